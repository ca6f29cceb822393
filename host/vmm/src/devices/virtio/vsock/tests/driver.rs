//! A guest driver and its sockets, on real rings, in the test's own thread.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::tempdir::TempDir;

use super::super::host_sockets::HostSockets;
use super::super::spec::{HEADER_BYTES, HOST_CID, Header, Op, TYPE_STREAM};
use super::super::worker::VsockWorker;
use super::super::{RX_QUEUE, TX_QUEUE, VsockMetrics};
use crate::devices::virtio::{Activation, Interrupt, QueueWorker, Watch};

pub(super) const GUEST_CID: u64 = 3;
pub(super) const RING_SIZE: u16 = 16;
/// Payload of one receive buffer: odd, so that boundaries fall everywhere.
pub(super) const BUFFER_BYTES: usize = 1009;
/// The receive window of the fake guest's sockets.
pub(super) const GUEST_WINDOW: u32 = 5003;
const RX_RING: u64 = 0x1000;
const TX_RING: u64 = 0x3000;
const RX_BUFFERS: u64 = 0x1_0000;
const TX_BUFFERS: u64 = 0x8_0000;
const TX_BUFFER_STRIDE: u64 = 0x1_0000;
const MEMORY_BYTES: usize = 4 << 20;

/// Counts interrupts.
#[derive(Debug, Default)]
pub(super) struct Interrupts([AtomicU32; 3]);

impl Interrupts {
    pub(super) fn count(&self, queue: u16) -> u32 {
        self.0[usize::from(queue)].load(Ordering::Relaxed)
    }
}

impl Interrupt for Interrupts {
    fn signal_used(&self, queue: u16) {
        self.0[usize::from(queue)].fetch_add(1, Ordering::Relaxed);
    }

    fn signal_config(&self) {}
}

/// The I/O thread's epoll.
pub(super) struct TestWatch(Epoll);

impl TestWatch {
    fn control(
        &self,
        operation: ControlOperation,
        fd: RawFd,
        token: u64,
        events: u32,
    ) -> io::Result<()> {
        self.0.ctl(
            operation,
            fd,
            EpollEvent::new(EventSet::from_bits_truncate(events), token),
        )
    }
}

impl Watch for TestWatch {
    fn add(&mut self, fd: RawFd, token: u64, events: u32) -> io::Result<()> {
        self.control(ControlOperation::Add, fd, token, events)
    }

    fn modify(&mut self, fd: RawFd, token: u64, events: u32) -> io::Result<()> {
        self.control(ControlOperation::Modify, fd, token, events)
    }

    fn remove(&mut self, fd: RawFd) -> io::Result<()> {
        self.control(ControlOperation::Delete, fd, 0, 0)
    }
}

/// Split ring as a driver sees it (VIRTIO 1.2, 2.7).
pub(super) struct DriverRing {
    base: u64,
    avail_idx: u16,
    used_seen: u16,
}

impl DriverRing {
    fn descriptors(&self) -> u64 {
        self.base
    }

    pub(super) fn avail(&self) -> u64 {
        self.base + 0x400
    }

    pub(super) fn used(&self) -> u64 {
        self.base + 0x800
    }

    fn queue(&self) -> Queue {
        let mut queue = Queue::new(RING_SIZE).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(self.descriptors()))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(self.avail()))
            .unwrap();
        queue
            .try_set_used_ring_address(GuestAddress(self.used()))
            .unwrap();
        queue.set_event_idx(true);
        queue.set_ready(true);
        queue
    }

    pub(super) fn set_descriptor(
        &self,
        memory: &GuestMemoryMmap,
        index: u16,
        descriptor: (u64, u32, u16, u16),
    ) {
        let (address, length, flags, next) = descriptor;
        let at = self.descriptors() + u64::from(index) * 16;
        memory.write_obj(address, GuestAddress(at)).unwrap();
        memory.write_obj(length, GuestAddress(at + 8)).unwrap();
        memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    pub(super) fn offer(&mut self, memory: &GuestMemoryMmap, head: u16) {
        let slot = self.avail() + 4 + u64::from(self.avail_idx % RING_SIZE) * 2;
        memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.avail_idx = self.avail_idx.wrapping_add(1);
        memory
            .write_obj(self.avail_idx, GuestAddress(self.avail() + 2))
            .unwrap();
    }

    /// Wants an interrupt for the next used buffer.
    fn arm(&self, memory: &GuestMemoryMmap) {
        let used_event = self.avail() + 4 + u64::from(RING_SIZE) * 2;
        memory
            .write_obj(self.used_seen, GuestAddress(used_event))
            .unwrap();
    }

    pub(super) fn next_used(&mut self, memory: &GuestMemoryMmap) -> Option<(u16, u32)> {
        let idx: u16 = memory.read_obj(GuestAddress(self.used() + 2)).unwrap();
        if idx == self.used_seen {
            return None;
        }
        let at = self.used() + 4 + u64::from(self.used_seen % RING_SIZE) * 8;
        self.used_seen = self.used_seen.wrapping_add(1);
        let head: u32 = memory.read_obj(GuestAddress(at)).unwrap();
        let length: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
        Some((u16::try_from(head).unwrap(), length))
    }
}

