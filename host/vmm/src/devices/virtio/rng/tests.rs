use super::*;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_queue::QueueT;
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::mock::MockSplitQueue;
use vm_memory::GuestAddress;

const WRITABLE: u16 = virtio_bindings::virtio_ring::VRING_DESC_F_WRITE as u16;
const BUFFER: u64 = 0x10_0000;

#[derive(Debug, Default)]
struct CountedInterrupt(AtomicU32);
impl Interrupt for CountedInterrupt {
    fn signal_used(&self, _queue: u16) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
    fn signal_config(&self) {}
}

struct Nothing;
impl Watch for Nothing {
    fn add(&mut self, _: i32, _: u64, _: u32) -> io::Result<()> {
        Ok(())
    }
    fn modify(&mut self, _: i32, _: u64, _: u32) -> io::Result<()> {
        Ok(())
    }
    fn remove(&mut self, _: i32) -> io::Result<()> {
        Ok(())
    }
}

fn memory() -> Arc<GuestMemoryMmap> {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap())
}

/// The device, a driver's queue with `descriptors` as one request each, and a kick.
fn kick(
    memory: &Arc<GuestMemoryMmap>,
    descriptors: &[Descriptor],
) -> (Vec<u32>, u32, io::Result<()>) {
    let driver = MockSplitQueue::new(&**memory, 16);
    let raw: Vec<RawDescriptor> = descriptors
        .iter()
        .map(|descriptor| RawDescriptor::from(*descriptor))
        .collect();
    driver.build_multiple_desc_chains(&raw).unwrap();
    let interrupt = Arc::new(CountedInterrupt::default());
    let queue: Queue = driver.create_queue().unwrap();
    assert!(queue.is_valid(&**memory));
    let mut worker = Rng::new()
        .unwrap()
        .activate(Activation {
            memory: memory.clone(),
            queues: vec![queue],
            interrupt: interrupt.clone(),
            features: 1 << VIRTIO_F_VERSION_1,
        })
        .unwrap();
    let result = worker.on_kick(0, &mut Nothing);
    let used = driver.used();
    let lengths = (0..used.idx().load())
        .map(|n| used.ring().ref_at(n.into()).unwrap().load().len())
        .collect();
    (lengths, interrupt.0.load(Ordering::SeqCst), result)
}

#[test]
fn the_guest_gets_random_bytes_and_one_interrupt() {
    let memory = memory();
    let requests = [
        Descriptor::new(BUFFER, 64, WRITABLE, 0),
        Descriptor::new(BUFFER + 64, 32, WRITABLE, 0),
    ];
    let (used, interrupts, result) = kick(&memory, &requests);
    result.unwrap();
    assert_eq!(used, [64, 32]);
    assert_eq!(interrupts, 1);
    let mut bytes = [0u8; 96];
    memory.read_slice(&mut bytes, GuestAddress(BUFFER)).unwrap();
    assert!(
        bytes.iter().filter(|&&byte| byte == 0).count() < 20,
        "not random: {bytes:?}"
    );
    assert_ne!(bytes[..32], bytes[32..64]);
}

#[test]
fn a_request_is_answered_in_part_rather_than_for_ever() {
    let memory = memory();
    let (used, _, result) = kick(&memory, &[Descriptor::new(BUFFER, 100_000, WRITABLE, 0)]);
    result.unwrap();
    assert_eq!(used, [MAX_REQUEST_BYTES as u32]);
}

#[test]
fn buffers_that_cannot_be_written_come_back_empty() {
    let memory = memory();
    let requests = [
        Descriptor::new(0x9000_0000, 64, WRITABLE, 0), // no memory there
        Descriptor::new(BUFFER, 64, 0, 0),             // readable only
        Descriptor::new(u64::MAX - 8, 64, WRITABLE, 0),
    ];
    let (used, interrupts, result) = kick(&memory, &requests);
    result.unwrap();
    assert_eq!((used, interrupts), (vec![0, 0, 0], 1));
}

#[test]
fn an_available_index_from_nowhere_stops_the_device_instead_of_spinning() {
    let memory = memory();
    let driver = MockSplitQueue::new(&*memory, 16);
    driver.avail().idx().store(u16::to_le(1000));
    let mut queue: Queue = driver.create_queue().unwrap();
    assert!(serve(&mut queue, &memory, |_| 0).is_err());
}
