use super::*;
use std::os::fd::AsRawFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// Long enough for any loaded machine; a test that waits this long has failed.
const DEADLINE: Duration = Duration::from_secs(10);

#[derive(Debug, PartialEq)]
enum Seen {
    Kick(u16),
    Fd(u64),
    Stop,
    NeedsReset,
}

struct Recorder {
    seen: Sender<Seen>,
    watched: EventFd,
    fails: bool,
}

impl QueueWorker for Recorder {
    fn start(&mut self, watch: &mut dyn Watch) -> io::Result<()> {
        watch.add(self.watched.as_raw_fd(), 1 << 40, libc::EPOLLIN as u32)
    }
    fn on_kick(&mut self, queue: u16, _watch: &mut dyn Watch) -> io::Result<()> {
        self.seen.send(Seen::Kick(queue)).unwrap();
        if self.fails {
            Err(io::Error::other("bad ring"))
        } else {
            Ok(())
        }
    }
    fn on_fd(&mut self, token: u64, _events: u32, watch: &mut dyn Watch) -> io::Result<()> {
        self.watched.read()?;
        watch.remove(self.watched.as_raw_fd())?;
        self.seen.send(Seen::Fd(token)).unwrap();
        Ok(())
    }
    fn stop(&mut self, _watch: &mut dyn Watch) {
        self.seen.send(Seen::Stop).unwrap();
    }
}

#[derive(Debug)]
struct Line(Sender<Seen>);
impl Interrupt for Line {
    fn signal_used(&self, _queue: u16) {}
    fn signal_config(&self) {}
    fn signal_needs_reset(&self) {
        self.0.send(Seen::NeedsReset).unwrap();
    }
}

struct Rig {
    io: IoThread,
    id: WorkerId,
    kicks: Vec<EventFd>,
    watched: EventFd,
    seen: Receiver<Seen>,
}

fn rig(fails: bool) -> Rig {
    let io = IoThread::start(Arc::new(ExitSlot::new().unwrap())).unwrap();
    let (sender, seen) = channel();
    let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let (kicks, watched) = (vec![event(), event()], event());
    let worker = Recorder {
        seen: sender.clone(),
        watched: watched.try_clone().unwrap(),
        fails,
    };
    let clones = kicks.iter().map(|kick| kick.try_clone().unwrap()).collect();
    let id = io
        .workers()
        .attach(Box::new(worker), clones, Arc::new(Line(sender)))
        .unwrap();
    Rig {
        io,
        id,
        kicks,
        watched,
        seen,
    }
}

impl Rig {
    fn next(&self) -> Seen {
        self.seen.recv_timeout(DEADLINE).unwrap()
    }
}

#[test]
fn kicks_and_watched_descriptors_reach_the_worker_under_their_names() {
    let rig = rig(false);
    rig.kicks[1].write(1).unwrap();
    assert_eq!(rig.next(), Seen::Kick(1));
    rig.watched.write(1).unwrap();
    assert_eq!(rig.next(), Seen::Fd(1 << 40));
    rig.kicks[0].write(1).unwrap();
    assert_eq!(rig.next(), Seen::Kick(0));
}

#[test]
fn a_detached_worker_has_stopped() {
    let rig = rig(false);
    rig.io.workers().detach(rig.id).unwrap();
    assert_eq!(rig.seen.try_recv(), Ok(Seen::Stop));
    rig.kicks[0].write(1).unwrap();
    assert!(rig.io.workers().detach(rig.id).is_err(), "it is gone");
    assert!(rig.seen.try_recv().is_err());
}

#[test]
fn a_worker_that_fails_is_stopped_once_and_its_driver_told() {
    let rig = rig(true);
    rig.kicks[0].write(1).unwrap();
    assert_eq!(rig.next(), Seen::Kick(0));
    assert_eq!(rig.next(), Seen::Stop);
    assert_eq!(rig.next(), Seen::NeedsReset);
    rig.kicks[1].write(1).unwrap();
    rig.io.workers().detach(rig.id).unwrap();
    assert!(rig.seen.try_recv().is_err());
}

#[test]
fn the_end_of_the_thread_stops_all_workers() {
    let mut rig = rig(false);
    rig.io.stop();
    assert_eq!(rig.seen.try_recv(), Ok(Seen::Stop));
    assert!(rig.io.workers().detach(rig.id).is_err());
}
