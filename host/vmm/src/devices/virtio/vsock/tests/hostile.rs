//! A guest that writes what it likes into rings and packets: the device survives, within bounds, and serves the others.

use proptest::prelude::*;
use std::io::{Read, Write};
use vm_memory::{Bytes, GuestAddress};

use super::super::connection::Key;
use super::super::mux::MAX_CONNECTIONS;
use super::super::spec::{Header, Op};
use super::super::{RX_QUEUE, TX_QUEUE};
use super::driver::{DriverRing, RING_SIZE, Rig};
use crate::devices::virtio::QueueWorker;

/// Fields near what is right, so that most packets get past the first check.
fn header(key: Key) -> impl Strategy<Value = Header> {
    let cid = prop_oneof![8 => Just(3u64), 1 => any::<u64>()];
    let dst = prop_oneof![8 => Just(2u64), 1 => any::<u64>()];
    let ports = prop_oneof![4 => Just((key.guest_port, key.host_port)), 4 => (0..3u32, 0..3u32), 1 => any::<(u32, u32)>()];
    let len = prop_oneof![4 => 0..100u32, 1 => any::<u32>()];
    let socket_type = prop_oneof![8 => Just(1u16), 1 => any::<u16>()];
    let rest = (0..9u16, any::<u32>(), any::<u32>(), any::<u32>());
    (cid, dst, ports, len, socket_type, rest).prop_map(
        |(src_cid, dst_cid, ports, len, socket_type, rest)| Header {
            src_cid,
            dst_cid,
            src_port: ports.0,
            dst_port: ports.1,
            len,
            socket_type,
            op: rest.0,
            flags: rest.1,
            buf_alloc: rest.2,
            fwd_cnt: rest.3,
        },
    )
}

fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![8 => 0x8_0000..0x9_0000u64, 1 => any::<u64>()];
    let length = prop_oneof![8 => 0..200u32, 1 => any::<u32>()];
    let flags = prop_oneof![8 => 0..4u16, 1 => any::<u16>()];
    (address, length, flags, 0..RING_SIZE + 2)
}

fn bystander_still_works(
    rig: &mut Rig,
    host: &mut std::os::unix::net::UnixStream,
    guest: &super::GuestSocket,
) {
    rig.send(
        &Header {
            len: 5,
            buf_alloc: 1 << 20,
            ..guest.header(Op::Data)
        },
        b"alive",
    );
    let mut heard = [0; 5];
    host.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"alive");
    while rig.next_packet().is_some() {}
    rig.offer_buffers(usize::MAX);
    host.write_all(b"too").unwrap();
    rig.settle();
    let mut got = Vec::new();
    while let Some((header, payload)) = rig.next_packet() {
        if header.dst_port == guest.guest_port && header.op == Op::Data as u16 {
            got.extend_from_slice(&payload);
        }
        rig.offer_buffers(usize::MAX);
    }
    assert_eq!(got, b"too");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn wild_packets_harm_only_their_own_connection(
        headers in prop::collection::vec(header(Key { host_port: (1 << 30) + 1, guest_port: 40 }), 1..200),
    ) {
        let mut rig = Rig::new();
        let (mut bystander, guest) = rig.connect(30);
        let (_victim, _) = rig.connect(40);
        for header in headers {
            if (header.src_port, header.dst_port) == (guest.guest_port, guest.host_port) {
                continue;
            }
            rig.send(&header, &[0; 64]);
            rig.settle();
            while rig.next_packet().is_some() {}
            rig.offer_buffers(usize::MAX);
        }
        prop_assert!(rig.worker.mux.len() <= 2);
        bystander_still_works(&mut rig, &mut bystander, &guest);
    }

    #[test]
    fn wild_descriptors_never_panic(
        on_tx in any::<bool>(),
        descriptors in prop::collection::vec(descriptor(), usize::from(RING_SIZE)),
        heads in prop::collection::vec(0..RING_SIZE, 1..40),
    ) {
        let mut rig = Rig::without_buffers();
        // Something to receive.
        let _host = rig.dial(9);
        rig.settle();
        let queue = if on_tx { TX_QUEUE } else { RX_QUEUE };
        let ring: &mut DriverRing = if on_tx { &mut rig.tx } else { &mut rig.rx };
        for (index, descriptor) in (0..).zip(descriptors) {
            ring.set_descriptor(&rig.memory, index, descriptor);
        }
        for head in heads {
            let ring: &mut DriverRing = if on_tx { &mut rig.tx } else { &mut rig.rx };
            ring.offer(&rig.memory, head);
            rig.worker.on_kick(queue, &mut rig.watch).unwrap();
        }
        prop_assert!(rig.worker.mux.len() <= MAX_CONNECTIONS);
    }

    #[test]
    fn rings_full_of_noise_stop_the_device_at_most(noise in prop::collection::vec(any::<u8>(), 0x1000)) {
        let mut rig = Rig::new();
        let _host = rig.dial(9);
        for base in [rig.rx.avail(), rig.tx.avail()] {
            rig.memory.write_slice(&noise[..0x400], GuestAddress(base)).unwrap();
        }
        rig.memory.write_slice(&noise, GuestAddress(0x1000)).unwrap();
        rig.memory.write_slice(&noise, GuestAddress(0x3000)).unwrap();
        for queue in [TX_QUEUE, RX_QUEUE, TX_QUEUE, 2, 77] {
            // An error means that the device stops.
            let _ = rig.worker.on_kick(queue, &mut rig.watch);
        }
    }
}
