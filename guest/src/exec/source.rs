//! One output stream of an exec: the reading end of its pipe or terminal, how far it has been read, and up to where it
//! must be read before the exit may be reported.

use std::os::fd::OwnedFd;

use airlock_proto::MAX_DATA_BYTES;
use airlock_proto::v1::Stream;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{self, Errno};

use super::ring::Ring;
use crate::out_queue::OutQueue;

/// First read of a stream; doubled whenever a read fills it. Most commands write less than this.
const FIRST_CHUNK_BYTES: usize = 8 << 10;
/// A stream that has carried this much is worth a larger pipe.
const BUSY_BYTES: u64 = 256 << 10;
/// And a read of this much says that the writer, too, was waiting for room.
const FULL_BYTES: usize = 32 << 10;
/// Size of that pipe: what an unprivileged process may have (fs.pipe-max-size).
const BUSY_PIPE_BYTES: usize = 1 << 20;
/// Most that a terminal can hold when its session's leader is gone: a flip buffer (64 KiB, tty_buffer.c) and a line
/// buffer (4 KiB, N_TTY_BUF_SIZE), rounded up.
const TTY_HELD_BYTES: u64 = 128 << 10;
/// Bytes read per call when nobody is there to have them.
const DISCARD_BYTES: usize = 16 << 10;

/// What a read attempt came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Data,
    /// Nothing there now.
    Empty,
    End,
}

#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) stream: Stream,
    fd: Option<OwnedFd>,
    tty: bool,
    /// There may be something to read.
    readable: bool,
    hung_up: bool,
    /// Bytes read so far.
    total: u64,
    /// Bytes read while nobody was attached and no ring kept them.
    discarded: u64,
    held_open: bool,
    chunk: usize,
    enlarged: bool,
    /// After the leader's exit: what was read by then, and where the report may follow.
    exit_at: Option<u64>,
    report_at: Option<u64>,
    /// Holders are waited for no longer: the stream ends here.
    end_at: Option<u64>,
    pub(crate) ring: Option<Ring>,
}

impl Source {
    pub(crate) fn new(stream: Stream, fd: OwnedFd, tty: bool, ring: Option<Ring>) -> Self {
        Self {
            stream,
            fd: Some(fd),
            tty,
            // The first event, or the leader's end, says that there is something.
            readable: false,
            hung_up: false,
            total: 0,
            discarded: 0,
            held_open: false,
            chunk: FIRST_CHUNK_BYTES,
            enlarged: tty,
            exit_at: None,
            report_at: None,
            end_at: None,
            ring,
        }
    }

    pub(crate) fn fd(&self) -> Option<&OwnedFd> {
        self.fd.as_ref()
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.fd.is_none()
    }

    pub(crate) fn may_have_data(&self) -> bool {
        self.readable && self.fd.is_some()
    }

    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    pub(crate) fn discarded(&self) -> u64 {
        self.discarded
    }

    pub(crate) fn is_held_open(&self) -> bool {
        self.held_open
    }

    /// Offset that must have been delivered before the leader's exit may be reported; None while it is not known.
    pub(crate) fn report_offset(&self) -> Option<u64> {
        self.report_at
    }

    pub(crate) fn on_event(&mut self, hung_up: bool) {
        self.readable = true;
        self.hung_up |= hung_up;
    }

    /// The leader has been reaped: what it wrote is in the pipe or has been read.
    pub(crate) fn leader_exited(&mut self) {
        self.exit_at = Some(self.total);
        match &self.fd {
            None => self.report_at = Some(self.total),
            // A read that finds nothing is the proof for a terminal: the kernel moves what is in flight first
            // (n_tty_read calls tty_buffer_flush_work).
            Some(_) if self.tty => self.readable = true,
            Some(fd) => {
                let held = io::ioctl_fionread(fd).unwrap_or(0);
                self.readable = true;
                self.report_at = Some(self.total + held);
            }
        }
    }

