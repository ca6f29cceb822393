//! The one epoll instance, and the tokens that tell what an event is about. No handler lives here.
//!
//! Everything is registered edge-triggered: readiness is remembered by whoever owns the descriptor, so pausing a
//! stream (its connection accepts no more) costs no system call and a hung-up pipe cannot spin the loop.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io;

use crate::table::Key;

/// Events taken per wait; more stay queued in the kernel.
const BATCH_EVENTS: usize = 64;

/// What an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Token {
    Listener,
    Connection(Key),
    /// The far side of a dialled connection.
    DialTarget(Key),
    Stdin(Key),
    Stdout(Key),
    Stderr(Key),
    Leader(Key),
    Cgroup(Key),
    /// The disk has what a write of this connection waits for.
    FileSync(Key),
}

impl Token {
    fn pack(self) -> u64 {
        let (kind, key) = match self {
            Self::Listener => {
                return 0;
            }
            Self::Connection(key) => (1, key),
            Self::DialTarget(key) => (2, key),
            Self::Stdin(key) => (3, key),
            Self::Stdout(key) => (4, key),
            Self::Stderr(key) => (5, key),
            Self::Leader(key) => (6, key),
            Self::Cgroup(key) => (7, key),
            Self::FileSync(key) => (8, key),
        };
        // Tables hold far fewer than 2^24 entries, so the index leaves the top byte free.
        kind << 56 | u64::from(key.index) << 32 | u64::from(key.generation)
    }

    fn unpack(bits: u64) -> Option<Self> {
        let key = Key {
            index: (bits >> 32) as u32 & 0x00ff_ffff,
            generation: bits as u32,
        };
        Some(match bits >> 56 {
            0 => Self::Listener,
            1 => Self::Connection(key),
            2 => Self::DialTarget(key),
            3 => Self::Stdin(key),
            4 => Self::Stdout(key),
            5 => Self::Stderr(key),
            6 => Self::Leader(key),
            7 => Self::Cgroup(key),
            8 => Self::FileSync(key),
            _ => return None,
        })
    }
}

/// What is ready.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ready {
    pub(crate) token: Token,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    /// The other side is gone, or an error is pending.
    pub(crate) hung_up: bool,
}

pub(crate) struct Reactor {
    epoll: OwnedFd,
    events: Vec<Event>,
}

impl fmt::Debug for Reactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The events are those of the last wait: of no interest, and without a Debug of their own.
        f.debug_struct("Reactor")
            .field("epoll", &self.epoll)
            .finish_non_exhaustive()
    }
}

impl Reactor {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            events: Vec::with_capacity(BATCH_EVENTS),
        })
    }

    pub(crate) fn add(&self, fd: impl AsFd, token: Token, flags: EventFlags) -> io::Result<()> {
        epoll::add(
            &self.epoll,
            fd,
            EventData::new_u64(token.pack()),
            flags | EventFlags::ET,
        )
    }

    pub(crate) fn modify(&self, fd: impl AsFd, token: Token, flags: EventFlags) -> io::Result<()> {
        epoll::modify(
            &self.epoll,
            fd,
            EventData::new_u64(token.pack()),
            flags | EventFlags::ET,
        )
    }

    /// Waits for events, at most for `timeout`, and appends them to `ready`.
    pub(crate) fn wait(
        &mut self,
        timeout: Option<Duration>,
        ready: &mut Vec<Ready>,
    ) -> io::Result<()> {
        let timeout = timeout.map(|t| Timespec {
            tv_sec: i64::try_from(t.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(t.subsec_nanos()),
        });
        self.events.clear();
        match epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(&mut self.events),
            timeout.as_ref(),
        ) {
            Ok(_) | Err(io::Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        ready.extend(self.events.iter().filter_map(|event| {
            let (flags, data) = (event.flags, event.data);
            Some(Ready {
                token: Token::unpack(data.u64())?,
                readable: flags.intersects(EventFlags::IN | EventFlags::PRI),
                writable: flags.contains(EventFlags::OUT),
                hung_up: flags.intersects(EventFlags::HUP | EventFlags::ERR | EventFlags::RDHUP),
            })
        }));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_kernel() {
        let key = Key {
            index: 0x00ab_cdef,
            generation: u32::MAX,
        };
        for token in [
            Token::Listener,
            Token::Connection(key),
            Token::DialTarget(key),
            Token::Stdin(key),
            Token::Stdout(key),
            Token::Stderr(key),
            Token::Leader(key),
            Token::Cgroup(key),
            Token::FileSync(key),
        ] {
            assert_eq!(Token::unpack(token.pack()), Some(token));
        }
        assert_eq!(Token::unpack(u64::MAX), None);
    }
}
