//! The one I/O thread: it waits for doorbells of all devices and for the file descriptors that their workers watch.
//!
//! One adapter, [`Subscriber`], stands between every [`QueueWorker`] and the event manager.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use event_manager::{
    EventManager, EventOps, Events, MutEventSubscriber, RemoteEndpoint, SubscriberId,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::devices::virtio::{Interrupt, QueueWorker, Watch};
use crate::guest_log::guest_warning;
use crate::machine::{ExitReason, ExitSlot};
use crate::seccomp;

/// The running I/O thread.
#[derive(Debug)]
pub struct IoThread {
    thread: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    workers: Workers,
}

/// Hands workers to the I/O thread and takes them away; for transports.
#[derive(Clone)]
pub struct Workers {
    remote: RemoteEndpoint<Subscriber>,
}

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Workers")
    }
}

/// A worker on the I/O thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkerId(SubscriberId);

/// The I/O thread is gone, or could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("the I/O thread does not answer: {0}")]
pub struct IoThreadError(String);

impl From<event_manager::Error> for IoThreadError {
    fn from(error: event_manager::Error) -> Self {
        Self(format!("{error:?}"))
    }
}

impl IoThread {
    /// Starts the thread. If it ends by itself, that ends the VM.
    pub fn start(exit: Arc<ExitSlot>) -> Result<Self, IoThreadError> {
        let mut manager = EventManager::<Subscriber>::new()?;
        let workers = Workers {
            remote: manager.remote_endpoint(),
        };
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::Builder::new()
            .name("io".to_owned())
            .spawn(move || {
                if let Err(error) = seccomp::install(seccomp::Thread::Io) {
                    exit.report(
                        ExitReason::Error,
                        format!("the I/O thread's system call filter: {error}"),
                    );
                    return;
                }
                while !stopped.load(Ordering::Acquire) {
                    if let Err(error) = manager.run() {
                        exit.report(
                            ExitReason::Error,
                            format!("the I/O thread cannot wait for events: {error:?}"),
                        );
                        return;
                    }
                }
            })
            .map_err(|error| IoThreadError(error.to_string()))?;
        Ok(Self {
            thread: Some(thread),
            stop,
            workers,
        })
    }

    /// How transports reach the thread.
    pub fn workers(&self) -> Workers {
        self.workers.clone()
    }

