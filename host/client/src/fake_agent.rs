//! An agent that does what a test tells it to, frame by frame. Tests only.

use airlock_proto::codec::{self, Decoder};
use airlock_proto::v1::{self, from_agent, to_agent};
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use crate::{Session, Transport};

/// Far more than any test has in flight.
const PIPE_BYTES: usize = 1 << 20;

pub(crate) struct FakeAgent<S = DuplexStream> {
    stream: S,
    buffer: BytesMut,
    decoder: Decoder<v1::ToAgent>,
}

/// A transport and the agent at its other end.
pub(crate) fn pair() -> (Transport, FakeAgent) {
    let (host, guest) = tokio::io::duplex(PIPE_BYTES);
    let (reader, writer) = tokio::io::split(host);
    (Transport::new(reader, writer), FakeAgent::new(guest))
}

/// A session whose only connection leads to the agent, with the Hello behind it.
pub(crate) async fn session() -> (Session, FakeAgent) {
    let (transport, mut agent) = pair();
    let session = Session::new(crate::Address::Unix("/nonexistent/airlock-test".into()));
    let (adopted, ()) = tokio::join!(session.adopt(transport), agent.greet());
    adopted.unwrap();
    (session, agent)
}

impl<S: AsyncReadExt + AsyncWriteExt + Unpin> FakeAgent<S> {
    pub(crate) fn new(stream: S) -> Self {
        Self {
            stream,
            buffer: BytesMut::new(),
            decoder: Decoder::default(),
        }
    }

    /// For a connection that carries raw bytes from now on. The host must not have sent any yet.
    pub(crate) fn into_stream(self) -> S {
        assert!(self.buffer.is_empty(), "bytes came behind the last frame");
        self.stream
    }

    /// The next frame of the host, or `None` at the connection's end.
    pub(crate) async fn receive(&mut self) -> Option<to_agent::Body> {
        loop {
            if let Some(message) = self.decoder.next(&mut self.buffer).unwrap() {
                return message.body;
            }
            if self.stream.read_buf(&mut self.buffer).await.ok()? == 0 {
                return None;
            }
        }
    }

    pub(crate) async fn send(&mut self, body: from_agent::Body) {
        let mut out = BytesMut::new();
        codec::encode(&v1::FromAgent { body: Some(body) }, &mut out).unwrap();
        self.stream.write_all(&out).await.unwrap();
    }

    /// What may not even be a frame.
    pub(crate) async fn send_bytes(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// Takes the Hello and answers it.
    pub(crate) async fn greet(&mut self) {
        assert!(matches!(
            self.receive().await,
            Some(to_agent::Body::Hello(_))
        ));
        self.send(from_agent::Body::Hello(hello_reply())).await;
    }

    /// Takes a start and says that it runs, with `credit` bytes of stdin.
    pub(crate) async fn start(&mut self, credit: u64) -> v1::ExecStart {
        let Some(to_agent::Body::ExecStart(start)) = self.receive().await else {
            panic!("a start was expected");
        };
        self.send(from_agent::Body::Started(v1::Started {
            id: start.id.clone(),
            pid: 42,
            stdin_credit: credit,
            ..v1::Started::default()
        }))
        .await;
        start
    }

    pub(crate) async fn output(&mut self, stream: v1::Stream, offset: u64, data: &'static [u8]) {
        self.send(from_agent::Body::Output(v1::Output {
            stream: stream.into(),
            offset,
            data: Bytes::from_static(data),
        }))
        .await;
    }

    pub(crate) async fn exited(&mut self, code: u32) {
        self.send(from_agent::Body::LeaderExited(v1::LeaderExited {
            status: Some(v1::leader_exited::Status::Code(code)),
            ..v1::LeaderExited::default()
        }))
        .await;
    }

    /// Exit, the streams' ends, the tree's, and the last word.
    pub(crate) async fn end(&mut self, code: u32, stdout_bytes: u64) {
        self.exited(code).await;
        for (stream, total_bytes) in [(v1::Stream::Stdout, stdout_bytes), (v1::Stream::Stderr, 0)] {
            self.send(from_agent::Body::StreamEnd(v1::StreamEnd {
                stream: stream.into(),
                total_bytes,
                ..v1::StreamEnd::default()
            }))
            .await;
        }
        self.send(from_agent::Body::TreeEmpty(v1::TreeEmpty { killed: false }))
            .await;
        self.send(from_agent::Body::ExecDone(v1::ExecDone {})).await;
    }
}

pub(crate) fn hello_reply() -> v1::HelloReply {
    v1::HelloReply {
        protocol: airlock_proto::PROTOCOL_VERSION,
        agent_version: "fake".to_owned(),
        boot_id: "boot".to_owned(),
        ..v1::HelloReply::default()
    }
}
