//! Frames: a u32 little-endian length and one protobuf message, in both directions.
//!
//! Sans-IO: the caller moves bytes into a buffer and asks for the next message. A length is checked against the
//! direction's limit before anything is allocated for it.

use std::fmt;
use std::marker::PhantomData;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;

use crate::v1;
use crate::{MAX_FROM_AGENT_BYTES, MAX_TO_AGENT_BYTES};

/// Bytes of the length in front of each frame.
pub const LENGTH_BYTES: usize = 4;

/// A message with the limit of its direction.
pub trait Frame: Message + Default {
    /// Longest encoding accepted, in bytes.
    const LIMIT: usize;
}

impl Frame for v1::ToAgent {
    const LIMIT: usize = MAX_TO_AGENT_BYTES;
}

impl Frame for v1::FromAgent {
    const LIMIT: usize = MAX_FROM_AGENT_BYTES;
}

/// Why bytes are no frame. The connection they came on cannot be used further: its framing is lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FrameError {
    /// The length exceeds the direction's limit.
    TooLong { length: usize, limit: usize },
    /// The body is not the protobuf message it should be.
    Malformed(String),
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong { length, limit } => {
                write!(f, "frame of {length} bytes exceeds the limit of {limit}")
            }
            Self::Malformed(what) => write!(f, "malformed frame: {what}"),
        }
    }
}

impl std::error::Error for FrameError {}

/// Appends `message` to `out` as one frame.
///
/// # Errors
/// [`FrameError::TooLong`] if it exceeds the limit; `out` is unchanged then.
pub fn encode<M: Frame>(message: &M, out: &mut BytesMut) -> Result<(), FrameError> {
    let length = message.encoded_len();
    if length > M::LIMIT {
        return Err(FrameError::TooLong {
            length,
            limit: M::LIMIT,
        });
    }
    out.reserve(LENGTH_BYTES + length);
    // The limits are far below u32::MAX (asserted below), so the cast is exact.
    out.put_u32_le(length as u32);
    message.encode_raw(out);
    Ok(())
}

const _: () = assert!(MAX_TO_AGENT_BYTES < u32::MAX as usize);
const _: () = assert!(MAX_FROM_AGENT_BYTES < u32::MAX as usize);
const _: () = assert!(crate::MAX_DATA_BYTES + 64 <= MAX_FROM_AGENT_BYTES);

/// Turns received bytes into messages.
#[derive(Debug)]
pub struct Decoder<M> {
    message: PhantomData<fn() -> M>,
}

impl<M: Frame> Default for Decoder<M> {
    fn default() -> Self {
        Self {
            message: PhantomData,
        }
    }
}

impl<M: Frame> Decoder<M> {
    /// Takes the next message off the front of `buffer`; `None` if it is not all there yet.
    ///
    /// # Errors
    /// When the bytes cannot be a frame; the connection is of no use after that.
    pub fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<M>, FrameError> {
        let Some(head) = buffer.first_chunk::<LENGTH_BYTES>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*head) as usize;
        if length > M::LIMIT {
            return Err(FrameError::TooLong {
                length,
                limit: M::LIMIT,
            });
        }
        if buffer.len() - LENGTH_BYTES < length {
            return Ok(None);
        }
        buffer.advance(LENGTH_BYTES);
        let body = buffer.split_to(length).freeze();
        M::decode(body)
            .map(Some)
            .map_err(|error| FrameError::Malformed(error.to_string()))
    }

    /// How many bytes are still missing for the message at the front of `buffer`; at least 1. A reader sizes its next
    /// read with it.
    #[must_use]
    pub fn missing(&self, buffer: &BytesMut) -> usize {
        match buffer.first_chunk::<LENGTH_BYTES>() {
            None => LENGTH_BYTES - buffer.len(),
            Some(head) => {
                let length = (u32::from_le_bytes(*head) as usize).min(M::LIMIT);
                (LENGTH_BYTES + length).saturating_sub(buffer.len()).max(1)
            }
        }
    }
}

/// The bytes that stand in front of `data_bytes` bytes of payload in an Output frame, length included: writing them
/// and then the payload sends the same bytes as encoding a whole [`v1::Output`], without copying the payload.
///
/// `data_bytes` must be at most [`crate::MAX_DATA_BYTES`].
#[must_use]
pub fn output_head(stream: v1::Stream, offset: u64, data_bytes: usize) -> Bytes {
    debug_assert!(data_bytes <= crate::MAX_DATA_BYTES);
    // An empty `data` is not encoded at all in proto3, so the head is the encoding of Output without it, plus the tag
    // and length of `data`, inside FromAgent's field 3.
    let bare = v1::Output {
        stream: stream.into(),
        offset,
        data: Bytes::new(),
    };
    let mut inner = BytesMut::with_capacity(32);
    bare.encode_raw(&mut inner);
    framed_head(3, 3, &mut inner, data_bytes)
}

/// The same for a [`v1::Stdin`] without `eof`: the bytes in front of `data_bytes` bytes of payload.
///
/// `data_bytes` must be at most [`crate::MAX_DATA_BYTES`].
#[must_use]
pub fn stdin_head(offset: u64, data_bytes: usize) -> Bytes {
    debug_assert!(data_bytes <= crate::MAX_DATA_BYTES);
    let bare = v1::Stdin {
        offset,
        data: Bytes::new(),
        eof: false,
    };
    let mut inner = BytesMut::with_capacity(32);
    bare.encode_raw(&mut inner);
    // Stdin.data is field 2, and Stdin is ToAgent's field 4.
    framed_head(4, 2, &mut inner, data_bytes)
}

