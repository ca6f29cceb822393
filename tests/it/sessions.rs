//! Commands that outlive their client: detach, attach from an offset, wait, kill, limits, recordings.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use airlock_tests::{Finished, Product, binary, finish, on_kvm, wait, wait_until};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(60);

/// A running sandbox `dev`; stopped with its product.
fn sandbox() -> Product {
    let product = Product::new();
    product
        .airlock(["up", "dev", "--image", "busybox"])
        .expect_code(0);
    product
}

fn exec(product: &Product, args: &[&str]) -> Finished {
    let line = ["exec"].iter().chain(args);
    product.airlock(line)
}

/// What a file below the product's run folder is called.
fn scratch(product: &Product, name: &str) -> PathBuf {
    product.run_root().join(name)
}

fn execs(product: &Product) -> Vec<Value> {
    let list = product
        .airlock(["ps", "--execs", "dev", "--json"])
        .expect_code(0);
    serde_json::from_slice(&list.stdout).expect("--json is JSON")
}

#[test]
fn a_detached_command_outlives_its_client_and_wait_tells_the_truth() {
    let product = sandbox();
    let started = exec(
        &product,
        &["-d", "dev", "--", "sh", "-c", "echo hi; sleep 1; exit 41"],
    );
    let started = started.expect_code(0);
    let id = started.out().trim_end().to_owned();
    assert_eq!(execs(&product)[0]["id"], id.as_str());
    assert_eq!(execs(&product)[0]["running"], true);
    let table = product
        .airlock(["ps", "--execs", "dev"])
        .expect_code(0)
        .out();
    assert!(table.contains(&id) && table.contains("running"), "{table}");
    product.airlock(["wait", "dev", &id]).expect_code(41);
    // And again, from whoever asks.
    product.airlock(["wait", "dev", &id]).expect_code(41);
    let attached = exec(&product, &["--attach", &id, "dev"]).expect_code(41);
    assert_eq!(attached.out(), "hi\n");
    let logs = product
        .airlock(["logs", "dev", "--exec", &id])
        .expect_code(0);
    assert_eq!(logs.out(), "hi\n");
    let table = product
        .airlock(["ps", "--execs", "dev"])
        .expect_code(0)
        .out();
    assert!(table.contains("exit 41"), "{table}");
    // Unknown ids are errors, everywhere.
    for args in [
        &["wait", "dev", "nobody"][..],
        &["kill", "dev", "nobody"],
        &["logs", "dev", "--exec", "nobody"],
        &["exec", "--attach", "nobody", "dev"],
    ] {
        product
            .airlock(args)
            .expect_failure(&["nobody", "ps --execs dev"]);
    }
}

#[test]
fn a_client_killed_during_output_comes_back_for_exactly_the_rest() {
    let product = sandbox();
    // Far more than any ring, as bytes whose places can be told apart.
    let script = "i=0; while [ $i -lt 40 ]; do seq $((i * 20000)) $((i * 20000 + 19999)); i=$((i + 1)); done";
    let expected: Vec<u8> = (0..800_000)
        .flat_map(|n| format!("{n}\n").into_bytes())
        .collect();
    exec(
        &product,
        &[
            "-d", "--keep", "--id", "numbers", "dev", "--", "sh", "-c", script,
        ],
    )
    .expect_code(0);
    let path = scratch(&product, "numbers.out");
    File::create(&path).expect("the run folder is writable");
    let length = || fs::metadata(&path).map_or(0, |meta| meta.len());
    let mut kills = 0;
    for turn in 1..=5 {
        let before = length();
        let file = File::options()
            .append(true)
            .open(&path)
            .expect("the file is there");
        let mut command = product.command([
            "exec",
            "--attach",
            "numbers",
            "--from",
            &before.to_string(),
            "dev",
        ]);
        let mut child = command.stdout(file).spawn().expect("airlock starts");
        wait_until("some output was written", SOON, || {
            length() > before + turn * 100_000
        })
        .expect("output comes");
        child.kill().expect("it runs");
        kills += u32::from(!child.wait().expect("it was started").success());
    }
    assert_eq!(kills, 5);
    let file = File::options()
        .append(true)
        .open(&path)
        .expect("the file is there");
    let mut command = product.command([
        "exec",
        "--attach",
        "numbers",
        "--from",
        &length().to_string(),
        "dev",
    ]);
    command.stdout(file);
    wait(command.spawn().expect("airlock starts")).expect_code(0);
    let got = fs::read(&path).expect("the file is there");
    assert!(got == expected, "{} bytes of {}", got.len(), expected.len());
}

