//! The virtio-mmio transport (VIRTIO 1.2, 4.2): registers on the vCPU side, and the interrupt.
//!
//! What a driver reads lies in a page that the guest sees as read-only memory, so reads never leave the guest; this
//! file keeps the page up to date. Writes come here, except doorbells (QueueNotify), which are ioeventfds.
//!
//! Interrupts are edges, and acknowledging "used buffer" is an ioeventfd that nobody reads: that status bit is set by
//! the first used buffer after a reset and then stays. A driver has to cope with it being set although the rings are
//! empty (an edge may always find work that an earlier look at the ring has done), and a bit that is never cleared
//! cannot be cleared too late. The configuration bit is set and acknowledged exactly as 4.2.2 says.

pub mod registers;

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Activation, Interrupt, VirtioDevice};
use crate::bus::BusDevice;
use crate::event_loop::{WorkerId, Workers};
use crate::guest_log::guest_warning;
use registers::{Register, RegisterPage};

/// "virt".
const MAGIC: u32 = 0x7472_6976;
/// Version of the register layout: not legacy.
const VERSION: u32 = 2;
/// Vendor ID "AIRL".
const VENDOR: u32 = u32::from_le_bytes(*b"AIRL");
/// What a shared memory region that does not exist reads as (4.2.2, SHMLenLow).
const NO_SHARED_MEMORY: u32 = u32::MAX;

/// Bits of InterruptStatus.
const INTERRUPT_USED_BUFFER: u32 = 1 << 0;
const INTERRUPT_CONFIG_CHANGE: u32 = 1 << 1;

/// The device's line to the driver: status bits in the register page, and an edge.
#[derive(Debug)]
pub struct MmioInterrupt {
    page: RegisterPage,
    edge: EventFd,
}

impl MmioInterrupt {
    fn raise(&self, bit: u32) {
        self.page.set_bits(Register::InterruptStatus, bit);
        // Cannot fail: KVM empties the counter.
        let _ = self.edge.write(1);
    }
}

impl Interrupt for MmioInterrupt {
    fn signal_used(&self, _queue: u16) {
        self.raise(INTERRUPT_USED_BUFFER);
    }

    fn signal_config(&self) {
        self.page.increment(Register::ConfigGeneration);
        self.raise(INTERRUPT_CONFIG_CHANGE);
    }

    fn signal_needs_reset(&self) {
        self.page
            .set_bits(Register::Status, VIRTIO_CONFIG_S_NEEDS_RESET);
        self.raise(INTERRUPT_CONFIG_CHANGE);
    }
}

/// A queue as the driver has described it so far.
#[derive(Debug, Clone, Copy, Default)]
struct QueueSetup {
    size: u16,
    descriptors: u64,
    driver_area: u64,
    device_area: u64,
    is_ready: bool,
}

/// One device behind virtio-mmio registers.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: Arc<GuestMemoryMmap>,
    workers: Workers,
    page: RegisterPage,
    interrupt: Arc<MmioInterrupt>,
    kicks: Vec<EventFd>,
    acknowledged: EventFd,
    queues: Vec<QueueSetup>,
    selected_queue: usize,
    selected_device_features: u32,
    selected_driver_features: u32,
    driver_features: u64,
    worker: Option<WorkerId>,
}

impl std::fmt::Debug for MmioTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MmioTransport")
            .field("device_type", &self.device.device_type())
            .field("status", &self.page.load(Register::Status))
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

