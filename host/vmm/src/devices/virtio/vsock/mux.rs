//! All connections of a device: who owns which pair of ports, whose turn it is, and what is owed to strangers.
//!
//! No I/O and no clock. `T` is what the owner keeps beside each connection (its socket and the bytes it holds).
//! Memory is bounded: [`MAX_CONNECTIONS`] slots, each at most once in the queue of turns, windows out of one budget,
//! and [`MAX_STRAY_RESETS`] answers to packets that belong to no connection.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use super::connection::{Connection, Key, Phase};
use super::spec::{HOST_CID, Header, Op, TYPE_STREAM};

/// More connections than one guest's agent needs by far; each costs a file descriptor and, at worst, its window.
pub(crate) const MAX_CONNECTIONS: usize = 4096;
/// Bytes of the guest that are held for a slow host process, at most. Linux uses as much of it as its own window is large,
/// 256 KiB, and a unix socket takes about as much: more would be copied and held, and gain nothing.
pub(crate) const LARGE_WINDOW: u32 = 256 << 10;
/// The window once [`WINDOW_BUDGET`] is spent: one packet of Linux.
pub(crate) const SMALL_WINDOW: u32 = 64 << 10;
/// Large windows are given out up to this sum: with it and the small ones a device holds 320 MiB when every one of its
/// 4096 connections has a host process that does not read.
pub(crate) const WINDOW_BUDGET: u64 = 64 << 20;
/// Answers to packets of unknown connections that wait for buffers of the guest: one for each connection there can be,
/// should they all end at once.
pub(crate) const MAX_STRAY_RESETS: usize = MAX_CONNECTIONS;
/// Ports for connections from the host: above those that people choose, below VMADDR_PORT_ANY.
const FIRST_HOST_PORT: u32 = 1 << 30;
const LAST_HOST_PORT: u32 = u32::MAX - 1;

/// A connection's place in the table. The generation tells a reused slot from the old one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct SlotId {
    index: u32,
    generation: u32,
}

impl SlotId {
    /// As an epoll token.
    pub(crate) fn token(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    /// From an epoll token; the slot may be gone.
    pub(crate) fn from_token(token: u64) -> Self {
        Self {
            index: (token & 0xffff_ffff) as u32,
            generation: (token >> 32) as u32,
        }
    }
}

/// One slot in use.
#[derive(Debug)]
pub(crate) struct Entry<T> {
    pub(crate) connection: Connection,
    pub(crate) attachment: T,
    /// The key under which the table knows it.
    registered: Option<Key>,
    in_turn: bool,
}

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    entry: Option<Entry<T>>,
}

/// The table is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Full;

/// The table.
#[derive(Debug)]
pub(crate) struct Mux<T> {
    guest_cid: u64,
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    by_key: HashMap<Key, SlotId>,
    /// The connection of the last packet: bulk data comes in runs.
    last: Option<(Key, SlotId)>,
    turns: VecDeque<SlotId>,
    stray_resets: VecDeque<Key>,
    next_host_port: u32,
    windows: u64,
    dropped: u64,
}

impl<T> Mux<T> {
    pub(crate) fn new(guest_cid: u64) -> Self {
        Self {
            guest_cid,
            slots: Vec::new(),
            free: Vec::new(),
            by_key: HashMap::new(),
            last: None,
            turns: VecDeque::new(),
            stray_resets: VecDeque::new(),
            next_host_port: FIRST_HOST_PORT,
            windows: 0,
            dropped: 0,
        }
    }

    pub(crate) fn guest_cid(&self) -> u64 {
        self.guest_cid
    }

