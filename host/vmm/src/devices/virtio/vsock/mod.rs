//! The socket device (VIRTIO 1.2, 5.10): stream sockets between the guest and unix sockets of the host.
//!
//! A host process connects to `<path>`, writes `CONNECT <guest port>\n` and reads `OK <host port>\n` once a process in
//! the guest has accepted; from then on the socket is the connection. If nobody accepts it reads end-of-file instead.
//! A process in the guest that connects to port N of the host reaches whoever listens on `<path>_N`.
//!
//! Bottom up: `spec` (words), `connection` (one connection, no I/O, no clock), `mux` (all of them), `ring`, `guest_io`
//! and `packets` (the queues, bytes and packets in guest memory), `host_sockets`, `worker` with `transmit` and `receive`
//! (the I/O thread's half), `device` (the vCPU's half).
//!
//! Invariants: bytes are delivered in order and completely, or the connection ends in an error; each direction ends on
//! its own; what a guest or a host process does costs bounded memory and disturbs no other connection.

mod connection;
mod device;
mod guest_io;
mod host_sockets;
mod mux;
mod packets;
mod receive;
mod ring;
mod spec;
mod transmit;
mod worker;

use std::sync::atomic::{AtomicU64, Ordering};

pub use device::VsockDevice;
pub use host_sockets::ListenError;

/// Queues of the device (VIRTIO 1.2, 5.10.2).
const RX_QUEUE: u16 = 0;
const TX_QUEUE: u16 = 1;
const EVENT_QUEUE: u16 = 2;
/// Linux fills the receive queue at once and each buffer is 4 KiB and a bit; 128 of them are a good burst, and half a
/// MiB of guest memory.
const QUEUE_SIZES: [u16; 3] = [128, 128, 8];

/// Counters; written by the I/O thread, read by whoever likes.
#[derive(Debug, Default)]
pub struct VsockMetrics {
    connections: AtomicU64,
    bytes_to_guest: AtomicU64,
    bytes_from_guest: AtomicU64,
    dropped: AtomicU64,
}

impl VsockMetrics {
    /// As a JSON object: connections now; bytes each way and packets against the rules since the start.
    pub fn to_json(&self) -> serde_json::Value {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        serde_json::json!({
            "connections": get(&self.connections),
            "bytes_to_guest": get(&self.bytes_to_guest),
            "bytes_from_guest": get(&self.bytes_from_guest),
            "dropped": get(&self.dropped),
        })
    }

    fn connections(&self, count: usize) {
        self.connections.store(count as u64, Ordering::Relaxed);
    }

    fn dropped(&self, count: u64) {
        self.dropped.store(count, Ordering::Relaxed);
    }

    fn count_to_guest(&self, bytes: usize) {
        add(&self.bytes_to_guest, bytes);
    }

    fn count_from_guest(&self, bytes: usize) {
        add(&self.bytes_from_guest, bytes);
    }
}

/// There is one writer, so no locked instruction is needed.
fn add(counter: &AtomicU64, bytes: usize) {
    counter.store(
        counter.load(Ordering::Relaxed).wrapping_add(bytes as u64),
        Ordering::Relaxed,
    );
}

#[cfg(test)]
mod tests;
