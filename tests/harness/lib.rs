//! The product as a test sees it: the real binaries, a run folder of the test's own, deadlines on everything, and a
//! check that nothing is left behind.
//!
//! Environment, set by scripts/test:
//! - `AIRLOCK_BIN_DIR`: where `airlock`, `airlock-vmm` and `airlock-agent` are; default: beside the test binary's folder.
//! - `AIRLOCK_TEST_ENGINE`: `kvm` or `qemu` (default).
//! - `AIRLOCK_CACHE`: kernels and images, as for the product.

pub mod oracle_plan;

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How long any one command of a test may take. Generous: an emulated machine under load is slow, and a test that
/// passes never waits for it.
pub const DEADLINE: Duration = Duration::from_secs(180);

/// The engine the tests run on.
#[must_use]
pub fn engine() -> String {
    std::env::var("AIRLOCK_TEST_ENGINE").unwrap_or_else(|_| "qemu".to_owned())
}

/// Whether the tests run on engine `kvm`.
#[must_use]
pub fn on_kvm() -> bool {
    engine() == "kvm"
}

fn bin_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("AIRLOCK_BIN_DIR") {
        return dir.into();
    }
    // target/<triple>/<profile>/deps/it-<hash>
    let mut dir = std::env::current_exe().expect("the test binary has a path");
    dir.pop();
    dir.pop();
    dir
}

/// The path of one of the product's binaries.
///
/// # Panics
/// If it was not built.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let path = bin_dir().join(name);
    assert!(
        path.exists(),
        "{} does not exist: build it, or use scripts/test",
        path.display()
    );
    path
}

/// The cache folder the product uses.
#[must_use]
pub fn cache() -> PathBuf {
    if let Some(dir) = std::env::var_os("AIRLOCK_CACHE") {
        return dir.into();
    }
    match std::env::var_os("XDG_CACHE_HOME") {
        Some(dir) => PathBuf::from(dir).join("airlock"),
        None => {
            PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache/airlock")
        }
    }
}

/// A finished command.
#[derive(Debug)]
pub struct Finished {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

impl Finished {
    /// Exit code; a signal that ended the command itself is a failure of the test.
    ///
    /// # Panics
    /// If a signal ended it.
    #[must_use]
    pub fn code(&self) -> i32 {
        self.status
            .code()
            .unwrap_or_else(|| panic!("ended by signal {:?}: {}", self.status.signal(), self.err()))
    }

    /// Standard output as text.
    #[must_use]
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    #[must_use]
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Says that it ended with `code`, and shows what it printed if not.
    ///
    /// # Panics
    /// If it did not.
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(
            self.code(),
            code,
            "\n--- stdout\n{}\n--- stderr\n{}",
            self.out(),
            self.err()
        );
        self
    }

    /// Says that it failed as airlock itself fails: status 125 and one line that mentions all of `words`.
    ///
    /// # Panics
    /// If it did not.
    pub fn expect_failure(self, words: &[&str]) -> Self {
        let this = self.expect_code(125);
        let text = this.err();
        let line = text
            .lines()
            .find(|line| line.starts_with("airlock: "))
            .unwrap_or_else(|| panic!("no line of airlock's own in: {text}"));
        for word in words {
            assert!(text.contains(word), "'{word}' is not in: {text}");
        }
        assert!(!line.contains("thread '"), "{text}");
        this
    }
}

/// The product with a run folder of its own. Dropping it stops whatever still runs in that folder.
#[derive(Debug)]
pub struct Product {
    run_root: PathBuf,
    extra_env: Vec<(String, String)>,
}

static SERIAL: AtomicU32 = AtomicU32::new(0);

impl Default for Product {
    fn default() -> Self {
        Self::new()
    }
}

impl Product {
    /// A run folder that nothing else uses.
    ///
    /// # Panics
    /// If it cannot be made.
    #[must_use]
    pub fn new() -> Self {
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        // Short: a unix socket's path has at most 107 bytes.
        let run_root = std::env::temp_dir().join(format!("alt-{}-{serial}", std::process::id()));
        fs::create_dir_all(&run_root).expect("the temp folder is writable");
        Self {
            run_root,
            extra_env: Vec::new(),
        }
    }

