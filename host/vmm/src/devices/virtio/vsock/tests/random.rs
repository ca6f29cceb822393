//! Random sequences of what both sides can do, against an oracle: every byte arrives once and in order in both
//! directions, each end is seen exactly where it was put, credit is kept, and nothing is left over.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::super::spec::{Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::driver::{GuestSocket, Rig};

const CONNECTIONS: usize = 3;

#[derive(Debug, Clone)]
enum Step {
    HostWrites(usize, usize),
    HostReads(usize, usize),
    HostEnds(usize),
    GuestSends(usize, usize),
    GuestReads(usize, u32),
    GuestEnds(usize),
    GuestUpdates(usize),
    /// Packets are queued without a kick until the next one.
    Kick,
    OfferBuffers(usize),
    IoThread,
}

fn step() -> impl Strategy<Value = Step> {
    let who = 0..CONNECTIONS;
    prop_oneof![
        6 => (who.clone(), 1..20_000usize).prop_map(|(who, n)| Step::HostWrites(who, n)),
        4 => (who.clone(), 1..300_000usize).prop_map(|(who, n)| Step::HostReads(who, n)),
        1 => who.clone().prop_map(Step::HostEnds),
        6 => (who.clone(), 1..60_000usize).prop_map(|(who, n)| Step::GuestSends(who, n)),
        6 => (who.clone(), 1..6_000u32).prop_map(|(who, n)| Step::GuestReads(who, n)),
        1 => who.clone().prop_map(Step::GuestEnds),
        3 => who.prop_map(Step::GuestUpdates),
        6 => Just(Step::Kick),
        6 => (1..20usize).prop_map(Step::OfferBuffers),
        6 => Just(Step::IoThread),
    ]
}

/// Bytes that tell their position.
fn pattern(from: usize, count: usize) -> Vec<u8> {
    (from..from + count)
        .map(|n| (n ^ (n >> 8) ^ (n >> 16)).to_le_bytes()[0])
        .collect()
}

struct Pair {
    host: UnixStream,
    guest: GuestSocket,
    host_wrote: usize,
    host_read: usize,
    host_ended: bool,
    host_saw_end: bool,
    guest_sent: usize,
    guest_received: usize,
    guest_ended: bool,
    guest_saw_end: bool,
    guest_saw_reset: bool,
}

struct World {
    rig: Rig,
    pairs: Vec<Pair>,
}

impl World {
    fn new() -> Self {
        let mut rig = Rig::new();
        let pairs = (0..CONNECTIONS)
            .map(|index| {
                let (host, mut guest) = rig.connect(100 + u32::try_from(index).unwrap());
                guest.host_buf_alloc = super::LARGE_WINDOW;
                Pair {
                    host,
                    guest,
                    host_wrote: 0,
                    host_read: 0,
                    host_ended: false,
                    host_saw_end: false,
                    guest_sent: 0,
                    guest_received: 0,
                    guest_ended: false,
                    guest_saw_end: false,
                    guest_saw_reset: false,
                }
            })
            .collect();
        Self { rig, pairs }
    }

    fn apply(&mut self, step: &Step) {
        match *step {
            Step::HostWrites(who, count) => self.host_writes(who, count),
            Step::HostReads(who, count) => self.host_reads(who, count),
            Step::HostEnds(who) => {
                let pair = &mut self.pairs[who];
                if !pair.host_ended {
                    pair.host.shutdown(Shutdown::Write).unwrap();
                    pair.host_ended = true;
                }
            }
            Step::GuestSends(who, count) => self.guest_sends(who, count),
            Step::GuestReads(who, count) => {
                let guest = &mut self.pairs[who].guest;
                guest.read = guest
                    .read
                    .wrapping_add(count.min(guest.received.wrapping_sub(guest.read)));
            }
            Step::GuestEnds(who) => self.guest_says(who, Op::Shutdown, SHUTDOWN_SEND),
            Step::GuestUpdates(who) => self.guest_says(who, Op::CreditUpdate, 0),
            Step::Kick => self.rig.kick(),
            Step::OfferBuffers(count) => self.rig.offer_buffers(count),
            Step::IoThread => {
                self.rig.turn();
            }
        }
        self.guest_takes_packets();
    }

