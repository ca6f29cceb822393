//! The agent's loop: waits, hands each event to whom it concerns, moves execs' output and writes what is ready, once a
//! turn, so that frames that are due together leave together.

mod connection;
mod control;
mod dial;
mod execs;
mod files;
mod listener;
mod probe;
mod requests;
mod shutdown;
mod system;
mod vsock;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit};

use crate::cgroup::Cgroups;
use crate::exec::Exec;
use crate::process::{NoOp, Spawner, signals};
use crate::reactor::{Reactor, Ready, Token};
use crate::table::{Key, Table};
use crate::users::Users;
use crate::{Options, log};
use connection::{Connection, Flushed, RECEIVE_BYTES, State};
use listener::Listener;
use shutdown::Shutdown;

/// Connections served at once: one for each live exec and some for control. Each may cost a frame and a queue.
const MAX_CONNECTIONS: usize = 4096;
/// Execs known at once, live and finished.
const MAX_EXECS: usize = 4096;
/// Finished execs kept for lists, waits and reattaching.
const MAX_FINISHED: usize = 64;
/// Memory that all replay rings may take together.
const MAX_REPLAY_TOTAL_BYTES: usize = 64 << 20;
/// Descriptors: an exec has up to nine, a connection one.
const NOFILE: u64 = 65536;
/// Socket reads of one connection before others get their turn.
const READS_PER_TURN: usize = 4;
/// After a cgroup could not be made or removed, how long until that is tried again.
const TIDY_RETRY: Duration = Duration::from_secs(1);

/// Why the agent could not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("cannot set up {what}: {source}")]
    SetUp {
        what: &'static str,
        source: std::io::Error,
    },
    #[error("waiting for events failed: {0}")]
    Wait(std::io::Error),
}

fn set_up<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> ServeError {
    move |source| ServeError::SetUp {
        what,
        source: source.into(),
    }
}

/// Serves until the host asks for a shutdown.
///
/// # Errors
/// When the agent cannot listen or its event queue fails; nothing that a client or an exec does.
pub fn serve(options: &Options) -> Result<(), ServeError> {
    signals::set_up();
    let mut agent = Agent::new(options)?;
    agent.ring_doorbell();
    while !agent.finished {
        agent.turn()?;
    }
    Ok(())
}

#[derive(Debug)]
struct Agent {
    options: Options,
    reactor: Reactor,
    ready: Vec<Ready>,
    listener: Listener,
    connections: Table<Connection>,
    execs: Table<Exec>,
    ids: HashMap<String, Key>,
    /// Execs that are over, oldest first.
    retired: VecDeque<Key>,
    timers: BTreeSet<(Instant, Key)>,
    /// Execs with something to move or to tell.
    to_pump: Vec<Key>,
    /// Connections with frames to write.
    to_flush: Vec<Key>,
    /// Connections whose frames, or bytes in the socket, were left for the next turn.
    to_read: Vec<Key>,
    probes: Vec<Key>,
    /// Connections whose file request has a next step.
    files: VecDeque<Key>,
    spawner: Spawner,
    users: Users,
    cgroups: Option<Cgroups>,
    tidy_after: Option<Instant>,
    null: OwnedFd,
    no_op: Option<NoOp>,
    scratch: Vec<u8>,
    boot_id: String,
    replay_bytes: usize,
    shutdown: Option<Shutdown>,
    finished: bool,
}

impl Agent {
    fn new(options: &Options) -> Result<Self, ServeError> {
        raise_nofile();
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let null = rustix::fs::open("/dev/null", flags, Mode::empty());
        let cgroups = options.cgroup.as_deref().map(Cgroups::open).transpose();
        let agent = Self {
            options: options.clone(),
            reactor: Reactor::new().map_err(set_up("epoll"))?,
            ready: Vec::new(),
            listener: Listener::open(&options.listen).map_err(set_up("the listener"))?,
            connections: Table::new(MAX_CONNECTIONS),
            execs: Table::new(MAX_EXECS),
            ids: HashMap::new(),
            retired: VecDeque::new(),
            timers: BTreeSet::new(),
            to_pump: Vec::new(),
            to_flush: Vec::new(),
            to_read: Vec::new(),
            probes: Vec::new(),
            files: VecDeque::new(),
            spawner: Spawner::new().map_err(set_up("the spawner"))?,
            users: Users::default(),
            cgroups: cgroups.map_err(set_up("the cgroup"))?,
            tidy_after: None,
            null: null.map_err(set_up("/dev/null"))?,
            no_op: None,
            scratch: vec![0; RECEIVE_BYTES],
            boot_id: system::boot_id(),
            replay_bytes: 0,
            shutdown: None,
            finished: false,
        };
        agent
            .reactor
            .add(agent.listener.fd(), Token::Listener, EventFlags::IN)
            .map_err(set_up("epoll"))?;
        Ok(agent)
    }

