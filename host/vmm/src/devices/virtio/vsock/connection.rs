//! One stream socket between a host socket and a guest socket, as a state machine: no I/O and no clock.
//!
//! ```text
//!   host connects                                  guest connects
//!   Greeting --CONNECT line--> Dialling --RESPONSE--> Open <--REQUEST-- (the host's listener accepted)
//!      |                          |                    |
//!      | bad line, time-out       | RST, time-out      | both directions finished, and all bytes delivered
//!      v                          v                    v
//!    Closed                     Closed    Closing --RST, time-out--> Resetting (owes the guest RST) --> Closed
//!                                         (host gone)
//!                                         Draining (the guest is gone, bytes for the host are left) --> Closed
//! ```
//!
//! Bytes from the host go straight from the socket into the guest's buffers, so nothing is ever held in that direction.
//! Bytes from the guest go straight from its memory into the socket; what the socket does not take is held by the owner
//! of this state machine, and is bounded by the window that was advertised to the guest: `received - forwarded`.
//! All counters wrap at 2^32 (VIRTIO 1.2, 5.10.6.3).

use std::time::Duration;

use super::spec::{
    HOST_CID, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};

/// How long a host process may take for its `CONNECT` line, and the guest's kernel for its answer.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the guest may take to confirm that both directions are shut (VIRTIO 1.2, 5.10.6.5: "implementation-specific").
/// Bytes that its kernel already holds stay readable afterwards, so nothing is cut.
pub(crate) const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(4);
/// A guest that said nothing about its free space for this long while we wait for it is asked (CREDIT_REQUEST).
pub(crate) const CREDIT_PATIENCE: Duration = Duration::from_millis(500);

/// Which connection a packet belongs to: the CIDs are always the guest's and the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) host_port: u32,
    pub(crate) guest_port: u32,
}

/// Where a connection is in its life; the picture is above.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Greeting,
    Dialling,
    Open,
    Closing,
    Resetting,
    Draining,
    Closed,
}

/// What to do with the host socket; each is asked for once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct HostActions {
    /// Answer the `CONNECT` line with `OK`.
    pub(crate) greet: bool,
    /// The host process reads end-of-file after what it was sent.
    pub(crate) shut_write: bool,
    /// The guest reads no more: writes of the host process fail.
    pub(crate) shut_read: bool,
    /// Nothing is left to do with the socket.
    pub(crate) close: bool,
}

/// What is owed to the guest apart from data: one bit each, so it cannot grow.
#[derive(Debug, Clone, Copy, Default)]
struct Owed {
    request: bool,
    response: bool,
    shutdown: bool,
    credit_update: bool,
    credit_request: bool,
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Connection {
    key: Key,
    phase: Phase,
    deadline: Option<Duration>,
    owed: Owed,
    /// The guest was sent REQUEST, so it must be told when we give up.
    guest_knows: bool,
    actions: HostActions,

    // Host to guest.
    guest_buf_alloc: u32,
    guest_fwd_cnt: u32,
    sent: u32,
    host_finished: bool,
    guest_receives: bool,
    /// The guest was asked about its free space since it last had any: once is enough.
    credit_asked: bool,

    // Guest to host.
    window: u32,
    received: u32,
    forwarded: u32,
    /// The `forwarded` that the guest was last told.
    told: u32,
    guest_sends: bool,
    host_gone: bool,

    /// SHUTDOWN flags that the guest was told.
    shutdown_told: u32,
}

impl Connection {
    /// A host process connected to the multiplexer and has not yet named a port.
    pub(crate) fn greeting(window: u32, now: Duration) -> Self {
        Self {
            key: Key {
                host_port: 0,
                guest_port: 0,
            },
            phase: Phase::Greeting,
            deadline: Some(now + CONNECT_TIMEOUT),
            owed: Owed::default(),
            guest_knows: false,
            actions: HostActions::default(),
            guest_buf_alloc: 0,
            guest_fwd_cnt: 0,
            sent: 0,
            host_finished: false,
            guest_receives: true,
            credit_asked: false,
            window,
            received: 0,
            forwarded: 0,
            told: 0,
            guest_sends: true,
            host_gone: false,
            shutdown_told: 0,
        }
    }