/// The frame length, the key of message field `outer`, `inner`, and the key of its bytes field `data_field`.
fn framed_head(outer: u32, data_field: u32, inner: &mut BytesMut, data_bytes: usize) -> Bytes {
    use prost::encoding::{WireType, encode_key, encode_varint};
    if data_bytes > 0 {
        encode_key(data_field, WireType::LengthDelimited, inner);
        encode_varint(data_bytes as u64, inner);
    }
    let message_bytes = inner.len() + data_bytes;
    let mut head = BytesMut::with_capacity(48);
    head.put_u32_le(0);
    encode_key(outer, WireType::LengthDelimited, &mut head);
    encode_varint(message_bytes as u64, &mut head);
    head.extend_from_slice(inner);
    let length = (head.len() - LENGTH_BYTES + data_bytes) as u32;
    head[..LENGTH_BYTES].copy_from_slice(&length.to_le_bytes());
    head.freeze()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::v1::from_agent::Body;

    fn output(data: Vec<u8>) -> v1::FromAgent {
        v1::FromAgent {
            body: Some(Body::Output(v1::Output {
                stream: v1::Stream::Stderr.into(),
                offset: 1 << 40,
                data: data.into(),
            })),
        }
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_its_body_arrives() {
        let mut buffer = BytesMut::new();
        buffer.put_u32_le(MAX_FROM_AGENT_BYTES as u32 + 1);
        let error = Decoder::<v1::FromAgent>::default().next(&mut buffer);
        assert!(matches!(error, Err(FrameError::TooLong { .. })));
        assert!(buffer.capacity() < 1024, "nothing was reserved for it");
    }

    #[test]
    fn a_message_over_the_limit_is_not_sent() {
        let mut out = BytesMut::new();
        let error = encode(&output(vec![0; MAX_FROM_AGENT_BYTES]), &mut out);
        assert!(matches!(error, Err(FrameError::TooLong { .. })));
        assert!(out.is_empty());
    }

    #[test]
    fn garbage_is_an_error_and_not_a_panic() {
        let mut buffer = BytesMut::from(&[3, 0, 0, 0, 0xff, 0xff, 0xff][..]);
        let error = Decoder::<v1::FromAgent>::default().next(&mut buffer);
        assert!(matches!(error, Err(FrameError::Malformed(_))));
    }

    #[test]
    fn exec_ids_that_could_leave_their_folder_are_refused() {
        for id in ["", ".", "..", "a/b", "a\0", "ä", &"x".repeat(65)] {
            assert!(!crate::is_exec_id(id), "{id:?}");
        }
        for id in ["a", "A-1_b.c", &"x".repeat(64)] {
            assert!(crate::is_exec_id(id), "{id:?}");
        }
    }

    proptest! {
        #[test]
        fn whatever_the_chunks_the_same_messages_come_out(
            sizes in proptest::collection::vec(0_usize..5000, 1..8),
            cut in 1_usize..600,
        ) {
            let sent: Vec<_> = sizes.iter().map(|n| output(vec![7; *n])).collect();
            let mut wire = BytesMut::new();
            for message in &sent {
                encode(message, &mut wire).unwrap();
            }
            let mut decoder = Decoder::<v1::FromAgent>::default();
            let mut buffer = BytesMut::new();
            let mut received = Vec::new();
            for chunk in wire.chunks(cut) {
                buffer.extend_from_slice(chunk);
                while let Some(message) = decoder.next(&mut buffer).unwrap() {
                    received.push(message);
                }
            }
            prop_assert!(buffer.is_empty());
            prop_assert_eq!(received, sent);
        }

        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            let mut decoder = Decoder::<v1::ToAgent>::default();
            while let Ok(Some(_)) = decoder.next(&mut buffer) {}
        }

        #[test]
        fn an_output_head_and_its_data_are_the_whole_frame(
            offset in any::<u64>(),
            data in proptest::collection::vec(any::<u8>(), 0..2000),
            stderr in any::<bool>(),
        ) {
            let stream = if stderr { v1::Stream::Stderr } else { v1::Stream::Stdout };
            let mut whole = BytesMut::new();
            encode(&v1::FromAgent {
                body: Some(Body::Output(v1::Output { stream: stream.into(), offset, data: data.clone().into() })),
            }, &mut whole).unwrap();
            let mut split = output_head(stream, offset, data.len()).to_vec();
            split.extend_from_slice(&data);
            prop_assert_eq!(split, whole.to_vec());
        }

        #[test]
        fn a_stdin_head_and_its_data_are_the_whole_frame(
            offset in any::<u64>(),
            data in proptest::collection::vec(any::<u8>(), 0..2000),
        ) {
            let mut whole = BytesMut::new();
            encode(&v1::ToAgent {
                body: Some(v1::to_agent::Body::Stdin(v1::Stdin { offset, data: data.clone().into(), eof: false })),
            }, &mut whole).unwrap();
            let mut split = stdin_head(offset, data.len()).to_vec();
            split.extend_from_slice(&data);
            prop_assert_eq!(split, whole.to_vec());
        }
    }
}