    /// Slots in use.
    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.len() >= MAX_CONNECTIONS
    }

    /// Packets and answers that were thrown away because the guest broke the rules.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped
    }

    pub(crate) fn count_dropped(&mut self) {
        self.dropped += 1;
    }

    pub(crate) fn get_mut(&mut self, id: SlotId) -> Option<&mut Entry<T>> {
        let slot = self.slots.get_mut(id.index as usize)?;
        slot.entry
            .as_mut()
            .filter(|_| slot.generation == id.generation)
    }

    /// All slots in use.
    pub(crate) fn ids(&self) -> Vec<SlotId> {
        let in_use = self
            .slots
            .iter()
            .enumerate()
            .filter(|(_, slot)| slot.entry.is_some());
        in_use
            .filter_map(|(index, slot)| {
                Some(SlotId {
                    index: u32::try_from(index).ok()?,
                    generation: slot.generation,
                })
            })
            .collect()
    }

    /// A host process has connected.
    pub(crate) fn greet(&mut self, attachment: T, now: Duration) -> Result<SlotId, Full> {
        let window = self.next_window();
        self.insert(Connection::greeting(window, now), attachment)
    }

    /// A host process wants `guest_port`; returns the host port, or `None` if the slot is gone.
    pub(crate) fn dial(&mut self, id: SlotId, guest_port: u32, now: Duration) -> Option<u32> {
        let key = self.unused_key(guest_port);
        let entry = self.get_mut(id)?;
        entry.connection.dial(key, now);
        entry.registered = Some(key);
        self.by_key.insert(key, id);
        self.take_turn(id);
        Some(key.host_port)
    }

    /// The guest's REQUEST was accepted by a host process.
    pub(crate) fn accept(&mut self, request: &Header, attachment: T) -> Result<SlotId, Full> {
        let key = key_of(request);
        let window = self.next_window();
        let id = self.insert(Connection::accepted(key, window, request), attachment)?;
        if let Some(entry) = self.get_mut(id) {
            entry.registered = Some(key);
        }
        self.by_key.insert(key, id);
        self.take_turn(id);
        Ok(id)
    }

    /// The connection of a packet, if there is one.
    pub(crate) fn find(&mut self, header: &Header) -> Option<SlotId> {
        let key = key_of(header);
        if let Some((last_key, id)) = self.last
            && last_key == key
        {
            return Some(id);
        }
        let id = *self.by_key.get(&key)?;
        self.last = Some((key, id));
        Some(id)
    }

    /// Answers a packet that belongs to no connection with RST, except if it is RST (VIRTIO 1.2, 5.10.6.6).
    pub(crate) fn answer_stranger(&mut self, header: &Header) {
        if header.op == Op::Reset as u16 {
            return;
        }
        if self.stray_resets.len() < MAX_STRAY_RESETS {
            self.stray_resets.push_back(key_of(header));
        } else {
            self.dropped += 1;
        }
    }

    pub(crate) fn has_stray_reset(&self) -> bool {
        !self.stray_resets.is_empty()
    }

    /// The next answer to a stranger.
    pub(crate) fn take_stray_reset(&mut self) -> Option<Header> {
        let key = self.stray_resets.pop_front()?;
        Some(Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: key.host_port,
            dst_port: key.guest_port,
            socket_type: TYPE_STREAM,
            op: Op::Reset as u16,
            ..Header::default()
        })
    }

    /// Queues a connection that may have something for the guest; at most once, so turns are fair.
    pub(crate) fn take_turn(&mut self, id: SlotId) {
        if let Some(entry) = self.get_mut(id)
            && !entry.in_turn
        {
            entry.in_turn = true;
            self.turns.push_back(id);
        }
    }

    /// Whose turn it is; the slot may be gone.
    pub(crate) fn next_turn(&mut self) -> Option<SlotId> {
        let id = self.turns.pop_front()?;
        if let Some(entry) = self.get_mut(id) {
            entry.in_turn = false;
        }
        Some(id)
    }

    /// Gives a turn back that could not be used, at the front.
    pub(crate) fn return_turn(&mut self, id: SlotId) {
        if let Some(entry) = self.get_mut(id)
            && !entry.in_turn
        {
            entry.in_turn = true;
            self.turns.push_front(id);
        }
    }

    /// Whether anything may be waiting for a buffer of the guest.
    pub(crate) fn has_work(&self) -> bool {
        !self.turns.is_empty() || !self.stray_resets.is_empty()
    }

    /// Frees the ports of a connection that the guest no longer knows, and the slot of one that has ended.
    pub(crate) fn settle(&mut self, id: SlotId) -> Option<T> {
        let entry = self.get_mut(id)?;
        let phase = entry.connection.phase();
        if entry.connection.is_known_to_guest() || phase == Phase::Greeting {
            return None;
        }
        if let Some(key) = entry.registered.take() {
            self.by_key.remove(&key);
            self.last = None;
        }
        if phase == Phase::Closed {
            self.remove(id)
        } else {
            None
        }
    }

    /// Connections whose deadline has passed, and whether any deadline is left.
    pub(crate) fn expire(&mut self, now: Duration, expired: &mut Vec<SlotId>) -> bool {
        let mut left = false;
        for (index, slot) in self.slots.iter().enumerate() {
            let Some(deadline) = slot
                .entry
                .as_ref()
                .and_then(|entry| entry.connection.deadline())
            else {
                continue;
            };
            if deadline <= now {
                expired.extend(u32::try_from(index).map(|index| SlotId {
                    index,
                    generation: slot.generation,
                }));
            } else {
                left = true;
            }
        }
        left
    }

    fn insert(&mut self, connection: Connection, attachment: T) -> Result<SlotId, Full> {
        if self.is_full() {
            return Err(Full);
        }
        self.windows += u64::from(connection.window());
        let entry = Some(Entry {
            connection,
            attachment,
            registered: None,
            in_turn: false,
        });
        if let Some(index) = self.free.pop() {
            let slot = &mut self.slots[index as usize];
            slot.entry = entry;
            return Ok(SlotId {
                index,
                generation: slot.generation,
            });
        }
        let index = u32::try_from(self.slots.len()).map_err(|_| Full)?;
        self.slots.push(Slot {
            generation: 0,
            entry,
        });
        Ok(SlotId {
            index,
            generation: 0,
        })
    }

    fn remove(&mut self, id: SlotId) -> Option<T> {
        let slot = self
            .slots
            .get_mut(id.index as usize)
            .filter(|slot| slot.generation == id.generation)?;
        let entry = slot.entry.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(id.index);
        self.windows -= u64::from(entry.connection.window());
        if entry.in_turn {
            self.turns.retain(|&turn| turn != id);
        }
        Some(entry.attachment)
    }

    fn next_window(&self) -> u32 {
        if self.windows + u64::from(LARGE_WINDOW) <= WINDOW_BUDGET {
            LARGE_WINDOW
        } else {
            SMALL_WINDOW
        }
    }

    /// Fewer connections than ports exist, so one is free.
    fn unused_key(&mut self, guest_port: u32) -> Key {
        loop {
            let key = Key {
                host_port: self.next_host_port,
                guest_port,
            };
            self.next_host_port = if key.host_port == LAST_HOST_PORT {
                FIRST_HOST_PORT
            } else {
                key.host_port + 1
            };
            if !self.by_key.contains_key(&key) {
                return key;
            }
        }
    }
}

