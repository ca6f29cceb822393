//! Block device (VIRTIO 1.2, 5.2) on a raw file.
//!
//! `request.rs` reads a request, `disk.rs` does it; neither knows rings. Requests run on the I/O thread, one at a time.

mod disk;
mod request;

use std::io;
use std::path::Path;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, Queue};
use vm_memory::{Bytes, GuestMemoryMmap};

use super::queue::serve;
use super::{Activation, Interrupt, QueueWorker, VirtioDevice, Watch};
pub use disk::{Disk, DiskError};
use request::{Kind, Request, RequestError};

/// 5.2.2: one queue without VIRTIO_BLK_F_MQ.
const QUEUE_SIZES: [u16; 1] = [256];
/// Data buffers of one request: a full queue without header and status.
const MAX_SEGMENTS: u32 = 254;
/// Of discard and write-zeroes: ranges in one request, and the length of one (in sectors; 1 GiB).
pub(crate) const MAX_RANGES: u32 = 16;
const MAX_RANGE_SECTORS: u32 = 1 << 21;
const SECTOR_BYTES: u64 = 512;

/// The device.
#[derive(Debug)]
pub struct Block {
    disk: Arc<Disk>,
}

impl Block {
    /// A device for the image at `path`. `is_durable`: a flush reaches the host's storage; without it only its page
    /// cache, which is enough for an image that is thrown away with the VM.
    pub fn open(path: &Path, is_read_only: bool, is_durable: bool) -> Result<Self, DiskError> {
        Ok(Self {
            disk: Arc::new(Disk::open(path, is_read_only, is_durable)?),
        })
    }

    /// `struct virtio_blk_config` (5.2.4) as far as the offered features reach.
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |offset: usize, bytes: &[u8]| {
            config[offset..offset + bytes.len()].copy_from_slice(bytes)
        };
        put(0, &self.disk.sectors().to_le_bytes());
        put(12, &MAX_SEGMENTS.to_le_bytes());
        put(36, &MAX_RANGE_SECTORS.to_le_bytes()); // max_discard_sectors
        put(40, &MAX_RANGES.to_le_bytes());
        put(44, &1u32.to_le_bytes()); // discard_sector_alignment
        put(48, &MAX_RANGE_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
        put(52, &MAX_RANGES.to_le_bytes());
        put(56, &[1]); // write_zeroes_may_unmap
        config
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_BLK_F_SEG_MAX;
        if self.disk.is_read_only() {
            always | 1 << VIRTIO_BLK_F_RO
        } else {
            always
                | 1 << VIRTIO_BLK_F_FLUSH
                | 1 << VIRTIO_BLK_F_DISCARD
                | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let tail = usize::try_from(offset)
            .ok()
            .and_then(|offset| config.get(offset..))
            .unwrap_or(&[]);
        data.fill(0);
        let bytes = tail.len().min(data.len());
        data[..bytes].copy_from_slice(&tail[..bytes]);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Box<dyn QueueWorker>> {
        let Activation {
            memory,
            queues,
            interrupt,
            features,
        } = activation;
        let queue = queues
            .into_iter()
            .next()
            .ok_or(io::ErrorKind::InvalidInput)?;
        // 5.2.6.2: a driver that cannot flush is promised that a write is stable when it is answered.
        let writes_through = features & 1 << VIRTIO_BLK_F_FLUSH == 0;
        Ok(Box::new(BlockWorker {
            disk: self.disk.clone(),
            memory,
            queue,
            interrupt,
            writes_through,
        }))
    }
}

struct BlockWorker {
    disk: Arc<Disk>,
    memory: Arc<GuestMemoryMmap>,
    queue: Queue,
    interrupt: Arc<dyn Interrupt>,
    writes_through: bool,
}

/// Does one request and returns how many bytes the device wrote, the status byte among them.
fn answer(
    disk: &Disk,
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
    writes_through: bool,
) -> u32 {
    let request = match Request::parse(memory, chain) {
        Ok(request) => request,
        // Nowhere to put a status: the driver gets its buffers back, with nothing written.
        Err(RequestError::NoStatus) => return 0,
        Err(RequestError::Malformed { status }) => {
            return u32::from(memory.write_obj(VIRTIO_BLK_S_IOERR as u8, status).is_ok());
        }
    };
    let (status, data_bytes) = match execute(disk, memory, &request, writes_through) {
        Ok(Some(data_bytes)) => (VIRTIO_BLK_S_OK, data_bytes),
        Ok(None) => (VIRTIO_BLK_S_UNSUPP, 0),
        Err(_) => (VIRTIO_BLK_S_IOERR, 0),
    };
    match memory.write_obj(status as u8, request.status) {
        Ok(()) => data_bytes + 1,
        Err(_) => 0,
    }
}

/// Bytes written into the guest's buffers; None for a request that this device does not know.
fn execute(
    disk: &Disk,
    memory: &GuestMemoryMmap,
    request: &Request,
    writes_through: bool,
) -> io::Result<Option<u32>> {
    match request.kind {
        Kind::Read => disk.read(memory, request.sector, &request.data)?,
        Kind::Write => {
            disk.write(memory, request.sector, &request.data)?;
            if writes_through {
                disk.flush()?;
            }
            return Ok(Some(0));
        }
        Kind::Flush => {
            disk.flush()?;
            return Ok(Some(0));
        }
        Kind::Discard | Kind::WriteZeroes => {
            for range in request.ranges(memory)? {
                disk.clear(range, request.kind == Kind::Discard)?;
            }
            return Ok(Some(0));
        }
        Kind::GetId => disk.write_id(memory, &request.data)?,
        Kind::Unknown => return Ok(None),
    }
    // Bounded by `request::MAX_DATA_BYTES`.
    Ok(Some(request.data_bytes() as u32))
}

impl QueueWorker for BlockWorker {
    fn start(&mut self, _watch: &mut dyn Watch) -> io::Result<()> {
        Ok(())
    }

    fn on_kick(&mut self, _queue: u16, _watch: &mut dyn Watch) -> io::Result<()> {
        let Self {
            disk,
            memory,
            queue,
            interrupt,
            writes_through,
        } = self;
        if serve(queue, memory, |chain| {
            answer(disk, memory, chain, *writes_through)
        })? {
            interrupt.signal_used(0);
        }
        Ok(())
    }

    fn on_fd(&mut self, _token: u64, _events: u32, _watch: &mut dyn Watch) -> io::Result<()> {
        Ok(())
    }

    fn stop(&mut self, _watch: &mut dyn Watch) {}
}

#[cfg(test)]
mod tests;
