//! The rings half of the device: kicks, host sockets and time come in here, on the I/O thread.
//!
//! What happens to a connection is decided in `connection.rs`; what moves bytes is in `transmit.rs` and `receive.rs`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};

use super::connection::Phase;
use super::host_sockets::{Greeted, Greeting, HostSockets, close_gently, send_ok};
use super::mux::{Full, Mux, SlotId};
use super::packets::{RxBatch, TxBatch};
use super::ring::{Ring, RingError};
use super::spec::{HOST_CID, Header};
use super::{EVENT_QUEUE, RX_QUEUE, TX_QUEUE, VsockMetrics};
use crate::devices::virtio::{Activation, Interrupt, QueueWorker, Watch};

/// epoll tokens that no slot has: a slot's low half is below the connection limit.
const LISTENER_TOKEN: u64 = u64::MAX;
const TIMER_TOKEN: u64 = u64::MAX - 1;
const AGAIN_TOKEN: u64 = u64::MAX - 2;
/// Deadlines are looked at this often while there are any.
const TICK: Duration = Duration::from_millis(250);
/// How long the driver may be kept from transmit buffers that it has back, and with them a process that waits for the
/// end of a zero-copy transmission.
const SIGNAL_DELAY: Duration = Duration::from_millis(10);
/// Connections accepted before others get their turn.
const ACCEPT_BATCH: usize = 64;

const EPOLLIN: u32 = libc::EPOLLIN as u32;
const EPOLLOUT: u32 = libc::EPOLLOUT as u32;
const EPOLLERR: u32 = libc::EPOLLERR as u32;
const EPOLLHUP: u32 = libc::EPOLLHUP as u32;
const EPOLLRDHUP: u32 = libc::EPOLLRDHUP as u32;
/// Edge-triggered: one `epoll_ctl` serves a connection for life, unless its host process reads too slowly.
const SOCKET_EVENTS: u32 = EPOLLIN | EPOLLRDHUP | (1 << 31);

/// The host's side of a connection.
#[derive(Debug)]
pub(super) struct HostSide {
    /// `None` once there is nothing left to do with it.
    pub(super) socket: Option<OwnedFd>,
    /// The `CONNECT` line and bytes for the guest that came with it.
    pub(super) greeting: Greeting,
    /// Bytes of the guest that the socket has not taken.
    pub(super) held: Held,
    /// A read may find something.
    pub(super) readable: bool,
    /// The end is near: read until it is found, whatever a short read says.
    pub(super) ending: bool,
    /// EPOLLOUT is watched, because `held` is not empty.
    pub(super) watches_writable: bool,
    /// The I/O thread knows the socket.
    pub(super) watched: bool,
    /// Receive buffers to take for the next read.
    pub(super) read_chains: u16,
}

impl HostSide {
    fn new(socket: OwnedFd) -> Self {
        Self {
            socket: Some(socket),
            greeting: Greeting::new(),
            held: Held::default(),
            readable: false,
            ending: false,
            watches_writable: false,
            watched: false,
            read_chains: 1,
        }
    }
}

impl HostSide {
    /// Asks the kernel again: the event may have been that of another socket with the same number, closed since.
    fn has_hung_up(&self) -> bool {
        let Some(socket) = &self.socket else {
            return false;
        };
        let mut fds = [PollFd::new(socket, PollFlags::empty())];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        matches!(poll(&mut fds, Some(&now)), Ok(1))
            && fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    }
}

/// Bytes between the guest and a host process that reads too slowly; bounded by the connection's window.
#[derive(Debug, Default)]
pub(super) struct Held {
    bytes: Vec<u8>,
    start: usize,
}

impl Held {
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.len() == self.start
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    /// Appends through `fill`.
    pub(super) fn extend(&mut self, fill: impl FnOnce(&mut Vec<u8>)) {
        // Moves at most as many bytes as were consumed since the last time.
        if self.start > self.bytes.len() / 2 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        fill(&mut self.bytes);
    }

    pub(super) fn consume(&mut self, count: usize) {
        self.start += count.min(self.bytes.len() - self.start);
        if self.is_empty() {
            // Memory is for those who are slow now.
            *self = Self::default();
        }
    }
}

