use super::*;
use std::fs;
use std::io::Write;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_blk::*;
use virtio_queue::QueueT;
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::mock::MockSplitQueue;
use vm_memory::GuestAddress;
use vmm_sys_util::tempfile::TempFile;

const NEXT: u16 = virtio_bindings::virtio_ring::VRING_DESC_F_NEXT as u16;
const WRITE: u16 = virtio_bindings::virtio_ring::VRING_DESC_F_WRITE as u16;
const HEADER: u64 = 0x10_0000;
const DATA: u64 = 0x11_0000;
const STATUS: u64 = 0x12_0000;
const NOT_WRITTEN: u8 = 0xee;

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

/// A disk of eight sectors, each filled with its number, and a driver that sends one request at a time.
struct Rig {
    image: TempFile,
    device: Block,
    memory: Arc<GuestMemoryMmap>,
}

impl Rig {
    fn new(is_read_only: bool) -> Self {
        let image = TempFile::new().unwrap();
        for sector in 0..8u8 {
            image.as_file().write_all(&[sector; 512]).unwrap();
        }
        let device = Block::open(image.as_path(), is_read_only, true).unwrap();
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap());
        Self {
            image,
            device,
            memory,
        }
    }

    /// Sends a request with `bytes` of data at [`DATA`]; returns status byte and used length.
    fn request(&mut self, kind: u32, sector: u64, bytes: u32, to_guest: bool) -> (u8, u32) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory
            .write_slice(&header, GuestAddress(HEADER))
            .unwrap();
        self.memory
            .write_obj(NOT_WRITTEN, GuestAddress(STATUS))
            .unwrap();
        let data_flags = if to_guest { NEXT | WRITE } else { NEXT };
        let mut chain = vec![Descriptor::new(HEADER, 16, NEXT, 1)];
        if bytes > 0 {
            chain.push(Descriptor::new(DATA, bytes, data_flags, 2));
        }
        chain.push(Descriptor::new(STATUS, 1, WRITE, 0));
        let chain: Vec<RawDescriptor> = chain.into_iter().map(RawDescriptor::from).collect();
        let driver = MockSplitQueue::new(&*self.memory, 16);
        driver.build_desc_chain(&chain).unwrap();
        driver.avail().idx().store(1);
        driver.used().idx().store(0);
        let interrupt = Arc::new(CountedInterrupt::default());
        let queue: Queue = driver.create_queue().unwrap();
        assert!(queue.is_valid(&*self.memory));
        let features = self.device.features();
        let activation = Activation {
            memory: self.memory.clone(),
            queues: vec![queue],
            interrupt: interrupt.clone(),
            features,
        };
        self.device
            .activate(activation)
            .unwrap()
            .on_kick(0, &mut Nothing)
            .unwrap();
        assert_eq!(driver.used().idx().load(), 1);
        assert_eq!(interrupt.0.load(Ordering::SeqCst), 1);
        let used = driver.used().ring().ref_at(0).unwrap().load().len();
        (self.memory.read_obj(GuestAddress(STATUS)).unwrap(), used)
    }

    fn guest_bytes(&self, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.memory
            .read_slice(&mut data, GuestAddress(DATA))
            .unwrap();
        data
    }

    fn image(&self) -> Vec<u8> {
        fs::read(self.image.as_path()).unwrap()
    }
}

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IO_ERROR: u8 = VIRTIO_BLK_S_IOERR as u8;

#[test]
fn sectors_reach_the_guest() {
    let mut rig = Rig::new(true);
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 3, 1024, true), (OK, 1025));
    let mut expected = vec![3; 512];
    expected.extend([4; 512]);
    assert_eq!(rig.guest_bytes(1024), expected);
}

#[test]
fn what_the_guest_writes_is_in_the_image_and_nothing_else_is() {
    let mut rig = Rig::new(false);
    rig.memory
        .write_slice(&[0xab; 512], GuestAddress(DATA))
        .unwrap();
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 7, 512, false), (OK, 1));
    assert_eq!(rig.request(VIRTIO_BLK_T_FLUSH, 0, 0, false), (OK, 1));
    let image = rig.image();
    assert_eq!(image.len(), 4096);
    assert_eq!(
        (&image[6 * 512..7 * 512], &image[7 * 512..]),
        (&[6; 512][..], &[0xab; 512][..])
    );
}

