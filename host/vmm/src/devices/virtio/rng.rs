//! Entropy device (VIRTIO 1.2, 5.4): the host's random numbers, as many as the guest has room for.

use std::fs::File;
use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{DescriptorChain, Queue};
use vm_memory::{Bytes, GuestMemoryMmap};

use super::queue::serve;
use super::{Activation, Interrupt, QueueWorker, VirtioDevice, Watch};

const QUEUE_SIZES: [u16; 1] = [64];
/// At most this much for one request: the device may fill less than there is room for (5.4.6.1), and no guest can
/// keep the I/O thread busy with one descriptor of 4 GiB.
const MAX_REQUEST_BYTES: usize = 4096;

/// The device.
#[derive(Debug)]
pub struct Rng {
    source: Arc<File>,
}

impl Rng {
    /// A device that reads the kernel's generator.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            source: Arc::new(File::open("/dev/urandom")?),
        })
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    /// 5.4.4: there is none.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Box<dyn QueueWorker>> {
        let Activation {
            memory,
            queues,
            interrupt,
            ..
        } = activation;
        let queue = queues
            .into_iter()
            .next()
            .ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Box::new(RngWorker {
            source: self.source.clone(),
            memory,
            queue,
            interrupt,
        }))
    }
}

struct RngWorker {
    source: Arc<File>,
    memory: Arc<GuestMemoryMmap>,
    queue: Queue,
    interrupt: Arc<dyn Interrupt>,
}

/// Fills the buffers that can be filled and says how many bytes that were.
fn fill(source: &File, memory: &GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>) -> u32 {
    let mut filled = 0;
    for descriptor in chain.writable() {
        let bytes = (descriptor.len() as usize).min(MAX_REQUEST_BYTES - filled);
        if memory
            .read_exact_volatile_from(descriptor.addr(), &mut &*source, bytes)
            .is_err()
        {
            break; // memory that does not exist: the driver learns by the length
        }
        filled += bytes;
    }
    filled as u32
}

impl QueueWorker for RngWorker {
    fn start(&mut self, _watch: &mut dyn Watch) -> io::Result<()> {
        Ok(())
    }

    fn on_kick(&mut self, _queue: u16, _watch: &mut dyn Watch) -> io::Result<()> {
        let Self {
            source,
            memory,
            queue,
            interrupt,
        } = self;
        if serve(queue, memory, |chain| fill(source, memory, chain))? {
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