/// The worker.
#[derive(Debug)]
pub(crate) struct VsockWorker {
    pub(super) rx_ring: Ring,
    pub(super) tx_ring: Ring,
    pub(super) interrupt: Arc<dyn Interrupt>,
    pub(super) mux: Mux<HostSide>,
    pub(super) sockets: Arc<HostSockets>,
    pub(super) metrics: Arc<VsockMetrics>,
    pub(super) rx: RxBatch,
    pub(super) tx: TxBatch,
    /// Whose packets are in `tx`.
    pub(super) tx_slot: Option<SlotId>,
    /// The driver is to kick when it adds receive buffers.
    pub(super) starved: bool,
    timer: OwnedFd,
    /// When it fires.
    timer_at: Option<Duration>,
    /// When deadlines are looked at.
    tick_at: Option<Duration>,
    /// When the driver is told of transmitted buffers.
    signal_at: Option<Duration>,
    /// Transmitted buffers that the driver was not told of.
    pub(super) unsignalled: usize,
    /// Written when there is more to do than one turn of the I/O thread should take.
    again: OwnedFd,
    again_pending: bool,
    listening: bool,
    expired: Vec<SlotId>,
}

impl VsockWorker {
    pub(crate) fn new(
        activation: Activation,
        guest_cid: u32,
        sockets: Arc<HostSockets>,
        metrics: Arc<VsockMetrics>,
    ) -> io::Result<Self> {
        let Activation {
            memory,
            queues,
            interrupt,
            features: _,
        } = activation;
        // The event queue may be served elsewhere (vhost-user), the two others may not.
        let ring = |index: u16| {
            let queue = queues.get(usize::from(index)).ok_or(RingError::NotReady);
            queue
                .and_then(|queue| Ring::new(queue, memory.clone()))
                .map_err(io::Error::other)
        };
        Ok(Self {
            rx_ring: ring(RX_QUEUE)?,
            tx_ring: ring(TX_QUEUE)?,
            interrupt,
            mux: Mux::new(u64::from(guest_cid)),
            sockets,
            metrics,
            rx: RxBatch::new(memory.clone()),
            tx: TxBatch::new(memory.clone()),
            tx_slot: None,
            starved: false,
            timer: timerfd_create(
                TimerfdClockId::Monotonic,
                TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
            )?,
            timer_at: None,
            tick_at: None,
            signal_at: None,
            unsignalled: 0,
            again: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            again_pending: false,
            listening: false,
            expired: Vec::new(),
        })
    }

    /// Serves both directions: what the guest sent first, for it may ask for what is sent to it.
    fn serve(&mut self, now: Duration, watch: &mut dyn Watch) -> io::Result<()> {
        self.transmit(now, watch)?;
        self.receive(now, watch)?;
        self.metrics
            .dropped(self.mux.dropped() + self.rx.rejected());
        self.metrics.connections(self.mux.len());
        Ok(())
    }

    /// Has the I/O thread come back after it has served others.
    pub(super) fn come_again(&mut self) -> io::Result<()> {
        if !self.again_pending {
            rustix::io::write(&self.again, &1u64.to_ne_bytes())?;
            self.again_pending = true;
        }
        Ok(())
    }

    /// A packet asks for a new connection to a host process.
    pub(super) fn on_request(&mut self, header: &Header, watch: &mut dyn Watch) -> io::Result<()> {
        let socket = if self.mux.is_full() {
            Err(Errno::MFILE)
        } else {
            self.sockets.dial(header.dst_port)
        };
        let Ok(socket) = socket else {
            self.mux.answer_stranger(header);
            return Ok(());
        };
        match self.mux.accept(header, HostSide::new(socket)) {
            Ok(id) => self.watch_socket(id, watch),
            Err(Full) => Ok(()),
        }
    }

    /// Readiness that is there already is reported at once.
    fn watch_socket(&mut self, id: SlotId, watch: &mut dyn Watch) -> io::Result<()> {
        let Some(entry) = self.mux.get_mut(id) else {
            return Ok(());
        };
        let host = &mut entry.attachment;
        if let Some(socket) = &host.socket
            && !host.watched
        {
            watch.add(socket.as_raw_fd(), id.token(), SOCKET_EVENTS)?;
            host.watched = true;
        }
        Ok(())
    }

