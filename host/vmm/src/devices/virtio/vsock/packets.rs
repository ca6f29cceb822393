//! Descriptor chains as packets: many receive buffers filled by one read, transmitted packets gathered for one write.
//!
//! Everything in the rings is the guest's word: lengths and addresses are checked, and each header is copied once.
//! Which connection a packet belongs to is none of this file's business.

use std::ops::Range;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::guest_io::{GuestVectors, MAX_SEGMENTS};
use super::ring::{Chain, Ring, RingError};
use super::spec::{HEADER_BYTES, HEADER_BYTES_U32, Header, LEN_OFFSET};

/// Receive buffers filled by one read at most: 256 KiB with Linux's 4 KiB buffers.
pub(crate) const MAX_RX_CHAINS: u16 = 64;
/// Segments of one chain at most; nobody builds packets out of more, and with it a batch always has room for one more.
const MAX_CHAIN_SEGMENTS: usize = 256;

/// One receive buffer.
#[derive(Debug)]
struct RxChain {
    head: u16,
    /// The room for the header: drivers may cut it (2.7.4.2). These are skipped pieces of the batch's payload.
    header: Range<usize>,
    room: usize,
}

/// Receive buffers between the available and the used ring.
#[derive(Debug)]
pub(crate) struct RxBatch {
    chains: Vec<RxChain>,
    /// Room for payload, in the chains' order.
    pub(crate) payload: GuestVectors,
    rejected: u64,
}

impl RxBatch {
    pub(crate) fn new(memory: Arc<GuestMemoryMmap>) -> Self {
        Self {
            chains: Vec::with_capacity(usize::from(MAX_RX_CHAINS)),
            payload: GuestVectors::new(memory),
            rejected: 0,
        }
    }

    /// Takes buffers for up to `limit` bytes of payload; `false` if the driver has to add some first.
    ///
    /// Buffers without room for a header, or for any payload where some is wanted, are used up empty.
    pub(crate) fn take(
        &mut self,
        ring: &mut Ring,
        max_chains: u16,
        limit: usize,
    ) -> Result<bool, RingError> {
        self.chains.clear();
        self.payload.clear();
        let mut rejected = 0;
        while self.chains.len() < usize::from(max_chains) && rejected < ring.size() {
            let left = limit - self.payload.bytes();
            if left == 0 && !self.chains.is_empty() {
                break;
            }
            let Some(head) = ring.take()? else { break };
            let mark = (self.payload.len(), self.payload.bytes());
            if let Some(chain) = parse_rx(head, ring.chain(head), &mut self.payload, left) {
                self.chains.push(chain);
                continue;
            }
            self.payload.truncate(mark.0, mark.1);
            if !self.chains.is_empty() {
                // It is dealt with when it is the first, so that buffers can be given back in order.
                ring.give_back(1);
                break;
            }
            rejected += 1;
            ring.put_used(head, 0);
        }
        self.rejected += u64::from(rejected);
        Ok(!self.chains.is_empty())
    }

    /// Buffers that had no room, ever.
    pub(crate) fn rejected(&self) -> u64 {
        self.rejected
    }

    /// Gives back all buffers, unused and in order.
    pub(crate) fn give_back(&mut self, ring: &mut Ring) {
        self.give_back_after(ring, 0);
    }

    fn give_back_after(&mut self, ring: &mut Ring, kept: usize) {
        // At most MAX_RX_CHAINS.
        ring.give_back(u16::try_from(self.chains.len() - kept).unwrap_or(0));
        self.chains.clear();
    }

    /// Puts `bytes` of payload, which are already in the buffers, into the used ring, one packet per buffer.
    pub(crate) fn complete(&mut self, ring: &mut Ring, header: &Header, bytes: usize) {
        let mut wire = header.encode();
        let mut left = bytes;
        let mut used = 0;
        for chain in &self.chains {
            if left == 0 && used > 0 {
                break;
            }
            let now = left.min(chain.room);
            // A buffer's room came from a descriptor's 32-bit length.
            let length = u32::try_from(now).unwrap_or(u32::MAX);
            wire[LEN_OFFSET..LEN_OFFSET + 4].copy_from_slice(&length.to_le_bytes());
            self.payload.write_skipped(chain.header.clone(), &wire);
            ring.put_used(chain.head, HEADER_BYTES_U32.saturating_add(length));
            left -= now;
            used += 1;
        }
        self.give_back_after(ring, used);
        ring.publish();
    }
}

