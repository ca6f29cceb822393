use super::*;
use proptest::prelude::*;

const WRITE: u16 = virtio_bindings::virtio_ring::VRING_DESC_F_WRITE as u16;
const MEMORY_BYTES: usize = 1 << 20;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap()
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

fn readable(address: u64, bytes: u32) -> Descriptor {
    Descriptor::new(address, bytes, 0, 0)
}

fn writable(address: u64, bytes: u32) -> Descriptor {
    Descriptor::new(address, bytes, WRITE, 0)
}

#[test]
fn a_read_as_linux_sends_it() {
    let memory = memory();
    memory
        .write_slice(&header(VIRTIO_BLK_T_IN, 7), GuestAddress(0x100))
        .unwrap();
    let chain = [
        readable(0x100, 16),
        writable(0x1000, 4096),
        writable(0x200, 1),
    ];
    let request = Request::parse(&memory, chain.into_iter()).unwrap();
    assert_eq!(
        request,
        Request {
            kind: Kind::Read,
            sector: 7,
            data: vec![Buffer {
                address: GuestAddress(0x1000),
                bytes: 4096
            }],
            status: GuestAddress(0x200),
        }
    );
}

#[test]
fn a_request_in_one_piece_each_way_is_the_same_request() {
    let memory = memory();
    memory
        .write_slice(&header(VIRTIO_BLK_T_OUT, 9), GuestAddress(0x1000))
        .unwrap();
    let write = [readable(0x1000, 16 + 512), writable(0x3000, 1)];
    let request = Request::parse(&memory, write.into_iter()).unwrap();
    assert_eq!(
        request.data,
        [Buffer {
            address: GuestAddress(0x1010),
            bytes: 512
        }]
    );
    memory
        .write_slice(&header(VIRTIO_BLK_T_IN, 9), GuestAddress(0x1000))
        .unwrap();
    let read = [
        readable(0x1000, 10),
        readable(0x100a, 6),
        writable(0x3000, 513),
    ];
    let request = Request::parse(&memory, read.into_iter()).unwrap();
    assert_eq!(
        request.data,
        [Buffer {
            address: GuestAddress(0x3000),
            bytes: 512
        }]
    );
    assert_eq!((request.status, request.sector), (GuestAddress(0x3200), 9));
}

#[test]
fn what_has_no_room_for_a_status_gets_none() {
    let memory = memory();
    for chain in [
        vec![],
        vec![readable(0x100, 16)],
        vec![readable(0x100, 16), writable(0x200, 0)],
    ] {
        assert_eq!(
            Request::parse(&memory, chain.into_iter()),
            Err(RequestError::NoStatus)
        );
    }
}

#[test]
fn what_is_malformed_is_told_so() {
    let memory = memory();
    let status = GuestAddress(0x200);
    for chain in [
        vec![readable(0x100, 15), writable(0x200, 1)],
        vec![writable(0x200, 1)],
        vec![readable(u64::MAX - 4, 16), writable(0x200, 1)],
        vec![readable(0x8000_0000, 16), writable(0x200, 1)],
        vec![writable(0x1ff, 1), readable(0x100, 16), writable(0x200, 1)],
        vec![
            readable(0x100, 16),
            writable(0, u32::MAX),
            writable(0x200, 1),
        ],
    ] {
        let result = Request::parse(&memory, chain.into_iter());
        assert_eq!(result, Err(RequestError::Malformed { status }));
    }
}

#[test]
fn ranges_are_read_and_their_number_is_bounded() {
    let memory = memory();
    memory
        .write_slice(&header(VIRTIO_BLK_T_DISCARD, 0), GuestAddress(0x100))
        .unwrap();
    memory
        .write_slice(&5u64.to_le_bytes(), GuestAddress(0x1000))
        .unwrap();
    memory
        .write_slice(&3u32.to_le_bytes(), GuestAddress(0x1008))
        .unwrap();
    let ranges = |bytes: u32| {
        let chain = [
            readable(0x100, 16),
            readable(0x1000, bytes),
            writable(0x200, 1),
        ];
        Request::parse(&memory, chain.into_iter())
            .unwrap()
            .ranges(&memory)
            .ok()
    };
    assert_eq!(
        ranges(16),
        Some(vec![Range {
            sector: 5,
            sectors: 3,
            flags: 0
        }])
    );
    assert_eq!(ranges(0), None);
    assert_eq!(ranges(24), None);
    assert_eq!(ranges(16 * (MAX_RANGES + 1)), None);
}

/// Addresses in, at the end of, and beyond memory; lengths from nothing to everything.
fn any_descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![
        0..MEMORY_BYTES as u64,
        MEMORY_BYTES as u64 - 20..MEMORY_BYTES as u64 + 20,
        any::<u64>(),
    ];
    let bytes = prop_oneof![0u32..40, 0u32..100_000, any::<u32>()];
    (address, bytes, any::<bool>()).prop_map(|(address, bytes, is_writable)| {
        if is_writable {
            writable(address, bytes)
        } else {
            readable(address, bytes)
        }
    })
}

proptest! {
    /// Whatever the driver sends: no panic, bounded data, every byte accounted for once.
    #[test]
    fn any_chain_is_a_bounded_request_or_an_error(
        chain in prop::collection::vec(any_descriptor(), 0..12),
        kind in prop_oneof![0u32..16, any::<u32>()],
        sector: u64,
    ) {
        let memory = memory();
        for descriptor in chain.iter().filter(|descriptor| !descriptor.is_write_only()).take(1) {
            let _ = memory.write_slice(&header(kind, sector), descriptor.addr());
        }
        if let Ok(request) = Request::parse(&memory, chain.iter().copied()) {
            prop_assert!(request.data_bytes() <= MAX_DATA_BYTES);
            let sum = |is_writable: bool| -> u64 {
                chain
                    .iter()
                    .filter(|descriptor| descriptor.is_write_only() == is_writable)
                    .map(|descriptor| u64::from(descriptor.len()))
                    .sum()
            };
            let expected = match request.kind {
                Kind::Read | Kind::GetId => sum(true) - 1,
                _ => sum(false) - HEADER_BYTES as u64,
            };
            prop_assert_eq!(request.data_bytes(), expected);
            let _ = request.ranges(&memory);
        }
    }

    /// How a request is cut into descriptors changes nothing.
    #[test]
    fn framing_does_not_matter(cuts in prop::collection::vec(1u32..700, 1..6), sector: u64) {
        let memory = memory();
        memory.write_slice(&header(VIRTIO_BLK_T_OUT, sector), GuestAddress(0x1000)).unwrap();
        let total = 16 + 1024;
        let (mut chain, mut at) = (Vec::new(), 0);
        for cut in cuts {
            let bytes = cut.min(total - at);
            chain.push(readable(0x1000 + u64::from(at), bytes));
            at += bytes;
        }
        chain.push(readable(0x1000 + u64::from(at), total - at));
        chain.push(writable(0x200, 1));
        let request = Request::parse(&memory, chain.into_iter()).unwrap();
        prop_assert_eq!((request.kind, request.sector), (Kind::Write, sector));
        let mut next = 0x1010;
        for buffer in &request.data {
            prop_assert_eq!(buffer.address.0, next);
            next += u64::from(buffer.bytes);
        }
        prop_assert_eq!(next, 0x1000 + u64::from(total));
    }
}
