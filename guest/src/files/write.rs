//! Writing a file: in place, or beside it and then put in its stead.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use airlock_proto::MAX_DATA_BYTES;
use airlock_proto::v1::{FileAttributes, FileData, FileWrite};
use bytes::Bytes;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Stat, Uid};
use rustix::io::{self, Errno};

use super::meta::{apply, check_regular, not_regular, permissions};
use super::root::Root;
use super::sync::Sync;
use super::{Failure, at};

const FILE_MODE: u32 = 0o644;
/// After so many bytes the disk is made to begin; after twice as many, with the first half still on its way, the host
/// waits. More would end in the kernel's making a write wait, and with it the agent (balance_dirty_pages).
const SYNC_EVERY_BYTES: usize = 4 << 20;
/// Names tried for a temporary file. One is taken only if an agent before this one was killed with it in hand.
const NAMES_TRIED: usize = 16;

static NEXT_NAME: AtomicU32 = AtomicU32::new(0);

#[derive(Debug)]
pub(crate) struct Write {
    file: OwnedFd,
    path: Bytes,
    offset: u64,
    /// Written since the last sync was begun.
    unsynced: usize,
    syncing: Option<Sync>,
    /// It was begun since `new_sync` was asked last.
    is_new: bool,
    stage: Stage,
    replacing: Option<Replacing>,
    attributes: FileAttributes,
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Data,
    /// All is written, a sync that was begun meanwhile is not over.
    Ending,
    /// The file is being synced whole.
    File,
    /// It is in place, and the name is being synced.
    Name,
    Over,
}

impl Write {
    pub(super) fn begin(root: &Root, request: &FileWrite) -> Result<Self, Failure> {
        let (file, replacing) = if request.atomic {
            let (file, replacing) = begin_atomic(root, request)?;
            (file, Some(replacing))
        } else {
            (begin_in_place(root, request)?, None)
        };
        Ok(Self {
            file,
            path: request.path.clone(),
            offset: request.offset,
            unsynced: 0,
            syncing: None,
            is_new: false,
            stage: Stage::Data,
            replacing,
            attributes: request.attributes.unwrap_or_default(),
        })
    }

    /// More bytes; true if that was all and everything is done.
    pub(super) fn data(&mut self, data: &FileData) -> Result<bool, Failure> {
        let bytes = &data.data[..];
        if bytes.len() > MAX_DATA_BYTES {
            return Err(Failure::invalid("more than 128 KiB of data in one frame"));
        }
        if !bytes.is_empty() && data.offset != self.offset {
            return Err(Failure::invalid("the data of a write must have no gaps"));
        }
        self.write(bytes).map_err(at(&self.path))?;
        if data.eof {
            self.stage = Stage::Ending;
        }
        self.go_on()
    }

    /// Whether it must hear from the disk before it takes more.
    pub(super) fn is_waiting(&self) -> bool {
        self.syncing.is_some() && (self.stage != Stage::Data || self.unsynced >= SYNC_EVERY_BYTES)
    }