    fn host_writes(&mut self, who: usize, count: usize) {
        let pair = &mut self.pairs[who];
        if pair.host_ended || pair.guest_saw_reset {
            return;
        }
        match pair.host.write(&pattern(pair.host_wrote, count)) {
            Ok(count) => pair.host_wrote += count,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }

    fn host_reads(&mut self, who: usize, count: usize) {
        let pair = &mut self.pairs[who];
        let mut buffer = vec![0; count];
        match pair.host.read(&mut buffer) {
            Ok(0) => {
                assert!(pair.guest_ended, "end of file before the guest's end");
                assert_eq!(
                    pair.host_read, pair.guest_sent,
                    "bytes of the guest were cut"
                );
                pair.host_saw_end = true;
            }
            Ok(count) => {
                assert!(
                    buffer[..count] == pattern(pair.host_read, count),
                    "bytes of the guest changed"
                );
                pair.host_read += count;
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }

    fn guest_sends(&mut self, who: usize, count: usize) {
        let pair = &mut self.pairs[who];
        let count = count.min(pair.guest.credit() as usize);
        if count == 0 || pair.guest_ended || pair.guest_saw_reset || !self.rig.can_send() {
            return;
        }
        let length = u32::try_from(count).unwrap();
        let payload = pattern(pair.guest_sent, count);
        self.rig.queue_packet(
            &Header {
                len: length,
                ..pair.guest.header(Op::Data)
            },
            &payload,
        );
        pair.guest.sent = pair.guest.sent.wrapping_add(length);
        pair.guest_sent += count;
    }

    fn guest_says(&mut self, who: usize, op: Op, flags: u32) {
        let pair = &mut self.pairs[who];
        if pair.guest_saw_reset || (op == Op::Shutdown && pair.guest_ended) || !self.rig.can_send()
        {
            return;
        }
        self.rig.queue_packet(
            &Header {
                flags,
                ..pair.guest.header(op)
            },
            &[],
        );
        pair.guest_ended |= op == Op::Shutdown;
    }

    fn guest_takes_packets(&mut self) {
        while let Some((header, payload)) = self.rig.next_packet() {
            let pair = self
                .pairs
                .iter_mut()
                .find(|pair| pair.guest.guest_port == header.dst_port)
                .unwrap();
            if pair.guest_saw_reset {
                // It answers what the guest sent before it knew.
                assert_eq!(
                    header.op,
                    Op::Reset as u16,
                    "a packet after the end: {header:?}"
                );
                continue;
            }
            pair.guest.on_packet(&header);
            match Op::parse(header.op).unwrap() {
                Op::Data => {
                    assert!(!pair.guest_saw_end);
                    assert!(
                        payload == pattern(pair.guest_received, payload.len()),
                        "bytes of the host changed"
                    );
                    pair.guest_received += payload.len();
                }
                Op::Shutdown => {
                    assert_eq!(
                        header.flags & SHUTDOWN_RECEIVE,
                        0,
                        "the host process still reads"
                    );
                    assert!(pair.host_ended);
                    assert_eq!(
                        pair.guest_received, pair.host_wrote,
                        "bytes of the host were cut"
                    );
                    pair.guest_saw_end = true;
                }
                Op::Reset => {
                    assert!(pair.guest_ended && pair.host_ended);
                    assert_eq!(
                        pair.guest_received, pair.host_wrote,
                        "bytes of the host were cut"
                    );
                    pair.guest_saw_reset = true;
                }
                Op::CreditUpdate | Op::CreditRequest => {}
                op => panic!("unexpected {op:?}"),
            }
        }
    }

    /// Both sides end and read to the end.
    fn finish(&mut self) {
        for _ in 0..10_000 {
            for who in 0..CONNECTIONS {
                self.apply(&Step::HostEnds(who));
                self.apply(&Step::GuestEnds(who));
                self.apply(&Step::GuestReads(who, u32::MAX));
                self.apply(&Step::GuestUpdates(who));
                self.apply(&Step::Kick);
                self.apply(&Step::OfferBuffers(usize::MAX));
                self.apply(&Step::HostReads(who, 1 << 20));
                self.apply(&Step::IoThread);
            }
            if self
                .pairs
                .iter()
                .all(|pair| pair.guest_saw_reset && pair.host_saw_end)
            {
                return;
            }
        }
        panic!("stuck");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn every_byte_arrives_once_and_in_order(steps in prop::collection::vec(step(), 1..250)) {
        let mut world = World::new();
        for step in &steps {
            world.apply(step);
        }
        world.finish();
        prop_assert_eq!(world.rig.worker.mux.len(), 0);
        prop_assert_eq!(world.rig.metrics.to_json()["dropped"].as_u64(), Some(0));
    }
}
