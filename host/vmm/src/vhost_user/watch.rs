//! epoll whose tokens go stale with their descriptor, so that an event never reaches the wrong owner.

use std::collections::HashMap;
use std::io;
use std::os::fd::RawFd;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::devices::virtio::Watch;

pub(super) const EPOLLIN: u32 = libc::EPOLLIN as u32;

/// What a descriptor is to the thread.
#[derive(Debug, Clone, Copy)]
pub(super) enum Target {
    Control,
    Stop,
    Kick(u16),
    Worker(u64),
}

/// The thread's epoll. Each registration has a number of its own, ever.
#[derive(Debug)]
pub(super) struct EpollWatch {
    epoll: Epoll,
    targets: HashMap<u64, Target>,
    ids: HashMap<RawFd, u64>,
    next_id: u64,
}

impl EpollWatch {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new()?,
            targets: HashMap::new(),
            ids: HashMap::new(),
            next_id: 0,
        })
    }

    pub(super) fn insert(&mut self, fd: RawFd, target: Target, events: u32) -> io::Result<()> {
        let id = self.next_id;
        self.control(ControlOperation::Add, fd, id, events)?;
        self.next_id += 1;
        self.targets.insert(id, target);
        self.ids.insert(fd, id);
        Ok(())
    }

    pub(super) fn target(&self, id: u64) -> Option<Target> {
        self.targets.get(&id).copied()
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: RawFd,
        id: u64,
        events: u32,
    ) -> io::Result<()> {
        self.epoll.ctl(
            operation,
            fd,
            EpollEvent::new(EventSet::from_bits_truncate(events), id),
        )
    }

    pub(super) fn wait(&self, events: &mut [EpollEvent]) -> io::Result<usize> {
        loop {
            match self.epoll.wait(-1, events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }
}

impl Watch for EpollWatch {
    fn add(&mut self, fd: RawFd, token: u64, events: u32) -> io::Result<()> {
        self.insert(fd, Target::Worker(token), events)
    }

    fn modify(&mut self, fd: RawFd, token: u64, events: u32) -> io::Result<()> {
        let id = *self.ids.get(&fd).ok_or(io::ErrorKind::NotFound)?;
        self.targets.insert(id, Target::Worker(token));
        self.control(ControlOperation::Modify, fd, id, events)
    }

    fn remove(&mut self, fd: RawFd) -> io::Result<()> {
        let id = self.ids.remove(&fd).ok_or(io::ErrorKind::NotFound)?;
        self.targets.remove(&id);
        self.control(ControlOperation::Delete, fd, id, 0)
    }
}
