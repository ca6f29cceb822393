//! A framed connection: whole messages in and out, the Hello of both sides, deadlines on both.
//!
//! The Hello waits in the send buffer until the first request goes out, so a fresh connection costs no round trip of
//! its own. Sending is safe to cancel: a frame that was begun is finished before the next one. What a message means is
//! for the layers above.

use std::fmt;
use std::io::IoSlice;
use std::time::Duration;

use airlock_proto::codec::{self, Decoder, FrameError};
use airlock_proto::v1::{self, from_agent, to_agent};
use airlock_proto::{PROTOCOL_VERSION, PROTOCOL_VERSION_MIN};
use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use crate::transport::{Address, Transport, TransportError};

/// How long the agent may take to answer the Hello. It has accepted the connection by then; the figure is for guests
/// under software emulation on a busy host.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(15);

/// Room for a read: one vsock packet of Linux and the frame head around it. A longer frame makes its own room.
const READ_BYTES: usize = (64 << 10) + 64;

/// An `Error` message of the agent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct AgentError {
    /// What kind.
    pub code: v1::ErrorCode,
    /// One line for a person.
    pub message: String,
    /// Linux errno where one caused it, else 0.
    pub errno: i32,
}

impl From<v1::Error> for AgentError {
    fn from(error: v1::Error) -> Self {
        Self {
            code: error.code(),
            message: if error.message.is_empty() {
                format!("{:?}", error.code())
            } else {
                error.message
            },
            errno: error.errno,
        }
    }
}

/// Why a message did not come or go.
#[derive(Debug, thiserror::Error)]
pub enum RpcError {
    /// There was no connection to begin with.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The connection ended where a message was expected.
    #[error("the connection to the agent was lost: {0}")]
    Lost(String),
    /// What was to be sent exceeds what a frame carries.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A message that does not fit here.
    #[error("the agent broke the protocol: {0}")]
    Protocol(String),
    /// No Hello in time.
    #[error("the agent did not say hello within {} s", HELLO_TIMEOUT.as_secs())]
    HelloTimeout,
    /// The agent refused.
    #[error(transparent)]
    Agent(#[from] AgentError),
}

/// The receiving half.
pub(crate) struct Reader {
    half: Box<dyn AsyncRead + Send + Unpin>,
    buffer: BytesMut,
    decoder: Decoder<v1::FromAgent>,
}

impl Reader {
    /// For a connection that carries no frames any more: its stream, and what has been read of that already.
    pub(crate) fn into_raw(self) -> (Box<dyn AsyncRead + Send + Unpin>, BytesMut) {
        (self.half, self.buffer)
    }

    /// The next message, if it has arrived already.
    pub(crate) fn arrived(&mut self) -> Result<Option<from_agent::Body>, RpcError> {
        // Not as Frame: it is the agent's fault and not the request's.
        while let Some(message) = self
            .decoder
            .next(&mut self.buffer)
            .map_err(|error| RpcError::Protocol(error.to_string()))?
        {
            // Without a body it is a message kind that this side does not know yet; the protocol only ever adds ones
            // that may be passed over.
            if message.body.is_some() {
                return Ok(message.body);
            }
        }
        Ok(None)
    }

    /// The next message. Safe to cancel: bytes that arrived are kept.
    pub(crate) async fn receive(&mut self) -> Result<from_agent::Body, RpcError> {
        loop {
            if let Some(body) = self.arrived()? {
                return Ok(body);
            }
            self.buffer
                .reserve(self.decoder.missing(&self.buffer).max(READ_BYTES));
            match self.half.read_buf(&mut self.buffer).await {
                Ok(0) => return Err(RpcError::Lost("it was closed".to_owned())),
                Ok(_) => {}
                Err(error) => return Err(RpcError::Lost(error.to_string())),
            }
        }
    }
}

/// The sending half: at most one frame's head and payload wait here, in that order.
pub(crate) struct Writer {
    half: Box<dyn AsyncWrite + Send + Unpin>,
    head: BytesMut,
    payload: Bytes,
}

impl Writer {
    /// For a connection that carries no frames any more; everything must be flushed.
    pub(crate) fn into_raw(self) -> Box<dyn AsyncWrite + Send + Unpin> {
        debug_assert!(self.head.is_empty() && self.payload.is_empty());
        self.half
    }

    /// Adds a message behind what waits; [`flush`](Self::flush) sends it. Only small messages are queued this way, and
    /// only behind a Hello.
    pub(crate) fn queue(&mut self, body: to_agent::Body) -> Result<(), FrameError> {
        debug_assert!(self.payload.is_empty(), "a payload must be flushed first");
        codec::encode(&v1::ToAgent { body: Some(body) }, &mut self.head)
    }

    /// Adds a head and the payload that belongs to it without copying the payload. Everything before must be flushed.
    pub(crate) fn queue_parts(&mut self, head: &[u8], payload: Bytes) {
        debug_assert!(self.payload.is_empty(), "a payload must be flushed first");
        self.head.extend_from_slice(head);
        self.payload = payload;
    }