    /// Whoever still holds the stream open is waited for no longer; what is in it now is still delivered.
    pub(crate) fn give_up_on_holders(&mut self) {
        let Some(fd) = &self.fd else { return };
        if nobody_writes(fd) {
            // It is only our reader that is slow: the end of the stream is in sight, and comes by itself.
            self.readable = true;
            return;
        }
        let held = io::ioctl_fionread(fd).unwrap_or(0);
        self.end_at = Some(self.total + held);
        if held == 0 {
            self.end(true);
        }
        self.readable = true;
    }

    /// Reads once, straight into the queue of the connection that wants it.
    pub(crate) fn read_to(&mut self, out: &mut OutQueue) -> Step {
        let want = self.want(MAX_DATA_BYTES);
        let Some(fd) = &self.fd else { return Step::End };
        let result = out.read_output(fd, want, self.stream, self.total);
        self.after_read(result, want)
    }

    /// Reads once into the ring, overwriting nothing from `keep_from` on. None: the ring is full.
    pub(crate) fn read_to_ring(&mut self, keep_from: u64) -> Option<Step> {
        let want = self.want(MAX_DATA_BYTES);
        let (Some(fd), Some(ring)) = (&self.fd, &mut self.ring) else {
            return Some(Step::End);
        };
        let free = ring.free(keep_from);
        let want = want.min(free.len());
        if want == 0 {
            return None;
        }
        let result = io::read(fd, &mut free[..want]);
        if let Ok(length) = result {
            ring.filled(length);
        }
        Some(self.after_read(result, want))
    }

    /// Reads once and counts, so that a process nobody listens to goes on.
    pub(crate) fn read_to_nobody(&mut self) -> Step {
        let want = self.want(DISCARD_BYTES);
        let Some(fd) = &self.fd else { return Step::End };
        let mut scratch = [0; DISCARD_BYTES];
        let result = io::read(fd, &mut scratch[..want]);
        if let Ok(length) = result {
            self.discarded += length as u64;
        }
        self.after_read(result, want)
    }

    fn want(&self, most: usize) -> usize {
        let left = self.end_at.map_or(u64::MAX, |at| at - self.total);
        // Never 0: a stream whose end is reached has been ended.
        (self.chunk.min(most) as u64).min(left) as usize
    }

    fn after_read(&mut self, result: io::Result<usize>, want: usize) -> Step {
        let step = match result {
            Ok(0) => self.end(false),
            Ok(length) => {
                self.total += length as u64;
                self.grow(length, want);
                if length < want && !self.tty && !self.hung_up && self.exit_at.is_none() {
                    // A pipe gives all it has; more will be an event. A terminal gives a line or a page at a time.
                    self.readable = false;
                }
                if self.end_at.is_some_and(|at| self.total >= at) {
                    self.end(true)
                } else {
                    Step::Data
                }
            }
            Err(Errno::INTR) => Step::Data,
            Err(Errno::AGAIN) => {
                self.readable = false;
                Step::Empty
            }
            // EIO is how a terminal without a slave says that this was all (law 9).
            Err(_) => self.end(false),
        };
        if let Some(at) = self.exit_at
            && self.report_at.is_none()
            && (step != Step::Data || self.total > at + TTY_HELD_BYTES)
        {
            self.report_at = Some(self.total);
        }
        step
    }

    fn end(&mut self, held_open: bool) -> Step {
        self.fd = None;
        self.held_open = held_open;
        // What was promised to come before the report cannot come any more.
        if self.exit_at.is_some() {
            self.report_at = Some(self.report_at.unwrap_or(self.total).min(self.total));
        }
        Step::End
    }

    fn grow(&mut self, length: usize, want: usize) {
        if length == want {
            self.chunk = (self.chunk * 2).min(MAX_DATA_BYTES);
        }
        if !self.enlarged
            && self.total >= BUSY_BYTES
            && length >= FULL_BYTES
            && let Some(fd) = &self.fd
        {
            // Fails for an unprivileged user over its limit, and then the pipe stays as it is.
            let _ = rustix::pipe::fcntl_setpipe_size(fd, BUSY_PIPE_BYTES);
            self.enlarged = true;
        }
    }
}

/// Whether no process has the other end open: nothing is written any more, though there may be something to read.
fn nobody_writes(fd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::empty())];
    let polled = poll(&mut fds, Some(&Timespec::default()));
    polled.is_ok() && fds[0].revents().contains(PollFlags::HUP)
}