    /// Does what the connection decided, after anything happened to it.
    pub(super) fn settle(
        &mut self,
        id: SlotId,
        now: Duration,
        watch: &mut dyn Watch,
    ) -> io::Result<()> {
        let Some(entry) = self.mux.get_mut(id) else {
            return Ok(());
        };
        let actions = entry.connection.take_actions();
        let host = &mut entry.attachment;
        if let Some(socket) = &host.socket {
            if actions.greet {
                // If it cannot be told it is gone, which epoll reports.
                send_ok(socket.as_fd(), entry.connection.key().host_port);
            }
            if actions.shut_read {
                // Fails only if the host process is gone, which epoll reports.
                let _ = shutdown(socket, Shutdown::Read);
            }
            if actions.shut_write {
                let _ = shutdown(socket, Shutdown::Write);
            }
        }
        if actions.close {
            host.readable = false;
            host.watches_writable = false;
            host.held = Held::default();
            if let Some(socket) = host.socket.take() {
                if host.watched {
                    watch.remove(socket.as_raw_fd())?;
                }
                close_gently(socket);
            }
        }
        let has_bytes = host.readable || !host.greeting.early().is_empty();
        let has_turn =
            entry.connection.owes_packet() || (has_bytes && entry.connection.wants_host_bytes());
        let has_deadline = entry.connection.deadline().is_some();
        if has_turn {
            self.mux.take_turn(id);
        }
        if has_deadline {
            self.arm_timer(now)?;
        }
        if self.mux.settle(id).is_some() {
            self.listen_again(watch)?;
        }
        Ok(())
    }

    /// Deadlines are looked at soon.
    pub(super) fn arm_timer(&mut self, now: Duration) -> io::Result<()> {
        if self.tick_at.is_none() {
            self.tick_at = Some(now + TICK);
            self.set_timer(now)?;
        }
        Ok(())
    }

    /// The driver is told of its transmitted buffers soon.
    pub(super) fn signal_soon(&mut self, now: Duration) -> io::Result<()> {
        if self.signal_at.is_none() {
            self.signal_at = Some(now + SIGNAL_DELAY);
            self.set_timer(now)?;
        }
        Ok(())
    }

    fn set_timer(&mut self, now: Duration) -> io::Result<()> {
        let next = match (self.tick_at, self.signal_at) {
            (Some(tick), Some(signal)) => tick.min(signal),
            (Some(at), None) | (None, Some(at)) => at,
            (None, None) => return Ok(()),
        };
        if self.timer_at.is_some_and(|at| at <= next) {
            return Ok(());
        }
        // Zero would disarm it.
        let delay = next.saturating_sub(now).max(Duration::from_millis(1));
        let it_value = Timespec {
            tv_sec: i64::try_from(delay.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(delay.subsec_nanos()),
        };
        let once = Itimerspec {
            it_interval: Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value,
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
        self.timer_at = Some(next);
        Ok(())
    }

    pub(super) fn on_timer(&mut self, now: Duration, watch: &mut dyn Watch) -> io::Result<()> {
        drain_counter(&self.timer);
        self.timer_at = None;
        if self.signal_at.take_if(|at| *at <= now).is_some() {
            self.signal_transmitted_now();
        }
        let mut expired = std::mem::take(&mut self.expired);
        if self.tick_at.take_if(|at| *at <= now).is_some() && self.mux.expire(now, &mut expired) {
            self.arm_timer(now)?;
        }
        self.set_timer(now)?;
        for id in expired.drain(..) {
            if let Some(entry) = self.mux.get_mut(id) {
                entry.connection.on_deadline(now);
            }
            self.settle(id, now, watch)?;
        }
        self.expired = expired;
        self.listen_again(watch)
    }

    fn on_listener(&mut self, now: Duration, watch: &mut dyn Watch) -> io::Result<()> {
        for _ in 0..ACCEPT_BATCH {
            let socket = match self.sockets.accept() {
                Ok(socket) => socket,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                // Out of file descriptors or memory: those who wait are served when something is freed.
                Err(_) => {
                    watch.remove(self.sockets.listener().as_raw_fd())?;
                    self.listening = false;
                    return self.arm_timer(now);
                }
            };
            // A full table closes the socket: the host process reads end-of-file at once.
            let Ok(id) = self.mux.greet(HostSide::new(socket), now) else {
                continue;
            };
            // The line is there already, as a rule: read it before epoll has a reason to report it.
            self.on_socket(id, EPOLLIN, now, watch)?;
            self.watch_socket(id, watch)?;
        }
        Ok(())
    }

    fn listen_again(&mut self, watch: &mut dyn Watch) -> io::Result<()> {
        if !self.listening {
            watch.add(self.sockets.listener().as_raw_fd(), LISTENER_TOKEN, EPOLLIN)?;
            self.listening = true;
        }
        Ok(())
    }

    fn on_socket(
        &mut self,
        id: SlotId,
        events: u32,
        now: Duration,
        watch: &mut dyn Watch,
    ) -> io::Result<()> {
        // A stale event of a slot that has been freed since.
        let Some(entry) = self.mux.get_mut(id) else {
            return Ok(());
        };
        let host = &mut entry.attachment;
        if events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR) != 0 {
            host.ending = true;
        }
        if events & !EPOLLOUT != 0 {
            host.readable = true;
        }
        if entry.connection.phase() == Phase::Greeting {
            let greeted = host
                .socket
                .as_ref()
                .map_or(Greeted::Bad, |socket| host.greeting.read(socket.as_fd()));
            match greeted {
                Greeted::Incomplete => {}
                Greeted::Bad => entry.connection.close(),
                Greeted::Port(guest_port) => {
                    self.mux.dial(id, guest_port, now);
                }
            }
        }
        if events & (EPOLLHUP | EPOLLERR) != 0
            && let Some(entry) = self.mux.get_mut(id)
            && entry.attachment.has_hung_up()
        {
            entry.attachment.held = Held::default();
            entry.connection.on_host_gone(now);
        } else if events & EPOLLOUT != 0 {
            self.write_held(id, now, watch)?;
        }
        self.settle(id, now, watch)
    }
}

impl QueueWorker for VsockWorker {
    fn start(&mut self, watch: &mut dyn Watch) -> io::Result<()> {
        watch.add(self.timer.as_raw_fd(), TIMER_TOKEN, EPOLLIN)?;
        watch.add(self.again.as_raw_fd(), AGAIN_TOKEN, EPOLLIN)?;
        self.listen_again(watch)
    }