    fn ring_doorbell(&mut self) {
        if let Some(fd) = self.listener.ring_doorbell() {
            self.add_connection(fd, State::Connecting);
        }
    }

    /// Waits once and does everything that has become due.
    fn turn(&mut self) -> Result<(), ServeError> {
        let mut ready = std::mem::take(&mut self.ready);
        ready.clear();
        let timeout = self.time_to_next(Instant::now());
        let waited = self.reactor.wait(timeout, &mut ready);
        waited.map_err(|errno| ServeError::Wait(errno.into()))?;
        let now = Instant::now();
        if ready.is_empty() && timeout == Some(Duration::ZERO) && self.is_quiet() {
            self.tidy(now);
        }
        // Leaders last: the ends of a process's streams are then known already when its exit is taken down.
        for event in ready
            .iter()
            .filter(|e| !matches!(e.token, Token::Leader(_)))
        {
            self.on_event(*event, now);
        }
        for event in ready.iter().filter(|e| matches!(e.token, Token::Leader(_))) {
            self.on_event(*event, now);
        }
        self.ready = ready;
        for key in std::mem::take(&mut self.to_read) {
            self.on_readable(key, now);
        }
        self.on_timers(now);
        self.probe_some();
        self.files_some();
        for key in std::mem::take(&mut self.to_pump) {
            self.pump(key, now);
        }
        for key in std::mem::take(&mut self.to_flush) {
            self.flush(key, now);
        }
        self.progress_shutdown(now);
        Ok(())
    }

    /// Nothing is waiting to be done but housekeeping.
    fn is_quiet(&self) -> bool {
        self.to_pump.is_empty()
            && self.to_read.is_empty()
            && self.to_flush.is_empty()
            && self.probes.is_empty()
            && self.files.is_empty()
    }

    fn wants_tidying(&self, now: Instant) -> bool {
        self.cgroups.as_ref().is_some_and(Cgroups::is_untidy)
            && self.tidy_after.is_none_or(|after| after <= now)
    }

    fn tidy(&mut self, now: Instant) {
        if let Some(cgroups) = &mut self.cgroups {
            self.tidy_after = (!cgroups.tidy()).then(|| now + TIDY_RETRY);
        }
    }

    fn time_to_next(&self, now: Instant) -> Option<Duration> {
        let held = self
            .to_flush
            .iter()
            .filter_map(|key| self.connections.get(*key)?.hold_until);
        if !self.to_pump.is_empty()
            || !self.to_read.is_empty()
            || !self.probes.is_empty()
            || !self.files.is_empty()
        {
            return Some(Duration::ZERO);
        }
        // What is on the list after a turn is being held back.
        if self.to_flush.is_empty() && self.wants_tidying(now) {
            return Some(Duration::ZERO);
        }
        let timer = self.timers.first().map(|(at, _)| *at);
        let shutdown = self.shutdown.as_ref().map(Shutdown::next_look);
        let tidy = self.tidy_after.filter(|_| {
            self.cgroups.as_ref().is_some_and(Cgroups::is_untidy) && self.to_flush.is_empty()
        });
        let next = held.chain(timer).chain(shutdown).chain(tidy).min()?;
        Some(next.saturating_duration_since(now))
    }

    fn on_event(&mut self, event: Ready, now: Instant) {
        match event.token {
            Token::Listener => self.accept(),
            Token::Connection(key) => self.on_connection_event(key, event, now),
            Token::DialTarget(key) => self.on_dial_target(key, event),
            Token::Stdin(key) => {
                if let Some(exec) = self.execs.get_mut(key) {
                    exec.stdin_event(event.hung_up);
                    self.to_pump.push(key);
                }
            }
            Token::Stdout(key) => self.on_output(key, 0, event),
            Token::Stderr(key) => self.on_output(key, 1, event),
            Token::Leader(key) => self.on_leader(key, now),
            Token::Cgroup(key) => self.on_tree(key, now),
            Token::FileSync(key) => self.on_file_synced(key),
        }
    }

    fn accept(&mut self) {
        loop {
            match self.listener.accept() {
                Ok(Some(fd)) => self.add_connection(fd, State::Greeting),
                Ok(None) => return,
                Err(error) => {
                    // Out of descriptors, most likely: the next connection will raise another event.
                    return log::error(format_args!("cannot accept a connection: {error}"));
                }
            }
        }
    }

