//! What a file is: type, mode, owner, size, time; telling it and setting it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use airlock_proto::v1::{FileAttributes, FileInfo, FileSet};
use bytes::Bytes;
use rustix::fs::{AtFlags, FileType, Gid, Mode, Stat, Timespec, Timestamps, UTIME_OMIT, Uid};
use rustix::io::{self, Errno};

use super::root::Root;
use super::{Failure, at};

const NS: i64 = 1_000_000_000;

pub(super) fn stat(root: &Root, path: &Bytes, follow: bool) -> Result<FileInfo, Failure> {
    let file = root.handle(path, follow).map_err(at(path))?;
    let stat = rustix::fs::fstat(&file).map_err(at(path))?;
    let link_target = target(&file, b"", &stat).map_err(at(path))?;
    Ok(info(path.clone(), &stat, link_target))
}

/// An entry of a folder.
pub(super) fn info_at(folder: BorrowedFd<'_>, name: &[u8]) -> io::Result<FileInfo> {
    let stat = rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let link_target = target(folder, name, &stat)?;
    Ok(info(Bytes::copy_from_slice(name), &stat, link_target))
}

/// Where a link leads; with an empty name, the link that the handle itself is.
fn target(at: impl AsFd, name: &[u8], stat: &Stat) -> io::Result<Bytes> {
    if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
        return Ok(Bytes::new());
    }
    let target = rustix::fs::readlinkat(at, name, Vec::new())?;
    Ok(target.into_bytes().into())
}

fn info(path: Bytes, stat: &Stat, link_target: Bytes) -> FileInfo {
    FileInfo {
        path,
        mode: stat.st_mode,
        uid: stat.st_uid,
        gid: stat.st_gid,
        size: u64::try_from(stat.st_size).unwrap_or(0),
        mtime_unix_ns: stat
            .st_mtime
            .saturating_mul(NS)
            .saturating_add_unsigned(stat.st_mtime_nsec),
        link_target,
        links: stat.st_nlink,
        inode: stat.st_ino,
        device: stat.st_dev,
    }
}

/// Devices, FIFOs and sockets would block the agent or do things; folders have requests of their own.
pub(super) fn check_regular(file: impl AsFd, path: &[u8]) -> Result<(), Failure> {
    let stat = rustix::fs::fstat(file).map_err(at(path))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(()),
        FileType::Directory => Err(Failure::of(path, Errno::ISDIR)),
        _ => Err(not_regular(path)),
    }
}

pub(super) fn not_regular(path: &[u8]) -> Failure {
    let mut failure = Failure::of(path, Errno::INVAL);
    failure.message = format!("{}: not a regular file", String::from_utf8_lossy(path));
    failure
}

pub(super) fn set(root: &Root, request: &FileSet) -> Result<(), Failure> {
    let path = &request.path;
    let file = root.handle(path, !request.link).map_err(at(path))?;
    let attributes = request.attributes.unwrap_or_default();
    apply(&file, &attributes).map_err(at(path))
}

/// Sets what is named, of any handle. The owner first: setting it takes set-id bits away.
pub(super) fn apply(file: impl AsFd, attributes: &FileAttributes) -> io::Result<()> {
    let file = file.as_fd();
    if attributes.uid.is_some() || attributes.gid.is_some() {
        if attributes.uid == Some(u32::MAX) || attributes.gid == Some(u32::MAX) {
            return Err(Errno::INVAL);
        }
        let (uid, gid) = (
            attributes.uid.map(Uid::from_raw),
            attributes.gid.map(Gid::from_raw),
        );
        rustix::fs::chownat(file, c"", uid, gid, AtFlags::EMPTY_PATH)?;
    }
    if let Some(mode) = attributes.mode {
        // fchmod(2) takes no O_PATH handle, and fchmodat2(2) with an empty path is too young (Linux 6.6).
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        rustix::fs::chmod(path, permissions(mode))?;
    }
    if let Some(ns) = attributes.mtime_unix_ns {
        let times = Timestamps {
            last_access: Timespec {
                tv_sec: 0,
                tv_nsec: UTIME_OMIT,
            },
            last_modification: Timespec {
                tv_sec: ns.div_euclid(NS),
                tv_nsec: ns.rem_euclid(NS),
            },
        };
        rustix::fs::utimensat(file, c"", &times, AtFlags::EMPTY_PATH)?;
    }
    Ok(())
}

pub(super) fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o7777)
}
