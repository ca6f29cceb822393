use super::*;
use std::os::fd::AsRawFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use crate::devices::virtio::{QueueWorker, Watch};
use crate::event_loop::IoThread;
use crate::machine::ExitSlot;
use vm_memory::GuestAddress;

/// Long enough for any loaded machine; a test that waits this long has failed.
const DEADLINE: Duration = Duration::from_secs(10);
const ACKNOWLEDGE_DRIVER: u32 = 1 | VIRTIO_CONFIG_S_DRIVER;
const NEGOTIATED: u32 = ACKNOWLEDGE_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;
const FEATURE: u32 = 1 << 5;

#[derive(Debug, PartialEq)]
enum Seen {
    Started { features: u64, sizes: Vec<u16> },
    Kick(u16),
    Stopped,
}

struct TestDevice {
    seen: Sender<Seen>,
    config: u8,
    fails: bool,
}

impl VirtioDevice for TestDevice {
    fn device_type(&self) -> u32 {
        42
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[64, 8]
    }
    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | u64::from(FEATURE)
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == 0 {
            data[0] = self.config;
        }
    }
    fn write_config(&mut self, _offset: u64, data: &[u8]) {
        self.config = data[0];
    }
    fn activate(&mut self, activation: Activation) -> io::Result<Box<dyn QueueWorker>> {
        if self.fails {
            return Err(io::Error::other("no"));
        }
        let sizes = activation
            .queues
            .iter()
            .map(|queue| if queue.ready() { queue.size() } else { 0 })
            .collect();
        self.seen
            .send(Seen::Started {
                features: activation.features,
                sizes,
            })
            .unwrap();
        Ok(Box::new(TestWorker {
            seen: self.seen.clone(),
            interrupt: activation.interrupt,
        }))
    }
}

struct TestWorker {
    seen: Sender<Seen>,
    interrupt: Arc<dyn Interrupt>,
}

impl QueueWorker for TestWorker {
    fn start(&mut self, _watch: &mut dyn Watch) -> io::Result<()> {
        Ok(())
    }
    fn on_kick(&mut self, queue: u16, _watch: &mut dyn Watch) -> io::Result<()> {
        if queue == 0 {
            self.interrupt.signal_used(0);
        } else {
            self.interrupt.signal_config();
        }
        self.seen.send(Seen::Kick(queue)).unwrap();
        Ok(())
    }
    fn on_fd(&mut self, _token: u64, _events: u32, _watch: &mut dyn Watch) -> io::Result<()> {
        Ok(())
    }
    fn stop(&mut self, _watch: &mut dyn Watch) {
        self.seen.send(Seen::Stopped).unwrap();
    }
}

/// A driver that sees registers only.
struct Driver {
    transport: MmioTransport,
    seen: Receiver<Seen>,
    _io: IoThread,
}

impl Driver {
    fn new(fails: bool) -> Self {
        let io = IoThread::start(Arc::new(ExitSlot::new().unwrap())).unwrap();
        let (sender, seen) = channel();
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
        let pages = RegisterPage::allocate(3).unwrap();
        let page = RegisterPage::of(&pages, 2).unwrap();
        assert!(RegisterPage::of(&pages, 3).is_none());
        let device = TestDevice {
            seen: sender,
            config: 7,
            fails,
        };
        let transport = MmioTransport::new(Box::new(device), memory, io.workers(), page).unwrap();
        Self {
            transport,
            seen,
            _io: io,
        }
    }