    /// The guest sent REQUEST and the host's listener accepted.
    pub(crate) fn accepted(key: Key, window: u32, request: &Header) -> Self {
        Self {
            key,
            phase: Phase::Open,
            deadline: None,
            owed: Owed {
                response: true,
                ..Owed::default()
            },
            guest_knows: true,
            guest_buf_alloc: request.buf_alloc,
            guest_fwd_cnt: request.fwd_cnt,
            ..Self::greeting(window, Duration::ZERO)
        }
    }

    /// The host process named a port.
    pub(crate) fn dial(&mut self, key: Key, now: Duration) {
        debug_assert_eq!(self.phase, Phase::Greeting);
        self.key = key;
        self.phase = Phase::Dialling;
        self.deadline = Some(now + CONNECT_TIMEOUT);
        self.owed.request = true;
    }

    pub(crate) fn key(&self) -> Key {
        self.key
    }

    pub(crate) fn phase(&self) -> Phase {
        self.phase
    }

    pub(crate) fn window(&self) -> u32 {
        self.window
    }

    /// When [`Self::on_deadline`] wants to be called.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        self.deadline
    }

    /// Whether packets of the guest still belong to this connection.
    pub(crate) fn is_known_to_guest(&self) -> bool {
        !matches!(
            self.phase,
            Phase::Greeting | Phase::Draining | Phase::Closed
        )
    }

    /// Bytes of the guest that the host socket has not taken yet.
    pub(crate) fn held(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// Whether the host socket still takes bytes.
    pub(crate) fn host_takes_data(&self) -> bool {
        !self.host_gone && matches!(self.phase, Phase::Open | Phase::Draining)
    }

    /// How many bytes of the host the guest has room for (VIRTIO 1.2, 5.10.6.3); 0 unless data may flow.
    pub(crate) fn sendable(&self) -> u32 {
        if self.phase != Phase::Open || self.host_finished || !self.guest_receives {
            return 0;
        }
        let in_flight = self.sent.wrapping_sub(self.guest_fwd_cnt);
        self.guest_buf_alloc.saturating_sub(in_flight)
    }

    /// Whether the end of the host's bytes is still to be found by reading the host socket.
    pub(crate) fn wants_host_bytes(&self) -> bool {
        self.phase == Phase::Open && !self.host_finished && self.guest_receives
    }

    /// Whether [`Self::take_packet`] would return something.
    pub(crate) fn owes_packet(&self) -> bool {
        let Owed {
            request,
            response,
            shutdown,
            credit_update,
            credit_request,
        } = self.owed;
        self.phase == Phase::Resetting
            || request
            || response
            || shutdown
            || credit_update
            || credit_request
    }

    /// Whether nothing but SHUTDOWN is owed.
    pub(crate) fn owes_only_shutdown(&self) -> bool {
        let Owed {
            request,
            response,
            shutdown,
            credit_update,
            credit_request,
        } = self.owed;
        self.phase == Phase::Open
            && shutdown
            && !(request || response || credit_update || credit_request)
    }

    /// The next packet without payload that is owed to the guest.
    pub(crate) fn take_packet(&mut self, guest_cid: u64) -> Option<Header> {
        if self.phase == Phase::Resetting {
            self.phase = Phase::Closed;
            self.owed = Owed::default();
            return Some(self.header(guest_cid, Op::Reset, 0));
        }
        let owed = &mut self.owed;
        if std::mem::take(&mut owed.request) {
            self.guest_knows = true;
            return Some(self.header(guest_cid, Op::Request, 0));
        }
        if std::mem::take(&mut owed.response) {
            return Some(self.header(guest_cid, Op::Response, 0));
        }
        if std::mem::take(&mut owed.shutdown) {
            return Some(self.header(guest_cid, Op::Shutdown, self.shutdown_told));
        }
        if std::mem::take(&mut owed.credit_update) {
            return Some(self.header(guest_cid, Op::CreditUpdate, 0));
        }
        if std::mem::take(&mut owed.credit_request) {
            return Some(self.header(guest_cid, Op::CreditRequest, 0));
        }
        None
    }

    /// A packet to the guest; every packet carries the credit (VIRTIO 1.2, 5.10.6.3), so an owed update is paid with it.
    pub(crate) fn header(&mut self, guest_cid: u64, op: Op, flags: u32) -> Header {
        self.owed.credit_update = false;
        self.told = self.forwarded;
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            len: 0,
            socket_type: TYPE_STREAM,
            op: op as u16,
            flags,
            buf_alloc: self.window,
            fwd_cnt: self.forwarded,
        }
    }