/// The ports of a packet from the guest.
pub(crate) fn key_of(header: &Header) -> Key {
    Key {
        host_port: header.dst_port,
        guest_port: header.src_port,
    }
}

#[cfg(test)]
mod tests {
    use super::super::connection::CONNECT_TIMEOUT;
    use super::super::spec::SHUTDOWN_BOTH;
    use super::*;

    const NOW: Duration = Duration::from_secs(5);

    fn request(guest_port: u32, host_port: u32) -> Header {
        Header {
            src_cid: 3,
            dst_cid: HOST_CID,
            src_port: guest_port,
            dst_port: host_port,
            socket_type: TYPE_STREAM,
            op: Op::Request as u16,
            buf_alloc: 1,
            ..Header::default()
        }
    }

    #[test]
    fn the_number_of_connections_and_their_windows_are_bounded() {
        let mut mux = Mux::new(3);
        for port in 0..MAX_CONNECTIONS {
            mux.accept(&request(u32::try_from(port).unwrap(), 1), ())
                .unwrap();
        }
        assert!(mux.is_full());
        assert_eq!(mux.greet((), NOW), Err(Full));
        assert_eq!(mux.accept(&request(u32::MAX, 1), ()), Err(Full));
        let small = u64::from(SMALL_WINDOW) * MAX_CONNECTIONS as u64;
        assert!(mux.windows <= WINDOW_BUDGET + small);
        assert_eq!(mux.turns.len(), MAX_CONNECTIONS);
    }

    #[test]
    fn answers_to_strangers_are_bounded_and_never_answer_a_reset() {
        let mut mux = Mux::<()>::new(3);
        mux.answer_stranger(&Header {
            op: Op::Reset as u16,
            ..request(1, 2)
        });
        assert!(!mux.has_work());
        for port in 0..5000 {
            mux.answer_stranger(&request(port, 2));
        }
        assert_eq!(mux.dropped(), 5000 - MAX_STRAY_RESETS as u64);
        let first = mux.take_stray_reset().unwrap();
        assert_eq!(
            (first.op, first.src_port, first.dst_port),
            (Op::Reset as u16, 2, 0)
        );
        assert_eq!(
            std::iter::from_fn(|| mux.take_stray_reset()).count(),
            MAX_STRAY_RESETS - 1
        );
    }

