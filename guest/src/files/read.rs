//! Reading a file, a frame at a time, as the connection takes it.

use std::os::fd::OwnedFd;

use airlock_proto::MAX_DATA_BYTES;
use airlock_proto::v1::{FileData, FileRead};
use bytes::BytesMut;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::meta::check_regular;
use super::root::Root;
use super::{Failure, at};

#[derive(Debug)]
pub(crate) struct Read {
    file: OwnedFd,
    path: bytes::Bytes,
    offset: u64,
    left: u64,
}

impl Read {
    pub(super) fn begin(root: &Root, request: &FileRead) -> Result<Self, Failure> {
        let path = &request.path;
        let file = root.open_at(path, OFlags::RDONLY, Mode::empty());
        let file = file.map_err(at(path))?;
        check_regular(&file, path)?;
        Ok(Self {
            file,
            path: path.clone(),
            offset: request.offset,
            left: match request.length {
                0 => u64::MAX,
                length => length,
            },
        })
    }

    /// The next bytes; `eof` with the last, which may be none.
    pub(super) fn step(&mut self) -> Result<FileData, Failure> {
        let want = usize::try_from(self.left).map_or(MAX_DATA_BYTES, |l| l.min(MAX_DATA_BYTES));
        let mut data = BytesMut::zeroed(want);
        let length = loop {
            match rustix::io::pread(&self.file, &mut data[..], self.offset) {
                Ok(length) => break length,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Failure::of(&self.path, errno)),
            }
        };
        data.truncate(length);
        let offset = self.offset;
        self.offset += length as u64;
        self.left -= length as u64;
        Ok(FileData {
            offset,
            // A file of /proc gives less than was asked for without being at its end: only nothing is the end.
            eof: length == 0 || self.left == 0,
            data: data.freeze(),
        })
    }
}