#[test]
fn a_client_killed_behind_a_reader_that_stopped_has_only_taken_what_it_wrote() {
    const RING_BYTES: u64 = 1 << 20;
    let product = sandbox();
    let started = exec(
        &product,
        &[
            "-d", "--keep", "--id", "n", "dev", "--", "seq", "1", "400000",
        ],
    );
    started.expect_code(0);
    let produced = || {
        let found = execs(&product).into_iter().find(|exec| exec["id"] == "n");
        found.map_or(0, |exec| exec["stdout_bytes"].as_u64().unwrap_or(0))
    };
    wait_until("the ring is full", SOON, || produced() >= RING_BYTES).expect("it fills");
    assert_eq!(
        produced(),
        RING_BYTES,
        "nobody is there, so nothing is let go"
    );
    let mut command = product.command(["exec", "--attach", "n", "dev"]);
    let mut child = command.spawn().expect("airlock starts");
    // A reader that has had enough: what it took makes room in the ring, what is stuck does not.
    let mut got = vec![0; 300_000];
    let mut stdout = child.stdout.take().expect("stdout is piped");
    stdout.read_exact(&mut got).expect("output comes");
    let mut before = 0;
    let stuck = || {
        let last = std::mem::replace(&mut before, produced());
        before > RING_BYTES && before == last
    };
    wait_until("everything is full", SOON, stuck).expect("it fills");
    child.kill().expect("it runs");
    child.wait().expect("it was started");
    // What it wrote before it was killed is in the pipe.
    stdout.read_to_end(&mut got).expect("the pipe ends");
    let written = got.len() as u64;
    assert!(
        produced() <= written + RING_BYTES,
        "output was let go before it was written: {} of {}",
        produced(),
        written
    );
    let from = written.to_string();
    let rest = exec(&product, &["--attach", "n", "--from", &from, "dev"]).expect_code(0);
    got.extend(rest.stdout);
    let expected: Vec<u8> = (1..=400_000)
        .flat_map(|n| format!("{n}\n").into_bytes())
        .collect();
    assert!(got == expected, "{} bytes of {}", got.len(), expected.len());
}

#[test]
fn a_kept_command_survives_its_client_and_a_plain_one_does_not() {
    let product = sandbox();
    let script = "trap '' HUP; echo up; sleep 1000";
    for (id, more) in [("plain", &[][..]), ("kept", &["--keep"])] {
        let mut args = vec!["exec", "--id", id];
        args.extend_from_slice(more);
        args.extend_from_slice(&["dev", "--", "sh", "-c", script]);
        let mut child = product.command(args).spawn().expect("airlock starts");
        let running = |id: &str| {
            let found = execs(&product).into_iter().find(|exec| exec["id"] == id);
            found.is_some_and(|exec| exec["running"] == true && exec["stdout_bytes"] == 3)
        };
        wait_until("it runs", SOON, || running(id)).expect("it runs");
        child.kill().expect("it runs");
        child.wait().expect("it was started");
    }
    product.airlock(["wait", "dev", "plain"]).expect_code(137);
    let found = execs(&product)
        .into_iter()
        .find(|exec| exec["id"] == "kept");
    assert_eq!(found.expect("it is known")["running"], true);
    // The shell ends by the signal; what it started goes with the tree.
    product
        .airlock(["kill", "dev", "kept", "-s", "KILL", "--tree"])
        .expect_code(0);
    product.airlock(["wait", "dev", "kept"]).expect_code(137);
    let found = execs(&product)
        .into_iter()
        .find(|exec| exec["id"] == "kept");
    assert_eq!(found.expect("it is known")["exit"]["cause"], "killed");
}

#[test]
fn limits_hold_and_the_report_says_what_they_did() {
    let product = sandbox();
    let report = scratch(&product, "report.json");
    let args = [
        "--limit",
        "memory=24M",
        "--report",
        report.to_str().expect("a plain path"),
        "dev",
        "--",
        "dd",
        "if=/dev/zero",
        "of=/dev/null",
        "bs=96M",
        "count=1",
    ];
    exec(&product, &args).expect_code(137);
    let report: Value = serde_json::from_slice(&fs::read(&report).expect("it was written"))
        .expect("the report is JSON");
    assert_eq!(report["exit"]["cause"], "oom", "{report}");
    // Without the limit it has room.
    exec(
        &product,
        &[
            "dev",
            "--",
            "dd",
            "if=/dev/zero",
            "of=/dev/null",
            "bs=96M",
            "count=1",
        ],
    )
    .expect_code(0);
    let many = "for i in 1 2 3 4 5 6 7 8; do sleep 5 & done; wait";
    let forks = exec(
        &product,
        &["--limit", "pids=4", "dev", "--", "sh", "-c", many],
    );
    assert!(forks.err().contains("fork"), "{}", forks.err());
    let busy = "i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done";
    let cpu_share = |limit: &[&str]| {
        let path = scratch(&product, "cpu.json");
        let mut args = vec!["--report", path.to_str().expect("a plain path")];
        args.extend_from_slice(limit);
        args.extend_from_slice(&["dev", "--", "sh", "-c", busy]);
        exec(&product, &args).expect_code(0);
        let report: Value = serde_json::from_slice(&fs::read(&path).expect("it was written"))
            .expect("the report is JSON");
        let us = |name: &str| report["exit"][name].as_f64().expect("a number");
        (us("user_us") + us("system_us")) / us("wall_us")
    };
    let limited = cpu_share(&["--limit", "cpu=0.1"]);
    assert!(limited < 0.3, "it used {limited} of a CPU");
    let wrong = exec(&product, &["--limit", "cpu=0.001", "dev", "--", "true"]).expect_code(125);
    assert!(wrong.err().contains("cpu=0.001"), "{}", wrong.err());
}