/// A machine with one vsock device, and its guest's driver.
pub(super) struct Rig {
    pub(super) memory: Arc<GuestMemoryMmap>,
    pub(super) worker: VsockWorker,
    pub(super) watch: TestWatch,
    pub(super) interrupts: Arc<Interrupts>,
    pub(super) metrics: Arc<VsockMetrics>,
    pub(super) rx: DriverRing,
    pub(super) tx: DriverRing,
    pub(super) path: PathBuf,
    free_tx: Vec<u16>,
    /// Receive buffers that the driver keeps back.
    pub(super) spare_rx: VecDeque<u16>,
    _folder: TempDir,
}

impl Rig {
    /// With all receive buffers offered.
    pub(super) fn new() -> Self {
        let mut rig = Self::without_buffers();
        rig.offer_buffers(usize::MAX);
        rig
    }

    pub(super) fn without_buffers() -> Self {
        let memory =
            Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap());
        let rx = DriverRing {
            base: RX_RING,
            avail_idx: 0,
            used_seen: 0,
        };
        let tx = DriverRing {
            base: TX_RING,
            avail_idx: 0,
            used_seen: 0,
        };
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("v");
        let interrupts = Arc::new(Interrupts::default());
        let metrics = Arc::new(VsockMetrics::default());
        let activation = Activation {
            memory: memory.clone(),
            queues: vec![rx.queue(), tx.queue()],
            interrupt: interrupts.clone(),
            features: 0,
        };
        let sockets = Arc::new(HostSockets::listen(&path).unwrap());
        let mut worker = VsockWorker::new(activation, 3, sockets, metrics.clone()).unwrap();
        let mut watch = TestWatch(Epoll::new().unwrap());
        worker.start(&mut watch).unwrap();
        Self {
            memory,
            worker,
            watch,
            interrupts,
            metrics,
            rx,
            tx,
            path,
            // A packet takes two descriptors.
            free_tx: (0..RING_SIZE / 2).map(|pair| pair * 2).collect(),
            spare_rx: (0..RING_SIZE).collect(),
            _folder: folder,
        }
    }

    /// Offers up to `count` receive buffers and kicks.
    pub(super) fn offer_buffers(&mut self, count: usize) {
        for head in self.spare_rx.drain(..count.min(self.spare_rx.len())) {
            let address = RX_BUFFERS + u64::from(head) * 0x800;
            let length = u32::try_from(HEADER_BYTES + BUFFER_BYTES).unwrap();
            self.rx
                .set_descriptor(&self.memory, head, (address, length, 2, 0));
            self.rx.offer(&self.memory, head);
        }
        self.worker.on_kick(RX_QUEUE, &mut self.watch).unwrap();
    }

    /// Whether the transmit ring has room for a packet.
    pub(super) fn can_send(&mut self) -> bool {
        while let Some((head, _)) = self.tx.next_used(&self.memory) {
            self.free_tx.push(head);
        }
        !self.free_tx.is_empty()
    }

    /// Puts a packet into the transmit ring, without a kick.
    pub(super) fn queue_packet(&mut self, header: &Header, payload: &[u8]) {
        assert!(self.can_send());
        let head = self.free_tx.pop().unwrap();
        let address = TX_BUFFERS + u64::from(head / 2) * TX_BUFFER_STRIDE;
        self.memory
            .write_slice(&header.encode(), GuestAddress(address))
            .unwrap();
        self.memory
            .write_slice(payload, GuestAddress(address + 64))
            .unwrap();
        let length = u32::try_from(payload.len()).unwrap();
        let header_flags = u16::from(length > 0);
        self.tx
            .set_descriptor(&self.memory, head, (address, 44, header_flags, head + 1));
        self.tx
            .set_descriptor(&self.memory, head + 1, (address + 64, length, 0, 0));
        self.tx.offer(&self.memory, head);
        self.tx.arm(&self.memory);
    }

    pub(super) fn kick(&mut self) {
        self.worker.on_kick(TX_QUEUE, &mut self.watch).unwrap();
    }

    pub(super) fn send(&mut self, header: &Header, payload: &[u8]) {
        self.queue_packet(header, payload);
        self.kick();
    }

    /// Lets the I/O thread handle what is ready; `false` if nothing was.
    pub(super) fn turn(&mut self) -> bool {
        let mut events = [EpollEvent::default(); 8];
        let count = self.watch.0.wait(0, &mut events).unwrap();
        for event in &events[..count] {
            self.worker
                .on_fd(event.data(), event.events(), &mut self.watch)
                .unwrap();
        }
        count > 0
    }

    pub(super) fn settle(&mut self) {
        while self.turn() {}
    }

    /// The next packet that the device has put into a receive buffer, which the driver then keeps back.
    pub(super) fn next_packet(&mut self) -> Option<(Header, Vec<u8>)> {
        self.rx.arm(&self.memory);
        let (head, length) = self.rx.next_used(&self.memory)?;
        self.spare_rx.push_back(head);
        let address = RX_BUFFERS + u64::from(head) * 0x800;
        let mut wire = [0; HEADER_BYTES];
        self.memory
            .read_slice(&mut wire, GuestAddress(address))
            .unwrap();
        let header = Header::decode(&wire);
        assert_eq!(
            length as usize,
            HEADER_BYTES + header.len as usize,
            "{header:?}"
        );
        assert_eq!(
            (header.src_cid, header.dst_cid, header.socket_type),
            (HOST_CID, GUEST_CID, TYPE_STREAM)
        );
        let mut payload = vec![0; header.len as usize];
        self.memory
            .read_slice(&mut payload, GuestAddress(address + 44))
            .unwrap();
        Some((header, payload))
    }

    /// The next packet, which must be `op`; gives its buffer back.
    pub(super) fn expect(&mut self, op: Op) -> (Header, Vec<u8>) {
        self.settle();
        let packet = self
            .next_packet()
            .unwrap_or_else(|| panic!("{op:?} expected, nothing came"));
        assert_eq!(Op::parse(packet.0.op), Some(op), "{:?}", packet.0);
        self.offer_buffers(usize::MAX);
        packet
    }

    pub(super) fn expect_nothing(&mut self) {
        self.settle();
        assert_eq!(self.next_packet(), None);
    }

    /// A host process connects to `guest_port` and the guest accepts.
    pub(super) fn connect(&mut self, guest_port: u32) -> (UnixStream, GuestSocket) {
        let host = self.dial(guest_port);
        let (request, _) = self.expect(Op::Request);
        let guest = GuestSocket::new(request.dst_port, request.src_port);
        assert_eq!(guest.guest_port, guest_port);
        self.send(&guest.header(Op::Response), &[]);
        assert_eq!(read_line(&host), format!("OK {}\n", guest.host_port));
        (host, guest)
    }

    /// Only the host's half of connecting.
    pub(super) fn dial(&mut self, guest_port: u32) -> UnixStream {
        use std::io::Write;
        let mut host = UnixStream::connect(&self.path).unwrap();
        host.write_all(format!("CONNECT {guest_port}\n").as_bytes())
            .unwrap();
        host.set_nonblocking(true).unwrap();
        host
    }
}

