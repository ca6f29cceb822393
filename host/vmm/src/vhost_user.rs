//! A virtio device of ours served to QEMU over vhost-user: one thread, one socket, the same worker as behind virtio-mmio.
//!
//! QEMU keeps the device's registers and hands us guest memory, rings, kicks and calls. Rings are stopped and started
//! again when a VM is paused and resumed; the worker and its connections survive that. Nothing here knows what kind of
//! device it serves.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::devices::virtio::{Activation, Interrupt, QueueWorker, VirtioDevice, Watch};

/// VHOST_USER_F_PROTOCOL_FEATURES.
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// VIRTIO_F_EVENT_IDX (VIRTIO 1.2, 2.7.10).
const EVENT_IDX: u64 = 1 << 29;
/// QEMU's virtio-mmio offers this size (VIRTQUEUE_MAX_SIZE), whatever a device's own limit is.
const MAX_RING: u16 = 1024;
/// Events taken from the kernel at once.
const EVENTS: usize = 64;

/// The device's thread.
#[derive(Debug)]
pub struct VhostUserServer {
    thread: Option<JoinHandle<()>>,
    stop: OwnedFd,
}

impl VhostUserServer {
    /// Serves `device` to the frontend at the other end of `socket`. `queues` of the device's queues are the
    /// frontend's to set up; it keeps the others to itself. `on_end` is called once, when the frontend is gone or broken.
    pub fn start(
        device: Box<dyn VirtioDevice>,
        queues: usize,
        socket: UnixStream,
        on_end: impl FnOnce(io::Result<()>) + Send + 'static,
    ) -> io::Result<Self> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let stopped = stop.try_clone()?;
        let control = socket.try_clone()?;
        let backend = Arc::new(Mutex::new(Backend::new(device, queues)));
        let handler = BackendReqHandler::from_stream(socket, backend.clone());
        let server = Server {
            backend,
            handler,
            control,
            stop: stopped,
            watch: EpollWatch::new()?,
        };
        let thread = std::thread::Builder::new()
            .name("vhost-user".into())
            .spawn(move || on_end(server.run()))?;
        Ok(Self {
            thread: Some(thread),
            stop,
        })
    }
}

impl Drop for VhostUserServer {
    /// The device touches nothing of the host once this returns.
    fn drop(&mut self) {
        // Cannot fail: the counter is far from its limit.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // A panic in it has been printed.
            let _ = thread.join();
        }
    }
}

struct Server {
    backend: Arc<Mutex<Backend>>,
    handler: BackendReqHandler<Mutex<Backend>>,
    control: UnixStream,
    stop: OwnedFd,
    watch: EpollWatch,
}

impl Server {
    fn run(mut self) -> io::Result<()> {
        let result = self.serve();
        let mut backend = lock(&self.backend);
        backend.stop_worker(&mut self.watch);
        result
    }

    fn serve(&mut self) -> io::Result<()> {
        self.watch
            .insert(self.control.as_raw_fd(), Target::Control, EPOLLIN)?;
        self.watch
            .insert(self.stop.as_raw_fd(), Target::Stop, EPOLLIN)?;
        let mut events = [EpollEvent::default(); EVENTS];
        loop {
            if lock(&self.backend).state != State::Running {
                if !self.wait_for_control()? {
                    return Ok(());
                }
                if !self.on_control()? {
                    return Ok(());
                }
                continue;
            }
            let count = self.watch.wait(&mut events)?;
            for event in &events[..count] {
                // Gone or stopped since, by an event before it.
                let Some(target) = self.watch.target(event.data()) else {
                    continue;
                };
                match target {
                    Target::Stop => return Ok(()),
                    Target::Control => {
                        if !self.on_control()? {
                            return Ok(());
                        }
                        if lock(&self.backend).state != State::Running {
                            break;
                        }
                    }
                    Target::Kick(index) => lock(&self.backend).on_kick(index, &mut self.watch)?,
                    Target::Worker(token) => {
                        lock(&self.backend).on_fd(token, event.events(), &mut self.watch)?;
                    }
                }
            }
        }
    }

