//! The agent's own signals: every disposition the default, SIGPIPE blocked. A child then starts from a clean state by
//! emptying its mask, without a system call per signal.

#![expect(
    unsafe_code,
    reason = "sigaction, kill, pidfd_send_signal, and wait4 for the resource usage of one child"
)]

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};

use nix::sys::signal::{SigSet, Signal};
use rustix::io::Errno;

/// `struct kernel_sigaction` of x86-64: handler, flags, restorer, mask.
const KERNEL_SIGACTION_WORDS: usize = 4;

/// Resets every disposition and blocks SIGPIPE (std ignores it, which execve would hand on).
pub(crate) fn set_up() {
    for signal in 1..=64 {
        let default = [0_u64; KERNEL_SIGACTION_WORDS];
        let none = std::ptr::null_mut::<u64>();
        // SAFETY: a zeroed kernel sigaction is SIG_DFL without flags; no handler is installed, so nothing can run in a
        // signal's context. SIGKILL and SIGSTOP report an error, which changes nothing. Not through libc, which keeps
        // signals 32 and 33 to itself: whoever started the agent may have had them ignored.
        unsafe {
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), none, 8);
        }
    }
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGPIPE);
    // Cannot fail for a valid set.
    let _ = mask.thread_set_mask();
}

/// Sends a signal to one process. It may be gone by now, which is what was wanted or makes no difference.
pub(crate) fn send(pid: u32, signal: i32) {
    // Never 0 or negative, which would mean a group or everybody.
    if let Ok(pid @ 1..) = i32::try_from(pid) {
        // SAFETY: takes integers only.
        unsafe { libc::kill(pid, signal) };
    }
}

/// Sends a signal to the process of a pidfd; real-time signals, too, which rustix does not name.
pub(crate) fn send_to_pidfd(pidfd: impl AsFd, signal: i32) -> Result<(), Errno> {
    let fd = pidfd.as_fd().as_raw_fd();
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: without a siginfo the kernel makes one as kill(2) does; the rest are integers.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, none, 0) };
    if result == 0 {
        return Ok(());
    }
    let errno = std::io::Error::last_os_error().raw_os_error();
    Err(Errno::from_raw_os_error(errno.unwrap_or(libc::EIO)))
}

/// How a process ended, and what it used.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ended {
    pub(crate) status: Status,
    pub(crate) user_us: u64,
    pub(crate) system_us: u64,
    pub(crate) max_rss_kib: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Code(u8),
    Signal { number: u8, core_dumped: bool },
}

/// Reaps the agent's child `pid`; `None` while it still runs. A pid cannot be reused before this has reaped it.
pub(crate) fn reap(pid: u32, block: bool) -> Option<Ended> {
    let mut status = 0;
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    let options = if block { 0 } else { libc::WNOHANG };
    loop {
        // SAFETY: both pointers are to memory of the right type. A zeroed rusage is a valid one.
        let (got, usage) = unsafe {
            let got = libc::wait4(pid as i32, &raw mut status, options, usage.as_mut_ptr());
            (got, usage.assume_init())
        };
        if got == 0 {
            return None;
        }
        if got < 0 {
            let interrupted =
                std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted;
            if interrupted {
                continue;
            }
            return None;
        }
        let micros = |t: libc::timeval| {
            (t.tv_sec as u64)
                .saturating_mul(1_000_000)
                .saturating_add(t.tv_usec as u64)
        };
        return Some(Ended {
            status: decode(status),
            user_us: micros(usage.ru_utime),
            system_us: micros(usage.ru_stime),
            max_rss_kib: usage.ru_maxrss as u64,
        });
    }
}

fn decode(status: i32) -> Status {
    if libc::WIFSIGNALED(status) {
        Status::Signal {
            number: libc::WTERMSIG(status) as u8,
            core_dumped: libc::WCOREDUMP(status),
        }
    } else {
        Status::Code(libc::WEXITSTATUS(status) as u8)
    }
}
