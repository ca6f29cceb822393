//! What the child does between clone and execve. It shares the agent's memory and the agent waits: every string was
//! made before, nothing is allocated, nothing may panic, and each step that fails says which it was.

#![expect(
    unsafe_code,
    reason = "raw system calls on memory prepared by the parent"
)]

use std::ffi::{CStr, c_char};

use airlock_proto::v1::SpawnStage;

use super::sys::call;

/// capget/capset: _LINUX_CAPABILITY_VERSION_3 (linux/capability.h).
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// One resource limit, as prlimit64 takes it.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Limit {
    pub(super) soft: u64,
    pub(super) hard: u64,
}

/// Ids to take on; absent when the agent itself has no privilege to change any.
#[derive(Debug)]
pub(super) struct Credentials<'a> {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) groups: &'a [u32],
}

/// Everything the child needs. Borrowed from the parent, which waits.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    pub(super) stdio: [i32; 3],
    pub(super) controlling_tty: bool,
    pub(super) oom_score_adj: Option<&'a [u8]>,
    pub(super) limits: &'a [(u32, Limit)],
    pub(super) nice: Option<i32>,
    pub(super) umask: u32,
    pub(super) drop_capabilities: u64,
    pub(super) credentials: Option<Credentials<'a>>,
    pub(super) no_new_privs: bool,
    /// Tried in turn.
    pub(super) cwd: &'a [&'a CStr],
    /// Paths to try execve on, in turn.
    pub(super) candidates: &'a [&'a CStr],
    /// Null-terminated.
    pub(super) argv: *const *const c_char,
    pub(super) envp: *const *const c_char,
    /// Where it failed and with which errno; set by the child.
    pub(super) failure: Option<(SpawnStage, i32)>,
}

/// The child's first and only function.
pub(super) extern "C" fn child_main(plan: *mut Plan<'_>) -> ! {
    // SAFETY: the parent passed its own exclusive borrow and does not run until this process execs or exits.
    let plan = unsafe { &mut *plan };
    let Err(failure) = run(plan);
    plan.failure = Some(failure);
    loop {
        // SAFETY: ends this process; takes no pointer.
        unsafe { call(libc::SYS_exit_group, [127, 0, 0, 0, 0]) };
    }
}

type Failure = (SpawnStage, i32);

fn run(plan: &Plan<'_>) -> Result<std::convert::Infallible, Failure> {
    session(plan)?;
    descriptors(plan)?;
    priorities(plan)?;
    identity(plan)?;
    enter_cwd(plan)?;
    // Last: until here a signal to the exec's group must not run a default action in half-made state.
    unblock_signals();
    execute(plan)
}

fn check(stage: SpawnStage, result: isize) -> Result<(), Failure> {
    if result < 0 {
        return Err((stage, -(result as i32)));
    }
    Ok(())
}

fn session(plan: &Plan<'_>) -> Result<(), Failure> {
    // SAFETY: no pointers.
    check(SpawnStage::SpawnResources, unsafe {
        call(libc::SYS_setsid, [0; 5])
    })?;
    if plan.controlling_tty {
        let tty = plan.stdio[0] as usize;
        // SAFETY: TIOCSCTTY takes an integer.
        check(SpawnStage::SpawnTty, unsafe {
            call(libc::SYS_ioctl, [tty, libc::TIOCSCTTY as usize, 0, 0, 0])
        })?;
    }
    Ok(())
}

fn descriptors(plan: &Plan<'_>) -> Result<(), Failure> {
    // The agent keeps 0 to 2 open at all times, so no source is among the targets and dup2 clears close-on-exec.
    for (target, source) in plan.stdio.iter().enumerate() {
        // SAFETY: no pointers; the descriptor table is this process's own (no CLONE_FILES).
        check(SpawnStage::SpawnResources, unsafe {
            call(libc::SYS_dup2, [*source as usize, target, 0, 0, 0])
        })?;
    }
    // SAFETY: as above. Everything of the agent's is close-on-exec already; this is the second lock on that door.
    let closed = unsafe { call(libc::SYS_close_range, [3, u32::MAX as usize, 0, 0, 0]) };
    check(SpawnStage::SpawnResources, closed)
}

fn priorities(plan: &Plan<'_>) -> Result<(), Failure> {
    if let Some(value) = plan.oom_score_adj {
        let path = c"/proc/self/oom_score_adj".as_ptr() as usize;
        // SAFETY: the path is a C string; the value's pointer and length go together. A failed open makes write and
        // close fail harmlessly on descriptor -errno.
        unsafe {
            let fd = call(
                libc::SYS_open,
                [path, (libc::O_WRONLY | libc::O_CLOEXEC) as usize, 0, 0, 0],
            );
            let write = [fd as usize, value.as_ptr() as usize, value.len(), 0, 0];
            let written = call(libc::SYS_write, write);
            call(libc::SYS_close, [fd as usize, 0, 0, 0, 0]);
            check(SpawnStage::SpawnCredentials, fd)?;
            check(SpawnStage::SpawnCredentials, written)?;
        }
    }
    for (resource, limit) in plan.limits {
        let new = std::ptr::from_ref(limit) as usize;
        // SAFETY: `new` points to a rlimit64; the old value is not asked for.
        check(SpawnStage::SpawnCredentials, unsafe {
            call(libc::SYS_prlimit64, [0, *resource as usize, new, 0, 0])
        })?;
    }
    if let Some(nice) = plan.nice {
        // SAFETY: no pointers.
        check(SpawnStage::SpawnCredentials, unsafe {
            call(
                libc::SYS_setpriority,
                [libc::PRIO_PROCESS as usize, 0, nice as usize, 0, 0],
            )
        })?;
    }
    // SAFETY: no pointers; umask cannot fail. The file system information is this process's own (no CLONE_FS).
    unsafe { call(libc::SYS_umask, [plan.umask as usize, 0, 0, 0, 0]) };
    Ok(())
}