    pub(super) fn new_sync(&mut self) -> Option<BorrowedFd<'_>> {
        let is_new = std::mem::take(&mut self.is_new);
        self.syncing.as_ref().filter(|_| is_new).map(Sync::fd)
    }

    /// Goes as far as it can without waiting for the disk; true if everything is done.
    pub(super) fn go_on(&mut self) -> Result<bool, Failure> {
        loop {
            if let Some(sync) = &self.syncing {
                match sync.result() {
                    None => return Ok(false),
                    Some(result) => result.map_err(at(&self.path))?,
                }
                self.syncing = None;
            }
            match self.stage {
                Stage::Data if self.unsynced < SYNC_EVERY_BYTES => return Ok(false),
                Stage::Data => {
                    self.unsynced = 0;
                    self.sync(false)?;
                }
                Stage::Ending => {
                    self.describe().map_err(at(&self.path))?;
                    if self.replacing.is_none() {
                        self.stage = Stage::Over;
                        continue;
                    }
                    self.stage = Stage::File;
                    self.sync(false)?;
                }
                Stage::File => {
                    if let Some(replacing) = &mut self.replacing {
                        replacing.put_in_place().map_err(at(&self.path))?;
                    }
                    self.stage = Stage::Name;
                    self.sync(true)?;
                }
                Stage::Name => self.stage = Stage::Over,
                Stage::Over => return Ok(true),
            }
        }
    }

    /// Begins to sync the file, or the folder that has its name. Without room for a process the agent waits itself.
    fn sync(&mut self, name: bool) -> Result<(), Failure> {
        let fd = match &self.replacing {
            Some(replacing) if name => &replacing.folder,
            _ => &self.file,
        };
        match Sync::begin(fd) {
            Ok(sync) => {
                self.syncing = Some(sync);
                self.is_new = true;
            }
            Err(_) => rustix::fs::fsync(fd).map_err(at(&self.path))?,
        }
        Ok(())
    }

    fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match rustix::io::pwrite(&self.file, bytes, self.offset) {
                Ok(length) => {
                    bytes = &bytes[length..];
                    self.offset += length as u64;
                    self.unsynced += length;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Mode, owner and time, once all bytes are there.
    fn describe(&self) -> io::Result<()> {
        if let Some(replacing) = &self.replacing {
            // Only root may give a file away; whose it is then matters less than that it is whole.
            if let Some((uid, gid)) = replacing.owner {
                let _ = rustix::fs::fchown(&self.file, Some(uid), Some(gid));
            }
            rustix::fs::fchmod(&self.file, replacing.mode)?;
        }
        apply(&self.file, &self.attributes)
    }
}

fn begin_in_place(root: &Root, request: &FileWrite) -> Result<OwnedFd, Failure> {
    let path = &request.path;
    let file = match root.open_at(path, OFlags::WRONLY, Mode::empty()) {
        Err(Errno::NOENT) if request.create => {
            let flags = OFlags::WRONLY | OFlags::CREATE;
            let file = root.open_at(path, flags, Mode::RUSR | Mode::WUSR);
            let file = file.map_err(at(path))?;
            check_regular(&file, path)?;
            rustix::fs::fchmod(&file, new_mode(request)).map_err(at(path))?;
            file
        }
        // No reader at the other end: it is a FIFO, or a socket.
        Err(Errno::NXIO) => return Err(not_regular(path)),
        other => other.map_err(at(path))?,
    };
    check_regular(&file, path)?;
    if request.truncate {
        rustix::fs::ftruncate(&file, 0).map_err(at(path))?;
    }
    Ok(file)
}

fn new_mode(request: &FileWrite) -> Mode {
    permissions(match request.mode {
        0 => FILE_MODE,
        mode => mode,
    })
}

fn begin_atomic(root: &Root, request: &FileWrite) -> Result<(OwnedFd, Replacing), Failure> {
    let path = &request.path;
    if request.offset != 0 {
        return Err(Failure::invalid("an atomic write begins at offset 0"));
    }
    let (folder, name) = root.parent(path).map_err(at(path))?;
    let old = match rustix::fs::statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Some(stat),
        Err(Errno::NOENT) => None,
        Err(errno) => return Err(Failure::of(path, errno)),
    };
    let old_file = |stat: &&Stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    match old.map(|stat| FileType::from_raw_mode(stat.st_mode)) {
        None | Some(FileType::RegularFile | FileType::Symlink) => {}
        Some(FileType::Directory) => return Err(Failure::of(path, Errno::ISDIR)),
        Some(_) => return Err(not_regular(path)),
    }
    let old = old.as_ref().filter(old_file);
    let mode = match old {
        Some(old) if request.mode == 0 => permissions(old.st_mode),
        _ => new_mode(request),
    };
    let (file, temporary) = temporary(&folder).map_err(at(path))?;
    let replacing = Replacing {
        folder,
        temporary: Some(temporary),
        name: Bytes::copy_from_slice(name),
        mode,
        owner: old.map(|old| (Uid::from_raw(old.st_uid), Gid::from_raw(old.st_gid))),
    };
    Ok((file, replacing))
}

fn temporary(folder: &OwnedFd) -> io::Result<(OwnedFd, String)> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let mut last = Errno::EXIST;
    for _ in 0..NAMES_TRIED {
        let number = NEXT_NAME.fetch_add(1, Ordering::Relaxed);
        let name = format!(".airlock-{}-{number}", std::process::id());
        match rustix::fs::openat(folder, &name, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => return Ok((file, name)),
            Err(Errno::EXIST) => {}
            Err(errno) => {
                last = errno;
                break;
            }
        }
    }
    Err(last)
}

/// A temporary file on its way into another's place; gone if it does not get there.
#[derive(Debug)]
struct Replacing {
    folder: OwnedFd,
    temporary: Option<String>,
    name: Bytes,
    mode: Mode,
    owner: Option<(Uid, Gid)>,
}

impl Replacing {
    fn put_in_place(&mut self) -> io::Result<()> {
        if let Some(temporary) = &self.temporary {
            rustix::fs::renameat(&self.folder, temporary, &self.folder, &self.name[..])?;
            self.temporary = None;
        }
        Ok(())
    }
}

impl Drop for Replacing {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            // Nobody is left to tell if this fails.
            let _ = rustix::fs::unlinkat(&self.folder, temporary, AtFlags::empty());
        }
    }
}
