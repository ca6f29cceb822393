//! One exec: its process tree, its streams, how it ended, and who is attached. Facts are kept here as they become
//! known; `report.rs` tells them to each attached connection in the order the protocol gives them. The loop, sockets
//! and requests are the server's business.

mod lifecycle;
mod report;
pub(crate) mod ring;
mod source;
mod start;
pub(crate) mod stdin;

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use airlock_proto::v1::{DisconnectPolicy, ExecInfo, HolderPolicy, LeaderExited};
use bytes::Bytes;

use crate::process::tree::Tree;
use crate::table::Key;
use source::Source;
use stdin::Stdin;

pub(crate) use lifecycle::ActionError;
pub(crate) use start::{Means, StartError, YOUNG, check_id, ring_bytes, start};

/// Observers beside the one controller of an exec; each costs a connection's buffers.
pub(crate) const MAX_OBSERVERS: usize = 8;

/// What a request said about how the exec is to be handled.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Policy {
    pub(crate) timeout: Option<Duration>,
    pub(crate) grace: Duration,
    pub(crate) holders: HolderPolicy,
    pub(crate) holder_grace: Duration,
    pub(crate) on_disconnect: DisconnectPolicy,
}

/// A connection that hears of the exec, and what it has been told.
#[derive(Debug)]
pub(crate) struct Attachment {
    pub(crate) connection: Key,
    pub(crate) observer: bool,
    /// Per stream: the next byte it gets.
    cursor: [u64; 2],
    /// Per stream: bytes it did not get.
    missed: [u64; 2],
    end_told: [bool; 2],
    started_told: bool,
    exit_told: bool,
    tree_told: bool,
}

impl Attachment {
    pub(crate) fn new(connection: Key, observer: bool, offsets: [u64; 2]) -> Self {
        Self {
            connection,
            observer,
            cursor: offsets,
            missed: [0; 2],
            end_told: [false; 2],
            started_told: false,
            exit_told: false,
            tree_told: false,
        }
    }
}

/// Moments at which something must happen without anybody asking.
#[derive(Debug, Default)]
struct Deadlines {
    /// Its streams are watched from now on; until then only its leader is.
    watch: Option<Instant>,
    timeout: Option<Instant>,
    kill: Option<Instant>,
    holders: Option<Instant>,
    /// Look at the tree again: a walk has no event for its end, and a kill is repeated until it is proven.
    tree: Option<Instant>,
}

#[derive(Debug)]
pub(crate) struct Exec {
    pub(crate) id: String,
    pub(crate) pid: u32,
    argv: Vec<Bytes>,
    is_tty: bool,
    started: Instant,
    start_unix_ns: u64,
    policy: Policy,
    /// Until it has been reaped.
    leader: Option<OwnedFd>,
    exit: Option<LeaderExited>,
    /// stdout and stderr; a terminal has the first only.
    sources: Vec<Source>,
    pub(crate) stdin: Stdin,
    stdin_is_watched: bool,
    streams_are_watched: bool,
    /// None once it was seen empty and given up.
    tree: Option<Tree>,
    tree_is_empty: bool,
    tree_looks: u32,
    attachments: Vec<Attachment>,
    detached: bool,
    deadlines: Deadlines,
    /// What the server's timer table has for this exec.
    pub(crate) scheduled: Option<Instant>,
    timed_out: bool,
    /// The agent decided that the rest of the tree must go; the exec is not over before it has.
    must_empty: bool,
    /// And it kills what is there until that has come about.
    killing: bool,
    /// Signals that clients sent (bit n-1), to tell whose doing an end was.
    client_signals: u64,
    /// Per stream: the client has these bytes and the ring may forget them.
    acknowledged: Option<[u64; 2]>,
    pub(crate) replay_bytes: usize,
    /// Already on the server's list of finished execs.
    pub(crate) retired: bool,
}

impl Exec {
    pub(crate) fn is_running(&self) -> bool {
        self.exit.is_none()
    }

    pub(crate) fn has_tree(&self) -> bool {
        self.tree.is_some()
    }

    pub(crate) fn is_attached(&self) -> bool {
        !self.attachments.is_empty()
    }

    /// Whether nothing more will happen that has to be reported.
    pub(crate) fn is_over(&self) -> bool {
        self.exit.is_some()
            && self.sources.iter().all(Source::has_ended)
            && (self.tree.is_none() || !self.must_empty)
    }

    pub(crate) fn streams_ended(&self) -> bool {
        self.sources.iter().all(Source::has_ended)
    }

    pub(crate) fn sees_empty_tree(&self) -> bool {
        self.tree_is_empty
    }

    /// The outputs to watch, with their places, once it is time to watch them.
    pub(crate) fn outputs_to_watch(&mut self) -> Vec<(usize, &OwnedFd)> {
        if self.streams_are_watched || self.deadlines.watch.is_some() {
            return Vec::new();
        }
        self.streams_are_watched = true;
        let fds = self.sources.iter().enumerate();
        fds.filter_map(|(index, source)| Some((index, source.fd()?)))
            .collect()
    }

    /// One of the outputs has something to read, or nobody writes to it any more.
    pub(crate) fn output_event(&mut self, index: usize, hung_up: bool) {
        if let Some(source) = self.sources.get_mut(index) {
            source.on_event(hung_up);
        }
    }

    /// The leader is said to have ended: whatever the streams have is to be read.
    pub(crate) fn expect_end(&mut self) {
        for source in &mut self.sources {
            source.on_event(false);
        }
    }

    /// The process takes input again, or never will.
    pub(crate) fn stdin_event(&mut self, hung_up: bool) {
        if hung_up {
            self.stdin.close();
        } else {
            self.stdin.flush();
        }
    }

    /// stdin's descriptor, the first time that it needs to be watched.
    pub(crate) fn stdin_to_watch(&mut self) -> Option<&OwnedFd> {
        if self.stdin_is_watched || self.stdin.waiting_fd().is_none() {
            return None;
        }
        self.stdin_is_watched = true;
        self.stdin.waiting_fd()
    }

    pub(crate) fn connections(&self) -> impl Iterator<Item = Key> {
        self.attachments.iter().map(|a| a.connection)
    }

    /// The connection that controls the exec.
    pub(crate) fn controller(&self) -> Option<Key> {
        let controller = self.attachments.iter().find(|a| !a.observer);
        controller.map(|a| a.connection)
    }

    pub(crate) fn info(&self) -> ExecInfo {
        let total = |index: usize| self.sources.get(index).map_or(0, Source::total);
        ExecInfo {
            id: self.id.clone(),
            pid: self.pid,
            argv: self.argv.clone(),
            tty: self.is_tty,
            start_unix_ns: self.start_unix_ns,
            running: self.is_running(),
            exit: self.exit,
            stdout_bytes: total(0),
            stderr_bytes: total(1),
            tree_empty: self.tree.is_none(),
        }
    }
}