#[test]
fn events_are_json_lines_that_add_up() {
    let product = sandbox();
    let run = exec(
        &product,
        &[
            "--json",
            "dev",
            "--",
            "sh",
            "-c",
            "printf 'a\\377'; echo oops >&2; exit 3",
        ],
    );
    let run = run.expect_code(3);
    let events: Vec<Value> = run
        .out()
        .lines()
        .map(|line| serde_json::from_str(line).expect("a line is JSON"))
        .collect();
    let named = |name: &str| -> Vec<&Value> {
        events
            .iter()
            .filter(|event| event["event"] == name)
            .collect()
    };
    assert_eq!(events[0]["event"], "started");
    let output = |stream: &str| -> String {
        let pieces = named("output")
            .into_iter()
            .filter(|e| e["stream"] == stream);
        pieces
            .map(|e| e["base64"].as_str().expect("base64 is text"))
            .collect()
    };
    assert_eq!(
        (output("stdout"), output("stderr")),
        ("Yf8=".into(), "b29wcwo=".into())
    );
    assert_eq!(named("exited")[0]["code"], 3);
    assert_eq!(named("exited")[0]["status"], 3);
    assert_eq!(named("stream_end").len(), 2);
    assert_eq!(named("tree_empty").len(), 1);
    assert_eq!(run.err(), "");
    let missing = exec(&product, &["--json", "dev", "--", "no-such-command"]).expect_code(127);
    let line: Value = serde_json::from_str(&missing.out()).expect("a line is JSON");
    assert_eq!(
        (&line["event"], &line["status"]),
        (&"not_started".into(), &127.into())
    );
}

#[test]
fn a_recording_is_asciicast_v2_with_or_without_a_terminal() {
    let product = sandbox();
    for (name, more) in [("plain.cast", &[][..]), ("tty.cast", &["-t"])] {
        let path = scratch(&product, name);
        let mut args = vec!["--record", path.to_str().expect("a plain path")];
        args.extend_from_slice(more);
        args.extend_from_slice(&["dev", "--", "sh", "-c", "echo één; sleep 0.3; echo two"]);
        exec(&product, &args).expect_code(0);
        let text = fs::read_to_string(&path).expect("a recording is UTF-8");
        let mut lines = text.lines();
        let header: Value = serde_json::from_str(lines.next().expect("a header")).expect("JSON");
        assert_eq!(header["version"], 2);
        assert!(header["width"].as_u64() > Some(0) && header["height"].as_u64() > Some(0));
        assert!(header["timestamp"].as_u64() > Some(1_600_000_000));
        let mut shown = String::new();
        let mut times = Vec::new();
        for line in lines {
            let event: (f64, String, String) = serde_json::from_str(line).expect("an event");
            times.push(event.0);
            match event.1.as_str() {
                "o" => shown.push_str(&event.2),
                kind => assert_eq!(kind, "r"),
            }
        }
        assert_eq!(shown, "één\r\ntwo\r\n", "{name}");
        assert!(times.is_sorted());
        assert!(times.last() >= Some(&0.2), "{times:?}");
    }
}

/// `airlock ARGS...` on a terminal of its own, with `input` typed. script(1) of util-linux gives it one.
fn on_a_terminal(product: &Product, args: &str, input: &str) -> Finished {
    let line = format!("{} {args}", binary("airlock").display());
    let mut command = product.command([""; 0]);
    let environment: Vec<_> = command
        .get_envs()
        .filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned())))
        .collect();
    command = std::process::Command::new("script");
    command
        .args(["-qec", &line, "/dev/null"])
        .envs(environment)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    finish(command, Some(input.as_bytes().to_vec()))
}

#[test]
fn a_shell_opens_on_our_terminal_and_one_left_running_is_found_again() {
    if on_kvm() && !Path::new("/usr/bin/script").exists() {
        airlock_tests::skipped("no script(1) in the lab; engine qemu runs this test");
        return;
    }
    let product = sandbox();
    let cast = scratch(&product, "shell.cast");
    let line = format!("shell --record {} dev", cast.display());
    let shell = on_a_terminal(&product, &line, "tty; echo $((6 * 7)); exit 6\n").expect_code(6);
    let shown = shell.out();
    assert!(
        shown.contains("/dev/pts/") && shown.contains("42"),
        "{shown}"
    );
    let cast = fs::read_to_string(&cast).expect("it was recorded");
    assert!(cast.contains("/dev/pts/"), "{cast}");
    // Detached with a terminal and an open stdin, for whoever comes.
    exec(&product, &["-d", "-it", "--id", "sh", "dev"]).expect_code(0);
    let first = on_a_terminal(&product, "exec -i --attach sh dev", "exit 9\n").expect_code(9);
    assert!(first.out().contains("exit 9"), "{}", first.out());
}

#[test]
fn a_shell_without_a_terminal_says_what_to_do() {
    sandbox()
        .airlock(["shell", "dev"])
        .expect_failure(&["terminal", "airlock exec -i dev sh"]);
}
