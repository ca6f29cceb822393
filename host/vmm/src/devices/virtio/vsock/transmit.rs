//! From the guest: packets of the transmit queue to connections, and their payload to host sockets.
//!
//! Payload goes from guest memory into the socket, several packets of a connection with one system call. Only what the
//! socket does not take is copied, and held within the connection's window.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use rustix::net::{SendFlags, send, sockopt};

use super::TX_QUEUE;
use super::mux::SlotId;
use super::packets::TxPacket;
use super::spec::{Op, TYPE_STREAM};
use super::worker::{Held, VsockWorker, is_addressed_right, socket_events};
use crate::devices::virtio::Watch;

/// Packets handled before others get their turn.
const PACKETS_PER_TURN: usize = 256;
/// A driver with this part of its ring in use has not run out: Linux takes two descriptors for a packet.
const UNSIGNALLED_SHARE: u16 = 8;
/// Asked for when a host process turns out to read slowly; the host caps it at net.core.wmem_max.
const SEND_BUFFER_BYTES: usize = 1 << 20;

impl VsockWorker {
    /// Takes what the guest has sent.
    pub(super) fn transmit(&mut self, now: Duration, watch: &mut dyn Watch) -> io::Result<()> {
        let mut packets = 0;
        loop {
            if packets == PACKETS_PER_TURN {
                self.come_again()?;
                break;
            }
            let Some(packet) = self
                .tx
                .next_packet(&mut self.tx_ring)
                .map_err(io::Error::other)?
            else {
                self.write_batch(now, watch)?;
                // Looks again after the driver was asked for kicks, so that none is missed (VIRTIO 1.2, 2.7.13.4.1).
                if self.tx_ring.want_kicks().map_err(io::Error::other)? {
                    continue;
                }
                break;
            };
            packets += 1;
            self.on_packet(&packet, now, watch)?;
        }
        self.write_batch(now, watch)?;
        self.tx_ring.publish();
        self.unsignalled += packets;
        self.signal_transmitted(now)
    }

    /// Tells the driver about buffers that it has back, but not at once: it needs them only when it runs out, and looks
    /// for them whenever another queue's interrupt comes, so that a request and its answer cost one interrupt.
    fn signal_transmitted(&mut self, now: Duration) -> io::Result<()> {
        if self.unsignalled == 0 {
            return Ok(());
        }
        let most = usize::from(self.tx_ring.size() / UNSIGNALLED_SHARE);
        if self.unsignalled >= most {
            self.signal_transmitted_now();
            return Ok(());
        }
        self.signal_soon(now)
    }

    /// Tells the driver, if it has not looked by itself since.
    pub(super) fn signal_transmitted_now(&mut self) {
        if std::mem::take(&mut self.unsignalled) > 0 && self.tx_ring.driver_wants_interrupt() {
            self.interrupt.signal_used(TX_QUEUE);
        }
    }

    fn on_packet(
        &mut self,
        packet: &TxPacket,
        now: Duration,
        watch: &mut dyn Watch,
    ) -> io::Result<()> {
        let header = packet
            .header
            .filter(|header| is_addressed_right(header, self.mux.guest_cid()));
        let Some(mut header) = header else {
            self.mux.count_dropped();
            return self.leave_out(packet);
        };
        if !packet.complete {
            // The stream has lost bytes: no operation is valid, and the connection is reset.
            header.op = 0;
        }
        let Some(id) = self.mux.find(&header) else {
            self.leave_out(packet)?;
            if Op::parse(header.op) == Some(Op::Request) && header.socket_type == TYPE_STREAM {
                return self.on_request(&header, watch);
            }
            self.mux.answer_stranger(&header);
            return Ok(());
        };
        let joins = self.tx_slot == Some(id) && header.op == Op::Data as u16 && !self.tx.is_full();
        if !self.tx.is_empty() && !joins {
            // What was sent before goes out before; then this packet is taken again.
            self.tx.untake(&mut self.tx_ring, packet);
            return self.write_batch(now, watch);
        }
        let Some(entry) = self.mux.get_mut(id) else {
            return self.leave_out(packet);
        };
        if entry.connection.on_packet(&header, now) > 0 {
            self.tx.keep(packet);
            self.tx_slot = Some(id);
            return Ok(());
        }
        self.leave_out(packet)?;
        self.settle(id, now, watch)
    }

    fn leave_out(&mut self, packet: &TxPacket) -> io::Result<()> {
        self.tx.leave_out(&mut self.tx_ring, packet);
        Ok(())
    }

    /// Writes the payload of the batch, holds what the socket does not take, and gives the driver its buffers back.
    fn write_batch(&mut self, now: Duration, watch: &mut dyn Watch) -> io::Result<()> {
        let Some(id) = self.tx_slot.take() else {
            return Ok(());
        };
        if self.tx.is_empty() {
            return Ok(());
        }
        self.write_payload(id, now, watch)?;
        self.tx.complete(&mut self.tx_ring);
        self.settle(id, now, watch)
    }

    fn write_payload(
        &mut self,
        id: SlotId,
        now: Duration,
        watch: &mut dyn Watch,
    ) -> io::Result<()> {
        let total = self.tx.payload.bytes();
        let Some(entry) = self.mux.get_mut(id) else {
            return Ok(());
        };
        let host = &mut entry.attachment;
        let Some(socket) = host
            .socket
            .as_ref()
            .filter(|_| entry.connection.host_takes_data())
        else {
            return Ok(());
        };
        self.metrics.count_from_guest(total);
        let mut sent = 0;
        if host.held.is_empty() {
            sent = match self.tx.payload.send(socket.as_fd()) {
                Ok(sent) => sent,
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) =>
                {
                    0
                }
                Err(_) => {
                    entry.connection.on_host_gone(now);
                    return Ok(());
                }
            };
        }
        if sent < total {
            host.held
                .extend(|held| self.tx.payload.copy_out(sent, held));
            if !host.watches_writable {
                host.watches_writable = true;
                // Best effort: it saves wake-ups, nothing depends on it.
                let _ = sockopt::set_socket_send_buffer_size(socket, SEND_BUFFER_BYTES);
                watch.modify(socket.as_raw_fd(), id.token(), socket_events(true))?;
            }
        }
        // At most the window.
        entry
            .connection
            .on_forwarded(u32::try_from(sent).unwrap_or(u32::MAX), now);
        Ok(())
    }

    /// The host process reads again.
    pub(super) fn write_held(
        &mut self,
        id: SlotId,
        now: Duration,
        watch: &mut dyn Watch,
    ) -> io::Result<()> {
        let Some(entry) = self.mux.get_mut(id) else {
            return Ok(());
        };
        let host = &mut entry.attachment;
        let Some(socket) = &host.socket else {
            return Ok(());
        };
        let mut forwarded: usize = 0;
        while !host.held.is_empty() {
            match send(
                socket,
                host.held.bytes(),
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            ) {
                Ok(count) => {
                    host.held.consume(count);
                    forwarded += count;
                }
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => {
                    host.held = Held::default();
                    entry.connection.on_host_gone(now);
                    return Ok(());
                }
            }
        }
        if host.held.is_empty() && host.watches_writable {
            host.watches_writable = false;
            watch.modify(socket.as_raw_fd(), id.token(), socket_events(false))?;
        }
        entry
            .connection
            .on_forwarded(u32::try_from(forwarded).unwrap_or(u32::MAX), now);
        Ok(())
    }
}