    fn read(&mut self, register: Register) -> u32 {
        let mut data = [0; 4];
        self.transport.read(register.offset(), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, register: Register, value: u32) {
        self.transport
            .write(register.offset(), &value.to_le_bytes());
    }

    fn negotiate(&mut self, low: u32, high: u32) {
        self.write(Register::Status, ACKNOWLEDGE_DRIVER);
        for (half, value) in [(0, low), (1, high)] {
            self.write(Register::DriverFeaturesSel, half);
            self.write(Register::DriverFeatures, value);
        }
        self.write(Register::Status, NEGOTIATED);
    }

    fn set_up_queue(&mut self, queue: u32, size: u32, address: u32) {
        self.write(Register::QueueSel, queue);
        self.write(Register::QueueNum, size);
        self.write(Register::QueueDescLow, address);
        self.write(Register::QueueDriverLow, address + 0x1000);
        self.write(Register::QueueDeviceLow, address + 0x2000);
        self.write(Register::QueueReady, 1);
    }

    fn bring_up(&mut self) {
        self.negotiate(FEATURE, 1);
        self.set_up_queue(0, 64, 0x1_0000);
        self.set_up_queue(1, 4, 0x2_0000);
        self.write(Register::Status, NEGOTIATED | VIRTIO_CONFIG_S_DRIVER_OK);
    }

    fn next(&self) -> Seen {
        self.seen.recv_timeout(DEADLINE).unwrap()
    }
}

#[test]
fn a_driver_finds_the_device() {
    let mut driver = Driver::new(false);
    assert_eq!(driver.read(Register::MagicValue), MAGIC);
    assert_eq!(driver.read(Register::Version), 2);
    assert_eq!(driver.read(Register::DeviceId), 42);
    assert_eq!(driver.read(Register::Status), 0);
    assert_eq!(driver.read(Register::QueueNumMax), 64);
    driver.write(Register::QueueSel, 1);
    assert_eq!(driver.read(Register::QueueNumMax), 8);
    driver.write(Register::QueueSel, 2);
    assert_eq!(
        driver.read(Register::QueueNumMax),
        0,
        "4.2.2: zero means that there is no such queue"
    );
    assert_eq!(driver.read(Register::DeviceFeatures), FEATURE);
    driver.write(Register::DeviceFeaturesSel, 1);
    assert_eq!(driver.read(Register::DeviceFeatures), 1);
    driver.write(Register::DeviceFeaturesSel, 2);
    assert_eq!(driver.read(Register::DeviceFeatures), 0);
    assert_eq!(driver.read(Register::ShmLenLow), u32::MAX);
}

#[test]
fn a_device_that_is_brought_up_gets_its_kicks() {
    let mut driver = Driver::new(false);
    driver.bring_up();
    let features = 1 << VIRTIO_F_VERSION_1 | u64::from(FEATURE);
    assert_eq!(
        driver.next(),
        Seen::Started {
            features,
            sizes: vec![64, 4]
        }
    );
    assert_eq!(driver.read(Register::QueueReady), 1);
    driver.write(Register::QueueNotify, 1);
    assert_eq!(driver.next(), Seen::Kick(1));
    driver.write(Register::QueueNotify, 7); // no such queue
    driver.write(Register::QueueNotify, 0);
    assert_eq!(driver.next(), Seen::Kick(0));
}

#[test]
fn interrupts_are_edges_with_a_status() {
    let mut driver = Driver::new(false);
    driver.bring_up();
    driver.next();
    assert_eq!(driver.read(Register::InterruptStatus), 0);
    driver.write(Register::QueueNotify, 0);
    assert_eq!(driver.next(), Seen::Kick(0));
    assert_eq!(
        driver.read(Register::InterruptStatus),
        INTERRUPT_USED_BUFFER
    );
    assert_eq!(driver.transport.interrupt_edge().read().unwrap(), 1);
    // A configuration change is seen once, and its acknowledgement counts.
    let generation = driver.read(Register::ConfigGeneration);
    driver.write(Register::QueueNotify, 1);
    assert_eq!(driver.next(), Seen::Kick(1));
    assert_eq!(
        driver.read(Register::InterruptStatus),
        INTERRUPT_USED_BUFFER | INTERRUPT_CONFIG_CHANGE
    );
    assert_eq!(driver.read(Register::ConfigGeneration), generation + 1);
    driver.write(
        Register::InterruptAck,
        INTERRUPT_USED_BUFFER | INTERRUPT_CONFIG_CHANGE,
    );
    assert_eq!(
        driver.read(Register::InterruptStatus) & INTERRUPT_CONFIG_CHANGE,
        0
    );
    assert_eq!(driver.transport.interrupt_edge().read().unwrap(), 1);
}

#[test]
fn doorbells_are_one_per_queue_and_the_acknowledgement() {
    let driver = Driver::new(false);
    let doorbells: Vec<_> = driver
        .transport
        .doorbells()
        .map(|(offset, value, _)| (offset, value))
        .collect();
    assert_eq!(doorbells, [(0x50, 0), (0x50, 1), (0x64, 1)]);
    let fds: std::collections::HashSet<_> = driver
        .transport
        .doorbells()
        .map(|(_, _, event)| event.as_raw_fd())
        .collect();
    assert_eq!(fds.len(), 3);
}

#[test]
fn a_reset_stops_the_worker_and_the_device_can_start_again() {
    let mut driver = Driver::new(false);
    driver.bring_up();
    driver.next();
    driver.write(Register::QueueNotify, 0);
    assert_eq!(driver.next(), Seen::Kick(0));
    driver.write(Register::Status, 0);
    assert_eq!(
        driver.seen.try_recv(),
        Ok(Seen::Stopped),
        "before the write returns"
    );
    for register in [
        Register::Status,
        Register::InterruptStatus,
        Register::QueueReady,
    ] {
        assert_eq!(driver.read(register), 0, "{register:?}");
    }
    driver.bring_up();
    assert!(matches!(driver.next(), Seen::Started { .. }));
    driver.write(Register::QueueNotify, 0);
    assert_eq!(driver.next(), Seen::Kick(0));
}

#[test]
fn features_that_were_not_offered_are_refused() {
    for (low, high) in [(FEATURE | 2, 1), (FEATURE, 0), (0, 3)] {
        let mut driver = Driver::new(false);
        driver.negotiate(low, high);
        assert_eq!(driver.read(Register::Status), ACKNOWLEDGE_DRIVER);
        driver.write(Register::Status, NEGOTIATED | VIRTIO_CONFIG_S_DRIVER_OK);
        assert_eq!(driver.read(Register::Status) & VIRTIO_CONFIG_S_DRIVER_OK, 0);
        assert!(driver.seen.try_recv().is_err());
    }
}

#[test]
fn queues_that_lie_nowhere_set_needs_reset() {
    for (size, address) in [(64, 0xffff_0000), (64, 0x1_0004), (0, 0x1_0000)] {
        let mut driver = Driver::new(false);
        driver.negotiate(FEATURE, 1);
        driver.set_up_queue(0, size, address);
        driver.write(Register::Status, NEGOTIATED | VIRTIO_CONFIG_S_DRIVER_OK);
        assert_ne!(
            driver.read(Register::Status) & VIRTIO_CONFIG_S_NEEDS_RESET,
            0,
            "{size} {address:#x}"
        );
        assert_eq!(
            driver.read(Register::InterruptStatus),
            INTERRUPT_CONFIG_CHANGE
        );
        assert!(driver.seen.try_recv().is_err());
    }
}

#[test]
fn a_device_that_does_not_start_says_so() {
    let mut driver = Driver::new(true);
    driver.bring_up();
    assert_ne!(
        driver.read(Register::Status) & VIRTIO_CONFIG_S_NEEDS_RESET,
        0
    );
    driver.write(Register::Status, 0);
    assert_eq!(driver.read(Register::Status), 0);
}

#[test]
fn a_queue_size_is_a_power_of_two_within_the_limit() {
    let mut driver = Driver::new(false);
    driver.negotiate(FEATURE, 1);
    driver.set_up_queue(0, 32, 0x1_0000);
    driver.write(Register::QueueReady, 0);
    for size in [0, 3, 128, 0x1_0020, u32::MAX] {
        driver.write(Register::QueueNum, size);
    }
    driver.write(Register::QueueReady, 1);
    driver.write(Register::QueueNum, 16); // 4.2.2.2: not while ready
    driver.write(Register::Status, NEGOTIATED | VIRTIO_CONFIG_S_DRIVER_OK);
    assert!(matches!(driver.next(), Seen::Started { sizes, .. } if sizes == [32, 0]));
}

#[test]
fn configuration_is_shown_and_can_be_written() {
    let mut driver = Driver::new(false);
    let mut data = [0; 2];
    driver.transport.read(0x100, &mut data);
    assert_eq!(data, [7, 0]);
    driver.transport.write(0x100, &[9]);
    driver.transport.read(0x100, &mut data);
    assert_eq!(data, [9, 0]);
    driver.transport.read(0xfff, &mut data);
    assert_eq!(data, [0, 0], "beyond the page");
}

#[test]
fn odd_accesses_change_nothing() {
    let mut driver = Driver::new(false);
    driver.transport.write(0x70, &[1]);
    driver.transport.write(0x71, &1u32.to_le_bytes());
    driver.transport.write(0x70, &[0xff; 8]);
    driver.write(Register::MagicValue, 0);
    driver.write(Register::InterruptStatus, 3);
    assert_eq!(driver.read(Register::Status), 0);
    assert_eq!(driver.read(Register::MagicValue), MAGIC);
    assert_eq!(driver.read(Register::InterruptStatus), 0);
}

proptest::proptest! {
    /// Any sequence of register writes: no panic, no deadlock, constants stay, and a reset brings the device back.
    #[test]
    fn any_writes_leave_a_device_that_can_be_reset(
        writes in proptest::collection::vec(
            (0u64..0x40, proptest::prelude::prop_oneof![0u32..16, 0x1_0000u32..0x4_0000, proptest::prelude::any::<u32>()]),
            0..60,
        ),
    ) {
        let mut driver = Driver::new(false);
        for (register, value) in writes {
            driver.transport.write(register * 4, &value.to_le_bytes());
        }
        assert_eq!(driver.read(Register::MagicValue), MAGIC);
        driver.write(Register::Status, 0);
        assert_eq!(driver.read(Register::Status), 0);
        while driver.seen.try_recv().is_ok() {}
        driver.bring_up();
        assert!(matches!(driver.next(), Seen::Started { .. }));
    }
}