    /// Sets an environment variable for every command of this product.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.extra_env.push((name.to_owned(), value.into()));
        self
    }

    /// Where the sandboxes of this product are.
    #[must_use]
    pub fn run_root(&self) -> &Path {
        &self.run_root
    }

    /// `airlock ARGS...`, not started.
    pub fn command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(binary("airlock"));
        command
            .args(args)
            .env("AIRLOCK_RUN", &self.run_root)
            .env("AIRLOCK_ENGINE", engine())
            .envs(self.extra_env.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// `airlock ARGS...`, to its end.
    pub fn airlock<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Finished {
        finish(self.command(args), None)
    }

    /// `airlock run --image busybox -- CMD...`
    pub fn busybox(&self, command: &[&str]) -> Finished {
        let mut args = vec!["run", "--image", "busybox", "--"];
        args.extend_from_slice(command);
        self.airlock(args)
    }

    /// `airlock ARGS...` with `input` on its standard input.
    pub fn airlock_with_input(&self, args: &[&str], input: Vec<u8>) -> Finished {
        finish(self.command(args), Some(input))
    }

    /// Processes whose command line or environment names this product's run folder: (pid, command line).
    #[must_use]
    pub fn processes(&self) -> Vec<(u32, String)> {
        let needle = self.run_root.to_string_lossy().into_owned();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").expect("/proc is mounted").flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|n| n.parse::<u32>().ok())
            else {
                continue;
            };
            if pid == std::process::id() {
                continue;
            }
            let cmdline = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let environ = fs::read(entry.path().join("environ")).unwrap_or_default();
            let cmdline = String::from_utf8_lossy(&cmdline).replace('\0', " ");
            if cmdline.contains(&needle) || String::from_utf8_lossy(&environ).contains(&needle) {
                found.push((pid, cmdline));
            }
        }
        found
    }

    /// Files below the run folder.
    #[must_use]
    pub fn files(&self) -> Vec<PathBuf> {
        fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                let path = entry.path();
                // The engine choice and locks live at the top and stay; a sandbox is a folder.
                if path.is_dir() && !path.is_symlink() {
                    found.push(path.clone());
                    walk(&path, found);
                } else {
                    found.push(path);
                }
            }
        }
        let mut found = Vec::new();
        walk(&self.run_root, &mut found);
        found
    }

    /// Folders below the run folder: the sandboxes that exist.
    #[must_use]
    pub fn sandboxes(&self) -> Vec<PathBuf> {
        self.files()
            .into_iter()
            .filter(|path| path.is_dir())
            .collect()
    }

    /// Waits until no process of this product and no sandbox folder is left.
    ///
    /// # Panics
    /// If something is still there after the deadline.
    pub fn expect_nothing_left(&self) {
        wait_until(
            "no process and no sandbox is left",
            Duration::from_secs(20),
            || self.processes().is_empty() && self.sandboxes().is_empty(),
        )
        .unwrap_or_else(|_| {
            panic!(
                "left behind: processes {:?}, files {:?}",
                self.processes(),
                self.files()
            )
        });
    }
}

impl Drop for Product {
    fn drop(&mut self) {
        for (pid, _) in self.processes() {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
        let _ = fs::remove_dir_all(&self.run_root);
    }
}

/// Runs `command` to its end with `input` on its standard input.
///
/// # Panics
/// If it does not end before [`DEADLINE`]; it is killed then.
pub fn finish(mut command: Command, input: Option<Vec<u8>>) -> Finished {
    if input.is_some() {
        command.stdin(Stdio::piped());
    }
    let mut child = command.spawn().expect("the binary starts");
    let writer = input.map(|input| {
        let mut stdin = child.stdin.take().expect("stdin is piped");
        // A command that does not read all of its input is no failure of this test by itself.
        thread::spawn(move || drop(stdin.write_all(&input)))
    });
    let finished = wait(child);
    if let Some(writer) = writer {
        writer.join().expect("the writer does not panic");
    }
    finished
}

/// Waits for a started command and collects what it printed.
///
/// # Panics
/// If it does not end before [`DEADLINE`]; it is killed then.
pub fn wait(mut child: Child) -> Finished {
    fn collect(stream: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut stream) = stream {
                let _ = stream.read_to_end(&mut bytes);
            }
            bytes
        })
    }
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let start = Instant::now();
    let mut late = false;
    let status = loop {
        if let Some(status) = child.try_wait().expect("waiting for a child works") {
            break status;
        }
        if start.elapsed() > DEADLINE && !late {
            late = true;
            let _ = child.kill();
        }
        thread::sleep(Duration::from_millis(5));
    };
    let finished = Finished {
        status,
        stdout: stdout.join().expect("the reader does not panic"),
        stderr: stderr.join().expect("the reader does not panic"),
    };
    assert!(
        !late,
        "no end after {DEADLINE:?}\n--- stdout\n{}\n--- stderr\n{}",
        finished.out(),
        finished.err()
    );
    finished
}

/// Waits for a fact.
///
/// # Errors
/// With `what`, if it is not so before `deadline`.
pub fn wait_until(
    what: &str,
    deadline: Duration,
    mut fact: impl FnMut() -> bool,
) -> Result<(), String> {
    let start = Instant::now();
    while start.elapsed() < deadline {
        if fact() {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(20));
    }
    Err(format!("not so after {deadline:?}: {what}"))
}

/// Says aloud that a test was not run here, and why. Written past the test runner, which keeps to itself what a test
/// that passes prints; scripts/test counts these lines.
pub fn skipped(why: &str) {
    let test = thread::current();
    let name = test.name().unwrap_or("a test").to_owned();
    // Nobody is left to tell if this fails.
    let _ = writeln!(std::io::stderr(), "skipped: {name}: {why}");
}

/// Sends `signal` (a name as kill(1) takes it) to `pid`.
///
/// # Panics
/// If kill(1) cannot be run.
pub fn signal(pid: u32, signal: &str) {
    let status = Command::new("kill")
        .args([&format!("-{signal}"), &pid.to_string()])
        .status()
        .expect("kill(1) runs");
    assert!(status.success(), "kill -{signal} {pid} failed");
}
