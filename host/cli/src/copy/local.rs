//! A folder here that a guest's tree goes into. The guest chooses the names and may be hostile: every path is resolved
//! beneath the folder, by the kernel and without following a link, those of the guest's own making among them.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use airlock_sandbox::client::FileAttributes;
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT, Uid,
};
use rustix::io::Errno;

const NS: i64 = 1_000_000_000;

pub(super) struct Tree {
    top: OwnedFd,
}

impl Tree {
    pub(super) fn open(folder: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let top = rustix::fs::openat(CWD, folder, flags, Mode::empty())?;
        Ok(Self { top })
    }

    /// Makes a folder, or finds it there.
    pub(super) fn folder(&self, path: &[u8]) -> io::Result<()> {
        let (parent, name) = self.parent(path)?;
        match rustix::fs::mkdirat(parent, name, Mode::RWXU) {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) => self.open_folder(path).map(drop),
            Err(errno) => Err(errno.into()),
        }
    }

    /// An empty regular file: new, or one that is there and loses what it held.
    pub(super) fn file(&self, path: &[u8]) -> io::Result<File> {
        let (parent, name) = self.parent(path)?;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let file = match rustix::fs::openat(&parent, name, flags, mode) {
            // One of ours that is read-only: it is replaced, as cp -f does.
            Err(Errno::ACCESS) => {
                rustix::fs::unlinkat(&parent, name, AtFlags::empty())?;
                rustix::fs::openat(&parent, name, flags | OFlags::EXCL, mode)?
            }
            other => other?,
        };
        let stat = rustix::fs::fstat(&file)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(io::Error::other("is there and not a regular file"));
        }
        rustix::fs::ftruncate(&file, 0)?;
        Ok(file.into())
    }

    pub(super) fn link(&self, target: &[u8], path: &[u8]) -> io::Result<()> {
        let (parent, name) = self.parent(path)?;
        replacing(&parent, name, || {
            rustix::fs::symlinkat(target, &parent, name)
        })
    }

    pub(super) fn second_name(&self, first: &[u8], path: &[u8]) -> io::Result<()> {
        let (first_parent, first_name) = self.parent(first)?;
        let (parent, name) = self.parent(path)?;
        replacing(&parent, name, || {
            rustix::fs::linkat(&first_parent, first_name, &parent, name, AtFlags::empty())
        })
    }

    pub(super) fn set_folder(&self, path: &[u8], attributes: &FileAttributes) -> io::Result<()> {
        set(&self.open_folder(path)?.into(), attributes)
    }

    /// Of a link itself: its time and owner.
    pub(super) fn set_link(&self, path: &[u8], attributes: &FileAttributes) -> io::Result<()> {
        let (parent, name) = self.parent(path)?;
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        if let Some((uid, gid)) = owner(attributes) {
            rustix::fs::chownat(&parent, name, uid, gid, flags)?;
        }
        if let Some(times) = times(attributes) {
            rustix::fs::utimensat(&parent, name, &times, flags)?;
        }
        Ok(())
    }

    fn parent<'a>(&self, path: &'a [u8]) -> io::Result<(OwnedFd, &'a [u8])> {
        let slash = path.iter().rposition(|byte| *byte == b'/');
        let (folder, name) = match slash {
            Some(slash) => (&path[..slash], &path[slash + 1..]),
            None => (&b""[..], path),
        };
        Ok((self.open_folder(folder)?, name))
    }

    fn open_folder(&self, path: &[u8]) -> io::Result<OwnedFd> {
        let path = if path.is_empty() { b"." } else { path };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        Ok(rustix::fs::openat2(
            &self.top,
            path,
            flags,
            Mode::empty(),
            resolve,
        )?)
    }
}

/// Makes a link where there may be something; never in place of a folder.
fn replacing(
    parent: &OwnedFd,
    name: &[u8],
    make: impl Fn() -> rustix::io::Result<()>,
) -> io::Result<()> {
    match make() {
        Err(Errno::EXIST) => {
            rustix::fs::unlinkat(parent, name, AtFlags::empty())?;
            Ok(make()?)
        }
        other => Ok(other?),
    }
}

/// Sets what is named; the owner first, because setting it takes set-id bits away.
pub(super) fn set(file: &File, attributes: &FileAttributes) -> io::Result<()> {
    if let Some((uid, gid)) = owner(attributes) {
        rustix::fs::fchown(file, uid, gid)?;
    }
    if let Some(mode) = attributes.mode {
        rustix::fs::fchmod(file, Mode::from_raw_mode(mode & 0o7777))?;
    }
    if let Some(times) = times(attributes) {
        rustix::fs::futimens(file, &times)?;
    }
    Ok(())
}

/// Only root may give files away; for others they are the copier's, as with tar(1).
fn owner(attributes: &FileAttributes) -> Option<(Option<Uid>, Option<Gid>)> {
    let (uid, gid) = (attributes.uid?, attributes.gid?);
    let nobody = uid == u32::MAX || gid == u32::MAX;
    let may = rustix::process::geteuid().is_root() && !nobody;
    may.then(|| (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))))
}

fn times(attributes: &FileAttributes) -> Option<Timestamps> {
    let ns = attributes.mtime_unix_ns?;
    Some(Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: ns.div_euclid(NS),
            tv_nsec: ns.rem_euclid(NS),
        },
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_link_that_the_guest_made_leads_nothing_out_of_the_tree() {
        let base = std::env::temp_dir().join(format!("airlock-cp-{}", std::process::id()));
        let top = base.join("top");
        fs::create_dir_all(&top).unwrap();
        fs::create_dir_all(base.join("outside")).unwrap();
        fs::write(base.join("outside/secret"), "secret").unwrap();
        let tree = Tree::open(&top).unwrap();
        tree.link(b"../outside", b"a").unwrap();
        tree.link(b"../outside/secret", b"b").unwrap();
        assert!(tree.folder(b"a").is_err());
        for path in [&b"a/new"[..], b"b", b"../outside/secret", b"/tmp/x"] {
            assert!(tree.file(path).is_err(), "{path:?}");
        }
        assert!(tree.folder(b"a/folder").is_err());
        assert!(tree.link(b"x", b"a/secret").is_err());
        assert!(tree.second_name(b"a/secret", b"stolen").is_err());
        assert_eq!(fs::read(base.join("outside/secret")).unwrap(), b"secret");
        assert_eq!(fs::read_dir(base.join("outside")).unwrap().count(), 1);
        fs::remove_dir_all(base).unwrap();
    }
}
