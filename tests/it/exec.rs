//! What a command run in a sandbox sees, and what its caller gets back.

use airlock_tests::Product;

#[test]
fn both_streams_arrive_apart_and_the_exit_status_is_the_commands() {
    let product = Product::new();
    let run = product
        .busybox(&["sh", "-c", "echo to-out; echo to-err >&2; exit 7"])
        .expect_code(7);
    assert_eq!(run.out(), "to-out\n");
    assert!(
        run.err().lines().any(|line| line == "to-err"),
        "{}",
        run.err()
    );
    product.expect_nothing_left();
}

#[test]
fn a_signal_is_128_plus_its_number() {
    Product::new()
        .busybox(&["sh", "-c", "kill -TERM $$"])
        .expect_code(143);
}

#[test]
fn a_command_that_does_not_exist_is_127_and_one_that_cannot_run_126() {
    let product = Product::new();
    let run = product.busybox(&["no-such-command"]).expect_code(127);
    assert!(run.err().contains("no-such-command"), "{}", run.err());
    let run = product.busybox(&["/etc/passwd"]).expect_code(126);
    assert!(run.err().contains("/etc/passwd"), "{}", run.err());
    let run = product.airlock(["run", "--image", "busybox", "-w", "/nowhere", "--", "true"]);
    assert_ne!(run.code(), 0);
    assert!(run.err().contains("/nowhere"), "{}", run.err());
    let run = product.airlock([
        "run",
        "--image",
        "busybox",
        "-u",
        "nosuchuser",
        "--",
        "true",
    ]);
    assert_ne!(run.code(), 0);
    assert!(run.err().contains("nosuchuser"), "{}", run.err());
    product.expect_nothing_left();
}

#[test]
fn environment_folder_and_user_are_those_asked_for() {
    let run = Product::new()
        .airlock([
            "run", "--image", "busybox", "-e", "GREETING=hello  world", "-w", "/usr", "-u", "user", "--", "sh", "-c",
            "echo \"$GREETING\"; pwd; id -u; id -g; echo $HOME; cat /proc/self/status | grep -c '^Uid:.1000.1000.1000.1000'",
        ])
        .expect_code(0);
    assert_eq!(run.out(), "hello  world\n/usr\n1000\n1000\n/home/user\n1\n");
}

#[test]
fn arguments_are_never_read_by_a_shell() {
    let run = Product::new()
        .busybox(&["printf", "%s|", "a b", "$HOME", "", "`id`", "ä"])
        .expect_code(0);
    assert_eq!(run.out(), "a b|$HOME||`id`|ä|");
}

#[test]
fn a_time_out_is_124_and_takes_the_whole_tree() {
    let product = Product::new();
    let run = product
        .airlock([
            "run",
            "--image",
            "busybox",
            "--timeout",
            "1s",
            "--",
            "sh",
            "-c",
            "sleep 1000 & sleep 1000; echo never",
        ])
        .expect_code(124);
    assert_eq!(run.out(), "");
    product.expect_nothing_left();
}

#[test]
fn input_reaches_the_command_with_its_end() {
    let product = Product::new();
    let input: Vec<u8> = (0..8_u32 << 20)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let run = product
        .airlock_with_input(
            &["run", "--image", "busybox", "-i", "--", "cat"],
            input.clone(),
        )
        .expect_code(0);
    assert!(
        run.stdout == input,
        "8 MiB came back as {} other bytes",
        run.stdout.len()
    );
    let run = product
        .airlock_with_input(
            &["run", "--image", "busybox", "-i", "--", "wc", "-c"],
            Vec::new(),
        )
        .expect_code(0);
    assert_eq!(run.out().trim(), "0");
}

#[test]
fn without_i_a_command_reads_nothing_at_once() {
    let run = Product::new().airlock_with_input(
        &["run", "--image", "busybox", "--", "wc", "-c"],
        b"unseen".to_vec(),
    );
    assert_eq!(run.expect_code(0).out().trim(), "0");
}

#[test]
fn a_large_output_is_whole() {
    let run = Product::new()
        .busybox(&[
            "sh",
            "-c",
            "dd if=/dev/zero bs=1M count=32 2>/dev/null | tr '\\0' 'x'; echo end",
        ])
        .expect_code(0);
    assert_eq!(run.stdout.len(), (32 << 20) + 4);
    assert!(run.stdout.ends_with(b"xend\n"));
}

#[test]
fn a_thousand_short_commands_lose_nothing() {
    let product = Product::new();
    product
        .airlock(["up", "many", "--image", "busybox"])
        .expect_code(0);
    // The sandbox's own loop is no test of ours: each of these is an exec of its own.
    let count = if airlock_tests::on_kvm() { 300 } else { 1000 };
    for i in 0..count {
        let text = format!("line {i}");
        let run = product.airlock([
            "exec",
            "many",
            "--",
            "sh",
            "-c",
            &format!("echo {text}; exit {}", i % 100),
        ]);
        let run = run.expect_code(i % 100);
        assert_eq!(run.out(), format!("{text}\n"), "exec {i}");
    }
    product.airlock(["rm", "-f", "many"]).expect_code(0);
    product.expect_nothing_left();
}

#[test]
fn a_background_child_that_keeps_the_output_open_does_not_hang_the_exit() {
    let product = Product::new();
    let run = product
        .busybox(&["sh", "-c", "sleep 1000 & echo started; exit 3"])
        .expect_code(3);
    assert_eq!(run.out(), "started\n");
    product.expect_nothing_left();
}

#[test]
fn a_terminal_is_a_terminal() {
    // script(1) of util-linux gives airlock a terminal of its own; it is part of every Debian.
    let product = Product::new();
    let inner = format!(
        "stty rows 33 cols 101; {} run --image busybox -it -- sh -c 'tty; stty size; echo done'; echo status=$?",
        airlock_tests::binary("airlock").display()
    );
    let mut command = std::process::Command::new("script");
    command
        .args(["-qefc", &inner, "/dev/null"])
        .env("AIRLOCK_RUN", product.run_root())
        .env("AIRLOCK_ENGINE", airlock_tests::engine())
        .env("SHELL", "/bin/sh")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    if airlock_tests::on_kvm() && !std::path::Path::new("/usr/bin/script").exists() {
        airlock_tests::skipped("no script(1) in the lab; engine qemu runs this test");
        return;
    }
    // Its input stays open for as long as it runs: an end of input is another test.
    let child = command.spawn().expect("script(1) starts");
    let run = airlock_tests::wait(child);
    let text = run.out();
    for expected in ["/dev/pts/0", "33 101", "done", "status=0"] {
        assert!(text.contains(expected), "'{expected}' is not in: {text}");
    }
}