    /// What to do with the host socket since the last call.
    pub(crate) fn take_actions(&mut self) -> HostActions {
        std::mem::take(&mut self.actions)
    }

    /// A packet of the guest. The number is how many bytes of its payload are to be forwarded to the host now.
    pub(crate) fn on_packet(&mut self, header: &Header, now: Duration) -> u32 {
        self.guest_buf_alloc = header.buf_alloc;
        self.guest_fwd_cnt = header.fwd_cnt;
        let op = Op::parse(header.op).filter(|_| header.socket_type == TYPE_STREAM);
        if op == Some(Op::Reset) {
            self.on_reset();
            return 0;
        }
        match (self.phase, op) {
            (Phase::Dialling, Some(Op::Response)) => {
                self.phase = Phase::Open;
                self.deadline = None;
                self.actions.greet = true;
            }
            (Phase::Open, Some(Op::Data)) => return self.on_data(header.len),
            (Phase::Open, Some(Op::CreditUpdate)) => self.credit_arrived(),
            (Phase::Open, Some(Op::CreditRequest)) => {
                self.owed.credit_update = true;
                self.credit_arrived();
            }
            (Phase::Open, Some(Op::Shutdown)) => self.on_shutdown(header.flags, now),
            // The guest had not seen our SHUTDOWN yet, which said that nothing more is received.
            (Phase::Closing, Some(Op::Data)) => {
                self.received = self.received.wrapping_add(header.len);
                self.forwarded = self.received;
            }
            (Phase::Closing, Some(Op::Shutdown))
                if header.flags & SHUTDOWN_BOTH == SHUTDOWN_BOTH =>
            {
                self.reset()
            }
            (Phase::Closing, Some(Op::Shutdown | Op::CreditUpdate | Op::CreditRequest))
            | (Phase::Resetting, _) => {}
            // Anything else has no place here: the guest's own connection is reset, and no other one notices.
            _ => self.reset(),
        }
        0
    }

    fn on_data(&mut self, len: u32) -> u32 {
        // More than the window allows, or after "no more is sent" (VIRTIO 1.2, 5.10.6.3.2 and 5.10.6.5).
        if !self.guest_sends || len > self.window - self.held() {
            self.reset();
            return 0;
        }
        self.received = self.received.wrapping_add(len);
        if self.host_gone {
            self.forwarded = self.received;
            return 0;
        }
        len
    }

    fn on_shutdown(&mut self, flags: u32, now: Duration) {
        // "These hints are permanent once sent" (VIRTIO 1.2, 5.10.6.5).
        if flags & SHUTDOWN_RECEIVE != 0 && self.guest_receives {
            self.guest_receives = false;
            self.actions.shut_read = true;
        }
        if flags & SHUTDOWN_SEND != 0 && self.guest_sends {
            self.guest_sends = false;
            self.shut_host_when_drained();
        }
        self.finish_if_done(now);
    }

    fn on_reset(&mut self) {
        let drain = self.phase == Phase::Open && self.held() > 0 && !self.host_gone;
        self.owed = Owed::default();
        self.deadline = None;
        if drain {
            self.phase = Phase::Draining;
        } else {
            self.phase = Phase::Closed;
            self.actions.close = true;
        }
    }

    fn credit_arrived(&mut self) {
        if self.sendable() > 0 {
            self.deadline = None;
            self.owed.credit_request = false;
            self.credit_asked = false;
        }
    }

    /// There are bytes for the guest and it has no room: it is asked if it stays silent.
    pub(crate) fn on_credit_exhausted(&mut self, now: Duration) {
        if self.phase == Phase::Open && self.deadline.is_none() && !self.credit_asked {
            self.deadline = Some(now + CREDIT_PATIENCE);
        }
    }

    /// `bytes` of the host were put into the guest's buffers.
    pub(crate) fn on_sent(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }

