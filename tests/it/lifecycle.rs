//! Sandboxes that stay: up, exec, ps, logs, stop, rm.

use airlock_tests::Product;

fn ps(product: &Product) -> serde_json::Value {
    let run = product.airlock(["ps", "--json"]).expect_code(0);
    serde_json::from_str(&run.out())
        .unwrap_or_else(|e| panic!("ps --json is not JSON ({e}): {}", run.out()))
}

#[test]
fn a_sandbox_keeps_its_files_between_commands_and_goes_when_removed() {
    let product = Product::new();
    product
        .airlock(["up", "dev", "--image", "busybox"])
        .expect_code(0);
    product
        .airlock(["exec", "dev", "--", "sh", "-c", "echo kept > /root/file"])
        .expect_code(0);
    let run = product
        .airlock(["exec", "dev", "--", "cat", "/root/file"])
        .expect_code(0);
    assert_eq!(run.out(), "kept\n");

    let list = ps(&product);
    let sandbox = &list.as_array().expect("a list")[0];
    assert_eq!(sandbox["name"], "dev");
    assert_eq!(sandbox["state"], "running");
    assert_eq!(sandbox["engine"], airlock_tests::engine());
    assert_eq!(sandbox["image"], "busybox");

    product.airlock(["logs", "dev"]).expect_code(0);
    product.airlock(["stop", "dev"]).expect_code(0);
    assert_eq!(ps(&product)[0]["state"], "stopped");
    product
        .airlock(["exec", "dev", "--", "true"])
        .expect_failure(&["dev", "stopped"]);
    product.airlock(["rm", "dev"]).expect_code(0);
    assert_eq!(ps(&product).as_array().map(Vec::len), Some(0));
    product.expect_nothing_left();
}

#[test]
fn commands_run_side_by_side_and_none_waits_for_another() {
    let product = Product::new();
    product
        .airlock(["up", "par", "--image", "busybox"])
        .expect_code(0);
    let slow = product.command([
        "exec",
        "par",
        "--",
        "sh",
        "-c",
        "cat /tmp/go 2>/dev/null; while [ ! -e /tmp/go ]; do sleep 0.05; done; echo slow",
    ]);
    let mut slow = { slow }.spawn().expect("airlock starts");
    let run = product
        .airlock(["exec", "par", "--", "echo", "quick"])
        .expect_code(0);
    assert_eq!(run.out(), "quick\n");
    assert!(
        slow.try_wait().expect("waiting works").is_none(),
        "the slow command is still running"
    );
    product
        .airlock(["exec", "par", "--", "touch", "/tmp/go"])
        .expect_code(0);
    let run = airlock_tests::wait(slow).expect_code(0);
    assert_eq!(run.out(), "slow\n");
    product.airlock(["rm", "-f", "par"]).expect_code(0);
    product.expect_nothing_left();
}

#[test]
fn a_running_sandbox_is_not_removed_by_mistake() {
    let product = Product::new();
    product
        .airlock(["up", "busy", "--image", "busybox"])
        .expect_code(0);
    product
        .airlock(["rm", "busy"])
        .expect_failure(&["busy", "running"]);
    product
        .airlock(["exec", "busy", "--", "true"])
        .expect_code(0);
    product.airlock(["rm", "-f", "busy"]).expect_code(0);
    product.expect_nothing_left();
}

#[test]
fn names_are_checked_and_taken_once() {
    let product = Product::new();
    product
        .airlock(["up", "../evil", "--image", "busybox"])
        .expect_failure(&["../evil"]);
    product
        .airlock(["up", "one", "--image", "busybox"])
        .expect_code(0);
    product
        .airlock(["up", "one", "--image", "busybox"])
        .expect_failure(&["one", "in use"]);
    product
        .airlock(["exec", "two", "--", "true"])
        .expect_failure(&["two"]);
    product.airlock(["stop", "two"]).expect_failure(&["two"]);
    product.airlock(["rm", "-f", "one"]).expect_code(0);
    product.expect_nothing_left();
}

#[test]
fn several_cpus_and_the_memory_asked_for_are_there() {
    let run = Product::new()
        .airlock([
            "run",
            "--image",
            "busybox",
            "--cpus",
            "2",
            "--memory",
            "384M",
            "--",
            "sh",
            "-c",
            "nproc; awk '/MemTotal/ { print ($2 > 330000 && $2 <= 393216) }' /proc/meminfo",
        ])
        .expect_code(0);
    assert_eq!(run.out(), "2\n1\n");
}

#[test]
fn completions_and_the_man_page_come_from_the_program() {
    let product = Product::new();
    for shell in ["bash", "zsh", "fish"] {
        let run = product.airlock(["completions", shell]).expect_code(0);
        assert!(run.out().contains("airlock"), "{shell}");
    }
    assert!(
        product
            .airlock(["man"])
            .expect_code(0)
            .out()
            .contains(".TH")
    );
    assert!(
        product
            .airlock(["--version"])
            .expect_code(0)
            .out()
            .contains("airlock")
    );
}