fn identity(plan: &Plan<'_>) -> Result<(), Failure> {
    let stage = SpawnStage::SpawnCredentials;
    if plan.drop_capabilities != 0 {
        // From the bounding set first, while CAP_SETPCAP is still there.
        for number in 0..64_usize {
            if plan.drop_capabilities >> number & 1 == 1 {
                // SAFETY: no pointers.
                check(stage, unsafe {
                    call(
                        libc::SYS_prctl,
                        [libc::PR_CAPBSET_DROP as usize, number, 0, 0, 0],
                    )
                })?;
            }
        }
    }
    if let Some(ids) = &plan.credentials {
        let groups = [ids.groups.len(), ids.groups.as_ptr() as usize, 0, 0, 0];
        let (gid, uid) = (ids.gid as usize, ids.uid as usize);
        // SAFETY: the groups' count and pointer go together; the rest are integers. As raw calls these change this
        // process only, where libc's would tell "the other threads" of the agent.
        unsafe {
            check(stage, call(libc::SYS_setgroups, groups))?;
            check(stage, call(libc::SYS_setresgid, [gid, gid, gid, 0, 0]))?;
            check(stage, call(libc::SYS_setresuid, [uid, uid, uid, 0, 0]))?;
        }
    }
    if plan.drop_capabilities != 0 {
        drop_held_capabilities(plan.drop_capabilities)?;
    }
    if plan.no_new_privs {
        // SAFETY: no pointers.
        check(stage, unsafe {
            call(
                libc::SYS_prctl,
                [libc::PR_SET_NO_NEW_PRIVS as usize, 1, 0, 0, 0],
            )
        })?;
    }
    Ok(())
}

/// Takes `mask` out of the effective, permitted and inheritable sets.
fn drop_held_capabilities(mask: u64) -> Result<(), Failure> {
    let stage = SpawnStage::SpawnCredentials;
    let header = [CAPABILITY_VERSION_3, 0];
    // Two rows (capabilities 0 to 31, 32 to 63) of effective, permitted, inheritable.
    let mut sets = [[0_u32; 3]; 2];
    let header_at = header.as_ptr() as usize;
    // SAFETY: the header is a __user_cap_header_struct and the sets are two __user_cap_data_struct, as version 3 has.
    check(stage, unsafe {
        call(
            libc::SYS_capget,
            [header_at, sets.as_mut_ptr() as usize, 0, 0, 0],
        )
    })?;
    let halves = [mask as u32, (mask >> 32) as u32];
    for (row, half) in sets.iter_mut().zip(halves) {
        for set in row {
            *set &= !half;
        }
    }
    // SAFETY: as above.
    check(stage, unsafe {
        call(
            libc::SYS_capset,
            [header_at, sets.as_ptr() as usize, 0, 0, 0],
        )
    })
}

fn enter_cwd(plan: &Plan<'_>) -> Result<(), Failure> {
    // As the exec's user, so that a folder it may not enter is an error here rather than a surprise later.
    let mut result = 0;
    for path in plan.cwd {
        // SAFETY: a C string.
        result = unsafe { call(libc::SYS_chdir, [path.as_ptr() as usize, 0, 0, 0, 0]) };
        if result >= 0 {
            break;
        }
    }
    check(SpawnStage::SpawnCwd, result)
}

fn unblock_signals() {
    let none = 0_u64;
    let set = std::ptr::from_ref(&none) as usize;
    // SAFETY: a kernel sigset of 8 bytes. The agent has handlers for nothing and ignores nothing (see signals.rs), so
    // with the mask empty the dispositions are the defaults as well.
    unsafe {
        call(
            libc::SYS_rt_sigprocmask,
            [libc::SIG_SETMASK as usize, set, 0, 8, 0],
        )
    };
}

/// Tries the candidates as execvp does: goes on past names that are missing, remembers one that may not be executed.
fn execute(plan: &Plan<'_>) -> Result<std::convert::Infallible, Failure> {
    let mut failure = (SpawnStage::SpawnLookup, libc::ENOENT);
    for path in plan.candidates {
        let at = path.as_ptr() as usize;
        // SAFETY: the path is a C string; argv and envp are null-terminated arrays of such, all alive.
        let errno = -unsafe {
            call(
                libc::SYS_execve,
                [at, plan.argv as usize, plan.envp as usize, 0, 0],
            )
        } as i32;
        match errno {
            libc::ENOENT | libc::ENOTDIR => {
                // SAFETY: a C string. F_OK is 0.
                let exists = unsafe { call(libc::SYS_access, [at, 0, 0, 0, 0]) } == 0;
                if exists {
                    // The file is there: what is missing is its interpreter.
                    return Err((SpawnStage::SpawnExec, errno));
                }
            }
            libc::EACCES => failure = (SpawnStage::SpawnLookup, errno),
            _ => return Err((SpawnStage::SpawnExec, errno)),
        }
    }
    Err(failure)
}
