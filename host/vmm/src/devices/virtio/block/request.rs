//! Reads a block request from its descriptors (VIRTIO 1.2, 5.2.6): pure, but for two reads of guest memory.
//!
//! How a request is cut into descriptors is the driver's business (2.7.4), so this works on bytes, not descriptors.

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::MAX_RANGES;

/// type, reserved, sector.
const HEADER_BYTES: usize = 16;
/// sector, number of sectors, flags (5.2.6, `virtio_blk_discard_write_zeroes`).
const RANGE_BYTES: usize = 16;
/// More than any driver sends (Linux: 1280 KiB), little enough to do in one go.
pub(super) const MAX_DATA_BYTES: u64 = 16 << 20;

/// A part of guest memory that a descriptor names; not checked to exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Buffer {
    pub(super) address: GuestAddress,
    pub(super) bytes: u32,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    GetId,
    Discard,
    WriteZeroes,
    Unknown,
}

/// One request: the header is copied, the data is not.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) kind: Kind,
    pub(super) sector: u64,
    /// Where the data comes from, or goes to: device-readable for writes, device-writable for reads.
    pub(super) data: Vec<Buffer>,
    /// Where the status byte goes.
    pub(super) status: GuestAddress,
}

/// A range of discard or write-zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) sector: u64,
    pub(super) sectors: u32,
    pub(super) flags: u32,
}

/// What a driver can have got wrong.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum RequestError {
    /// Not even a byte for the status.
    NoStatus,
    /// It can be told.
    Malformed { status: GuestAddress },
}

impl Request {
    pub(super) fn parse(
        memory: &GuestMemoryMmap,
        descriptors: impl Iterator<Item = Descriptor>,
    ) -> Result<Self, RequestError> {
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        let mut is_ordered = true;
        for descriptor in descriptors {
            let buffer = Buffer {
                address: descriptor.addr(),
                bytes: descriptor.len(),
            };
            if descriptor.is_write_only() {
                writable.push(buffer);
            } else {
                // 2.7.4.2: device-readable descriptors come first.
                is_ordered &= writable.is_empty();
                readable.push(buffer);
            }
        }
        let status = split_last_byte(&mut writable).ok_or(RequestError::NoStatus)?;
        let malformed = RequestError::Malformed { status };
        let header = if is_ordered {
            split_header(memory, &mut readable)
        } else {
            None
        };
        let Some((kind, sector)) = header else {
            return Err(malformed);
        };
        let data = if matches!(kind, Kind::Read | Kind::GetId) {
            writable
        } else {
            readable
        };
        let request = Self {
            kind,
            sector,
            data,
            status,
        };
        if request.data_bytes() > MAX_DATA_BYTES {
            Err(malformed)
        } else {
            Ok(request)
        }
    }

    /// Length of all data buffers; at most [`MAX_DATA_BYTES`] in a request that was parsed.
    pub(super) fn data_bytes(&self) -> u64 {
        self.data.iter().map(|buffer| u64::from(buffer.bytes)).sum()
    }

    /// The ranges of discard or write-zeroes.
    pub(super) fn ranges(&self, memory: &GuestMemoryMmap) -> io::Result<Vec<Range>> {
        let bytes = self.data_bytes() as usize;
        if bytes == 0
            || !bytes.is_multiple_of(RANGE_BYTES)
            || bytes / RANGE_BYTES > MAX_RANGES as usize
        {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut copy = Vec::with_capacity(bytes);
        for buffer in &self.data {
            let start = copy.len();
            copy.resize(start + buffer.bytes as usize, 0);
            memory
                .read_slice(&mut copy[start..], buffer.address)
                .map_err(io::Error::other)?;
        }
        let range = |bytes: &[u8]| {
            Some(Range {
                sector: u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?),
                sectors: u32::from_le_bytes(bytes.get(8..12)?.try_into().ok()?),
                flags: u32::from_le_bytes(bytes.get(12..16)?.try_into().ok()?),
            })
        };
        Ok(copy.chunks_exact(RANGE_BYTES).filter_map(range).collect())
    }
}

/// Takes the last byte of `buffers`.
fn split_last_byte(buffers: &mut Vec<Buffer>) -> Option<GuestAddress> {
    while let Some(last) = buffers.last_mut() {
        if last.bytes == 0 {
            buffers.pop();
            continue;
        }
        last.bytes -= 1;
        let address = last.address.0.checked_add(last.bytes.into())?;
        if last.bytes == 0 {
            buffers.pop();
        }
        return Some(GuestAddress(address));
    }
    None
}

/// Takes the header off the front of `buffers` and copies it, once: the guest may change it at any time.
fn split_header(memory: &GuestMemoryMmap, buffers: &mut Vec<Buffer>) -> Option<(Kind, u64)> {
    let mut header = [0; HEADER_BYTES];
    let mut filled = 0;
    let mut used_up = 0;
    for buffer in buffers.iter_mut() {
        let bytes = (buffer.bytes as usize).min(HEADER_BYTES - filled);
        memory
            .read_slice(&mut header[filled..filled + bytes], buffer.address)
            .ok()?;
        filled += bytes;
        buffer.address.0 = buffer.address.0.checked_add(bytes as u64)?;
        buffer.bytes -= bytes as u32;
        if filled == HEADER_BYTES {
            break;
        }
        used_up += 1;
    }
    if filled < HEADER_BYTES {
        return None;
    }
    buffers.drain(..used_up);
    buffers.retain(|buffer| buffer.bytes > 0);
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let kind = match u32::from_le_bytes([t0, t1, t2, t3]) {
        VIRTIO_BLK_T_IN => Kind::Read,
        VIRTIO_BLK_T_OUT => Kind::Write,
        VIRTIO_BLK_T_FLUSH => Kind::Flush,
        VIRTIO_BLK_T_GET_ID => Kind::GetId,
        VIRTIO_BLK_T_DISCARD => Kind::Discard,
        VIRTIO_BLK_T_WRITE_ZEROES => Kind::WriteZeroes,
        _ => Kind::Unknown,
    };
    Some((kind, u64::from_le_bytes(sector)))
}

#[cfg(test)]
mod tests;
