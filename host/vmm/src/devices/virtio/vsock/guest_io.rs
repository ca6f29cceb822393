//! Vectored I/O between a host socket and the guest's memory, without a copy in between.
//!
//! What a packet means is none of this file's business.
#![expect(
    unsafe_code,
    reason = "iovecs into guest memory cannot be slices: the guest writes to it at any time"
)]

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

/// UIO_MAXIOV: more segments are an error of the system call.
pub(crate) const MAX_SEGMENTS: usize = 1024;

/// Segments of guest memory, as the kernel wants them.
#[derive(Debug)]
pub(crate) struct GuestVectors {
    /// Invariant: every pointer below points into a mapping that this keeps alive, and its length stays inside.
    memory: Arc<GuestMemoryMmap>,
    vectors: Vec<libc::iovec>,
    bytes: usize,
    /// What was skipped before segments.
    skipped: Vec<libc::iovec>,
}

// SAFETY: the pointers point into a mapping of the process, not of a thread, which `memory` keeps alive.
unsafe impl Send for GuestVectors {}

impl GuestVectors {
    pub(crate) fn new(memory: Arc<GuestMemoryMmap>) -> Self {
        Self {
            memory,
            vectors: Vec::with_capacity(MAX_SEGMENTS),
            bytes: 0,
            skipped: Vec::new(),
        }
    }

    /// Number of segments.
    pub(crate) fn len(&self) -> usize {
        self.vectors.len()
    }