    /// Waits while the rings are stopped; `false` if the server is to end.
    fn wait_for_control(&self) -> io::Result<bool> {
        let mut fds = [
            PollFd::new(&self.control, PollFlags::IN),
            PollFd::new(&self.stop, PollFlags::IN),
        ];
        loop {
            match poll(&mut fds, None) {
                Ok(_) => return Ok(fds[1].revents().is_empty()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// One message of the frontend; `false` if it is gone.
    fn on_control(&mut self) -> io::Result<bool> {
        match self.handler.handle_request() {
            Ok(()) => {}
            Err(Error::Disconnected | Error::PartialMessage) => return Ok(false),
            Err(Error::SocketBroken(_)) => return Ok(false),
            Err(error) => return Err(io::Error::other(format!("vhost-user: {error}"))),
        }
        lock(&self.backend).settle(&mut self.watch)?;
        Ok(true)
    }
}

/// Whether the worker may touch the rings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Not all rings are set up.
    Down,
    Running,
    /// Stopped by the frontend; the worker waits to go on.
    Held,
}

/// What of the guest's memory is where; equal tables mean equal memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mapping {
    user_address: u64,
    size: u64,
    guest_address: u64,
    file_offset: u64,
    file: (u64, u64),
}

#[derive(Debug, Default)]
struct Ring {
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    base: u16,
    kick: Option<File>,
    enabled: bool,
}

/// Which rings a worker was made for.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Layout {
    features: u64,
    mappings: Vec<Mapping>,
    rings: Vec<(u16, u64, u64, u64)>,
}

struct Backend {
    device: Box<dyn VirtioDevice>,
    features: u64,
    memory: Option<Arc<GuestMemoryMmap>>,
    mappings: Vec<Mapping>,
    rings: Vec<Ring>,
    calls: Arc<Calls>,
    state: State,
    worker: Option<(Box<dyn QueueWorker>, Layout)>,
    /// Kick descriptors that the loop watches.
    watched: Vec<Option<RawFd>>,
    /// Descriptors of replaced kicks; open until the loop has forgotten them.
    retired: Vec<File>,
}

impl Backend {
    fn new(device: Box<dyn VirtioDevice>, queues: usize) -> Self {
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

    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
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
    fn settle(&mut self, watch: &mut EpollWatch) -> io::Result<()> {
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
    fn used_index(&self, ring: &Ring) -> Option<u16> {
        let mut queue = Queue::new(ring.size).ok()?;
        queue
            .try_set_used_ring_address(GuestAddress(ring.used))
            .ok()?;
        let memory = self.memory.as_ref()?;
        queue
            .used_idx(&**memory, std::sync::atomic::Ordering::Acquire)
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

    fn stop_worker(&mut self, watch: &mut EpollWatch) {
        if let Some((mut worker, _)) = self.worker.take() {
            worker.stop(watch);
        }
    }

    fn on_kick(&mut self, index: u16, watch: &mut EpollWatch) -> io::Result<()> {
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

    fn on_fd(&mut self, token: u64, events: u32, watch: &mut EpollWatch) -> io::Result<()> {
        let Some((worker, _)) = &mut self.worker else {
            return Ok(());
        };
        let result = worker.on_fd(token, events, watch);
        self.check(result, watch)
    }

    /// A guest that broke its rings loses the device, and nothing else happens.
    fn check(&mut self, result: io::Result<()>, watch: &mut EpollWatch) -> io::Result<()> {
        if let Err(error) = result {
            eprintln!(
                "airlock-vmm: the guest's driver broke the vsock device, which stops: {error}"
            );
            self.stop_worker(watch);
        }
        Ok(())
    }

    fn guest_address(&self, user_address: u64) -> Result<u64> {
        let inside = |mapping: &&Mapping| {
            (mapping.user_address..mapping.user_address + mapping.size).contains(&user_address)
        };
        let mapping = self
            .mappings
            .iter()
            .find(inside)
            .ok_or(Error::InvalidParam)?;
        Ok(user_address - mapping.user_address + mapping.guest_address)
    }
}

impl VhostUserBackendReqHandlerMut for Backend {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("device reset"))
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.device.features() | PROTOCOL_FEATURES)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !(self.device.features() | PROTOCOL_FEATURES) != 0 {
            return Err(Error::InvalidParam);
        }
        self.features = features;
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let mut mappings = Vec::with_capacity(regions.len());
        for (region, file) in regions.iter().zip(&files) {
            let metadata = file.metadata().map_err(Error::ReqHandlerError)?;
            mappings.push(Mapping {
                user_address: region.user_addr,
                size: region.memory_size,
                guest_address: region.guest_phys_addr,
                file_offset: region.mmap_offset,
                file: (metadata.dev(), metadata.ino()),
            });
        }
        // After a pause the same memory is announced again: the worker keeps its mapping.
        if self.memory.is_some() && mappings == self.mappings {
            return Ok(None);
        }
        let mut mapped = Vec::with_capacity(regions.len());
        for (region, file) in regions.iter().zip(files) {
            let region = GuestRegionMmap::new(
                region.mmap_region(file)?,
                GuestAddress(region.guest_phys_addr),
            );
            mapped.push(region.ok_or(Error::InvalidParam)?);
        }
        let memory = GuestMemoryMmap::from_regions(mapped)
            .map_err(|error| Error::ReqHandlerError(io::Error::other(error)))?;
        self.memory = Some(Arc::new(memory));
        self.mappings = mappings;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num)
            .ok()
            .filter(|&size| size.is_power_of_two() && size <= MAX_RING);
        self.ring(index)?.size = size.ok_or(Error::InvalidParam)?;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let (descriptors, used, available) = (
            self.guest_address(descriptor)?,
            self.guest_address(used)?,
            self.guest_address(available)?,
        );
        let ring = self.ring(index)?;
        (ring.descriptors, ring.used, ring.available) = (descriptors, used, available);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.ring(index)?.base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        // The ring stops with this (vhost-user, "starting and stopping rings").
        let ring = self.ring(index)?;
        let kick = ring.kick.take();
        self.retired.extend(kick);
        let ring = self.rings.get(index as usize).ok_or(Error::InvalidParam)?;
        let base = self.used_index(ring).unwrap_or(ring.base);
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let old = std::mem::replace(&mut self.ring(u32::from(index))?.kick, fd);
        self.retired.extend(old);
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let call = self
            .calls
            .0
            .get(usize::from(index))
            .ok_or(Error::InvalidParam)?;
        *lock(call) = fd;
        Ok(())
    }

