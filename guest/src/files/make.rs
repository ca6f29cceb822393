//! Names: making folders and links, renaming.

use airlock_proto::v1::FileMkdir;
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::{self, Errno};

use super::meta::permissions;
use super::root::Root;
use super::{Failure, at};

const FOLDER_MODE: u32 = 0o755;
/// Folders that one request makes: each is resolved from the root again, so many of them would hold up others.
const MAX_PARENTS: usize = 256;

pub(super) fn folder(root: &Root, request: &FileMkdir) -> Result<(), Failure> {
    let path = &request.path[..];
    let mode = match request.mode {
        0 => FOLDER_MODE,
        mode => mode,
    };
    if !request.parents {
        return one_folder(root, path, mode).map_err(at(path));
    }
    let ends: Vec<usize> = (1..=path.len())
        .filter(|end| path[end - 1] != b'/' && path.get(*end).is_none_or(|next| *next == b'/'))
        .collect();
    if ends.len() > MAX_PARENTS {
        return Err(Failure::of(path, Errno::NAMETOOLONG));
    }
    for end in &ends {
        let part = &path[..*end];
        let is_last = Some(end) == ends.last();
        let made = one_folder(root, part, if is_last { mode } else { FOLDER_MODE });
        match made {
            Ok(()) => {}
            // There already, or a name such as `..` that is always there: if it is a folder, all is well.
            Err(Errno::EXIST | Errno::INVAL) => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY;
                root.open_at(part, flags, Mode::empty()).map_err(at(part))?;
            }
            Err(errno) => return Err(Failure::of(part, errno)),
        }
    }
    Ok(())
}

fn one_folder(root: &Root, path: &[u8], mode: u32) -> io::Result<()> {
    let (parent, name) = root.parent(path)?;
    rustix::fs::mkdirat(&parent, name, Mode::RWXU)?;
    // The agent's umask has no say in what was asked for.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = rustix::fs::openat(&parent, name, flags, Mode::empty())?;
    rustix::fs::fchmod(folder, permissions(mode))
}

pub(super) fn rename(root: &Root, from: &[u8], to: &[u8]) -> Result<(), Failure> {
    let (from_parent, from_name) = root.parent(from).map_err(at(from))?;
    let (to_parent, to_name) = root.parent(to).map_err(at(to))?;
    rustix::fs::renameat(from_parent, from_name, to_parent, to_name).map_err(at(from))
}

pub(super) fn symlink(root: &Root, target: &[u8], path: &[u8]) -> Result<(), Failure> {
    let (parent, name) = root.parent(path).map_err(at(path))?;
    rustix::fs::symlinkat(target, parent, name).map_err(at(path))
}

pub(super) fn link(root: &Root, existing: &[u8], path: &[u8]) -> Result<(), Failure> {
    let (old_parent, old_name) = root.parent(existing).map_err(at(existing))?;
    let (parent, name) = root.parent(path).map_err(at(path))?;
    // Without AT_SYMLINK_FOLLOW: the link would lead wherever it says.
    rustix::fs::linkat(old_parent, old_name, parent, name, AtFlags::empty()).map_err(at(path))
}
