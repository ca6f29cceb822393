//! The lifeline: an inherited pipe or socket whose end-of-file says that the owner is gone.

#![expect(
    unsafe_code,
    reason = "takes over a file descriptor that was inherited as a number"
)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

/// The read end, held by this process alone.
#[derive(Debug)]
pub struct Lifeline(OwnedFd);

impl Lifeline {
    /// Takes over descriptor `fd`. Call at most once, before the process opens descriptors of its own.
    pub fn inherit(fd: RawFd) -> io::Result<Self> {
        let is_output = matches!(fd, libc::STDOUT_FILENO | libc::STDERR_FILENO);
        if fd < 0 || is_output || !Path::new(&format!("/proc/self/fd/{fd}")).exists() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("file descriptor {fd} was not inherited"),
            ));
        }
        if fd == libc::STDIN_FILENO {
            // The standard library keeps that number for itself, so watch a copy.
            return Ok(Self(rustix::io::fcntl_dupfd_cloexec(
                rustix::stdio::stdin(),
                3,
            )?));
        }
        // SAFETY: the descriptor is open (checked above), none of the standard ones, and nothing else in this process
        // has it: `main` calls this first, so it can only have been inherited for this purpose.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // QEMU, where it is a child of this process, must not keep it open.
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
        Ok(Self(fd))
    }

    /// Whether the owner is gone.
    pub fn is_cut(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, poll};
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        let now = rustix::event::Timespec::default();
        matches!(poll(&mut fds, Some(&now)), Ok(1..)) && is_end(fds[0].revents())
    }
}

/// Whether poll's answer for a lifeline says that its other end is closed. Nobody writes to it, so readable is the end.
pub(crate) fn is_end(revents: rustix::event::PollFlags) -> bool {
    !revents.is_empty()
}

impl AsRawFd for Lifeline {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl std::os::fd::AsFd for Lifeline {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::IntoRawFd;

    #[test]
    fn the_owners_end_is_seen() {
        let (reader, writer) = std::io::pipe().unwrap();
        let lifeline = Lifeline::inherit(reader.into_raw_fd()).unwrap();
        assert!(!lifeline.is_cut());
        drop(writer);
        assert!(lifeline.is_cut());
    }

    #[test]
    fn a_number_that_is_no_descriptor_is_refused() {
        assert!(Lifeline::inherit(99_999).is_err());
        assert!(Lifeline::inherit(2).is_err());
    }
}