    /// Sends what waits. Safe to cancel: the rest goes out first next time.
    pub(crate) async fn flush(&mut self) -> Result<(), RpcError> {
        let lost = |error: std::io::Error| RpcError::Lost(error.to_string());
        while !self.head.is_empty() || !self.payload.is_empty() {
            let parts = [IoSlice::new(&self.head), IoSlice::new(&self.payload)];
            let sent = self.half.write_vectored(&parts).await.map_err(lost)?;
            if sent == 0 {
                return Err(RpcError::Lost("it takes no more bytes".to_owned()));
            }
            let of_head = sent.min(self.head.len());
            self.head.advance(of_head);
            self.payload.advance(sent - of_head);
        }
        // Let go of the payload's buffer.
        self.payload = Bytes::new();
        self.half.flush().await.map_err(lost)
    }
}

/// A connection to an agent on which no request is running.
pub struct Connection {
    pub(crate) reader: Reader,
    pub(crate) writer: Writer,
    hello: Option<v1::HelloReply>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("hello", &self.hello)
            .finish_non_exhaustive()
    }
}

impl Connection {
    /// Connects; the Hello goes out with the first request.
    ///
    /// # Errors
    /// When nothing answers at the address.
    pub async fn connect(address: &Address) -> Result<Self, RpcError> {
        Self::new(Transport::connect(address).await?)
    }

    /// A connection over a stream that exists already: the doorbell, or a test's.
    ///
    /// # Errors
    /// Never in practice: the Hello is far below the frame limit.
    pub fn new(transport: Transport) -> Result<Self, RpcError> {
        let mut writer = Writer {
            half: transport.writer,
            head: BytesMut::new(),
            payload: Bytes::new(),
        };
        writer.queue(to_agent::Body::Hello(v1::Hello {
            protocol_min: PROTOCOL_VERSION_MIN,
            protocol_max: PROTOCOL_VERSION,
            client: concat!("airlock ", env!("CARGO_PKG_VERSION")).to_owned(),
        }))?;
        Ok(Self {
            reader: Reader {
                half: transport.reader,
                buffer: transport.received,
                decoder: Decoder::default(),
            },
            writer,
            hello: None,
        })
    }

    /// Exchanges the Hello now, if that has not happened yet: after it, the agent is known to answer.
    ///
    /// # Errors
    /// When the agent does not answer in [`HELLO_TIMEOUT`], or speaks no version of ours.
    pub async fn hello(&mut self) -> Result<&v1::HelloReply, RpcError> {
        let reply = match self.hello.take() {
            Some(reply) => reply,
            None => {
                self.writer.flush().await?;
                self.receive_hello().await?
            }
        };
        Ok(self.hello.insert(reply))
    }

    /// Sends a request and reads the first message of its answer.
    pub(crate) async fn request(
        &mut self,
        body: to_agent::Body,
    ) -> Result<from_agent::Body, RpcError> {
        self.writer.queue(body)?;
        self.writer.flush().await?;
        if self.hello.is_none() {
            self.hello = Some(self.receive_hello().await?);
        }
        self.receive().await
    }

    /// Sends a message that is not answered yet.
    pub(crate) async fn send(&mut self, body: to_agent::Body) -> Result<(), RpcError> {
        self.writer.queue(body)?;
        self.writer.flush().await
    }

    /// The next message of an answer; an `Error` of the agent is an error here.
    pub(crate) async fn receive(&mut self) -> Result<from_agent::Body, RpcError> {
        match self.reader.receive().await? {
            from_agent::Body::Error(error) => Err(AgentError::from(error).into()),
            body => Ok(body),
        }
    }

    async fn receive_hello(&mut self) -> Result<v1::HelloReply, RpcError> {
        let Ok(first) = timeout(HELLO_TIMEOUT, self.receive()).await else {
            return Err(RpcError::HelloTimeout);
        };
        match first? {
            from_agent::Body::Hello(reply)
                if (PROTOCOL_VERSION_MIN..=PROTOCOL_VERSION).contains(&reply.protocol) =>
            {
                Ok(reply)
            }
            from_agent::Body::Hello(reply) => Err(RpcError::Protocol(format!(
                "it chose version {} of {PROTOCOL_VERSION_MIN} to {PROTOCOL_VERSION}",
                reply.protocol
            ))),
            other => Err(unexpected("its hello", &other)),
        }
    }

    pub(crate) fn into_parts(self) -> (Reader, Writer, Option<v1::HelloReply>) {
        (self.reader, self.writer, self.hello)
    }

    pub(crate) fn from_parts(
        reader: Reader,
        writer: Writer,
        hello: Option<v1::HelloReply>,
    ) -> Self {
        Self {
            reader,
            writer,
            hello,
        }
    }
}

/// A message where another was due. Payloads stay out of the text.
pub(crate) fn unexpected(expected: &str, body: &from_agent::Body) -> RpcError {
    use from_agent::Body;
    let name = match body {
        Body::Hello(_) => "HelloReply",
        Body::Started(_) => "Started",
        Body::Output(_) => "Output",
        Body::LeaderExited(_) => "LeaderExited",
        Body::StreamEnd(_) => "StreamEnd",
        Body::TreeEmpty(_) => "TreeEmpty",
        Body::SpawnFailed(_) => "SpawnFailed",
        Body::StdinCredit(_) => "StdinCredit",
        Body::ExecDone(_) => "ExecDone",
        Body::Error(_) => "Error",
        Body::Dialled(_) => "Dialled",
        Body::File(_) => "FileReply",
        Body::Control(_) => "ControlReply",
    };
    RpcError::Protocol(format!("{name} came where {expected} was due"))
}
