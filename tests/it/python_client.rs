//! The client of proto/README.md, as a user would run it: protoc, python3, a sandbox's socket.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use airlock_tests::{DEADLINE, Finished, Product, finish, signal, wait_until};

/// The example, ready to run against a sandbox.
struct Example {
    python: &'static str,
    product: Product,
    script: PathBuf,
    messages: PathBuf,
}

impl Example {
    /// None, having said why, where there is no Python on purpose: the lab.
    fn new() -> Option<Self> {
        if std::env::var("AIRLOCK_TEST_PYTHON").is_ok_and(|python| python == "no") {
            airlock_tests::skipped("no python3 in the lab; engine qemu runs this test");
            return None;
        }
        let product = Product::new();
        let proto = Path::new(env!("CARGO_MANIFEST_DIR")).join("../proto");
        // Beside the run folder, where every folder is a sandbox.
        let messages = product.run_root().with_extension("messages");
        std::fs::create_dir(&messages).unwrap();
        let mut protoc = Command::new("protoc");
        protoc
            .arg("-I")
            .arg(&proto)
            .arg("--python_out")
            .arg(&messages)
            .arg(proto.join("agent.proto"));
        let made = protoc.status();
        assert!(
            made.as_ref().is_ok_and(|status| status.success()),
            "protoc: {made:?}; install protobuf-compiler and python3-protobuf"
        );
        product
            .airlock(["up", "py", "--image", "busybox"])
            .expect_code(0);
        Some(Self {
            python: python_with_protobuf(),
            product,
            script: proto.join("examples/airlock_exec.py"),
            messages,
        })
    }

    fn socket(&self) -> PathBuf {
        self.product.run_root().join("py/vsock.sock")
    }

    fn command(&self, options: &[&str], command: &[&str]) -> Command {
        let mut python = Command::new(self.python);
        python
            .arg(&self.script)
            .args(options)
            .arg(self.socket())
            .args(command)
            .env("PYTHONPATH", &self.messages)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        python
    }

    fn run(&self, options: &[&str], command: &[&str]) -> Finished {
        finish(self.command(options, command), None)
    }

    fn end(&self) {
        self.product.airlock(["rm", "-f", "py"]).expect_code(0);
        self.product.expect_nothing_left();
    }
}

/// Debian's own python3 has the package; another that comes first in PATH need not.
fn python_with_protobuf() -> &'static str {
    let has_it = |python: &&str| {
        let mut import = Command::new(python);
        import.args(["-c", "import google.protobuf"]);
        import.stderr(Stdio::null());
        import.status().is_ok_and(|status| status.success())
    };
    ["python3", "/usr/bin/python3"]
        .into_iter()
        .find(has_it)
        .expect("no python3 with protobuf: install python3-protobuf")
}

impl Drop for Example {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.messages);
    }
}

#[test]
fn the_python_client_of_the_protocols_readme_runs_commands() {
    let Some(example) = Example::new() else {
        return;
    };
    let run = example
        .run(&[], &["sh", "-c", "echo to-out; echo to-err >&2; exit 7"])
        .expect_code(7);
    assert_eq!(
        (run.out(), run.err()),
        ("to-out\n".into(), "to-err\n".into())
    );
    let options = ["--env", "A=1 2", "--cwd", "/usr", "--user", "user"];
    let run = example
        .run(&options, &["sh", "-c", "echo \"$A\"; pwd; id -u"])
        .expect_code(0);
    assert_eq!(run.out(), "1 2\n/usr\n1000\n");
    let script = "dd if=/dev/zero bs=1M count=4 2>/dev/null; echo end";
    let run = example.run(&[], &["sh", "-c", script]).expect_code(0);
    assert_eq!(run.stdout.len(), (4 << 20) + 4);
    example
        .run(&[], &["sh", "-c", "kill -9 $$"])
        .expect_code(137);
    example.run(&[], &["no-such-command"]).expect_code(127);
    example.run(&[], &["/etc/passwd"]).expect_code(126);
    example
        .run(&["--timeout", "0.5"], &["sleep", "1000"])
        .expect_code(124);
    example.end();
}

#[test]
fn the_python_client_sends_input_within_its_credit() {
    let Some(example) = Example::new() else {
        return;
    };
    // Four windows, from a pipe and from a file, which a program waits for differently.
    let input: Vec<u8> = (0..1_u32 << 20)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let run = finish(example.command(&["-i"], &["cat"]), Some(input.clone())).expect_code(0);
    assert!(run.stdout == input, "{} bytes came back", run.stdout.len());
    let file = example.messages.join("input");
    std::fs::write(&file, &input).unwrap();
    let mut command = example.command(&["-i"], &["cat"]);
    command.stdin(std::fs::File::open(&file).unwrap());
    let run = finish(command, None).expect_code(0);
    assert!(run.stdout == input, "{} bytes came back", run.stdout.len());
    // A command that stops reading ends its input, not the client.
    let run = finish(example.command(&["-i"], &["head", "-c", "5"]), Some(input)).expect_code(0);
    assert_eq!(run.stdout.len(), 5);
    example.end();
}

#[test]
fn the_python_client_never_takes_a_lost_vm_for_success() {
    let Some(example) = Example::new() else {
        return;
    };
    let child = example
        .command(&[], &["sleep", "1000"])
        .spawn()
        .expect("python3 starts");
    wait_until("it runs", DEADLINE, || {
        let seen = example.run(&[], &["sh", "-c", "ps | grep '[s]leep 1000'"]);
        seen.code() == 0
    })
    .unwrap();
    signal(crate::faults::vmm_pid(&example.product), "KILL");
    let run = airlock_tests::wait(child).expect_code(125);
    assert!(run.err().contains("not known"), "{}", run.err());
    example.end();
}
