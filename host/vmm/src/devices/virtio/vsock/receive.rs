//! To the guest: packets that are owed, and bytes of host sockets, into the driver's receive buffers.
//!
//! One read fills many buffers; nothing is copied and nothing is held. Connections take turns.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use super::RX_QUEUE;
use super::mux::SlotId;
use super::packets::MAX_RX_CHAINS;
use super::spec::{Header, Op};
use super::worker::VsockWorker;
use crate::devices::virtio::Watch;

/// Bytes that one connection may send before the next has its turn.
const BYTES_PER_TURN: usize = 256 << 10;
/// Turns before the I/O thread serves other devices.
const TURNS: usize = 16;
/// Buffers taken grow by this factor when a read fills them all, so a bulk stream is at full size after 3 reads, and a
/// small message costs one buffer.
const GROWTH: u16 = 4;

/// How a turn ended.
enum Turn {
    Done,
    /// The driver has to add buffers.
    Starved,
}

impl VsockWorker {
    /// Gives the guest what it is owed, as far as there are buffers.
    pub(super) fn receive(&mut self, now: Duration, watch: &mut dyn Watch) -> io::Result<()> {
        let mut turns = 0;
        while self.mux.has_work() {
            if turns == TURNS {
                self.come_again()?;
                break;
            }
            turns += 1;
            if matches!(self.receive_turn(now, watch)?, Turn::Starved) {
                // Looks again after the driver was asked for kicks, so that none is missed.
                self.starved = true;
                if !self.rx_ring.want_kicks().map_err(io::Error::other)? {
                    break;
                }
            }
        }
        if !self.mux.has_work() && self.starved {
            // Buffers are of no interest until something waits for them.
            self.starved = false;
            self.rx_ring.want_no_kicks();
        }
        if self.rx_ring.driver_wants_interrupt() {
            self.interrupt.signal_used(RX_QUEUE);
        }
        Ok(())
    }

    fn receive_turn(&mut self, now: Duration, watch: &mut dyn Watch) -> io::Result<Turn> {
        if self.mux.has_stray_reset() {
            if !self.take_buffers(1, 0)? {
                return Ok(Turn::Starved);
            }
            let header = self.mux.take_stray_reset();
            return self.send_packet(header);
        }
        let Some(id) = self.mux.next_turn() else {
            return Ok(Turn::Done);
        };
        let Some(entry) = self.mux.get_mut(id) else {
            return Ok(Turn::Done);
        };
        // "No more is sent or received" can wait for the bytes before it, and then is one packet instead of two.
        let bytes_first = entry.attachment.readable
            && entry.connection.owes_only_shutdown()
            && entry.connection.sendable() > 0;
        if entry.connection.owes_packet() && !bytes_first {
            if !self.take_buffers(1, 0)? {
                self.mux.return_turn(id);
                return Ok(Turn::Starved);
            }
            let cid = self.mux.guest_cid();
            let header = self
                .mux
                .get_mut(id)
                .and_then(|entry| entry.connection.take_packet(cid));
            self.send_packet(header)?;
            // Whatever else it has waits for its next turn.
            self.settle(id, now, watch)?;
            return Ok(Turn::Done);
        }
        self.receive_data(id, now, watch)
    }

    fn receive_data(
        &mut self,
        id: SlotId,
        now: Duration,
        watch: &mut dyn Watch,
    ) -> io::Result<Turn> {
        let Some(entry) = self.mux.get_mut(id) else {
            return Ok(Turn::Done);
        };
        let early = entry.attachment.greeting.early().len();
        if !entry.connection.wants_host_bytes() || !(entry.attachment.readable || early > 0) {
            return Ok(Turn::Done);
        }
        let limit = (entry.connection.sendable() as usize).min(BYTES_PER_TURN);
        if limit == 0 {
            entry.connection.on_credit_exhausted(now);
            // The turn comes back with the guest's next packet.
            if entry.connection.deadline().is_some() {
                self.arm_timer(now)?;
            }
            return Ok(Turn::Done);
        }
        let chains = entry.attachment.read_chains;
        if !self.take_buffers(chains, limit)? {
            self.mux.return_turn(id);
            return Ok(Turn::Starved);
        }
        self.fill_buffers(id, now)?;
        self.settle(id, now, watch)?;
        Ok(Turn::Done)
    }

    /// One read into the buffers that were taken.
    fn fill_buffers(&mut self, id: SlotId, now: Duration) -> io::Result<()> {
        let ring = &mut self.rx_ring;
        let cid = self.mux.guest_cid();
        let Some(entry) = self.mux.get_mut(id) else {
            self.rx.give_back(ring);
            return Ok(());
        };
        let (host, room) = (&mut entry.attachment, self.rx.payload.bytes());
        let early = host.greeting.early();
        let result = match &host.socket {
            _ if !early.is_empty() => {
                self.rx.payload.copy_in(early);
                let count = early.len().min(room);
                host.greeting.consume(count);
                // The socket itself has not been looked at.
                host.readable = true;
                Ok(count)
            }
            Some(socket) => {
                let result = self.rx.payload.receive(socket.as_fd());
                // A stream's short read has found its present end, unless the end for good is behind it.
                host.readable = match result {
                    Ok(count) => count == room || (host.ending && count > 0),
                    Err(ref error) => error.kind() == io::ErrorKind::Interrupted,
                };
                result
            }
            None => Ok(0),
        };
        match result {
            Ok(count) if count > 0 => {
                // Small messages cost one buffer, bulk is read in large pieces.
                let full = count == room;
                host.read_chains = if full {
                    host.read_chains.saturating_mul(GROWTH)
                } else {
                    host.read_chains / 2
                };
                host.read_chains = host.read_chains.clamp(1, MAX_RX_CHAINS);
                let header = entry.connection.header(cid, Op::Data, 0);
                // At most the turn's limit.
                entry
                    .connection
                    .on_sent(u32::try_from(count).unwrap_or(u32::MAX));
                self.metrics.count_to_guest(count);
                self.rx.complete(ring, &header, count);
                return Ok(());
            }
            Ok(_) => entry.connection.on_host_finished(now),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            Err(_) => {
                entry.connection.on_host_gone(now);
                entry.connection.on_host_finished(now);
            }
        }
        self.rx.give_back(ring);
        Ok(())
    }

    fn take_buffers(&mut self, chains: u16, limit: usize) -> io::Result<bool> {
        self.rx
            .take(&mut self.rx_ring, chains, limit)
            .map_err(io::Error::other)
    }

    /// A packet without payload into the one buffer that was taken.
    fn send_packet(&mut self, header: Option<Header>) -> io::Result<Turn> {
        let ring = &mut self.rx_ring;
        match header {
            Some(header) => self.rx.complete(ring, &header, 0),
            None => self.rx.give_back(ring),
        }
        Ok(Turn::Done)
    }
}