    fn on_kick(&mut self, queue: u16, watch: &mut dyn Watch) -> io::Result<()> {
        match queue {
            TX_QUEUE => self.serve(now(), watch),
            RX_QUEUE => self.receive(now(), watch),
            // Its buffers wait for a transport reset (VIRTIO 1.2, 5.10.6.7), which needs a migrated guest.
            EVENT_QUEUE => Ok(()),
            _ => Ok(()),
        }
    }

    fn on_fd(&mut self, token: u64, events: u32, watch: &mut dyn Watch) -> io::Result<()> {
        let now = now();
        match token {
            LISTENER_TOKEN => self.on_listener(now, watch)?,
            TIMER_TOKEN => self.on_timer(now, watch)?,
            AGAIN_TOKEN => {
                drain_counter(&self.again);
                self.again_pending = false;
                return self.serve(now, watch);
            }
            token => self.on_socket(SlotId::from_token(token), events, now, watch)?,
        }
        self.receive(now, watch)
    }

    fn stop(&mut self, watch: &mut dyn Watch) {
        for id in self.mux.ids() {
            let Some(entry) = self.mux.get_mut(id) else {
                continue;
            };
            if let Some(socket) = entry.attachment.socket.take() {
                // The loop may be gone already; closing the socket is what counts.
                let _ = watch.remove(socket.as_raw_fd());
                close_gently(socket);
            }
        }
        self.mux = Mux::new(self.mux.guest_cid());
        for fd in [self.timer.as_raw_fd(), self.again.as_raw_fd()] {
            let _ = watch.remove(fd);
        }
        if std::mem::take(&mut self.listening) {
            let _ = watch.remove(self.sockets.listener().as_raw_fd());
        }
    }
}

/// Whether a packet is from this guest to the host (VIRTIO 1.2, 5.10.6.1).
pub(super) fn is_addressed_right(header: &Header, guest_cid: u64) -> bool {
    header.src_cid == guest_cid && header.dst_cid == HOST_CID
}

/// Milliseconds are enough for deadlines of seconds, and the coarse clock costs no instruction that traps in a guest.
fn now() -> Duration {
    let now = clock_gettime(ClockId::MonotonicCoarse);
    Duration::new(
        u64::try_from(now.tv_sec).unwrap_or(0),
        u32::try_from(now.tv_nsec).unwrap_or(0),
    )
}

fn drain_counter(fd: &OwnedFd) {
    // EAGAIN if it was read already; either way it is 0 afterwards.
    let _ = rustix::io::read(fd, &mut [0u8; 8]);
}

/// The events for a socket whose host process reads too slowly, and for one whose does not.
pub(super) fn socket_events(writable: bool) -> u32 {
    if writable {
        SOCKET_EVENTS | EPOLLOUT
    } else {
        SOCKET_EVENTS
    }
}
