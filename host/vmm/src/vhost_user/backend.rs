//! What the frontend has set up so far, and the worker that serves it.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use vhost::vhost_user::message::VhostUserVirtioFeatures;
use vhost::vhost_user::{Error, Result};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::lock;
use super::watch::{EPOLLIN, EpollWatch, Target};
use crate::devices::virtio::{Activation, Interrupt, QueueWorker, VirtioDevice, Watch};
use crate::tell;

/// VHOST_USER_F_PROTOCOL_FEATURES.
pub(super) const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// VIRTIO_F_EVENT_IDX (VIRTIO 1.2, 2.7.10).
const EVENT_IDX: u64 = 1 << 29;
/// QEMU's virtio-mmio offers this size (VIRTQUEUE_MAX_SIZE), whatever a device's own limit is.
pub(super) const MAX_RING: u16 = 1024;

/// Whether the worker may touch the rings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Not all rings are set up.
    Down,
    Running,
    /// Stopped by the frontend; the worker waits to go on.
    Held,
}

/// What of the guest's memory is where; equal tables mean equal memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) user_address: u64,
    pub(super) size: u64,
    pub(super) guest_address: u64,
    pub(super) file_offset: u64,
    pub(super) file: (u64, u64),
}

#[derive(Debug, Default)]
pub(super) struct Ring {
    pub(super) size: u16,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    pub(super) base: u16,
    pub(super) kick: Option<File>,
    pub(super) enabled: bool,
}

/// Which rings a worker was made for.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Layout {
    features: u64,
    mappings: Vec<Mapping>,
    rings: Vec<(u16, u64, u64, u64)>,
}

pub(super) struct Backend {
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) features: u64,
    pub(super) memory: Option<Arc<GuestMemoryMmap>>,
    pub(super) mappings: Vec<Mapping>,
    pub(super) rings: Vec<Ring>,
    pub(super) calls: Arc<Calls>,
    pub(super) state: State,
    worker: Option<(Box<dyn QueueWorker>, Layout)>,
    /// Kick descriptors that the loop watches.
    pub(super) watched: Vec<Option<RawFd>>,
    /// Descriptors of replaced kicks; open until the loop has forgotten them.
    pub(super) retired: Vec<File>,
}

impl Backend {
    pub(super) fn new(device: Box<dyn VirtioDevice>, queues: usize) -> Self {
        Self {
            device,
            features: 0,
            memory: None,
            mappings: Vec::new(),
            rings: (0..queues).map(|_| Ring::default()).collect(),
            calls: Arc::new(Calls((0..queues).map(|_| Mutex::new(None)).collect())),
            state: State::Down,
            worker: None,
            watched: vec![None; queues],
            retired: Vec::new(),
        }
    }

