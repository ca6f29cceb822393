//! The guest side of airlock: PID 1 ([`init`]) and the agent that runs commands for the host ([`server`]).
//!
//! One thread and one epoll loop serve everything. An own loop rather than tokio: what is ready together has to leave
//! in one write (an exec is one frame in and one coalesced frame out), a process's pipe is read straight into the
//! buffer that goes to the socket, and nothing runs between two system calls that this crate does not name. Nothing
//! here may block but the spawn itself, use a second thread, or call libc's name service (NSS would load the guest's
//! own libraries into the agent).

pub mod init;
pub mod log;
pub mod server;

mod cgroup;
mod exec;
mod files;
mod out_queue;
mod process;
mod pty;
mod reactor;
mod table;
mod users;

use std::path::PathBuf;

/// Where the agent listens.
#[derive(Debug, Clone)]
pub enum Listen {
    /// vsock port [`airlock_proto::AGENT_PORT`], for the host only, and the doorbell after it.
    Vsock,
    /// A unix socket, for tests.
    Unix(PathBuf),
}

/// How the agent runs.
#[derive(Debug, Clone)]
pub struct Options {
    pub listen: Listen,
    /// A cgroup v2 folder that is the agent's to fill. Without one a process tree is found by walking /proc.
    pub cgroup: Option<PathBuf>,
    /// Whether this machine is the agent's: clock, entropy and power are served only then.
    pub machine: bool,
    /// How often the agent has been started again in this boot.
    pub restarts: u32,
}
