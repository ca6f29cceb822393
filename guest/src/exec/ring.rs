//! The last bytes of a stream, kept for a client that comes back. Offsets are those of the stream.

/// A fixed number of bytes.
#[derive(Debug)]
pub(crate) struct Ring {
    data: Vec<u8>,
    /// Offset of the oldest byte that is kept.
    start: u64,
    /// Offset behind the newest.
    end: u64,
}

impl Ring {
    /// `capacity` must not be 0.
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            // Zeroed pages come from the kernel when they are first written, so an unused ring costs nothing.
            data: vec![0; capacity.max(1)],
            start: 0,
            end: 0,
        }
    }

    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    fn place(&self, offset: u64) -> usize {
        (offset % self.data.len() as u64) as usize
    }

    /// Where the next bytes go: as much as fits in one piece without overwriting bytes from `keep_from` on.
    pub(crate) fn free(&mut self, keep_from: u64) -> &mut [u8] {
        let kept = self.end.saturating_sub(keep_from.max(self.start)) as usize;
        let at = self.place(self.end);
        let length = self
            .data
            .len()
            .saturating_sub(kept)
            .min(self.data.len() - at);
        &mut self.data[at..at + length]
    }

    /// Says that the first `length` bytes of [`Self::free`] were filled.
    pub(crate) fn filled(&mut self, length: usize) {
        self.end += length as u64;
        self.start = self
            .start
            .max(self.end.saturating_sub(self.data.len() as u64));
    }

    /// Bytes from `offset` on, as far as they are in one piece; empty at the end.
    pub(crate) fn at(&self, offset: u64) -> &[u8] {
        if offset < self.start || offset >= self.end {
            return &[];
        }
        let at = self.place(offset);
        let length = ((self.end - offset) as usize).min(self.data.len() - at);
        &self.data[at..at + length]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_byte_that_is_kept_is_the_one_that_was_written(
            capacity in 1_usize..40,
            writes in proptest::collection::vec(0_usize..50, 0..40),
        ) {
            let mut ring = Ring::new(capacity);
            let mut written = Vec::new();
            for want in writes {
                let end = written.len() as u64;
                let free = ring.free(end);
                let length = want.min(free.len());
                for byte in &mut free[..length] {
                    *byte = written.len() as u8;
                    written.push(*byte);
                }
                ring.filled(length);
                let mut offset = ring.start();
                let mut kept = Vec::new();
                while !ring.at(offset).is_empty() {
                    kept.extend_from_slice(ring.at(offset));
                    offset += ring.at(offset).len() as u64;
                }
                prop_assert_eq!(offset, written.len() as u64);
                prop_assert_eq!(&kept[..], &written[ring.start() as usize..]);
                prop_assert!(kept.len() <= capacity);
            }
        }

        #[test]
        fn bytes_that_must_be_kept_are_not_overwritten(
            capacity in 1_usize..40,
            keep in 0_u64..40,
            wants in proptest::collection::vec(1_usize..20, 1..20),
        ) {
            let mut ring = Ring::new(capacity);
            for want in wants {
                let free = ring.free(keep).len();
                ring.filled(want.min(free));
                prop_assert!(ring.start() <= keep);
            }
        }
    }
}
