//! A virtio device of ours served to QEMU over vhost-user: one thread, one socket, the same worker as behind virtio-mmio.
//!
//! QEMU keeps the device's registers and hands us guest memory, rings, kicks and calls. Rings are stopped and started
//! again when a VM is paused and resumed; the worker and its connections survive that. Nothing here knows what kind of
//! device it serves.

mod backend;
mod messages;
mod watch;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use vhost::vhost_user::{BackendReqHandler, Error};
use vmm_sys_util::epoll::EpollEvent;

use self::backend::{Backend, State};
use self::watch::{EPOLLIN, EpollWatch, Target};
use crate::devices::virtio::VirtioDevice;

/// Events taken from the kernel at once.
const EVENTS: usize = 64;

/// The device's thread.
#[derive(Debug)]
pub struct VhostUserServer {
    thread: Option<JoinHandle<()>>,
    stop: OwnedFd,
}

impl VhostUserServer {
    /// Serves `device` to the frontend at the other end of `socket`. `queues` of the device's queues are the
    /// frontend's to set up; it keeps the others to itself. `on_end` is called once, when the frontend is gone or broken.
    pub fn start(
        device: Box<dyn VirtioDevice>,
        queues: usize,
        socket: UnixStream,
        on_end: impl FnOnce(io::Result<()>) + Send + 'static,
    ) -> io::Result<Self> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let stopped = stop.try_clone()?;
        let control = socket.try_clone()?;
        let backend = Arc::new(Mutex::new(Backend::new(device, queues)));
        let handler = BackendReqHandler::from_stream(socket, backend.clone());
        let server = Server {
            backend,
            handler,
            control,
            stop: stopped,
            watch: EpollWatch::new()?,
        };
        let thread = std::thread::Builder::new()
            .name("vhost-user".into())
            .spawn(move || on_end(server.run()))?;
        Ok(Self {
            thread: Some(thread),
            stop,
        })
    }
}

impl Drop for VhostUserServer {
    /// The device touches nothing of the host once this returns.
    fn drop(&mut self) {
        // Cannot fail: the counter is far from its limit.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // A panic in it has been printed.
            let _ = thread.join();
        }
    }
}

struct Server {
    backend: Arc<Mutex<Backend>>,
    handler: BackendReqHandler<Mutex<Backend>>,
    control: UnixStream,
    stop: OwnedFd,
    watch: EpollWatch,
}

impl Server {
    fn run(mut self) -> io::Result<()> {
        let result = self.serve();
        let mut backend = lock(&self.backend);
        backend.stop_worker(&mut self.watch);
        result
    }

    fn serve(&mut self) -> io::Result<()> {
        self.watch
            .insert(self.control.as_raw_fd(), Target::Control, EPOLLIN)?;
        self.watch
            .insert(self.stop.as_raw_fd(), Target::Stop, EPOLLIN)?;
        let mut events = [EpollEvent::default(); EVENTS];
        loop {
            if lock(&self.backend).state != State::Running {
                if !self.wait_for_control()? {
                    return Ok(());
                }
                if !self.on_control()? {
                    return Ok(());
                }
                continue;
            }
            let count = self.watch.wait(&mut events)?;
            for event in &events[..count] {
                // Gone or stopped since, by an event before it.
                let Some(target) = self.watch.target(event.data()) else {
                    continue;
                };
                match target {
                    Target::Stop => return Ok(()),
                    Target::Control => {
                        if !self.on_control()? {
                            return Ok(());
                        }
                        if lock(&self.backend).state != State::Running {
                            break;
                        }
                    }
                    Target::Kick(index) => lock(&self.backend).on_kick(index, &mut self.watch)?,
                    Target::Worker(token) => {
                        lock(&self.backend).on_fd(token, event.events(), &mut self.watch)?;
                    }
                }
            }
        }
    }

    /// Waits while the rings are stopped; `false` if the server is to end.
    fn wait_for_control(&self) -> io::Result<bool> {
        let mut fds = [
            PollFd::new(&self.control, PollFlags::IN),
            PollFd::new(&self.stop, PollFlags::IN),
        ];
        loop {
            match poll(&mut fds, None) {
                Ok(_) => return Ok(fds[1].revents().is_empty()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// One message of the frontend; `false` if it is gone.
    fn on_control(&mut self) -> io::Result<bool> {
        match self.handler.handle_request() {
            Ok(()) => {}
            Err(Error::Disconnected | Error::PartialMessage) => return Ok(false),
            Err(Error::SocketBroken(_)) => return Ok(false),
            Err(error) => return Err(io::Error::other(format!("vhost-user: {error}"))),
        }
        lock(&self.backend).settle(&mut self.watch)?;
        Ok(true)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