    #[test]
    fn ports_are_not_reused_at_once_and_never_in_use() {
        let mut mux = Mux::new(3);
        mux.accept(&request(9, FIRST_HOST_PORT), ()).unwrap();
        mux.next_host_port = LAST_HOST_PORT;
        let first = mux.greet((), NOW).unwrap();
        assert_eq!(mux.dial(first, 9, NOW), Some(LAST_HOST_PORT));
        let second = mux.greet((), NOW).unwrap();
        assert_eq!(
            mux.dial(second, 9, NOW),
            Some(FIRST_HOST_PORT + 1),
            "the guest has taken the first"
        );
    }

    #[test]
    fn a_slot_that_is_used_again_does_not_answer_to_its_old_name() {
        let mut mux = Mux::new(3);
        let old = mux.accept(&request(1, 2), "old").unwrap();
        assert_eq!(mux.find(&request(1, 2)), Some(old));
        mux.get_mut(old).unwrap().connection.on_packet(
            &Header {
                op: Op::Reset as u16,
                ..request(1, 2)
            },
            NOW,
        );
        assert_eq!(mux.settle(old), Some("old"));
        assert_eq!(mux.find(&request(1, 2)), None);
        assert!(!mux.has_work(), "its turn is gone with it");
        let new = mux.accept(&request(1, 2), "new").unwrap();
        assert!(mux.get_mut(old).is_none());
        assert_eq!(SlotId::from_token(new.token()), new);
        assert_ne!(old.token(), new.token());
    }

    #[test]
    fn turns_are_fair_and_taken_once() {
        let mut mux = Mux::new(3);
        let ids: Vec<_> = (0..3)
            .map(|port| mux.accept(&request(port, 2), ()).unwrap())
            .collect();
        mux.take_turn(ids[0]);
        mux.take_turn(ids[0]);
        assert_eq!(mux.next_turn(), Some(ids[0]));
        mux.take_turn(ids[0]);
        assert_eq!(mux.next_turn(), Some(ids[1]));
        mux.return_turn(ids[1]);
        assert_eq!(
            std::iter::from_fn(|| mux.next_turn()).collect::<Vec<_>>(),
            [ids[1], ids[2], ids[0]]
        );
    }

    #[test]
    fn deadlines_are_found() {
        let mut mux = Mux::new(3);
        let id = mux.greet((), NOW).unwrap();
        let mut expired = Vec::new();
        assert!(mux.expire(NOW, &mut expired));
        assert_eq!(expired, []);
        assert!(!mux.expire(NOW + CONNECT_TIMEOUT, &mut expired));
        assert_eq!(expired, [id]);
    }

    #[test]
    fn the_ports_of_bytes_that_outlive_their_sender_are_free() {
        let mut mux = Mux::new(3);
        let id = mux.accept(&request(1, 2), ()).unwrap();
        let entry = mux.get_mut(id).unwrap();
        let data = Header {
            op: Op::Data as u16,
            len: 1,
            ..request(1, 2)
        };
        assert_eq!(entry.connection.on_packet(&data, NOW), 1);
        entry.connection.on_packet(
            &Header {
                op: Op::Shutdown as u16,
                flags: SHUTDOWN_BOTH,
                ..request(1, 2)
            },
            NOW,
        );
        entry.connection.on_packet(
            &Header {
                op: Op::Reset as u16,
                ..request(1, 2)
            },
            NOW,
        );
        assert_eq!(mux.settle(id), None, "one byte is to be delivered");
        assert_eq!(mux.find(&request(1, 2)), None);
        let again = mux.accept(&request(1, 2), ()).unwrap();
        assert_eq!(mux.find(&request(1, 2)), Some(again));
        mux.get_mut(id).unwrap().connection.on_forwarded(1, NOW);
        assert_eq!(mux.settle(id), Some(()));
        assert_eq!(
            mux.find(&request(1, 2)),
            Some(again),
            "the old one takes nothing along"
        );
    }
}
