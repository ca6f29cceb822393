//! A raw image file, read from and written to guest memory directly.
#![expect(
    unsafe_code,
    reason = "preadv and pwritev between a file and guest memory, without a copy"
)]

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use virtio_bindings::virtio_blk::{VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP};
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::write_zeroes::{PunchHole, WriteZeroesAt};

use super::request::{Buffer, Range};
use super::{MAX_RANGE_SECTORS, SECTOR_BYTES};

/// Most buffers for one system call (IOV_MAX).
const MAX_IOVECS: usize = 1024;

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Cannot be opened.
    #[error("cannot open the disk image {0}")]
    Open(PathBuf, #[source] io::Error),
    /// Another VM writes to it, or this one would write to what another reads.
    #[error("the disk image {0} is in use by another VM")]
    InUse(PathBuf),
    /// Not a whole sector.
    #[error("the disk image {0} is {1} bytes long, which is less than one sector")]
    Empty(PathBuf, u64),
}

/// An open image. Its size is what it was when it was opened.
#[derive(Debug)]
pub struct Disk {
    file: File,
    sectors: u64,
    is_read_only: bool,
    is_durable: bool,
    id: [u8; VIRTIO_BLK_ID_BYTES as usize],
}

impl Disk {
    pub(super) fn open(
        path: &Path,
        is_read_only: bool,
        is_durable: bool,
    ) -> Result<Self, DiskError> {
        let open_error = |error| DiskError::Open(path.to_owned(), error);
        let mut file = OpenOptions::new()
            .read(true)
            .write(!is_read_only)
            .open(path)
            .map_err(open_error)?;
        let lock = if is_read_only {
            file.try_lock_shared()
        } else {
            file.try_lock()
        };
        match lock {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(DiskError::InUse(path.to_owned())),
            // A file system without locks is no reason not to boot.
            Err(TryLockError::Error(_)) => {}
        }
        // Not the metadata: block devices have no size there.
        let bytes = file.seek(SeekFrom::End(0)).map_err(open_error)?;
        if bytes < SECTOR_BYTES {
            return Err(DiskError::Empty(path.to_owned(), bytes));
        }
        Ok(Self {
            file,
            sectors: bytes / SECTOR_BYTES,
            is_read_only,
            is_durable,
            id: id_of(path),
        })
    }

    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    pub(super) fn read(
        &self,
        memory: &GuestMemoryMmap,
        sector: u64,
        data: &[Buffer],
    ) -> io::Result<()> {
        self.transfer(memory, sector, data, Direction::ToGuest)
    }

    pub(super) fn write(
        &self,
        memory: &GuestMemoryMmap,
        sector: u64,
        data: &[Buffer],
    ) -> io::Result<()> {
        self.check_writable()?;
        self.transfer(memory, sector, data, Direction::FromGuest)
    }

    pub(super) fn flush(&self) -> io::Result<()> {
        if self.is_durable {
            self.file.sync_data()
        } else {
            Ok(())
        }
    }

    /// Frees a range (its content is then undefined; here zero), or makes it zero.
    pub(super) fn clear(&self, range: Range, is_discard: bool) -> io::Result<()> {
        self.check_writable()?;
        // 5.2.6.2: flags other than unmap are reserved, and discard must not have unmap.
        let unmap = range.flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        let unknown = range.flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        if unknown || (is_discard && unmap) || range.sectors > MAX_RANGE_SECTORS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let bytes = u64::from(range.sectors) * SECTOR_BYTES;
        let offset = self.check_range(range.sector, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        if is_discard || unmap {
            match punch_hole(&self.file, offset, bytes) {
                // A file system without holes: discarding is advice, zeroing is not.
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) && is_discard => {
                    return Ok(());
                }
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
                other => return other,
            }
        }
        write_zeroes(&self.file, offset, bytes)
    }

    /// 5.2.6.1: 20 bytes, padded with zeros; a shorter buffer gets what fits.
    pub(super) fn write_id(&self, memory: &GuestMemoryMmap, data: &[Buffer]) -> io::Result<()> {
        let mut rest = &self.id[..];
        for buffer in data {
            let (part, after) = rest.split_at(rest.len().min(buffer.bytes as usize));
            memory
                .write_slice(part, buffer.address)
                .map_err(io::Error::other)?;
            rest = after;
        }
        Ok(())
    }