    /// The host socket took `bytes` of the guest.
    pub(crate) fn on_forwarded(&mut self, bytes: u32, now: Duration) {
        self.forwarded = self.forwarded.wrapping_add(bytes);
        match self.phase {
            Phase::Open => {
                // The guest is told once it could believe that half of its room is gone. Linux uses no more of our
                // window than its own is large.
                if self.received.wrapping_sub(self.told)
                    >= self.window.min(self.guest_buf_alloc) / 2
                {
                    self.owed.credit_update = true;
                }
                if !self.guest_sends {
                    self.shut_host_when_drained();
                    self.finish_if_done(now);
                }
            }
            Phase::Draining if self.held() == 0 => {
                self.phase = Phase::Closed;
                self.actions.close = true;
            }
            _ => {}
        }
    }

    fn shut_host_when_drained(&mut self) {
        if self.held() == 0 && !self.host_gone {
            self.actions.shut_write = true;
        }
    }

    /// The host process shut its sending direction, and all it sent is with the guest.
    pub(crate) fn on_host_finished(&mut self, now: Duration) {
        if self.host_finished {
            return;
        }
        self.host_finished = true;
        self.deadline = None;
        match self.phase {
            Phase::Greeting => self.close(),
            Phase::Open => {
                self.tell_shutdown(SHUTDOWN_SEND);
                self.finish_if_done(now);
            }
            _ => {}
        }
    }

    /// The host process closed its socket: nobody takes the guest's bytes any more. Bytes that it sent before are still
    /// read and delivered.
    pub(crate) fn on_host_gone(&mut self, now: Duration) {
        if self.host_gone {
            return;
        }
        self.host_gone = true;
        self.forwarded = self.received;
        match self.phase {
            Phase::Greeting | Phase::Draining => self.close(),
            Phase::Dialling => self.reset(),
            Phase::Open => {
                if self.guest_sends {
                    self.tell_shutdown(SHUTDOWN_RECEIVE);
                }
                self.finish_if_done(now);
            }
            Phase::Closing | Phase::Resetting | Phase::Closed => {}
        }
    }

    fn tell_shutdown(&mut self, flags: u32) {
        if self.shutdown_told & flags != flags {
            self.shutdown_told |= flags;
            self.owed.shutdown = true;
        }
    }

    /// Clean disconnect (VIRTIO 1.2, 5.10.6.5), once each direction has ended and its bytes are delivered.
    fn finish_if_done(&mut self, now: Duration) {
        let nothing_follows_from_host = self.host_finished || !self.guest_receives;
        if self.phase != Phase::Open || !nothing_follows_from_host {
            return;
        }
        if !self.guest_sends && self.held() == 0 {
            // Nothing can follow in either direction.
            self.reset();
        } else if self.guest_sends && self.host_gone {
            self.tell_shutdown(SHUTDOWN_BOTH);
            self.phase = Phase::Closing;
            self.deadline = Some(now + SHUTDOWN_TIMEOUT);
            self.actions.close = true;
        }
    }

    /// A deadline has passed: of `CONNECT`, of the guest's answer, of its confirmation, or of its silence about credit.
    pub(crate) fn on_deadline(&mut self, now: Duration) {
        match self.deadline {
            Some(deadline) if deadline <= now => self.deadline = None,
            _ => return,
        }
        match self.phase {
            Phase::Greeting => self.close(),
            Phase::Dialling | Phase::Closing => self.reset(),
            Phase::Open => {
                self.owed.credit_request = true;
                self.credit_asked = true;
            }
            Phase::Resetting | Phase::Draining | Phase::Closed => {}
        }
    }

    /// Gives up: the host's `CONNECT` line was wrong, or there is no port left.
    pub(crate) fn close(&mut self) {
        self.phase = Phase::Closed;
        self.deadline = None;
        self.actions.close = true;
    }

    /// Ends the connection for both sides: RST to a guest that knows of it, and the host socket closes.
    fn reset(&mut self) {
        self.phase = if self.guest_knows {
            Phase::Resetting
        } else {
            Phase::Closed
        };
        self.owed = Owed::default();
        self.deadline = None;
        self.forwarded = self.received;
        self.actions.close = true;
    }
}

#[cfg(test)]
mod tests;
