//! The words of VIRTIO 1.2, clause 5.10: packet header, operations, flags. No behaviour lives here.

/// Device ID of a socket device (clause 5).
pub(crate) const DEVICE_TYPE: u32 = 19;
/// VIRTIO_F_VERSION_1 (clause 6).
pub(crate) const FEATURE_VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_EVENT_IDX (clause 2.7.7.1 and 2.7.10).
pub(crate) const FEATURE_EVENT_IDX: u64 = 1 << 29;
/// The host's CID (clause 5.10.4).
pub(crate) const HOST_CID: u64 = 2;
/// Size of `struct virtio_vsock_hdr` (clause 5.10.6).
pub(crate) const HEADER_BYTES: usize = 44;
/// [`HEADER_BYTES`] as the rings count.
pub(crate) const HEADER_BYTES_U32: u32 = 44;
/// VIRTIO_VSOCK_TYPE_STREAM, the only socket type offered (clause 5.10.6).
pub(crate) const TYPE_STREAM: u16 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE: the sender of the packet will not receive any more (clause 5.10.6.5).
pub(crate) const SHUTDOWN_RECEIVE: u32 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_SEND: the sender of the packet will not send any more (clause 5.10.6.5).
pub(crate) const SHUTDOWN_SEND: u32 = 2;
/// Both directions.
pub(crate) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// Operation of a packet (clause 5.10.6, `enum virtio_vsock_op`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Op {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Op {
    /// `None` for VIRTIO_VSOCK_OP_INVALID and everything unassigned.
    pub(crate) fn parse(op: u16) -> Option<Self> {
        Some(match op {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// `struct virtio_vsock_hdr` (clause 5.10.6). From the guest it is a copy: the guest can change its own at any time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Header {
    pub(crate) src_cid: u64,
    pub(crate) dst_cid: u64,
    pub(crate) src_port: u32,
    pub(crate) dst_port: u32,
    pub(crate) len: u32,
    pub(crate) socket_type: u16,
    pub(crate) op: u16,
    pub(crate) flags: u32,
    pub(crate) buf_alloc: u32,
    pub(crate) fwd_cnt: u32,
}

/// Where `len` stands in the header: the one field that differs between the packets of one batch.
pub(crate) const LEN_OFFSET: usize = 24;

impl Header {
    /// Reads the little-endian wire form.
    pub(crate) fn decode(wire: &[u8; HEADER_BYTES]) -> Self {
        Self {
            src_cid: u64::from_le_bytes(field(wire, 0)),
            dst_cid: u64::from_le_bytes(field(wire, 8)),
            src_port: u32::from_le_bytes(field(wire, 16)),
            dst_port: u32::from_le_bytes(field(wire, 20)),
            len: u32::from_le_bytes(field(wire, LEN_OFFSET)),
            socket_type: u16::from_le_bytes(field(wire, 28)),
            op: u16::from_le_bytes(field(wire, 30)),
            flags: u32::from_le_bytes(field(wire, 32)),
            buf_alloc: u32::from_le_bytes(field(wire, 36)),
            fwd_cnt: u32::from_le_bytes(field(wire, 40)),
        }
    }

    /// Writes the little-endian wire form.
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut wire = [0; HEADER_BYTES];
        wire[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        wire[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        wire[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        wire[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        wire[24..28].copy_from_slice(&self.len.to_le_bytes());
        wire[28..30].copy_from_slice(&self.socket_type.to_le_bytes());
        wire[30..32].copy_from_slice(&self.op.to_le_bytes());
        wire[32..36].copy_from_slice(&self.flags.to_le_bytes());
        wire[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        wire[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        wire
    }
}

fn field<const N: usize>(wire: &[u8; HEADER_BYTES], offset: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&wire[offset..offset + N]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_wire() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 3,
            dst_port: 4,
            len: 5,
            socket_type: 6,
            op: 7,
            flags: 8,
            buf_alloc: 9,
            fwd_cnt: u32::MAX,
        };
        let wire = header.encode();
        assert_eq!(wire[..8], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(wire[LEN_OFFSET..LEN_OFFSET + 4], [5, 0, 0, 0]);
        assert_eq!(Header::decode(&wire), header);
    }

    #[test]
    fn operations_are_the_numbers_of_the_specification() {
        for op in 1..=7 {
            assert_eq!(Op::parse(op).map(|op| op as u16), Some(op));
        }
        assert_eq!(Op::parse(0), None);
        assert_eq!(Op::parse(8), None);
    }
}