/// `None` if the chain has no room for a header, or none for payload although `limit` wants some.
fn parse_rx(
    head: u16,
    chain: Chain<'_>,
    payload: &mut GuestVectors,
    limit: usize,
) -> Option<RxChain> {
    let first_piece = payload.skipped();
    let mut header_left = HEADER_BYTES;
    let mut room = 0;
    for (index, descriptor) in chain.enumerate() {
        if !descriptor.is_writable || index == MAX_CHAIN_SEGMENTS {
            return None;
        }
        let header_part = descriptor.length.min(header_left);
        let wanted = (descriptor.length - header_part).min(limit - room);
        if !payload.push_behind(descriptor.address, header_part, wanted) {
            return None;
        }
        header_left -= header_part;
        room += wanted;
        if header_left == 0 && room == limit {
            break;
        }
    }
    let header = first_piece..payload.skipped();
    (header_left == 0 && (room > 0 || limit == 0)).then_some(RxChain { head, header, room })
}

/// Transmitted packets of one connection whose payload waits to be written.
#[derive(Debug)]
pub(crate) struct TxBatch {
    memory: Arc<GuestMemoryMmap>,
    heads: Vec<u16>,
    /// The payload of the packets, in order.
    pub(crate) payload: GuestVectors,
}

/// A transmitted packet; its payload is at the end of the batch.
#[derive(Debug)]
pub(crate) struct TxPacket {
    head: u16,
    mark: (usize, usize),
    /// `None`: no header, or not in guest memory.
    pub(crate) header: Option<Header>,
    /// The payload that the header promises is there.
    pub(crate) complete: bool,
}

impl TxBatch {
    pub(crate) fn new(memory: Arc<GuestMemoryMmap>) -> Self {
        Self {
            heads: Vec::with_capacity(MAX_SEGMENTS),
            payload: GuestVectors::new(memory.clone()),
            memory,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.heads.is_empty()
    }

    /// Whether the next packet might not fit.
    pub(crate) fn is_full(&self) -> bool {
        self.payload.len() + MAX_CHAIN_SEGMENTS > MAX_SEGMENTS
    }

    /// The next packet of the transmit queue. [`Self::keep`], [`Self::leave_out`] or [`Self::untake`] must follow.
    pub(crate) fn next_packet(&mut self, ring: &mut Ring) -> Result<Option<TxPacket>, RingError> {
        let mark = (self.payload.len(), self.payload.bytes());
        let Some(head) = ring.take()? else {
            return Ok(None);
        };
        let (header, complete) = parse_tx(ring.chain(head), &self.memory, &mut self.payload);
        Ok(Some(TxPacket {
            head,
            mark,
            header,
            complete,
        }))
    }

    /// The packet's payload goes out with the batch.
    pub(crate) fn keep(&mut self, packet: &TxPacket) {
        self.heads.push(packet.head);
    }

    /// Puts the packet back to be taken again. It must be the last one taken.
    pub(crate) fn untake(&mut self, ring: &mut Ring, packet: &TxPacket) {
        self.payload.truncate(packet.mark.0, packet.mark.1);
        ring.give_back(1);
    }

    /// The packet has no payload for the batch. It must be the last one taken.
    pub(crate) fn leave_out(&mut self, ring: &mut Ring, packet: &TxPacket) {
        self.payload.truncate(packet.mark.0, packet.mark.1);
        ring.put_used(packet.head, 0);
    }

    /// All payload is written or copied: the driver gets its buffers back.
    pub(crate) fn complete(&mut self, ring: &mut Ring) {
        for &head in &self.heads {
            ring.put_used(head, 0);
        }
        ring.publish();
        self.heads.clear();
        self.payload.clear();
    }
}

/// The header, copied once, and whether its payload was found and appended to `payload`.
fn parse_tx(
    chain: Chain<'_>,
    memory: &GuestMemoryMmap,
    payload: &mut GuestVectors,
) -> (Option<Header>, bool) {
    let mut wire = [0; HEADER_BYTES];
    let mut filled = 0;
    let mut header: Option<Header> = None;
    let mut left = 0;
    for (index, descriptor) in chain.enumerate() {
        if descriptor.is_writable || index == MAX_CHAIN_SEGMENTS {
            return (header, false);
        }
        let mut address = descriptor.address;
        let mut length = descriptor.length;
        if filled < HEADER_BYTES {
            let piece = length.min(HEADER_BYTES - filled);
            if memory
                .read_slice(&mut wire[filled..filled + piece], address)
                .is_err()
            {
                return (None, false);
            }
            filled += piece;
            length -= piece;
            if filled < HEADER_BYTES {
                continue;
            }
            let parsed = Header::decode(&wire);
            header = Some(parsed);
            left = parsed.len as usize;
            // No overflow: the bytes up to here were just read.
            address = GuestAddress(address.0 + piece as u64);
        }
        let wanted = length.min(left);
        if !payload.push(address, wanted) {
            return (header, false);
        }
        left -= wanted;
        if left == 0 {
            return (header, true);
        }
    }
    (header, false)
}