    fn set_vring_err(&mut self, _index: u8, _fd: Option<File>) -> Result<()> {
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.ring(index)?.enabled = enable;
        Ok(())
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        // The library has bounded the size by its message.
        let mut config = vec![0; size as usize];
        self.device.read_config(u64::from(offset), &mut config);
        Ok(config)
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.device.write_config(u64::from(offset), buf);
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("gpu"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("shared objects"))
    }

    fn get_inflight_fd(
        &mut self,
        _inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidOperation("reconnecting"))
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("reconnecting"))
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Err(Error::InvalidOperation("memory hotplug"))
    }

    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _fd: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        Err(Error::InvalidOperation("memory hotplug"))
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> Result<()> {
        Err(Error::InvalidOperation("memory hotplug"))
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("migration"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("migration"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("shared memory"))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("migration"))
    }
}

/// The frontend's call descriptors. They are replaced while the VM runs.
#[derive(Debug)]
struct Calls(Vec<Mutex<Option<File>>>);

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

const EPOLLIN: u32 = libc::EPOLLIN as u32;

#[derive(Debug, Clone, Copy)]
enum Target {
    Control,
    Stop,
    Kick(u16),
    Worker(u64),
}

/// epoll with tokens that go stale with their descriptor, so an event never reaches the wrong owner.
struct EpollWatch {
    epoll: Epoll,
    targets: HashMap<u64, Target>,
    ids: HashMap<RawFd, u64>,
    next_id: u64,
}

impl EpollWatch {
    fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new()?,
            targets: HashMap::new(),
            ids: HashMap::new(),
            next_id: 0,
        })
    }

    fn insert(&mut self, fd: RawFd, target: Target, events: u32) -> io::Result<()> {
        let id = self.next_id;
        self.control(ControlOperation::Add, fd, id, events)?;
        self.next_id += 1;
        self.targets.insert(id, target);
        self.ids.insert(fd, id);
        Ok(())
    }

    fn target(&self, id: u64) -> Option<Target> {
        self.targets.get(&id).copied()
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: RawFd,
        id: u64,
        events: u32,
    ) -> io::Result<()> {
        self.epoll.ctl(
            operation,
            fd,
            EpollEvent::new(EventSet::from_bits_truncate(events), id),
        )
    }

    fn wait(&self, events: &mut [EpollEvent]) -> io::Result<usize> {
        loop {
            match self.epoll.wait(-1, events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }
}

impl Watch for EpollWatch {
    fn add(&mut self, fd: RawFd, token: u64, events: u32) -> io::Result<()> {
        self.insert(fd, Target::Worker(token), events)
    }

    fn modify(&mut self, fd: RawFd, token: u64, events: u32) -> io::Result<()> {
        let id = *self.ids.get(&fd).ok_or(io::ErrorKind::NotFound)?;
        self.targets.insert(id, Target::Worker(token));
        self.control(ControlOperation::Modify, fd, id, events)
    }

    fn remove(&mut self, fd: RawFd) -> io::Result<()> {
        let id = self.ids.remove(&fd).ok_or(io::ErrorKind::NotFound)?;
        self.targets.remove(&id);
        self.control(ControlOperation::Delete, fd, id, 0)
    }
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backend")
            .field("state", &self.state)
            .field("rings", &self.rings)
            .finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