impl MmioTransport {
    /// Puts `device` behind the registers in `page`.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestMemoryMmap>,
        workers: Workers,
        page: RegisterPage,
    ) -> io::Result<Self> {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let queue_count = device.queue_max_sizes().len();
        let kicks = (0..queue_count)
            .map(|_| event())
            .collect::<Result<_, _>>()?;
        let interrupt = Arc::new(MmioInterrupt {
            page: page.clone(),
            edge: event()?,
        });
        let mut transport = Self {
            device,
            memory,
            workers,
            page,
            interrupt,
            kicks,
            acknowledged: event()?,
            queues: vec![QueueSetup::default(); queue_count],
            selected_queue: 0,
            selected_device_features: 0,
            selected_driver_features: 0,
            driver_features: 0,
            worker: None,
        };
        transport.show_constants();
        transport.clear();
        Ok(transport)
    }

    /// The edge of the interrupt line: to be an irqfd.
    pub fn interrupt_edge(&self) -> &EventFd {
        &self.interrupt.edge
    }

    /// Register offset, written value and event of each write that need not come here: to be ioeventfds.
    pub fn doorbells(&self) -> impl Iterator<Item = (u64, u32, &EventFd)> {
        let kicks = (0..)
            .zip(&self.kicks)
            .map(|(queue, kick)| (Register::QueueNotify.offset(), queue, kick));
        let acknowledge = (
            Register::InterruptAck.offset(),
            INTERRUPT_USED_BUFFER,
            &self.acknowledged,
        );
        kicks.chain([acknowledge])
    }

    fn show_constants(&self) {
        self.page.store(Register::MagicValue, MAGIC);
        self.page.store(Register::Version, VERSION);
        self.page
            .store(Register::DeviceId, self.device.device_type());
        self.page.store(Register::VendorId, VENDOR);
        for register in [
            Register::ShmLenLow,
            Register::ShmLenHigh,
            Register::ShmBaseLow,
            Register::ShmBaseHigh,
        ] {
            self.page.store(register, NO_SHARED_MEMORY);
        }
    }

    /// The state after reset (2.4).
    fn clear(&mut self) {
        self.queues.fill(QueueSetup::default());
        self.selected_queue = 0;
        self.selected_device_features = 0;
        self.selected_driver_features = 0;
        self.driver_features = 0;
        for kick in &self.kicks {
            let _ = kick.read(); // a doorbell from before the reset; mostly there is none
        }
        self.page.store(Register::Status, 0);
        self.page.store(Register::InterruptStatus, 0);
        self.show_selected_features();
        self.show_selected_queue();
        self.show_config();
    }

    fn show_selected_features(&self) {
        let features = match self.selected_device_features {
            0 => self.device.features() as u32,
            1 => (self.device.features() >> 32) as u32,
            _ => 0,
        };
        self.page.store(Register::DeviceFeatures, features);
    }

    fn show_selected_queue(&self) {
        let max = self
            .device
            .queue_max_sizes()
            .get(self.selected_queue)
            .copied()
            .unwrap_or(0);
        let is_ready = self
            .queues
            .get(self.selected_queue)
            .is_some_and(|queue| queue.is_ready);
        self.page.store(Register::QueueNumMax, max.into());
        self.page.store(Register::QueueReady, is_ready.into());
    }

    fn show_config(&self) {
        let mut config = [0; registers::CONFIG_BYTES];
        self.device.read_config(0, &mut config);
        self.page.store_config(&config);
    }

    fn status(&self) -> u32 {
        self.page.load(Register::Status)
    }

    fn write_register(&mut self, register: Register, value: u32) {
        match register {
            Register::DeviceFeaturesSel => {
                self.selected_device_features = value;
                self.show_selected_features();
            }
            Register::DriverFeaturesSel => self.selected_driver_features = value,
            Register::DriverFeatures => self.accept_features(value),
            Register::QueueSel => {
                self.selected_queue = value as usize;
                self.show_selected_queue();
            }
            Register::QueueNum
            | Register::QueueReady
            | Register::QueueDescLow
            | Register::QueueDescHigh
            | Register::QueueDriverLow
            | Register::QueueDriverHigh
            | Register::QueueDeviceLow
            | Register::QueueDeviceHigh => self.write_queue(register, value),
            // Only where the ioeventfd is missing: in tests, and for a queue that does not exist.
            Register::QueueNotify => {
                if let Some(kick) = self.kicks.get(value as usize) {
                    let _ = kick.write(1);
                }
            }
            Register::InterruptAck => {
                self.page
                    .clear_bits(Register::InterruptStatus, value & !INTERRUPT_USED_BUFFER);
            }
            Register::Status => self.write_status(value),
            // Read-only, or of a feature that is not offered (4.2.2.1: such writes are ignored).
            _ => {}
        }
    }

    /// 3.1.1 step 4: only between DRIVER and FEATURES_OK.
    fn accept_features(&mut self, value: u32) {
        if self.status() & (VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK)
            != VIRTIO_CONFIG_S_DRIVER
        {
            return;
        }
        match self.selected_driver_features {
            0 => self.driver_features = (self.driver_features & !0xffff_ffff) | u64::from(value),
            1 => {
                self.driver_features = (self.driver_features & 0xffff_ffff) | u64::from(value) << 32
            }
            _ => {}
        }
    }

    /// 3.1.1 step 7: queues are set up between FEATURES_OK and DRIVER_OK.
    fn write_queue(&mut self, register: Register, value: u32) {
        let set_up = VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;
        if self.status() & set_up != VIRTIO_CONFIG_S_FEATURES_OK {
            return;
        }
        let max = self
            .device
            .queue_max_sizes()
            .get(self.selected_queue)
            .copied()
            .unwrap_or(0);
        let Some(queue) = self.queues.get_mut(self.selected_queue) else {
            return;
        };
        match register {
            Register::QueueReady => queue.is_ready = value == 1,
            // 4.2.2.2: the driver must not change a queue that is ready.
            _ if queue.is_ready => {}
            // 2.7: a power of two, at most what QueueNumMax says.
            Register::QueueNum => match u16::try_from(value) {
                Ok(size) if size.is_power_of_two() && size <= max => queue.size = size,
                _ => guest_warning(format_args!("queue size {value} is not possible")),
            },
            Register::QueueDescLow => set_low(&mut queue.descriptors, value),
            Register::QueueDescHigh => set_high(&mut queue.descriptors, value),
            Register::QueueDriverLow => set_low(&mut queue.driver_area, value),
            Register::QueueDriverHigh => set_high(&mut queue.driver_area, value),
            Register::QueueDeviceLow => set_low(&mut queue.device_area, value),
            Register::QueueDeviceHigh => set_high(&mut queue.device_area, value),
            _ => {}
        }
        self.show_selected_queue();
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let old = self.status();
        // 2.1.1: the driver must not clear a bit, other than by reset.
        let mut new = value & 0xff | old;
        let added = new & !old;
        if added & VIRTIO_CONFIG_S_FEATURES_OK != 0 && !self.features_are_possible() {
            // 2.2.2: a set that cannot be supported is refused by leaving FEATURES_OK clear.
            new &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 && new & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            new &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        // Before the worker starts, which may add DEVICE_NEEDS_RESET.
        self.page.store(Register::Status, new);
        let starts =
            added & new & VIRTIO_CONFIG_S_DRIVER_OK != 0 && new & VIRTIO_CONFIG_S_FAILED == 0;
        if starts && let Err(error) = self.activate() {
            guest_warning(format_args!(
                "virtio device {} does not start: {error}",
                self.device.device_type()
            ));
            self.interrupt.signal_needs_reset();
        }
    }

    fn features_are_possible(&self) -> bool {
        let is_modern = self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0;
        is_modern && self.driver_features & !self.device.features() == 0
    }

    fn activate(&mut self) -> io::Result<()> {
        let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut queues = Vec::with_capacity(self.queues.len());
        for (setup, &max) in self.queues.iter().zip(self.device.queue_max_sizes()) {
            queues.push(build_queue(setup, max, event_idx, &self.memory)?);
        }
        let interrupt: Arc<dyn Interrupt> = self.interrupt.clone();
        let worker = self.device.activate(Activation {
            memory: self.memory.clone(),
            queues,
            interrupt: interrupt.clone(),
            features: self.driver_features,
        })?;
        let kicks = self
            .kicks
            .iter()
            .map(EventFd::try_clone)
            .collect::<Result<_, _>>()?;
        self.worker = Some(
            self.workers
                .attach(worker, kicks, interrupt)
                .map_err(io::Error::other)?,
        );
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take()
            && let Err(error) = self.workers.detach(worker)
        {
            guest_warning(format_args!(
                "virtio device {} does not reset: {error}",
                self.device.device_type()
            ));
        }
        self.clear();
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = (*address & !0xffff_ffff) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = (*address & 0xffff_ffff) | u64::from(value) << 32;
}

/// A queue for the worker; an error if the driver's description cannot be served.
fn build_queue(
    setup: &QueueSetup,
    max: u16,
    event_idx: bool,
    memory: &GuestMemoryMmap,
) -> io::Result<Queue> {
    let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
    let mut queue = Queue::new(max).map_err(|error| invalid(format!("{error}")))?;
    if !setup.is_ready {
        return Ok(queue);
    }
    if setup.size == 0 {
        return Err(invalid("a queue is enabled but has no size".to_owned()));
    }
    let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
    queue.set_size(setup.size);
    for (address, set) in [
        (
            setup.descriptors,
            Queue::set_desc_table_address as fn(&mut Queue, Option<u32>, Option<u32>),
        ),
        (setup.driver_area, Queue::set_avail_ring_address),
        (setup.device_area, Queue::set_used_ring_address),
    ] {
        let (low, high) = halves(address);
        set(&mut queue, low, high);
    }
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    let taken = [queue.desc_table(), queue.avail_ring(), queue.used_ring()];
    // A misaligned address is not taken over (2.7.1).
    if taken != [setup.descriptors, setup.driver_area, setup.device_area] || !queue.is_valid(memory)
    {
        return Err(invalid(format!(
            "a queue does not lie in memory: {setup:x?}"
        )));
    }
    Ok(queue)
}

impl BusDevice for MmioTransport {
    /// Only where the page is not mapped into the guest.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.page.read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(config_offset) = offset.checked_sub(registers::CONFIG_OFFSET) {
            self.device.write_config(config_offset, data);
            self.show_config();
            return;
        }
        // 4.2.2.2: registers are accessed with 32 bits.
        match (Register::at(offset), <[u8; 4]>::try_from(data)) {
            (Some(register), Ok(bytes)) => self.write_register(register, u32::from_le_bytes(bytes)),
            _ => guest_warning(format_args!(
                "a write of {} bytes at register {offset:#x}",
                data.len()
            )),
        }
    }
}

impl Drop for MmioTransport {
    fn drop(&mut self) {
        if let Some(worker) = self.worker.take() {
            // The I/O thread may be gone already, and its workers with it.
            let _ = self.workers.detach(worker);
        }
    }
}

#[cfg(test)]
mod tests;
