//! The folder beneath which a request's paths are resolved, by the kernel: whatever links and `..` stand in a path, and
//! whoever changes them meanwhile, it ends beneath the root.

use std::os::fd::OwnedFd;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::{self, Errno};

use super::{Failure, at};

/// With a `..` in the path openat2(2) gives EAGAIN while anything anywhere is being renamed; it asks to try again.
const ATTEMPTS: usize = 64;

#[derive(Debug)]
pub(super) struct Root {
    folder: OwnedFd,
}

impl Root {
    pub(super) fn open(path: &[u8]) -> Result<Self, Failure> {
        let path = if path.is_empty() { b"/" } else { path };
        if !path.starts_with(b"/") {
            return Err(Failure::invalid("the root must be an absolute path"));
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(at(path))?;
        Ok(Self { folder })
    }

    /// Opens what a path leads to. Never waits for a FIFO's other end, never gets a controlling terminal.
    pub(super) fn open_at(&self, path: &[u8], flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
        self.resolve(path, flags | OFlags::NONBLOCK | OFlags::NOCTTY, mode)
    }

    /// A handle on what a path leads to; with `follow`, through a link at its end.
    pub(super) fn handle(&self, path: &[u8], follow: bool) -> io::Result<OwnedFd> {
        let mut flags = OFlags::PATH;
        flags.set(OFlags::NOFOLLOW, !follow);
        self.resolve(path, flags, Mode::empty())
    }

    fn resolve(&self, path: &[u8], flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
        let path = if path.is_empty() { b"." } else { path };
        let flags = flags | OFlags::CLOEXEC;
        let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        for _ in 1..ATTEMPTS {
            match rustix::fs::openat2(&self.folder, path, flags, mode, how) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return other,
            }
        }
        rustix::fs::openat2(&self.folder, path, flags, mode, how)
    }

    /// The folder that holds a path's last name, and that name: for what acts on names and follows no link at the end.
    pub(super) fn parent<'a>(&self, path: &'a [u8]) -> io::Result<(OwnedFd, &'a [u8])> {
        let (folder, name) = split(path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        Ok((self.open_at(folder, flags, Mode::empty())?, name))
    }
}

/// A path's folder and last name.
fn split(path: &[u8]) -> io::Result<(&[u8], &[u8])> {
    let end = path.iter().rposition(|byte| *byte != b'/');
    let path = &path[..end.map_or(0, |end| end + 1)];
    let (folder, name) = match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => path.split_at(slash + 1),
        None => (&b""[..], path),
    };
    match name {
        b"" | b"." | b".." => Err(Errno::INVAL),
        name => Ok((folder, name)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_ends_in_a_name() {
        let split = |path: &'static str| split(path.as_bytes());
        assert_eq!(split("a"), Ok((&b""[..], &b"a"[..])));
        assert_eq!(split("/a"), Ok((&b"/"[..], &b"a"[..])));
        assert_eq!(split("/a/b//"), Ok((&b"/a/"[..], &b"b"[..])));
        for path in ["", "/", "//", ".", "a/.", "/..", "a/../"] {
            assert_eq!(split(path), Err(Errno::INVAL), "{path}");
        }
    }
}
