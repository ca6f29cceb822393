//! Descriptor chains as packets: many receive buffers filled by one read, transmitted packets gathered for one write.
//!
//! Everything in the rings is the guest's word: lengths and addresses are checked, and each header is copied once.
//! Which connection a packet belongs to is none of this file's business.

use std::sync::Arc;

use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::guest_io::{GuestVectors, MAX_SEGMENTS};
use super::spec::{HEADER_BYTES, HEADER_BYTES_U32, Header, LEN_OFFSET};

/// Receive buffers filled by one read at most: 256 KiB with Linux's 4 KiB buffers.
pub(crate) const MAX_RX_CHAINS: u16 = 64;
/// Pieces into which a driver may cut the room for a header. Drivers cut at most once; framing is theirs to choose
/// (VIRTIO 1.2, 2.7.4.2), but a chain beyond this is returned unused.
const MAX_HEADER_PIECES: usize = 4;
/// Segments of one chain at most; nobody builds packets out of more, and with it a batch always has room for one more.
const MAX_CHAIN_SEGMENTS: usize = 256;

/// One receive buffer.
#[derive(Debug, Clone, Copy)]
struct RxChain {
    head: u16,
    header: [(GuestAddress, usize); MAX_HEADER_PIECES],
    room: usize,
}

/// Receive buffers between the available and the used ring.
#[derive(Debug)]
pub(crate) struct RxBatch {
    memory: Arc<GuestMemoryMmap>,
    chains: Vec<RxChain>,
    /// Room for payload, in the chains' order.
    pub(crate) payload: GuestVectors,
    rejected: u64,
}

impl RxBatch {
    pub(crate) fn new(memory: Arc<GuestMemoryMmap>) -> Self {
        Self {
            chains: Vec::with_capacity(usize::from(MAX_RX_CHAINS)),
            payload: GuestVectors::new(memory.clone()),
            memory,
            rejected: 0,
        }
    }

    /// Takes buffers for up to `limit` bytes of payload; `false` if the driver has to add some first.
    ///
    /// Buffers without room for a header, or for any payload where some is wanted, are used up empty.
    pub(crate) fn take(
        &mut self,
        queue: &mut Queue,
        max_chains: u16,
        limit: usize,
    ) -> Result<bool, Error> {
        self.chains.clear();
        self.payload.clear();
        let mut rejected = 0;
        while self.chains.len() < usize::from(max_chains) && rejected < queue.size() {
            let left = limit - self.payload.bytes();
            if left == 0 && !self.chains.is_empty() {
                break;
            }
            let Some(chain) = queue.iter(&*self.memory)?.next() else {
                break;
            };
            let head = chain.head_index();
            let mark = (self.payload.len(), self.payload.bytes());
            if let Some(chain) = parse_rx(chain, &self.memory, &mut self.payload, left) {
                self.chains.push(chain);
                continue;
            }
            self.payload.truncate(mark.0, mark.1);
            if !self.chains.is_empty() {
                // It is dealt with when it is the first, so that buffers can be given back in order.
                queue.go_to_previous_position();
                break;
            }
            rejected += 1;
            queue.add_used(&*self.memory, head, 0)?;
        }
        self.rejected += u64::from(rejected);
        Ok(!self.chains.is_empty())
    }

    /// Buffers that had no room, ever.
    pub(crate) fn rejected(&self) -> u64 {
        self.rejected
    }

    /// Gives back all buffers, unused and in order.
    pub(crate) fn give_back(&mut self, queue: &mut Queue) {
        self.give_back_after(queue, 0);
    }

    fn give_back_after(&mut self, queue: &mut Queue, kept: usize) {
        for _ in kept..self.chains.len() {
            queue.go_to_previous_position();
        }
        self.chains.clear();
    }

