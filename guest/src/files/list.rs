//! Listing a folder, some entries at a time, as the connection takes them.

use airlock_proto::v1::FileInfo;
use bytes::Bytes;
use rustix::fs::{Dir, Mode, OFlags};
use rustix::io::Errno;

use super::meta::info_at;
use super::root::Root;
use super::{Failure, at};

/// Entries in one step: even with the longest names and link targets they are about a frame's worth.
const ENTRIES: usize = 32;

#[derive(Debug)]
pub(crate) struct List {
    folder: Dir,
    path: Bytes,
}

impl List {
    pub(super) fn begin(root: &Root, path: &Bytes) -> Result<Self, Failure> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let folder = root.open_at(path, flags, Mode::empty()).map_err(at(path))?;
        Ok(Self {
            folder: Dir::new(folder).map_err(at(path))?,
            path: path.clone(),
        })
    }

    /// The next entries; `None` at the end.
    pub(super) fn step(&mut self) -> Result<Option<Vec<FileInfo>>, Failure> {
        let mut entries = Vec::new();
        while entries.len() < ENTRIES {
            let Some(entry) = self.folder.read() else {
                break;
            };
            let entry = entry.map_err(at(&self.path))?;
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            let folder = self.folder.fd().map_err(at(&self.path))?;
            match info_at(folder, name) {
                Ok(info) => entries.push(info),
                // It has gone meanwhile.
                Err(Errno::NOENT) => {}
                Err(errno) => return Err(Failure::of(name, errno)),
            }
        }
        Ok((!entries.is_empty()).then_some(entries))
    }
}
