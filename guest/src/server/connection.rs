//! One connection: its socket, the bytes that have come in, the frames that wait to go out, and what it is being used
//! for. Which frame means what is decided in `requests.rs`.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use airlock_proto::codec::{Decoder, FrameError};
use airlock_proto::v1::ToAgent;
use bytes::BytesMut;
use rustix::io::{self, Errno};

use super::dial::Dialled;
use super::probe::Probe;
use crate::files::Work;
use crate::out_queue::{OutQueue, Outlet};
use crate::table::{Key, Table};

/// Bytes taken from a socket at once; the reader's scratch buffer has this size.
pub(super) const RECEIVE_BYTES: usize = 64 << 10;
/// When every stream has ended the leader's exit is due; the ends wait this long for it.
pub(super) const ENDING_HOLD: Duration = Duration::from_millis(1);
/// More than this is worth a write of its own.
const HOLD_BYTES: usize = 16 << 10;

/// What a connection is used for.
#[derive(Debug)]
pub(super) enum State {
    /// The doorbell, until the host has taken it.
    Connecting,
    /// Hello has not come yet.
    Greeting,
    Idle,
    Exec(Key),
    /// ExecWait on this exec.
    Waiting(Key),
    /// ExecList: execs still to be told.
    Listing(VecDeque<Key>),
    Probing(Probe),
    File(Box<Work>),
    /// Shutdown is under way and will be answered here.
    ShuttingDown,
    /// Raw bytes.
    Dialled(Box<Dialled>),
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) fd: OwnedFd,
    pub(super) state: State,
    pub(super) out: OutQueue,
    inbox: BytesMut,
    decoder: Decoder<ToAgent>,
    /// There may be more to read from the socket.
    pub(super) readable: bool,
    /// The peer will send no more.
    pub(super) hung_up: bool,
    /// The reactor watches for the socket to take more.
    pub(super) watching_write: bool,
    /// Goes once what is queued has been sent.
    pub(super) closing: bool,
    pub(super) hold_until: Option<Instant>,
    /// On the server's list of connections to flush.
    pub(super) listed: bool,
}

/// What became of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flushed {
    /// All is sent.
    Empty,
    /// The socket takes no more for now.
    Blocked,
    /// Kept back until `hold_until`.
    Held,
    Lost,
}

impl Connection {
    pub(super) fn new(fd: OwnedFd, state: State) -> Self {
        Self {
            fd,
            state,
            out: OutQueue::default(),
            inbox: BytesMut::new(),
            decoder: Decoder::default(),
            readable: true,
            hung_up: false,
            watching_write: false,
            closing: false,
            hold_until: None,
            listed: false,
        }
    }

    /// Reads once. `Ok(false)`: nothing there. An error, or the end of the stream, means that the peer is gone.
    pub(super) fn receive(&mut self, scratch: &mut [u8]) -> Result<bool, Gone> {
        match io::read(&self.fd, &mut *scratch) {
            Ok(0) => Err(Gone),
            Ok(length) => {
                self.inbox.extend_from_slice(&scratch[..length]);
                // A stream socket that gives less than asked has no more (epoll(7)); its end is yet to be read.
                self.readable = length == scratch.len() || self.hung_up;
                Ok(true)
            }
            Err(Errno::INTR) => Ok(true),
            Err(Errno::AGAIN) => {
                self.readable = false;
                Ok(false)
            }
            Err(_) => Err(Gone),
        }
    }

    pub(super) fn next_frame(&mut self) -> Result<Option<ToAgent>, FrameError> {
        self.decoder.next(&mut self.inbox)
    }

    /// Bytes that came behind a Dial and belong to its target.
    pub(super) fn take_inbox(&mut self) -> BytesMut {
        std::mem::take(&mut self.inbox)
    }

    pub(super) fn flush(&mut self, now: Instant) -> Flushed {
        if let Some(until) = self.hold_until {
            if now < until && !self.closing && self.out.bytes() < HOLD_BYTES {
                return Flushed::Held;
            }
            self.hold_until = None;
        }
        match self.out.write_to(&self.fd) {
            Ok(true) => {
                if matches!(self.state, State::Idle) {
                    self.out.shrink();
                    if self.inbox.is_empty() && self.inbox.capacity() > RECEIVE_BYTES {
                        self.inbox = BytesMut::new();
                    }
                }
                Flushed::Empty
            }
            Ok(false) => Flushed::Blocked,
            Err(_) => Flushed::Lost,
        }
    }
}

/// The peer is gone.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gone;

impl Outlet for Table<Connection> {
    fn out(&mut self, connection: Key) -> Option<&mut OutQueue> {
        self.get_mut(connection).map(|c| &mut c.out)
    }
}