    /// Stops all workers and the thread.
    pub fn stop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // A thread that is gone cannot be woken, and need not be.
        let _ = self.workers.remote.kick();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Workers {
    /// Starts `worker`; `kicks[n]` is the doorbell of queue n. A worker that fails is stopped, and `interrupt` told.
    pub fn attach(
        &self,
        worker: Box<dyn QueueWorker>,
        kicks: Vec<EventFd>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<WorkerId, IoThreadError> {
        let subscriber = Subscriber {
            worker,
            kicks,
            interrupt,
            tokens: HashMap::new(),
            is_stopped: false,
        };
        self.remote
            .call_blocking(move |loop_| Ok(WorkerId(loop_.add_subscriber(subscriber))))
    }

    /// Stops a worker; once this returns it does not touch guest memory any more.
    pub fn detach(&self, worker: WorkerId) -> Result<(), IoThreadError> {
        self.remote.call_blocking(move |loop_| {
            // Dropping the subscriber stops its worker.
            loop_
                .remove_subscriber(worker.0)
                .map(drop)
                .map_err(IoThreadError::from)
        })
    }
}

/// One worker with what it watches.
struct Subscriber {
    worker: Box<dyn QueueWorker>,
    kicks: Vec<EventFd>,
    interrupt: Arc<dyn Interrupt>,
    tokens: HashMap<RawFd, u64>,
    is_stopped: bool,
}

impl Subscriber {
    fn fail(&mut self, what: &str, error: &io::Error, ops: &mut EventOps<'_>) {
        guest_warning(format_args!("a device stops, {what}: {error}"));
        for kick in &self.kicks {
            let _ = ops.remove(Events::empty(kick));
        }
        self.worker.stop(&mut LoopWatch {
            ops,
            tokens: &mut self.tokens,
        });
        self.is_stopped = true;
        self.interrupt.signal_needs_reset();
    }

    fn start(&mut self, ops: &mut EventOps<'_>) -> io::Result<()> {
        for (queue, kick) in (1..).zip(&self.kicks) {
            ops.add(Events::with_data(kick, queue, EventSet::IN))
                .map_err(to_io_error)?;
        }
        self.worker.start(&mut LoopWatch {
            ops,
            tokens: &mut self.tokens,
        })
    }

    fn dispatch(&mut self, events: Events, ops: &mut EventOps<'_>) -> io::Result<()> {
        let fd = events.fd();
        // Kicks carry their queue's number plus one, other descriptors zero.
        let queue = events
            .data()
            .checked_sub(1)
            .and_then(|queue| u16::try_from(queue).ok());
        let kick =
            queue.and_then(|queue| self.kicks.get(usize::from(queue)).map(|kick| (queue, kick)));
        let mut watch = LoopWatch {
            ops,
            tokens: &mut self.tokens,
        };
        match kick {
            Some((queue, kick)) => {
                // Emptied before the ring is looked at, so that no kick is lost. Already empty: harmless.
                let _ = kick.read();
                self.worker.on_kick(queue, &mut watch)
            }
            None => match watch.tokens.get(&fd) {
                Some(&token) => self
                    .worker
                    .on_fd(token, events.event_set().bits(), &mut watch),
                None => Ok(()),
            },
        }
    }
}

impl MutEventSubscriber for Subscriber {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = self.start(ops) {
            self.fail("it cannot start", &error, ops);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if self.is_stopped {
            return;
        }
        if let Err(error) = self.dispatch(events, ops) {
            self.fail("its driver or its host side is broken", &error, ops);
        }
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        if !self.is_stopped {
            // The event manager has let go of all descriptors already.
            self.worker.stop(&mut NoWatch);
        }
    }
}

struct LoopWatch<'a, 'b> {
    ops: &'a mut EventOps<'b>,
    tokens: &'a mut HashMap<RawFd, u64>,
}

impl Watch for LoopWatch<'_, '_> {
    fn add(&mut self, fd: RawFd, token: u64, events: u32) -> io::Result<()> {
        self.ops
            .add(Events::new_raw(fd, EventSet::from_bits_truncate(events)))
            .map_err(to_io_error)?;
        self.tokens.insert(fd, token);
        Ok(())
    }

    fn modify(&mut self, fd: RawFd, token: u64, events: u32) -> io::Result<()> {
        self.ops
            .modify(Events::new_raw(fd, EventSet::from_bits_truncate(events)))
            .map_err(to_io_error)?;
        self.tokens.insert(fd, token);
        Ok(())
    }

    fn remove(&mut self, fd: RawFd) -> io::Result<()> {
        self.tokens.remove(&fd);
        self.ops.remove(Events::empty_raw(fd)).map_err(to_io_error)
    }
}

/// For a worker whose descriptors are not watched any more.
struct NoWatch;

impl Watch for NoWatch {
    fn add(&mut self, _fd: RawFd, _token: u64, _events: u32) -> io::Result<()> {
        Err(io::ErrorKind::NotConnected.into())
    }

    fn modify(&mut self, _fd: RawFd, _token: u64, _events: u32) -> io::Result<()> {
        Err(io::ErrorKind::NotConnected.into())
    }

    fn remove(&mut self, _fd: RawFd) -> io::Result<()> {
        Ok(())
    }
}

fn to_io_error(error: event_manager::Error) -> io::Error {
    match error {
        event_manager::Error::Epoll(errno) => io::Error::from_raw_os_error(errno.errno()),
        other => io::Error::other(format!("{other:?}")),
    }
}

#[cfg(test)]
mod tests;
