//! clone3 in the manner of vfork: the child borrows the agent's memory and runs on a stack of its own while the agent
//! waits, so starting a process costs the same however large the agent is.

#![expect(
    unsafe_code,
    reason = "clone3 returns twice, which only assembly can express"
)]

use std::arch::asm;
use std::ffi::c_void;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};

use super::child::{Plan, child_main};

/// Room for the child's frames between clone and execve, which hold a few hundred bytes each; debug builds more.
const STACK_BYTES: usize = 64 << 10;
const GUARD_BYTES: usize = 4096;

/// `struct clone_args` of linux/sched.h, as of Linux 5.7 (88 bytes).
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// linux/sched.h; libc's constant does not fit its own c_int.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// The child's stack. One is enough: the agent waits until the child has left it.
#[derive(Debug)]
pub(super) struct Stack {
    base: *mut c_void,
}

impl Stack {
    pub(super) fn new() -> Result<Self, Errno> {
        // SAFETY: a new private mapping at an address of the kernel's choice touches nothing that exists; the guard
        // page is inside it.
        unsafe {
            let base = rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                GUARD_BYTES + STACK_BYTES,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::STACK,
            )?;
            rustix::mm::mprotect(base, GUARD_BYTES, MprotectFlags::empty())?;
            Ok(Self { base })
        }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, of this length, and no child is on it: spawning borrows the stack mutably until
        // the child has left.
        let _ = unsafe { rustix::mm::munmap(self.base, GUARD_BYTES + STACK_BYTES) };
    }
}

/// Starts a child that runs `plan`; returns when it has called execve or ended. `plan.failure` then tells which.
pub(super) fn clone_vfork(
    stack: &mut Stack,
    plan: &mut Plan<'_>,
    cgroup: Option<BorrowedFd<'_>>,
) -> Result<(u32, OwnedFd), Errno> {
    let mut pidfd: i32 = -1;
    let mut flags = (libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD) as u64;
    if cgroup.is_some() {
        flags |= CLONE_INTO_CGROUP;
    }
    let args = CloneArgs {
        flags,
        pidfd: &raw mut pidfd as u64,
        exit_signal: libc::SIGCHLD as u64,
        stack: stack.base as u64 + GUARD_BYTES as u64,
        stack_size: STACK_BYTES as u64,
        cgroup: cgroup.map_or(0, |fd| fd.as_raw_fd() as u64),
        ..CloneArgs::default()
    };
    let result: isize;
    // SAFETY: `args` is a complete clone_args naming memory that outlives the call. The kernel starts the child behind
    // the `syscall` with every register but rax as here and rsp at the top of `stack` (16-byte aligned, used by nobody
    // else: it is borrowed mutably), where it calls child_main(plan), which never returns. CLONE_VFORK keeps this
    // thread from running until the child no longer uses this memory, so `plan` is not aliased; the asm block counts
    // as writing any memory, so `plan` and `pidfd` are read afresh after it.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r8",
            "call r9",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 as isize => result,
            in("rdi") &raw const args,
            in("rsi") size_of::<CloneArgs>(),
            in("r8") std::ptr::from_mut(plan),
            in("r9") child_main as extern "C" fn(*mut Plan<'_>) -> !,
            lateout("rcx") _, lateout("r11") _,
        );
    }
    if result < 0 {
        return Err(Errno::from_raw_os_error(-(result as i32)));
    }
    // SAFETY: CLONE_PIDFD stored a descriptor that nobody else knows.
    Ok((result as u32, unsafe { OwnedFd::from_raw_fd(pidfd) }))
}
