//! What a virtio device is, apart from any transport and any event loop.
//!
//! A device has two halves. [`VirtioDevice`] answers register and configuration accesses; it lives on the vCPU side of
//! the transport. When the driver sets DRIVER_OK (VIRTIO 1.2, 3.1.1) the transport calls [`VirtioDevice::activate`],
//! which hands out the other half, a [`QueueWorker`]: it owns the rings and runs on the I/O thread. Nothing is shared
//! between the halves, so there is no lock around a device.
//!
//! The same workers run behind virtio-mmio on KVM and behind vhost-user for engine `qemu`: a worker sees guest memory,
//! its queues, an [`Interrupt`] to raise and a [`Watch`] to register file descriptors with, and no more.

pub mod block;
pub mod mmio;
pub mod queue;
pub mod rng;
pub mod vsock;

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;

/// Raises the device's interrupt. Implemented by the mmio transport (status bit + irqfd) and by vhost-user (call fds).
pub trait Interrupt: Send + Sync + fmt::Debug {
    /// Buffers of `queue` were used (VIRTIO 1.2, 2.7.7): the caller has already decided that the driver wants to know.
    fn signal_used(&self, queue: u16);
    /// The configuration space changed (VIRTIO 1.2, 2.5).
    fn signal_config(&self);
    /// The worker failed and has stopped: DEVICE_NEEDS_RESET (VIRTIO 1.2, 2.1.2).
    fn signal_needs_reset(&self) {}
}

/// The I/O thread as a worker sees it: file descriptors to be told about.
///
/// `token` comes back in [`QueueWorker::on_fd`]. Events are epoll's (`EPOLLIN`, `EPOLLOUT`, ...), level-triggered unless
/// the caller adds `EPOLLET`.
pub trait Watch {
    /// Starts watching `fd`.
    fn add(&mut self, fd: RawFd, token: u64, events: u32) -> io::Result<()>;
    /// Changes which events of `fd` are watched.
    fn modify(&mut self, fd: RawFd, token: u64, events: u32) -> io::Result<()>;
    /// Stops watching `fd`. Must be called before the fd is closed.
    fn remove(&mut self, fd: RawFd) -> io::Result<()>;
}

/// Everything a worker gets at DRIVER_OK.
#[derive(Debug)]
pub struct Activation {
    /// The guest's memory. Hostile: the guest writes to it at any time, so headers are copied once and then checked.
    pub memory: Arc<GuestMemoryMmap>,
    /// The queues in the device's order, configured by the driver. One that it left disabled is not `ready()`.
    /// VIRTIO_F_EVENT_IDX is set on them already, as negotiated.
    pub queues: Vec<Queue>,
    /// How to tell the driver.
    pub interrupt: Arc<dyn Interrupt>,
    /// Feature bits that the driver accepted (VIRTIO 1.2, 2.2).
    pub features: u64,
}

/// The registers half of a device: vCPU side, must answer without blocking.
pub trait VirtioDevice: Send {
    /// Device ID (VIRTIO 1.2, clause 5).
    fn device_type(&self) -> u32;
    /// Largest size of each queue.
    fn queue_max_sizes(&self) -> &[u16];
    /// Feature bits offered, VIRTIO_F_VERSION_1 included.
    fn features(&self) -> u64;
    /// Reads configuration space; bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes configuration space; most devices ignore it.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// Turns the device on and hands out its ring side. Called again after a device reset (VIRTIO 1.2, 2.4).
    fn activate(&mut self, activation: Activation) -> io::Result<Box<dyn QueueWorker>>;
}

/// The rings half of a device: I/O thread only.
pub trait QueueWorker: Send {
    /// Called once, first, on the I/O thread: register extra file descriptors here.
    fn start(&mut self, watch: &mut dyn Watch) -> io::Result<()>;
    /// The driver kicked `queue`. An error is a broken guest: it is logged (rate limited) and the device stops.
    fn on_kick(&mut self, queue: u16, watch: &mut dyn Watch) -> io::Result<()>;
    /// A watched file descriptor is ready with epoll `events`.
    fn on_fd(&mut self, token: u64, events: u32, watch: &mut dyn Watch) -> io::Result<()>;
    /// The device was reset or the VM is stopping: unregister every fd and drop host resources.
    fn stop(&mut self, watch: &mut dyn Watch);
}