    pub(super) fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        self.rings
            .get_mut(index as usize)
            .ok_or(Error::InvalidParam)
    }

    fn layout(&self) -> Layout {
        let rings = self
            .rings
            .iter()
            .map(|ring| (ring.size, ring.descriptors, ring.available, ring.used))
            .collect();
        Layout {
            features: self.features,
            mappings: self.mappings.clone(),
            rings,
        }
    }

    /// Brings worker and loop in line with what the frontend has said.
    pub(super) fn settle(&mut self, watch: &mut EpollWatch) -> io::Result<()> {
        // Without the protocol features rings are enabled from the start.
        let always_enabled = self.features & PROTOCOL_FEATURES == 0;
        let ready = self.memory.is_some()
            && self
                .rings
                .iter()
                .all(|ring| ring.kick.is_some() && (ring.enabled || always_enabled));
        self.watch_kicks(ready, watch)?;
        match (ready, self.state) {
            (true, State::Down | State::Held) => self.go(watch),
            (false, State::Running) => {
                self.state = State::Held;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn watch_kicks(&mut self, ready: bool, watch: &mut EpollWatch) -> io::Result<()> {
        for (index, ring) in self.rings.iter().enumerate() {
            let wanted = ring.kick.as_ref().filter(|_| ready).map(AsRawFd::as_raw_fd);
            // A retired descriptor's number may be in use again, so equal numbers prove nothing then.
            if self.watched[index] == wanted && self.retired.is_empty() {
                continue;
            }
            if let Some(old) = self.watched[index].take() {
                watch.remove(old)?;
            }
            if let Some(new) = wanted {
                watch.insert(
                    new,
                    Target::Kick(u16::try_from(index).unwrap_or(u16::MAX)),
                    EPOLLIN,
                )?;
            }
            self.watched[index] = wanted;
        }
        self.retired.clear();
        Ok(())
    }

    /// All rings are set up: the worker goes on where it was, or a new one starts.
    fn go(&mut self, watch: &mut EpollWatch) -> io::Result<()> {
        let layout = self.layout();
        let continues =
            self.worker.as_ref().is_some_and(|(_, old)| *old == layout) && self.bases_match();
        if !continues {
            self.stop_worker(watch);
            let mut worker = self.activate()?;
            worker.start(watch)?;
            self.worker = Some((worker, layout));
        }
        self.state = State::Running;
        // Kicks may have come while nobody looked.
        for index in 0..self.rings.len() {
            self.kick_worker(u16::try_from(index).unwrap_or(u16::MAX), watch)?;
        }
        Ok(())
    }

    /// Whether the rings go on where they were stopped.
    fn bases_match(&self) -> bool {
        self.rings
            .iter()
            .all(|ring| self.used_index(ring) == Some(ring.base))
    }

    /// Our workers return every buffer before they pause, so the next buffer to take is the number of those used.
    pub(super) fn used_index(&self, ring: &Ring) -> Option<u16> {
        let mut queue = Queue::new(ring.size).ok()?;
        queue
            .try_set_used_ring_address(GuestAddress(ring.used))
            .ok()?;
        let memory = self.memory.as_ref()?;
        queue
            .used_idx(&**memory, Ordering::Acquire)
            .ok()
            .map(|index| index.0)
    }

    fn activate(&mut self) -> io::Result<Box<dyn QueueWorker>> {
        let memory = self.memory.clone().ok_or(io::ErrorKind::InvalidInput)?;
        let mut queues = Vec::with_capacity(self.rings.len());
        for ring in &self.rings {
            queues.push(
                self.queue(ring, &memory)
                    .ok_or_else(|| io::Error::other("a ring is not in guest memory"))?,
            );
        }
        self.device.activate(Activation {
            memory,
            queues,
            interrupt: self.calls.clone(),
            features: self.features & !PROTOCOL_FEATURES,
        })
    }

    fn queue(&self, ring: &Ring, memory: &GuestMemoryMmap) -> Option<Queue> {
        let mut queue = Queue::new(ring.size).ok()?;
        queue
            .try_set_desc_table_address(GuestAddress(ring.descriptors))
            .ok()?;
        queue
            .try_set_avail_ring_address(GuestAddress(ring.available))
            .ok()?;
        queue
            .try_set_used_ring_address(GuestAddress(ring.used))
            .ok()?;
        queue.set_event_idx(self.features & EVENT_IDX != 0);
        queue.set_next_avail(ring.base);
        queue.set_next_used(self.used_index(ring)?);
        queue.set_ready(true);
        queue.is_valid(memory).then_some(queue)
    }

    pub(super) fn stop_worker(&mut self, watch: &mut EpollWatch) {
        if let Some((mut worker, _)) = self.worker.take() {
            worker.stop(watch);
        }
    }

    pub(super) fn on_kick(&mut self, index: u16, watch: &mut EpollWatch) -> io::Result<()> {
        if let Some(kick) = self
            .rings
            .get(usize::from(index))
            .and_then(|ring| ring.kick.as_ref())
        {
            // EAGAIN if someone was quicker; either way the counter is 0 afterwards.
            let _ = rustix::io::read(kick, &mut [0u8; 8]);
        }
        self.kick_worker(index, watch)
    }

    fn kick_worker(&mut self, index: u16, watch: &mut EpollWatch) -> io::Result<()> {
        let Some((worker, _)) = &mut self.worker else {
            return Ok(());
        };
        let result = worker.on_kick(index, watch);
        self.check(result, watch)
    }

    pub(super) fn on_fd(
        &mut self,
        token: u64,
        events: u32,
        watch: &mut EpollWatch,
    ) -> io::Result<()> {
        let Some((worker, _)) = &mut self.worker else {
            return Ok(());
        };
        let result = worker.on_fd(token, events, watch);
        self.check(result, watch)
    }

    /// A guest that broke its rings loses the device, and nothing else happens.
    fn check(&mut self, result: io::Result<()>, watch: &mut EpollWatch) -> io::Result<()> {
        if let Err(error) = result {
            tell!("airlock-vmm: the guest's driver broke the vsock device, which stops: {error}");
            self.stop_worker(watch);
        }
        Ok(())
    }

    pub(super) fn guest_address(&self, user_address: u64) -> Result<u64> {
        let within = |mapping: &Mapping| {
            let offset = user_address.checked_sub(mapping.user_address)?;
            (offset < mapping.size).then(|| mapping.guest_address.checked_add(offset))?
        };
        self.mappings
            .iter()
            .find_map(within)
            .ok_or(Error::InvalidParam)
    }
}

/// The frontend's call descriptors. They are replaced while the VM runs.
#[derive(Debug)]
pub(super) struct Calls(pub(super) Vec<Mutex<Option<File>>>);

impl Interrupt for Calls {
    fn signal_used(&self, queue: u16) {
        let Some(call) = self.0.get(usize::from(queue)) else {
            return;
        };
        if let Some(fd) = &*lock(call) {
            // EAGAIN: the counter is full, so the driver has not looked for 2^64 calls and will.
            let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
        }
    }

    /// Needs the backend channel of vhost-user, which no device of ours asks for.
    fn signal_config(&self) {}
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backend")
            .field("state", &self.state)
            .field("rings", &self.rings)
            .finish_non_exhaustive()
    }
}