    fn check_writable(&self) -> io::Result<()> {
        if self.is_read_only {
            Err(io::ErrorKind::ReadOnlyFilesystem.into())
        } else {
            Ok(())
        }
    }

    /// Byte offset of a range that lies on the disk.
    fn check_range(&self, sector: u64, bytes: u64) -> io::Result<u64> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        if !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(invalid());
        }
        let end = sector
            .checked_add(bytes / SECTOR_BYTES)
            .ok_or_else(invalid)?;
        if end > self.sectors {
            return Err(invalid());
        }
        Ok(sector * SECTOR_BYTES)
    }

    fn transfer(
        &self,
        memory: &GuestMemoryMmap,
        sector: u64,
        data: &[Buffer],
        direction: Direction,
    ) -> io::Result<()> {
        let bytes = data.iter().map(|buffer| u64::from(buffer.bytes)).sum();
        let mut offset = self.check_range(sector, bytes)?;
        let mut slices = Vec::with_capacity(data.len());
        for buffer in data {
            for slice in memory.get_slices(buffer.address, buffer.bytes as usize) {
                slices.push(slice.map_err(io::Error::other)?);
            }
        }
        let guards: Vec<_> = slices.iter().map(|slice| slice.ptr_guard_mut()).collect();
        let mut iovecs: Vec<libc::iovec> = guards
            .iter()
            .map(|guard| libc::iovec {
                iov_base: guard.as_ptr().cast(),
                iov_len: guard.len(),
            })
            .collect();
        let mut rest = &mut iovecs[..];
        while !rest.is_empty() {
            let count = rest.len().min(MAX_IOVECS);
            // SAFETY: each iovec is a part of guest memory that vm-memory has found to be mapped, and `guards` and
            // `memory` keep it mapped during the call. The guest may race with the copy; these bytes are nothing
            // but bytes to this process.
            let done = unsafe { direction.call(self.file.as_raw_fd(), &rest[..count], offset) }?;
            if done == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into()); // somebody has cut the file
            }
            offset += done as u64;
            rest = skip(rest, done);
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
enum Direction {
    ToGuest,
    FromGuest,
}

impl Direction {
    /// One preadv or pwritev, again after EINTR.
    ///
    /// # Safety
    /// Every iovec must name memory that stays valid for reads and writes during the call.
    unsafe fn call(self, file: i32, iovecs: &[libc::iovec], offset: u64) -> io::Result<usize> {
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        let count = iovecs.len() as libc::c_int; // at most MAX_IOVECS
        loop {
            let result = match self {
                // SAFETY: the caller's promise.
                Self::ToGuest => unsafe { libc::preadv(file, iovecs.as_ptr(), count, offset) },
                // SAFETY: the caller's promise.
                Self::FromGuest => unsafe { libc::pwritev(file, iovecs.as_ptr(), count, offset) },
            };
            match usize::try_from(result) {
                Ok(bytes) => return Ok(bytes),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }
}

/// The iovecs behind the first `bytes` bytes.
fn skip(mut iovecs: &mut [libc::iovec], mut bytes: usize) -> &mut [libc::iovec] {
    while let Some(first) = iovecs.first_mut() {
        if bytes < first.iov_len {
            first.iov_base = first.iov_base.wrapping_byte_add(bytes);
            first.iov_len -= bytes;
            break;
        }
        bytes -= first.iov_len;
        iovecs = &mut iovecs[1..];
    }
    iovecs
}

fn punch_hole(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    file.try_clone()?.punch_hole(offset, bytes)
}

fn write_zeroes(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    file.try_clone()?
        .write_all_zeroes_at(offset, usize::try_from(bytes).map_err(io::Error::other)?)
}

/// The end of the file's name: what tells two disks of one guest apart.
fn id_of(path: &Path) -> [u8; VIRTIO_BLK_ID_BYTES as usize] {
    let name = path
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let bytes = name.as_bytes();
    let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
    let tail = &bytes[bytes.len().saturating_sub(id.len())..];
    id[..tail.len()].copy_from_slice(tail);
    id
}
