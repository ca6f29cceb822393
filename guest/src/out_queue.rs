//! Frames waiting for a connection to take them: small ones are put together, output is read from the process straight
//! to where it is sent from. Fixed bounds; no policy about what is sent lives here.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::ops::Range;
use std::os::fd::AsFd;

use airlock_proto::codec;
use airlock_proto::v1::{FromAgent, Stream, from_agent::Body};
use bytes::BytesMut;
use rustix::io::{self, Errno};

use crate::table::Key;

/// Queued bytes beyond which no output is added. Two largest frames: one can be read while the other is being sent.
const ROOM_BYTES: usize = 256 << 10;
/// Space left in front of output for its head, which is only known once the length is: more than the longest head
/// (4 of length, 4 of FromAgent's key and length, 2 of stream, 11 of offset, 4 of data's key and length).
const HEAD_ROOM: usize = 32;
/// What an idle connection may keep.
const IDLE_BYTES: usize = 16 << 10;
/// Segments handed to one writev.
const SEGMENTS: usize = 16;

/// Finds the queue of a connection, as long as it is there.
pub(crate) trait Outlet {
    fn out(&mut self, connection: Key) -> Option<&mut OutQueue>;
}

#[derive(Debug, Default)]
pub(crate) struct OutQueue {
    /// Storage; what lies beyond `end` is free. Kept initialised, so that a read into it needs no unsafe code and
    /// clears memory only when it grows.
    buffer: Vec<u8>,
    end: usize,
    /// Parts of `buffer` to send, in order.
    pending: VecDeque<Range<usize>>,
    bytes: usize,
    scratch: BytesMut,
    /// Somebody was told that there is no room, and wants to know when there is.
    refused: bool,
}

impl OutQueue {
    pub(crate) fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether more output may be added.
    pub(crate) fn has_room(&mut self) -> bool {
        let room = self.bytes < ROOM_BYTES;
        self.refused |= !room;
        room
    }

    /// Whether somebody was refused room since the last call.
    pub(crate) fn take_refused(&mut self) -> bool {
        std::mem::take(&mut self.refused)
    }

    /// Adds a frame. What the agent says has bounds of its own, all below the frame limit; should one exceed it after
    /// all, it is left out and the caller told.
    pub(crate) fn push(&mut self, body: Body) -> bool {
        self.scratch.clear();
        let frame = FromAgent { body: Some(body) };
        if codec::encode(&frame, &mut self.scratch).is_err() {
            return false;
        }
        let start = self.end;
        let length = self.scratch.len();
        self.ensure(length);
        self.buffer[start..start + length].copy_from_slice(&self.scratch);
        self.add(start..start + length);
        true
    }

    /// Adds output that is in memory already.
    pub(crate) fn push_output(&mut self, stream: Stream, offset: u64, data: &[u8]) {
        let head = codec::output_head(stream, offset, data.len());
        let start = self.end;
        let data_start = start + head.len();
        self.ensure(head.len() + data.len());
        self.buffer[start..data_start].copy_from_slice(&head);
        self.buffer[data_start..data_start + data.len()].copy_from_slice(data);
        self.add(start..data_start + data.len());
    }

    /// Reads up to `want` bytes of output from `source` into the queue and puts a frame head in front. A result of 0
    /// is the end of the source, and nothing is queued then.
    pub(crate) fn read_output(
        &mut self,
        source: impl AsFd,
        want: usize,
        stream: Stream,
        offset: u64,
    ) -> io::Result<usize> {
        let data_start = self.end + HEAD_ROOM;
        self.ensure(HEAD_ROOM + want);
        let length = io::read(source, &mut self.buffer[data_start..data_start + want])?;
        if length > 0 {
            let head = codec::output_head(stream, offset, length);
            let start = data_start - head.len();
            self.buffer[start..data_start].copy_from_slice(&head);
            self.add(start..data_start + length);
        }
        Ok(length)
    }

