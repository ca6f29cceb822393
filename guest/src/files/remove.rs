//! Removing: one name, or a folder with all that is in it, some names at a time.
//!
//! Every folder is opened from the one above it by its name and without following a link, so nothing that changes
//! meanwhile leads out of the tree. However deep that is, a fixed number of folders is open: one deeper is moved up.

use std::ffi::CString;
use std::os::fd::OwnedFd;

use bytes::Bytes;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::{self, Errno};

use super::root::Root;
use super::{Failure, at};

/// Names taken away in one step.
const NAMES: usize = 64;
/// Folders open at once; each costs a descriptor and a buffer of the folder's entries.
const MAX_DEPTH: usize = 64;
/// A folder that is never empty, though all its names are taken away: somebody keeps filling it.
const MAX_PASSES: u32 = 64;

#[derive(Debug)]
pub(crate) struct Remove {
    path: Bytes,
    parent: OwnedFd,
    name: CString,
    /// The tree's top, and open folders below it, each with its name in the one above.
    open: Vec<Open>,
    moved: u64,
}

#[derive(Debug)]
struct Open {
    name: CString,
    entries: Dir,
    passes: u32,
}

impl Remove {
    /// `None`: done already.
    pub(super) fn begin(
        root: &Root,
        path: &Bytes,
        recursive: bool,
    ) -> Result<Option<Self>, Failure> {
        let (parent, name) = root.parent(path).map_err(at(path))?;
        let name = CString::new(name).map_err(|_| Failure::of(path, Errno::INVAL))?;
        match rustix::fs::unlinkat(&parent, &name, AtFlags::empty()) {
            Ok(()) => return Ok(None),
            // EISDIR by Linux, EPERM by POSIX (unlink(2)).
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(errno) => return Err(Failure::of(path, errno)),
        }
        match rustix::fs::unlinkat(&parent, &name, AtFlags::REMOVEDIR) {
            Ok(()) => return Ok(None),
            Err(Errno::NOTEMPTY | Errno::EXIST) if recursive => {}
            Err(errno) => return Err(Failure::of(path, errno)),
        }
        let entries = open(&parent, &name).map_err(at(path))?;
        let top = Open {
            name: name.clone(),
            entries,
            passes: 0,
        };
        Ok(Some(Self {
            path: path.clone(),
            parent,
            name,
            open: vec![top],
            moved: 0,
        }))
    }

    /// Some names more; true when all is gone.
    pub(super) fn step(&mut self) -> Result<bool, Failure> {
        for _ in 0..NAMES {
            if self.one().map_err(at(&self.path))? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn one(&mut self) -> io::Result<bool> {
        let depth = self.open.len();
        let Some(current) = self.open.last_mut() else {
            return Ok(true);
        };
        let Some(entry) = current.entries.read() else {
            return self.close();
        };
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            return Ok(false);
        }
        let folder = current.entries.fd()?;
        if entry.file_type() != FileType::Directory {
            match rustix::fs::unlinkat(folder, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => return Ok(false),
                // Not every filesystem says what an entry is.
                Err(Errno::ISDIR | Errno::PERM) => {}
                Err(errno) => return Err(errno),
            }
        }
        match rustix::fs::unlinkat(folder, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => return Ok(false),
            Err(Errno::NOTEMPTY | Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
        if depth < MAX_DEPTH {
            let entries = open(folder, name)?;
            let name = name.to_owned();
            self.open.push(Open {
                name,
                entries,
                passes: 0,
            });
            return Ok(false);
        }
        let name = name.to_owned();
        self.move_up(&name)
    }

    /// Moves a folder that is too deep to the top of the tree, whose next pass meets it.
    fn move_up(&mut self, name: &CString) -> io::Result<bool> {
        let (Some(top), Some(current)) = (self.open.first(), self.open.last()) else {
            return Ok(true);
        };
        let (top, current) = (top.entries.fd()?, current.entries.fd()?);
        loop {
            self.moved += 1;
            let new_name = format!(".airlock-removed-{}", self.moved);
            match rustix::fs::renameat_with(
                current,
                name,
                top,
                &new_name,
                rustix::fs::RenameFlags::NOREPLACE,
            ) {
                Ok(()) | Err(Errno::NOENT) => return Ok(false),
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    /// The current folder has no more entries: it goes, or is read once more. True when it was the top.
    fn close(&mut self) -> io::Result<bool> {
        let Some(mut folder) = self.open.pop() else {
            return Ok(true);
        };
        let gone = match self.open.last() {
            Some(above) => {
                rustix::fs::unlinkat(above.entries.fd()?, &folder.name, AtFlags::REMOVEDIR)
            }
            None => rustix::fs::unlinkat(&self.parent, &self.name, AtFlags::REMOVEDIR),
        };
        match gone {
            Ok(()) | Err(Errno::NOENT) => return Ok(self.open.is_empty()),
            // Moved up by us, or made meanwhile.
            Err(Errno::NOTEMPTY | Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
        folder.passes += 1;
        // What was moved up is one more reason for a pass, and there is no limit to that but the tree's depth.
        if u64::from(folder.passes) > u64::from(MAX_PASSES) + self.moved {
            return Err(Errno::NOTEMPTY);
        }
        folder.entries.rewind();
        self.open.push(folder);
        Ok(false)
    }
}

/// A folder's entries. Not those of another filesystem that is mounted there.
fn open(parent: impl std::os::fd::AsFd, name: &std::ffi::CStr) -> io::Result<Dir> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
    Dir::new(rustix::fs::openat2(
        parent,
        name,
        flags,
        Mode::empty(),
        resolve,
    )?)
}
