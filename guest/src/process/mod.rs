//! Starting processes: what to run ([`Command`]), the vfork-class spawn ([`Spawner`]), reaping, and finding and
//! signalling a whole tree. Nothing here knows connections or the RPC beyond the names of spawn stages.

mod child;
mod clone;
mod command;
pub(crate) mod signals;
mod sys;
pub(crate) mod tree;

use std::ffi::{CStr, CString, c_char};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use airlock_proto::v1::SpawnStage;
use rustix::io::Errno;

pub(crate) use command::{Command, prepare};

/// Why a process could not be started, for the client to see.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct SpawnError {
    pub(crate) stage: SpawnStage,
    pub(crate) errno: i32,
    pub(crate) message: String,
}

impl SpawnError {
    pub(crate) fn new(stage: SpawnStage, errno: i32, message: impl Into<String>) -> Self {
        Self {
            stage,
            errno,
            message: message.into(),
        }
    }

    /// The guest ran out of something while `what` was being made.
    pub(crate) fn resources(what: &str, errno: Errno) -> Self {
        let message = format!("cannot make {what}: {errno}");
        Self::new(SpawnStage::SpawnResources, errno.raw_os_error(), message)
    }
}

/// A started process. The agent is its parent and must reap it.
#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) pid: u32,
    pub(crate) pidfd: OwnedFd,
}

/// The three descriptors a process starts with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stdio<'a> {
    pub(crate) fds: [BorrowedFd<'a>; 3],
    /// Descriptor 0 becomes the controlling terminal.
    pub(crate) controlling_tty: bool,
}

/// Starts processes, one at a time, on a stack it keeps.
#[derive(Debug)]
pub(crate) struct Spawner {
    stack: clone::Stack,
    /// Whether the agent may change ids.
    privileged: bool,
    own_ids: (u32, u32),
    own_oom_score_adj: i32,
}

impl Spawner {
    pub(crate) fn new() -> Result<Self, Errno> {
        let own_ids = (
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        );
        Ok(Self {
            stack: clone::Stack::new()?,
            privileged: own_ids.0 == 0,
            own_ids,
            own_oom_score_adj: own_oom_score_adj(),
        })
    }

    /// Starts `command`; returns when it has become the new program or has failed to.
    pub(crate) fn spawn(
        &mut self,
        command: &Command,
        stdio: Stdio<'_>,
        cgroup: Option<BorrowedFd<'_>>,
    ) -> Result<Child, SpawnError> {
        let argv = pointers(&command.argv);
        let envp = pointers(&command.env);
        let cwd: Vec<&CStr> = command.cwd.iter().map(CString::as_c_str).collect();
        let candidates: Vec<&CStr> = command.candidates.iter().map(CString::as_c_str).collect();
        let identity = &command.identity;
        let oom_score_adj = command.oom_score_adj.to_string();
        let other_oom_score_adj = command.oom_score_adj != self.own_oom_score_adj;
        // Without privilege an exec can only run as the agent's own user, and then nothing needs to be changed.
        let change_ids = self.privileged || (identity.uid, identity.gid) != self.own_ids;
        let mut plan = child::Plan {
            stdio: stdio.fds.map(|fd| fd.as_raw_fd()),
            controlling_tty: stdio.controlling_tty,
            oom_score_adj: other_oom_score_adj.then_some(oom_score_adj.as_bytes()),
            limits: &command.limits,
            nice: command.nice,
            umask: command.umask,
            drop_capabilities: command.drop_capabilities,
            credentials: change_ids.then_some(child::Credentials {
                uid: identity.uid,
                gid: identity.gid,
                groups: &identity.groups,
            }),
            no_new_privs: command.no_new_privs,
            cwd: &cwd,
            candidates: &candidates,
            argv: argv.as_ptr(),
            envp: envp.as_ptr(),
            failure: None,
        };
        let (pid, pidfd) = clone::clone_vfork(&mut self.stack, &mut plan, cgroup)
            .map_err(|errno| SpawnError::resources("a process", errno))?;
        match plan.failure {
            None => Ok(Child { pid, pidfd }),
            Some((stage, errno)) => {
                signals::reap(pid, true);
                Err(command.explain(stage, errno))
            }
        }
    }
}

fn own_oom_score_adj() -> i32 {
    let text = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings
        .iter()
        .map(|s| s.as_ptr())
        .chain([std::ptr::null()])
        .collect()
}

/// A program that does nothing, kept in memory: what [`airlock_proto::v1::SpawnProbe`] spawns, so that the floor it
/// measures does not depend on the image.
#[derive(Debug)]
pub(crate) struct NoOp {
    _program: OwnedFd,
    pub(crate) command: Command,
}

impl NoOp {
    pub(crate) fn new() -> Result<Self, Errno> {
        let program = rustix::fs::memfd_create("true", rustix::fs::MemfdFlags::CLOEXEC)?;
        rustix::io::write(&program, &NO_OP_ELF)?;
        // Through the agent's own folder in /proc, because the child has closed its copy by then.
        let path = format!("/proc/{}/fd/{}", std::process::id(), program.as_raw_fd());
        Ok(Self {
            command: Command::bare(path.as_bytes()),
            _program: program,
        })
    }
}

/// The smallest ELF64 program that exits with 0: header, one PT_LOAD over the whole file, and
/// `xor edi,edi; mov eax,60; syscall`.
const NO_OP_ELF: [u8; 129] = {
    let head: [u8; 120] = [
        0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, // e_ident
        2, 0, 62, 0, 1, 0, 0, 0, // ET_EXEC, EM_X86_64, EV_CURRENT
        0x78, 0, 0x40, 0, 0, 0, 0, 0, // e_entry
        64, 0, 0, 0, 0, 0, 0, 0, // e_phoff
        0, 0, 0, 0, 0, 0, 0, 0, // e_shoff
        0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0, // sizes and counts
        1, 0, 0, 0, 5, 0, 0, 0, // PT_LOAD, read and execute
        0, 0, 0, 0, 0, 0, 0, 0, // p_offset
        0, 0, 0x40, 0, 0, 0, 0, 0, // p_vaddr
        0, 0, 0x40, 0, 0, 0, 0, 0, // p_paddr
        129, 0, 0, 0, 0, 0, 0, 0, // p_filesz
        129, 0, 0, 0, 0, 0, 0, 0, // p_memsz
        0, 0x10, 0, 0, 0, 0, 0, 0, // p_align
    ];
    let code: [u8; 9] = [0x31, 0xff, 0xb8, 60, 0, 0, 0, 0x0f, 0x05];
    let mut file = [0; 129];
    let mut at = 0;
    while at < 129 {
        file[at] = if at < 120 { head[at] } else { code[at - 120] };
        at += 1;
    }
    file
};
