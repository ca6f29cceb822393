//! The way in: what a client sends, up to its window, until the process takes it. Bounded by the window; the end of
//! input is in band and may be said twice.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};

use airlock_proto::STDIN_WINDOW_BYTES;
use airlock_proto::v1::StdinCredit;
use rustix::io::{self, Errno};

use crate::pty;

/// Credit is given in steps of half a window: often enough that the client never stalls, rarely enough to cost nothing.
const CREDIT_STEP_BYTES: u64 = STDIN_WINDOW_BYTES / 2;

/// The client sent what it had no right to send.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum StdinError {
    #[error("stdin from offset {offset} leaves a gap: {expected} bytes were received")]
    Gap { offset: u64, expected: u64 },
    #[error("stdin up to {end} exceeds the credit of {credit}")]
    BeyondCredit { end: u64, credit: u64 },
}

#[derive(Debug)]
pub(crate) struct Stdin {
    /// None once closed, or if the exec has no input.
    fd: Option<OwnedFd>,
    tty: bool,
    queue: VecDeque<u8>,
    received: u64,
    credit: u64,
    eof: bool,
    /// Whether what was written last ends a line; matters to a terminal's end of input.
    line_is_unfinished: bool,
    /// The client must still hear that nobody reads.
    closed_untold: bool,
}

impl Stdin {
    pub(crate) fn new(fd: Option<OwnedFd>, tty: bool) -> Self {
        Self {
            fd,
            tty,
            queue: VecDeque::new(),
            received: 0,
            credit: STDIN_WINDOW_BYTES,
            eof: false,
            line_is_unfinished: false,
            closed_untold: false,
        }
    }

    pub(crate) fn credit(&self) -> u64 {
        self.credit
    }

    pub(crate) fn received(&self) -> u64 {
        self.received
    }

    /// The descriptor, as long as there is something to write to it.
    pub(crate) fn waiting_fd(&self) -> Option<&OwnedFd> {
        self.fd.as_ref().filter(|_| !self.queue.is_empty())
    }

    /// Takes bytes from the client and writes what the process accepts; the rest waits.
    pub(crate) fn accept(&mut self, offset: u64, data: &[u8], eof: bool) -> Result<(), StdinError> {
        if offset > self.received {
            return Err(StdinError::Gap {
                offset,
                expected: self.received,
            });
        }
        let end = offset.saturating_add(data.len() as u64);
        if end > self.credit {
            return Err(StdinError::BeyondCredit {
                end,
                credit: self.credit,
            });
        }
        let seen = ((self.received - offset) as usize).min(data.len());
        let fresh = &data[seen..];
        if self.eof || self.fd.is_none() {
            // After the end, or with nobody to read: dropped, as the protocol says.
            self.received = self.received.max(end);
            return Ok(());
        }
        self.received += fresh.len() as u64;
        // Straight from the frame while nothing is queued before it.
        let mut rest = fresh;
        while self.queue.is_empty() && !rest.is_empty() {
            match self.write(rest) {
                Some(0) | None => break,
                Some(written) => rest = &rest[written..],
            }
        }
        if self.fd.is_some() {
            self.queue.extend(rest);
        }
        self.eof |= eof;
        self.finish();
        Ok(())
    }

    /// Writes what is queued, as far as the process takes it.
    pub(crate) fn flush(&mut self) {
        loop {
            let (front, _) = self.queue.as_slices();
            if front.is_empty() {
                break;
            }
            // The slice must not borrow `self` while writing; the queue itself does not change in between.
            let mut chunk = [0; 16 << 10];
            let length = front.len().min(chunk.len());
            chunk[..length].copy_from_slice(&front[..length]);
            match self.write(&chunk[..length]) {
                Some(0) | None => break,
                Some(written) => {
                    self.queue.drain(..written);
                }
            }
        }
        self.finish();
    }

    /// Nobody reads any more.
    pub(crate) fn close(&mut self) {
        if self.fd.take().is_some() {
            self.closed_untold = !self.eof;
        }
        self.queue = VecDeque::new();
    }

