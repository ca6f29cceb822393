//! Raw system calls for the moment between clone and execve. The child runs in the agent's own memory then, so
//! nothing there may touch libc's state (errno, locks, the allocator): each call is one instruction.

#![expect(
    unsafe_code,
    reason = "a system call is an instruction the compiler knows nothing about"
)]

use std::arch::asm;

/// A system call with up to five arguments; a negative result is minus the errno.
///
/// # Safety
/// As the call itself: pointers must be what the kernel expects of call `number`.
pub(super) unsafe fn call(number: i64, arguments: [usize; 5]) -> isize {
    let [a, b, c, d, e] = arguments;
    let result: isize;
    // SAFETY: the x86-64 convention: number in rax, arguments in rdi, rsi, rdx, r10, r8; rcx and r11 are clobbered and
    // the stack is left alone. What the call does to memory is the caller's promise.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    result
}