    /// Reads up to `want` raw bytes into the queue, without a frame around them.
    pub(crate) fn read_raw(&mut self, source: impl AsFd, want: usize) -> io::Result<usize> {
        let start = self.end;
        self.ensure(want);
        let length = io::read(source, &mut self.buffer[start..start + want])?;
        if length > 0 {
            self.add(start..start + length);
        }
        Ok(length)
    }

    /// Adds raw bytes.
    pub(crate) fn push_raw(&mut self, data: &[u8]) {
        let start = self.end;
        self.ensure(data.len());
        self.buffer[start..start + data.len()].copy_from_slice(data);
        self.add(start..start + data.len());
    }

    /// Makes room for `more` bytes behind `end`.
    fn ensure(&mut self, more: usize) {
        let wanted = self.end + more;
        if self.buffer.len() < wanted {
            // Doubling, so that a stream pays for growing a few times only.
            self.buffer.resize(wanted.max(self.buffer.len() * 2), 0);
        }
    }

    fn add(&mut self, range: Range<usize>) {
        self.bytes += range.len();
        self.end = range.end;
        match self.pending.back_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.pending.push_back(range),
        }
    }

    /// Writes as much as `sink` takes. `Ok(true)`: nothing is left.
    pub(crate) fn write_to(&mut self, sink: impl AsFd) -> io::Result<bool> {
        while self.bytes > 0 {
            let mut segments = [IoSlice::new(&[]); SEGMENTS];
            let mut count = 0;
            for (segment, range) in segments.iter_mut().zip(&self.pending) {
                *segment = IoSlice::new(&self.buffer[range.clone()]);
                count += 1;
            }
            match io::writev(&sink, &segments[..count]) {
                Ok(written) => self.consume(written),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn consume(&mut self, mut written: usize) {
        self.bytes -= written;
        while written > 0
            && let Some(front) = self.pending.front_mut()
        {
            let step = written.min(front.len());
            front.start += step;
            written -= step;
            if front.start == front.end {
                self.pending.pop_front();
            }
        }
        if self.bytes == 0 {
            self.pending.clear();
            self.end = 0;
        }
    }

    /// Gives back what a busy stream needed.
    pub(crate) fn shrink(&mut self) {
        if self.bytes == 0 && self.buffer.len() > IDLE_BYTES {
            self.buffer = Vec::new();
        }
        if self.scratch.capacity() > IDLE_BYTES {
            self.scratch = BytesMut::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use airlock_proto::v1::Output;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn what_is_queued_comes_out_as_frames_in_order() {
        let (mut writer, source) = UnixStream::pair().unwrap();
        let (sink, mut reader) = UnixStream::pair().unwrap();
        writer.write_all(b"from the pipe").unwrap();
        let mut queue = OutQueue::default();
        queue.push_output(Stream::Stderr, 7, b"from memory");
        let length = queue.read_output(&source, 100, Stream::Stdout, 9).unwrap();
        assert_eq!(length, 13);
        assert!(queue.push(Body::ExecDone(airlock_proto::v1::ExecDone {})));
        assert!(queue.write_to(&sink).unwrap());
        assert!(queue.is_empty());
        drop(sink);
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        let mut bytes = BytesMut::from(&bytes[..]);
        let mut decoder = codec::Decoder::<FromAgent>::default();
        let mut bodies = Vec::new();
        while let Some(frame) = decoder.next(&mut bytes).unwrap() {
            bodies.push(frame.body.unwrap());
        }
        let output = |stream: Stream, offset, data: &'static [u8]| {
            Body::Output(Output {
                stream: stream.into(),
                offset,
                data: data.into(),
            })
        };
        assert_eq!(bodies[0], output(Stream::Stderr, 7, b"from memory"));
        assert_eq!(bodies[1], output(Stream::Stdout, 9, b"from the pipe"));
        assert_eq!(bodies.len(), 3);
        assert!(bytes.is_empty());
    }
}