    /// Sum of their lengths.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn clear(&mut self) {
        self.vectors.clear();
        self.skipped.clear();
        self.bytes = 0;
    }

    /// Appends a segment; `false` if it is not all guest memory, or one too many.
    #[must_use]
    pub(crate) fn push(&mut self, address: GuestAddress, length: usize) -> bool {
        if length == 0 {
            return true;
        }
        self.push_behind(address, 0, length)
    }

    /// Appends the `length` bytes behind the first `skipped` at `address`; those are remembered.
    #[must_use]
    pub(crate) fn push_behind(
        &mut self,
        address: GuestAddress,
        skipped: usize,
        length: usize,
    ) -> bool {
        let Some(Ok(slice)) = skipped
            .checked_add(length)
            .map(|total| self.memory.get_slice(address, total))
        else {
            return false;
        };
        let pointer = slice.ptr_guard_mut().as_ptr();
        if skipped > 0 {
            self.skipped.push(libc::iovec {
                iov_base: pointer.cast(),
                iov_len: skipped,
            });
        }
        if length > 0 {
            if self.vectors.len() == MAX_SEGMENTS {
                return false;
            }
            // SAFETY: the slice is `skipped + length` bytes long.
            let iov_base = unsafe { pointer.add(skipped) }.cast();
            self.vectors.push(libc::iovec {
                iov_base,
                iov_len: length,
            });
            self.bytes += length;
        }
        true
    }

    /// Number of pieces that were skipped.
    pub(crate) fn skipped(&self) -> usize {
        self.skipped.len()
    }

    /// Fills skipped pieces with `bytes`, as far as they reach.
    pub(crate) fn write_skipped(&self, pieces: Range<usize>, mut bytes: &[u8]) {
        for piece in self.skipped.get(pieces).unwrap_or_default() {
            let (now, later) = bytes.split_at(bytes.len().min(piece.iov_len));
            self.slice(piece, 0).copy_from(now);
            bytes = later;
        }
    }

    /// Forgets all but the first `segments`, which hold `bytes`.
    pub(crate) fn truncate(&mut self, segments: usize, bytes: usize) {
        self.vectors.truncate(segments);
        self.bytes = bytes;
    }

    /// Reads from a socket into the segments.
    pub(crate) fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let count = libc::c_int::try_from(self.vectors.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: by the invariant each iovec is writable memory of this process that no Rust reference covers, and
        // the count is the length of the array.
        let result = unsafe { libc::readv(socket.as_raw_fd(), self.vectors.as_ptr(), count) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// Writes the segments to a socket.
    pub(crate) fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: all-zero is a valid msghdr: no name, no control data, no flags.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.vectors.as_mut_ptr();
        message.msg_iovlen = self.vectors.len();
        // SAFETY: by the invariant each iovec is readable memory of this process; the kernel copies it once, so a guest
        // that changes it meanwhile only garbles its own bytes.
        let result = unsafe {
            libc::sendmsg(
                socket.as_raw_fd(),
                &raw const message,
                libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
            )
        };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// Appends everything after the first `skip` bytes to `out`.
    pub(crate) fn copy_out(&self, mut skip: usize, out: &mut Vec<u8>) {
        out.reserve(self.bytes.saturating_sub(skip));
        for vector in &self.vectors {
            if skip >= vector.iov_len {
                skip -= vector.iov_len;
                continue;
            }
            let start = out.len();
            out.resize(start + vector.iov_len - skip, 0);
            self.slice(vector, skip).copy_to(&mut out[start..]);
            skip = 0;
        }
    }

    /// Fills the segments with `bytes`, as far as they reach.
    pub(crate) fn copy_in(&mut self, mut bytes: &[u8]) {
        for vector in &self.vectors {
            let (now, later) = bytes.split_at(bytes.len().min(vector.iov_len));
            self.slice(vector, 0).copy_from(now);
            bytes = later;
        }
    }

    fn slice(&self, vector: &libc::iovec, skip: usize) -> VolatileSlice<'_> {
        let skip = skip.min(vector.iov_len);
        // SAFETY: by the invariant the iovec lies within a mapping that lives as long as `self`, and `skip` is inside.
        unsafe {
            VolatileSlice::new(
                ptr::from_ref(vector).read().iov_base.cast::<u8>().add(skip),
                vector.iov_len - skip,
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use vm_memory::Bytes;

    fn memory() -> Arc<GuestMemoryMmap> {
        Arc::new(
            GuestMemoryMmap::from_ranges(&[
                (GuestAddress(0), 0x1000),
                (GuestAddress(0x4000), 0x1000),
            ])
            .unwrap(),
        )
    }

    #[test]
    fn only_guest_memory_can_be_named() {
        let mut vectors = GuestVectors::new(memory());
        assert!(vectors.push(GuestAddress(0xfff), 1));
        assert!(!vectors.push(GuestAddress(0xfff), 2));
        assert!(!vectors.push(GuestAddress(0x2000), 1));
        assert!(!vectors.push(GuestAddress(u64::MAX), 1));
        assert!(!vectors.push(GuestAddress(0x4000), usize::MAX));
        assert!(vectors.push(GuestAddress(0x2000), 0), "nothing is nowhere");
        assert_eq!((vectors.len(), vectors.bytes()), (1, 1));
    }

    #[test]
    fn bytes_go_through_in_order() {
        let memory = memory();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        memory.write_slice(b"abcdef", GuestAddress(0)).unwrap();
        let mut vectors = GuestVectors::new(memory.clone());
        assert!(vectors.push(GuestAddress(3), 3) && vectors.push(GuestAddress(0), 3));
        assert_eq!(vectors.send(theirs.as_fd()).unwrap(), 6);
        let mut heard = [0; 6];
        ours.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"defabc");
        let mut rest = Vec::new();
        vectors.copy_out(2, &mut rest);
        assert_eq!(rest, b"fabc");
        ours.write_all(b"12345").unwrap();
        assert_eq!(vectors.receive(theirs.as_fd()).unwrap(), 5);
        let mut there = [0; 6];
        memory.read_slice(&mut there, GuestAddress(0)).unwrap();
        assert_eq!(&there, b"45c123");
        vectors.copy_in(b"xyzw");
        memory.read_slice(&mut there, GuestAddress(0)).unwrap();
        assert_eq!(&there, b"w5cxyz");
    }
}