    /// Puts `bytes` of payload, which are already in the buffers, into the used ring, one packet per buffer.
    pub(crate) fn complete(
        &mut self,
        queue: &mut Queue,
        header: &Header,
        bytes: usize,
    ) -> Result<(), Error> {
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
            let mut rest = &wire[..];
            for &(address, length) in chain.header.iter().take_while(|(_, length)| *length > 0) {
                let (piece, later) = rest.split_at(length.min(rest.len()));
                self.memory
                    .write_slice(piece, address)
                    .map_err(Error::GuestMemory)?;
                rest = later;
            }
            queue.add_used(
                &*self.memory,
                chain.head,
                HEADER_BYTES_U32.saturating_add(length),
            )?;
            left -= now;
            used += 1;
        }
        self.give_back_after(queue, used);
        Ok(())
    }
}

/// `None` if the chain has no room for a header, or none for payload although `limit` wants some.
fn parse_rx(
    chain: DescriptorChain<&GuestMemoryMmap>,
    memory: &GuestMemoryMmap,
    payload: &mut GuestVectors,
    limit: usize,
) -> Option<RxChain> {
    let head = chain.head_index();
    let mut parsed = RxChain {
        head,
        header: [(GuestAddress(0), 0); MAX_HEADER_PIECES],
        room: 0,
    };
    let mut header_left = HEADER_BYTES;
    let mut pieces = 0;
    for (index, descriptor) in chain.enumerate() {
        if !descriptor.is_write_only() || index == MAX_CHAIN_SEGMENTS {
            return None;
        }
        let mut address = descriptor.addr();
        let mut length = descriptor.len() as usize;
        if header_left > 0 && length > 0 {
            let piece = length.min(header_left);
            memory.get_slice(address, piece).ok()?;
            *parsed.header.get_mut(pieces)? = (address, piece);
            pieces += 1;
            header_left -= piece;
            length -= piece;
            address = GuestAddress(address.0.checked_add(piece as u64)?);
        }
        let wanted = length.min(limit - parsed.room);
        if !payload.push(address, wanted) {
            return None;
        }
        parsed.room += wanted;
        if header_left == 0 && parsed.room == limit {
            break;
        }
    }
    (header_left == 0 && (parsed.room > 0 || limit == 0)).then_some(parsed)
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
    pub(crate) fn next_packet(&mut self, queue: &mut Queue) -> Result<Option<TxPacket>, Error> {
        let mark = (self.payload.len(), self.payload.bytes());
        let Some(chain) = queue.iter(&*self.memory)?.next() else {
            return Ok(None);
        };
        let head = chain.head_index();
        let (header, complete) = parse_tx(chain, &self.memory, &mut self.payload);
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
    pub(crate) fn untake(&mut self, queue: &mut Queue, packet: &TxPacket) {
        self.payload.truncate(packet.mark.0, packet.mark.1);
        queue.go_to_previous_position();
    }

    /// The packet has no payload for the batch. It must be the last one taken.
    pub(crate) fn leave_out(&mut self, queue: &mut Queue, packet: &TxPacket) -> Result<(), Error> {
        self.payload.truncate(packet.mark.0, packet.mark.1);
        queue.add_used(&*self.memory, packet.head, 0)
    }

    /// All payload is written or copied: the driver gets its buffers back.
    pub(crate) fn complete(&mut self, queue: &mut Queue) -> Result<(), Error> {
        for &head in &self.heads {
            queue.add_used(&*self.memory, head, 0)?;
        }
        self.heads.clear();
        self.payload.clear();
        Ok(())
    }
}

/// The header, copied once, and whether its payload was found and appended to `payload`.
fn parse_tx(
    chain: DescriptorChain<&GuestMemoryMmap>,
    memory: &GuestMemoryMmap,
    payload: &mut GuestVectors,
) -> (Option<Header>, bool) {
    let mut wire = [0; HEADER_BYTES];
    let mut filled = 0;
    let mut header: Option<Header> = None;
    let mut left = 0;
    for (index, descriptor) in chain.enumerate() {
        if descriptor.is_write_only() || index == MAX_CHAIN_SEGMENTS {
            return (header, false);
        }
        let mut address = descriptor.addr();
        let mut length = descriptor.len() as usize;
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