#[test]
fn a_read_only_disk_cannot_be_changed() {
    let mut rig = Rig::new(true);
    let before = rig.image();
    for kind in [
        VIRTIO_BLK_T_OUT,
        VIRTIO_BLK_T_DISCARD,
        VIRTIO_BLK_T_WRITE_ZEROES,
    ] {
        assert_eq!(rig.request(kind, 0, 512, false), (IO_ERROR, 1));
    }
    assert_eq!(rig.image(), before);
    assert_ne!(rig.device.features() & 1 << VIRTIO_BLK_F_RO, 0);
}

#[test]
fn what_lies_beyond_the_end_is_an_error() {
    let mut rig = Rig::new(false);
    for (sector, bytes) in [
        (8, 512),
        (7, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (0, 100),
    ] {
        assert_eq!(
            rig.request(VIRTIO_BLK_T_IN, sector, bytes, true),
            (IO_ERROR, 1),
            "{sector} {bytes}"
        );
        assert_eq!(
            rig.request(VIRTIO_BLK_T_OUT, sector, bytes, false),
            (IO_ERROR, 1),
            "{sector} {bytes}"
        );
    }
    assert_eq!(rig.image().len(), 4096);
}

#[test]
fn a_file_that_somebody_cuts_is_an_error_and_no_hang() {
    let mut rig = Rig::new(true);
    rig.image.as_file().set_len(512).unwrap();
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 3, 512, true), (IO_ERROR, 1));
}

#[test]
fn zeroed_and_discarded_ranges_read_as_zero() {
    let mut rig = Rig::new(false);
    let mut range = [0; 16];
    range[0] = 2; // sector
    range[8] = 2; // sectors
    rig.memory.write_slice(&range, GuestAddress(DATA)).unwrap();
    assert_eq!(
        rig.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, 16, false),
        (OK, 1)
    );
    range[0] = 5;
    rig.memory.write_slice(&range, GuestAddress(DATA)).unwrap();
    assert_eq!(rig.request(VIRTIO_BLK_T_DISCARD, 0, 16, false), (OK, 1));
    let image = rig.image();
    let firsts: Vec<u8> = image.chunks(512).map(|sector| sector[0]).collect();
    assert_eq!(firsts, [0, 1, 0, 0, 4, 0, 0, 7]);
    range[0] = 7; // beyond the end
    rig.memory.write_slice(&range, GuestAddress(DATA)).unwrap();
    assert_eq!(
        rig.request(VIRTIO_BLK_T_DISCARD, 0, 16, false),
        (IO_ERROR, 1)
    );
}

#[test]
fn the_id_is_the_images_name() {
    let mut rig = Rig::new(true);
    assert_eq!(rig.request(VIRTIO_BLK_T_GET_ID, 0, 20, true), (OK, 21));
    let name = rig
        .image
        .as_path()
        .file_name()
        .unwrap()
        .to_string_lossy()
        .into_owned();
    let id = String::from_utf8(rig.guest_bytes(20)).unwrap();
    assert!(name.ends_with(id.trim_end_matches('\0')), "{id}");
}

#[test]
fn unknown_requests_are_unsupported() {
    let mut rig = Rig::new(false);
    assert_eq!(
        rig.request(99, 0, 512, false),
        (VIRTIO_BLK_S_UNSUPP as u8, 1)
    );
}

#[test]
fn the_configuration_says_capacity_and_zeros_beyond_its_end() {
    let rig = Rig::new(false);
    let mut capacity = [0; 8];
    rig.device.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 8);
    let mut beyond = [1; 16];
    rig.device.read_config(56, &mut beyond);
    assert_eq!(beyond, [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    rig.device.read_config(u64::MAX, &mut beyond);
    assert_eq!(beyond, [0; 16]);
}

#[test]
fn one_image_has_one_writer() {
    let rig = Rig::new(false);
    let error = Block::open(rig.image.as_path(), true, true)
        .unwrap_err()
        .to_string();
    assert!(error.contains("in use by another VM"), "{error}");
    let shared = Rig::new(true);
    Block::open(shared.image.as_path(), true, true).unwrap();
}

#[test]
fn a_missing_or_empty_image_is_named() {
    let error = Block::open(Path::new("/nowhere/rootfs"), true, true)
        .unwrap_err()
        .to_string();
    assert_eq!(error, "cannot open the disk image /nowhere/rootfs");
    let empty = TempFile::new().unwrap();
    let error = Block::open(empty.as_path(), true, true)
        .unwrap_err()
        .to_string();
    assert!(error.contains("0 bytes long"), "{error}");
}
