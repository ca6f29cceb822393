//! System call filters, one per kind of thread, installed before the guest runs its first instruction.
//!
//! A call outside the lists ends the process at once with [`EXIT_FORBIDDEN_CALL`] and one line on standard error that
//! names the call. Nothing is executable that was not so from the start, and no program can be started.

#![expect(
    unsafe_code,
    reason = "a SIGSYS handler reads siginfo and may call only async-signal-safe functions"
)]

use std::collections::BTreeMap;
use std::ffi::{c_int, c_void};
use std::sync::Once;

use libc::c_long;
use seccompiler::SeccompCmpArgLen::Dword;
use seccompiler::SeccompCmpOp::{Eq, MaskedEq};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};
use vmm_sys_util::signal::register_signal_handler;

/// Status of a process that made a forbidden call: 128 + SIGSYS, as a shell would show it.
pub const EXIT_FORBIDDEN_CALL: c_int = 128 + libc::SIGSYS;

/// The kinds of threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thread {
    /// Runs a vCPU.
    Vcpu,
    /// Runs device workers.
    Io,
    /// Serves the control socket, and clears up at the end; the process's first thread.
    Control,
}

/// What the allocator, locks, signals, panics and the end of a thread need.
const EVERY_THREAD: &[c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_lseek,     // console log
    libc::SYS_ftruncate, // console log
    libc::SYS_fsync,
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_tgkill,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_eventfd2,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// The vCPU side of devices: a device's activation makes its timers and event descriptors.
const VCPU: &[c_long] = &[
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
];

const IO: &[c_long] = &[
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_readv,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_unlink,
];

/// After the VM's end this thread reads the console's tail, writes `exit.json` and removes files.
const CONTROL: &[c_long] = &[
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_ctl,
    libc::SYS_accept4,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_newfstatat,
    libc::SYS_fstat,
    libc::SYS_stat,
    libc::SYS_statx,
    libc::SYS_rename,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_rmdir,
];

/// `_IO(0xAE, 0x80)` and its like: <linux/kvm.h>.
const KVM_RUN: u64 = 0xae80;
const KVM_KVMCLOCK_CTRL: u64 = 0xaead;
const KVM_GET_REGS: u64 = 0x8090_ae81;
const KVM_GET_SREGS: u64 = 0x8138_ae83;
/// std makes sockets non-blocking with it.
const FIONBIO: u64 = 0x5421;

/// Makes all threads allocate from one heap. To be called first of all, while there is one thread.
///
/// The heap of another arena is shrunk when much of it is freed, and glibc (malloc/arena.c, `shrink_heap`) then opens
/// `/proc/sys/vm/overcommit_memory`, which no filter here allows: many connections that closed at once ended the VM.
pub fn keep_one_heap() {
    // SAFETY: sets a parameter of the allocator; there is one thread, as the caller promises.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Installs the calling thread's filter, for good, and gives up the right to gain privileges.
pub fn install(thread: Thread) -> Result<(), String> {
    static HANDLER: Once = Once::new();
    let mut registered = Ok(());
    HANDLER.call_once(|| registered = register_signal_handler(libc::SIGSYS, report_and_exit));
    registered.map_err(|error| error.to_string())?;
    // rustix looks for the vDSO at its first use, with calls and files that it never needs again.
    let _ = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let program = filter(thread).map_err(|error| error.to_string())?;
    seccompiler::apply_filter(&program).map_err(|error| error.to_string())
}

fn filter(thread: Thread) -> Result<BpfProgram, seccompiler::BackendError> {
    let (calls, ioctls): (_, &[u64]) = match thread {
        Thread::Vcpu => (
            VCPU,
            &[KVM_RUN, KVM_KVMCLOCK_CTRL, KVM_GET_REGS, KVM_GET_SREGS],
        ),
        Thread::Io => (IO, &[FIONBIO]),
        Thread::Control => (CONTROL, &[FIONBIO]),
    };
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> = BTreeMap::new();
    for &call in EVERY_THREAD.iter().chain(calls) {
        rules.insert(call, Vec::new());
    }
    let rule = |argument, operator, value| {
        SeccompRule::new(vec![SeccompCondition::new(
            argument, Dword, operator, value,
        )?])
    };
    for &request in ioctls {
        rules
            .entry(libc::SYS_ioctl)
            .or_default()
            .push(rule(1, Eq, request)?);
    }
    // Memory may be mapped, but not to be executed.
    let not_executable = || rule(2, MaskedEq(libc::PROT_EXEC as u64), 0);
    rules.insert(libc::SYS_mmap, vec![not_executable()?]);
    rules.insert(libc::SYS_mprotect, vec![not_executable()?]);
    let duplicate = [
        libc::F_DUPFD_CLOEXEC,
        libc::F_GETFD,
        libc::F_GETFL,
        libc::F_SETFL,
        libc::F_SETFD,
    ];
    let duplicate = duplicate
        .into_iter()
        .map(|command| rule(1, Eq, command as u64));
    rules.insert(libc::SYS_fcntl, duplicate.collect::<Result<_, _>>()?);
    if thread == Thread::Io {
        rules.insert(libc::SYS_socket, vec![rule(0, Eq, libc::AF_UNIX as u64)?]);
    }
    SeccompFilter::new(
        rules,
        SeccompAction::Trap,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?
    .try_into()
}

/// SIGSYS: says which call, and ends the process.
extern "C" fn report_and_exit(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    /// `si_syscall` of <asm-generic/siginfo.h>: after three ints, padding, and the call's address.
    const SYSCALL_OFFSET: usize = 24;
    // SAFETY: the kernel hands a handler that was registered with SA_SIGINFO a whole siginfo_t, which is 128 bytes
    // long, and for SIGSYS the int at this offset is the call's number.
    let number = unsafe {
        info.cast::<u8>()
            .add(SYSCALL_OFFSET)
            .cast::<i32>()
            .read_unaligned()
    };
    let mut line = *b"airlock-vmm: forbidden system call      \n";
    // No allocation here: three digits, from the right.
    let (mut rest, mut at) = (number.unsigned_abs(), line.len() - 2);
    while rest > 0 && at > 35 {
        line[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        at -= 1;
    }
    // SAFETY: write and _exit are async-signal-safe, and `line` is valid for its length.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len());
        libc::_exit(EXIT_FORBIDDEN_CALL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    const ATTEMPT: &str = "AIRLOCK_TEST_FORBIDDEN_CALL";

    fn attempts() -> [(&'static str, fn()); 4] {
        [
            ("mkdir", || drop(std::fs::create_dir("/nowhere/at/all"))),
            ("execve", || drop(rustix_execve())),
            ("inet socket", || {
                drop(std::net::UdpSocket::bind("127.0.0.1:0"))
            }),
            ("executable memory", map_executable),
        ]
    }

    fn rustix_execve() -> std::io::Error {
        use std::os::unix::process::CommandExt;
        Command::new("/bin/true").exec()
    }

    fn map_executable() {
        // SAFETY: an anonymous mapping that nothing uses.
        unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
    }

    /// Runs in a process of its own, started by the test below; by itself it does nothing.
    #[test]
    fn victim() {
        let Ok(attempt) = std::env::var(ATTEMPT) else {
            return;
        };
        let (thread, name) = attempt.split_once('/').unwrap();
        let thread = match thread {
            "vcpu" => Thread::Vcpu,
            "io" => Thread::Io,
            _ => Thread::Control,
        };
        if name == "free much" {
            keep_one_heap();
            let freeing = std::thread::spawn(move || {
                install(thread).unwrap();
                // Below the size that gets a mapping of its own, so that all are in a heap.
                drop((0..2000).map(|n| vec![1u8; 60_000 + n]).collect::<Vec<_>>());
            });
            freeing.join().unwrap();
            // SAFETY: ends the process at once, as is wanted here.
            unsafe { libc::_exit(0) };
        }
        install(thread).unwrap();
        if let Some((_, call)) = attempts().into_iter().find(|(known, _)| *known == name) {
            call();
        }
        drop(vec![1u8; 1 << 20]);
        // SAFETY: ends the process at once, as is wanted here.
        unsafe { libc::_exit(0) };
    }

    fn run_victim(attempt: &str) -> (Option<i32>, String) {
        let output = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "seccomp::tests::victim",
                "--nocapture",
                "--test-threads=1",
            ])
            .env(ATTEMPT, attempt)
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    }

    #[test]
    fn a_forbidden_call_ends_the_process_and_is_named() {
        for thread in ["vcpu", "io", "control"] {
            assert_eq!(
                run_victim(&format!("{thread}/nothing")).0,
                Some(0),
                "{thread}: the filter alone"
            );
            for (name, _) in attempts() {
                let (status, stderr) = run_victim(&format!("{thread}/{name}"));
                assert_eq!(
                    status,
                    Some(EXIT_FORBIDDEN_CALL),
                    "{thread} {name}: {stderr}"
                );
                assert!(
                    stderr.contains("forbidden system call"),
                    "{thread} {name}: {stderr}"
                );
            }
        }
    }

    #[test]
    fn many_connections_that_close_at_once_do_not_end_the_vm() {
        for thread in ["vcpu", "io"] {
            let (status, stderr) = run_victim(&format!("{thread}/free much"));
            assert_eq!(status, Some(0), "{thread}: {stderr}");
        }
    }

    #[test]
    fn the_call_is_named_by_its_number() {
        let (_, stderr) = run_victim("io/mkdir");
        assert!(
            stderr.contains(&format!(" {}\n", libc::SYS_mkdir)),
            "{stderr}"
        );
    }
}