    /// What the client should hear about its window, if anything.
    pub(crate) fn take_credit(&mut self) -> Option<StdinCredit> {
        let target = self.received - self.queue.len() as u64 + STDIN_WINDOW_BYTES;
        let closed = std::mem::take(&mut self.closed_untold);
        if !closed && (self.eof || target < self.credit + CREDIT_STEP_BYTES) {
            return None;
        }
        self.credit = target;
        Some(StdinCredit {
            up_to: target,
            closed,
        })
    }

    /// Bytes written, 0 if the process takes none now; None if it never will.
    fn write(&mut self, data: &[u8]) -> Option<usize> {
        loop {
            match io::write(self.fd.as_ref()?.as_fd(), data) {
                Ok(written) => {
                    if let Some(last) = data[..written].last() {
                        self.line_is_unfinished = *last != b'\n';
                    }
                    return Some(written);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Some(0),
                // EPIPE of a pipe without a reader, EIO of a terminal that was hung up.
                Err(_) => {
                    self.close();
                    return None;
                }
            }
        }
    }

    /// After the end of input and the last byte before it: closes the pipe, or types the terminal's EOF character.
    fn finish(&mut self) {
        if !self.eof || !self.queue.is_empty() {
            return;
        }
        if self.tty
            && let Some(fd) = &self.fd
        {
            // A terminal too full for one character has a reader that will come back for more lines; its end is then
            // lost, which closing the terminal makes up for.
            let _ = io::write(fd, &pty::end_of_input(fd, self.line_is_unfinished));
        }
        self.fd = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::{PipeFlags, pipe_with};

    fn stdin() -> (Stdin, OwnedFd) {
        let (reader, writer) = pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC).unwrap();
        (Stdin::new(Some(writer), false), reader)
    }

    fn read(fd: &OwnedFd) -> Vec<u8> {
        let mut all = Vec::new();
        let mut chunk = [0; 4096];
        while let Ok(length @ 1..) = io::read(fd, &mut chunk) {
            all.extend_from_slice(&chunk[..length]);
        }
        all
    }

    #[test]
    fn a_byte_that_was_seen_is_dropped_and_a_gap_is_an_error() {
        let (mut stdin, reader) = stdin();
        stdin.accept(0, b"abc", false).unwrap();
        stdin.accept(1, b"bcde", false).unwrap();
        assert_eq!(read(&reader), b"abcde");
        assert_eq!(
            stdin.accept(6, b"x", false),
            Err(StdinError::Gap {
                offset: 6,
                expected: 5
            })
        );
    }

    #[test]
    fn the_window_bounds_what_is_held_and_moves_as_the_process_reads() {
        let (mut stdin, reader) = stdin();
        let data = vec![7; STDIN_WINDOW_BYTES as usize];
        stdin.accept(0, &data, false).unwrap();
        assert!(stdin.waiting_fd().is_some());
        let beyond = stdin.accept(STDIN_WINDOW_BYTES, b"x", false);
        assert!(matches!(beyond, Err(StdinError::BeyondCredit { .. })));
        assert_eq!(stdin.take_credit(), None);
        let mut got = 0;
        while got < data.len() {
            got += read(&reader).len();
            stdin.flush();
        }
        let credit = stdin.take_credit().unwrap();
        assert_eq!(
            (credit.up_to, credit.closed),
            (2 * STDIN_WINDOW_BYTES, false)
        );
    }

    #[test]
    fn law_7_the_end_of_input_is_in_band_and_idempotent() {
        let (mut stdin, reader) = stdin();
        let data = vec![1; 100_000];
        stdin.accept(0, &data, true).unwrap();
        stdin.accept(100_000, b"", true).unwrap();
        let mut got = 0;
        loop {
            let mut chunk = [0; 4096];
            match io::read(&reader, &mut chunk) {
                Ok(0) => break,
                Ok(length) => got += length,
                Err(_) => stdin.flush(),
            }
        }
        assert_eq!(got, data.len(), "the end comes behind the last byte");
        stdin.accept(100_000, b"late", true).unwrap();
        assert_eq!(stdin.take_credit(), None);
    }

    #[test]
    fn a_reader_that_is_gone_is_told_once() {
        crate::process::signals::set_up();
        let (mut stdin, reader) = stdin();
        drop(reader);
        stdin.accept(0, b"abc", false).unwrap();
        assert!(stdin.take_credit().unwrap().closed);
        assert_eq!(stdin.take_credit(), None);
        stdin.accept(3, b"more", false).unwrap();
    }
}
