//! PID 1: makes the machine ready, forks the agent while there is one thread, then only reaps and powers off. A step
//! that fails is one line in the kernel's log and a reset; a guest never hangs half made.

mod agent;
mod cmdline;
mod modules;
mod mounts;
mod network;
pub mod power;
mod root;

use std::fmt;
use std::os::unix::fs::symlink;
use std::path::Path;

use rustix::io::Errno;

use crate::{Listen, Options, log};

/// The folder of the hierarchy that is the agent's.
const CGROUP: &str = "/sys/fs/cgroup/airlock";

/// A step of the boot that failed.
#[derive(Debug)]
struct BootError {
    step: &'static str,
    what: String,
    why: String,
}

impl BootError {
    fn new(step: &'static str, what: impl Into<String>, why: impl fmt::Display) -> Self {
        Self {
            step,
            what: what.into(),
            why: why.to_string(),
        }
    }
}

impl fmt::Display for BootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "boot failed at {}: {}: {}",
            self.step, self.what, self.why
        )
    }
}

/// Runs as PID 1.
pub fn run() -> ! {
    if let Err(error) = boot() {
        log::error(format_args!("{error}"));
        power::reset();
    }
    agent::supervise(&Options {
        listen: Listen::Vsock,
        cgroup: Some(CGROUP.into()),
        machine: true,
        restarts: 0,
    })
}

/// The whole way from the kernel's hand-over to a machine that the agent can serve.
fn boot() -> Result<(), BootError> {
    mounts::early()?;
    let cmdline = cmdline::read()?;
    modules::load()?;
    if let Some(base) = &cmdline.root {
        root::assemble(base, &cmdline.scratch)?;
        root::switch()?;
    }
    mounts::late()?;
    device_links();
    if let Some(hostname) = &cmdline.hostname {
        rustix::system::sethostname(hostname.as_bytes())
            .map_err(|e| BootError::new("hostname", hostname, e))?;
    }
    network::loopback_up();
    workload_cgroup();
    Ok(())
}

/// The names that programs expect beside what devtmpfs makes.
fn device_links() {
    for (name, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        // One that is there already is as good.
        let _ = symlink(target, name);
    }
}

/// Hands the controllers to the agent's folder and keeps something back from the workload, so that the agent answers
/// when the guest has no memory and no pids left.
fn workload_cgroup() {
    /// What the agent and PID 1 need at most: their own memory, and the kernel's for their sockets.
    const RESERVED_BYTES: u64 = 16 << 20;
    /// Processes and threads that the workload leaves to the rest of the system.
    const RESERVED_PIDS: u64 = 64;
    let root = Path::new("/sys/fs/cgroup");
    let set = |folder: &Path, file: &str, value: String| {
        // A kernel without the controller has no such file; the agent then lives with what the kernel gives all.
        let result = crate::cgroup::set(folder, file, &value);
        if let Err(errno) = result
            && errno != Errno::NOENT
        {
            log::info(format_args!("cgroup {file}: {errno}"));
        }
    };
    crate::cgroup::enable_controllers(root);
    let airlock = Path::new(CGROUP);
    let (agent, exec) = (airlock.join("agent"), airlock.join("exec"));
    let _ = std::fs::create_dir(airlock);
    crate::cgroup::enable_controllers(airlock);
    let _ = std::fs::create_dir(&agent);
    let _ = std::fs::create_dir(&exec);
    set(airlock, "memory.min", RESERVED_BYTES.to_string());
    set(&agent, "memory.min", RESERVED_BYTES.to_string());
    let threads = std::fs::read_to_string("/proc/sys/kernel/threads-max").unwrap_or_default();
    if let Ok(threads) = threads.trim().parse::<u64>() {
        let most = threads.saturating_sub(RESERVED_PIDS).max(RESERVED_PIDS);
        set(&exec, "pids.max", most.to_string());
    }
}