    fn add_connection(&mut self, fd: OwnedFd, state: State) {
        let flags = match state {
            State::Connecting => EventFlags::OUT,
            _ => EventFlags::IN | EventFlags::RDHUP,
        };
        let connecting = matches!(state, State::Connecting);
        let Ok(key) = self.connections.insert(Connection::new(fd, state)) else {
            return log::error(format_args!(
                "refused a connection: {MAX_CONNECTIONS} are open"
            ));
        };
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        connection.watching_write = connecting;
        if self
            .reactor
            .add(&connection.fd, Token::Connection(key), flags)
            .is_err()
        {
            self.connections.remove(key);
        }
    }

    fn on_connection_event(&mut self, key: Key, event: Ready, now: Instant) {
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        if matches!(connection.state, State::Connecting) {
            return self.on_doorbell(key, event);
        }
        if event.writable || event.hung_up {
            self.list_for_flush(key);
        }
        if event.readable || event.hung_up {
            if let Some(connection) = self.connections.get_mut(key) {
                connection.readable = true;
                connection.hung_up |= event.hung_up;
            }
            self.on_readable(key, now);
        }
    }

    /// The doorbell was answered or refused. Refused is no error: the host need not listen.
    fn on_doorbell(&mut self, key: Key, event: Ready) {
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        let taken = event.writable
            && !event.hung_up
            && matches!(
                rustix::net::sockopt::socket_error(&connection.fd),
                Ok(Ok(()))
            );
        if !taken {
            self.connections.remove(key);
            return;
        }
        connection.state = State::Greeting;
        connection.watching_write = false;
        let flags = EventFlags::IN | EventFlags::RDHUP;
        if self
            .reactor
            .modify(&connection.fd, Token::Connection(key), flags)
            .is_err()
        {
            self.connections.remove(key);
        }
    }

    /// Reads from a connection and handles what came, for a bounded time.
    fn on_readable(&mut self, key: Key, now: Instant) {
        for _ in 0..READS_PER_TURN {
            if !self.handle_frames(key, now) {
                return;
            }
            let Some(connection) = self.connections.get_mut(key) else {
                return;
            };
            if matches!(connection.state, State::Dialled(_)) {
                return self.pump_dialled(key);
            }
            if !connection.readable {
                return;
            }
            match connection.receive(&mut self.scratch) {
                Ok(true) => {}
                Ok(false) => return,
                Err(_) => return self.lose(key, now),
            }
        }
        self.to_read.push(key);
    }

    fn list_for_flush(&mut self, key: Key) {
        if let Some(connection) = self.connections.get_mut(key)
            && !connection.listed
        {
            connection.listed = true;
            self.to_flush.push(key);
        }
    }

    fn flush(&mut self, key: Key, now: Instant) {
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        connection.listed = false;
        let flushed = connection.flush(now);
        if flushed == Flushed::Held {
            return self.list_for_flush(key);
        }
        if flushed == Flushed::Lost {
            return self.lose(key, now);
        }
        let blocked = flushed == Flushed::Blocked;
        if blocked != connection.watching_write {
            connection.watching_write = blocked;
            let mut flags = EventFlags::IN | EventFlags::RDHUP;
            flags.set(EventFlags::OUT, blocked);
            let watched = self
                .reactor
                .modify(&connection.fd, Token::Connection(key), flags);
            if watched.is_err() {
                return self.lose(key, now);
            }
        }
        if blocked {
            return;
        }
        if connection.closing {
            return self.lose(key, now);
        }
        if connection.out.take_refused() {
            match &mut connection.state {
                State::Exec(exec) => self.to_pump.push(*exec),
                State::Listing(execs) => {
                    let execs = std::mem::take(execs);
                    self.list_execs(key, execs);
                }
                State::File(_) => self.files.push_back(key),
                _ => self.to_read.push(key),
            }
        }
    }

    /// Forgets a connection. An exec that it controlled is handled by its own policy.
    fn lose(&mut self, key: Key, now: Instant) {
        let Some(connection) = self.connections.remove(key) else {
            return;
        };
        if let State::Exec(exec_key) = connection.state
            && let Some(exec) = self.execs.get_mut(exec_key)
        {
            exec.drop_connection(key, true, now);
            self.to_pump.push(exec_key);
        }
    }
}

/// Takes as many descriptors as the limits allow.
fn raise_nofile() {
    let own = rustix::process::getrlimit(Resource::Nofile);
    let hard = own.maximum.map_or(NOFILE, |hard| hard.max(NOFILE));
    let raised = |hard| Rlimit {
        current: Some(hard),
        maximum: Some(hard),
    };
    // Raising the hard limit takes a privilege; without it the soft one goes up to the hard one.
    if rustix::process::setrlimit(Resource::Nofile, raised(hard)).is_err()
        && let Some(hard) = own.maximum
    {
        let _: Result<(), Errno> = rustix::process::setrlimit(Resource::Nofile, raised(hard));
    }
}
