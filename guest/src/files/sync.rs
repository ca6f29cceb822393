//! Waiting for the disk, by a process of its own: fsync takes as long as the disk does, and neither the agent's one thread
//! nor any exec may wait for it. The process is nobody's child but init's, so nothing is left to reap here.

#![expect(
    unsafe_code,
    reason = "fork, and system calls without allocation in the child"
)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::io::{self, Errno};
use rustix::pipe::PipeFlags;

/// One fsync that is under way.
#[derive(Debug)]
pub(super) struct Sync {
    /// Gives the result, as four bytes of errno or 0.
    result: OwnedFd,
}

impl Sync {
    /// Begins; an error means that it could not, and nothing is known of the file.
    pub(super) fn begin(file: &OwnedFd) -> io::Result<Self> {
        let (result, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let (file, writer_fd) = (file.as_raw_fd(), writer.as_raw_fd());
        // SAFETY: this process has one thread, so the child begins in a consistent state; it makes plain system calls
        // on descriptors that its copy of the table has, and ends in `child` without coming back.
        let pid = unsafe { libc::fork() };
        match pid {
            // SAFETY: as above; in the child.
            0 => unsafe { child(file, writer_fd) },
            -1 => {
                let errno = std::io::Error::last_os_error().raw_os_error();
                return Err(Errno::from_raw_os_error(errno.unwrap_or(libc::EAGAIN)));
            }
            _ => {}
        }
        let mut status = 0;
        // SAFETY: waits for the child above, which ends as soon as it has made its own child.
        while unsafe { libc::waitpid(pid, &raw mut status, 0) } == -1
            && std::io::Error::last_os_error().raw_os_error() == Some(libc::EINTR)
        {}
        if status != 0 {
            return Err(Errno::AGAIN);
        }
        Ok(Self { result })
    }

    /// Readable once there is a result.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.result.as_fd()
    }

    /// `None`: still under way.
    pub(super) fn result(&self) -> Option<io::Result<()>> {
        let mut errno = [0; 4];
        match io::read(&self.result, &mut errno) {
            Ok(4) => match i32::from_ne_bytes(errno) {
                0 => Some(Ok(())),
                errno => Some(Err(Errno::from_raw_os_error(errno))),
            },
            Err(Errno::AGAIN | Errno::INTR) => None,
            // It was killed: what it had to do is not done.
            Ok(_) => Some(Err(Errno::IO)),
            Err(errno) => Some(Err(errno)),
        }
    }
}

/// Makes the process that waits, and ends.
///
/// # Safety
/// Only in a process that was just forked; `file` and `result` must be open.
unsafe fn child(file: RawFd, result: RawFd) -> ! {
    // SAFETY: system calls on integers, and four bytes of this function's own stack. Every other descriptor is closed:
    // a connection or a pipe that was held here would seem open to its peer for as long as the disk takes.
    unsafe {
        match libc::fork() {
            0 => {}
            -1 => libc::_exit(1),
            _ => libc::_exit(0),
        }
        // Out of the way of the two that are kept, in whichever order they are.
        let file = libc::fcntl(file, libc::F_DUPFD, 3);
        let result = libc::fcntl(result, libc::F_DUPFD, 3);
        libc::dup2(file, 0);
        libc::dup2(result, 1);
        libc::syscall(libc::SYS_close_range, 2_u32, u32::MAX, 0_u32);
        let errno: i32 = match libc::fsync(0) {
            0 => 0,
            _ => *libc::__errno_location(),
        };
        libc::write(1, (&raw const errno).cast(), 4);
        libc::_exit(0)
    }
}