pub(super) fn read_line(mut stream: &UnixStream) -> String {
    use std::io::Read;
    let mut line = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte).unwrap() == 1 {
        line.push(byte[0]);
        if byte[0] == b'\n' {
            break;
        }
    }
    String::from_utf8(line).unwrap()
}

/// A socket of the guest's kernel: credit as VIRTIO 1.2, 5.10.6.3 has it.
#[derive(Debug, Clone)]
pub(super) struct GuestSocket {
    pub(super) guest_port: u32,
    pub(super) host_port: u32,
    /// Bytes received, and those of them that the guest's process has read.
    pub(super) received: u32,
    pub(super) read: u32,
    pub(super) sent: u32,
    pub(super) host_buf_alloc: u32,
    pub(super) host_fwd_cnt: u32,
}

impl GuestSocket {
    pub(super) fn new(guest_port: u32, host_port: u32) -> Self {
        Self {
            guest_port,
            host_port,
            received: 0,
            read: 0,
            sent: 0,
            host_buf_alloc: 0,
            host_fwd_cnt: 0,
        }
    }

    pub(super) fn header(&self, op: Op) -> Header {
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: self.guest_port,
            dst_port: self.host_port,
            len: 0,
            socket_type: TYPE_STREAM,
            op: op as u16,
            flags: 0,
            buf_alloc: GUEST_WINDOW,
            fwd_cnt: self.read,
        }
    }

    /// Takes the credit from a packet of the host, and checks that the host kept to ours.
    pub(super) fn on_packet(&mut self, header: &Header) {
        self.host_buf_alloc = header.buf_alloc;
        self.host_fwd_cnt = header.fwd_cnt;
        if header.op == Op::Data as u16 {
            self.received = self.received.wrapping_add(header.len);
            assert!(
                self.received.wrapping_sub(self.read) <= GUEST_WINDOW,
                "the host exceeded the guest's credit"
            );
        }
    }

    /// How much the host lets us send.
    pub(super) fn credit(&self) -> u32 {
        self.host_buf_alloc - self.sent.wrapping_sub(self.host_fwd_cnt)
    }
}
