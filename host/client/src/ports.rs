//! Ports and sockets in a sandbox: a connection to the agent becomes the bytes of one there.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use airlock_proto::v1::{self, dial, from_agent, to_agent};
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Duration, timeout};

use crate::rpc::{AgentError, RpcError, unexpected};
use crate::session::Session;

/// How long something in the guest may take to accept. Linux answers for a listening program; only a route out of the
/// guest takes longer, and gives up after about two minutes.
pub const DIAL_TIMEOUT: Duration = Duration::from_secs(150);

/// What is dialled, as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A TCP port; the host is an address or `localhost`.
    Tcp {
        /// An address, or `localhost`.
        host: String,
        /// 1 to 65535.
        port: u16,
    },
    /// A unix socket, by its path.
    Unix(Bytes),
}

/// Why nothing was connected.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The guest could not connect, or refused to.
    #[error(transparent)]
    Agent(AgentError),
    /// No answer in [`DIAL_TIMEOUT`].
    #[error("the guest did not connect within {} s", DIAL_TIMEOUT.as_secs())]
    Timeout,
    /// The connection to the agent failed.
    #[error(transparent)]
    Rpc(RpcError),
}

impl From<RpcError> for DialError {
    fn from(error: RpcError) -> Self {
        match error {
            RpcError::Agent(error) => Self::Agent(error),
            error => Self::Rpc(error),
        }
    }
}

impl Session {
    /// Connects to something in the guest.
    ///
    /// # Errors
    /// When nothing listens there, or the agent does not answer.
    pub async fn dial(&self, target: Target) -> Result<(DialReader, DialWriter), DialError> {
        let target = match target {
            Target::Tcp { host, port } => dial::Target::Tcp(v1::TcpTarget {
                host,
                port: port.into(),
            }),
            Target::Unix(path) => dial::Target::UnixPath(path),
        };
        let body = to_agent::Body::Dial(v1::Dial {
            target: Some(target),
        });
        // A new one: it does not come back, and the idle ones are for execs.
        let mut connection = self.connect().await?;
        let answer = timeout(DIAL_TIMEOUT, connection.request(body)).await;
        match answer.map_err(|_| DialError::Timeout)?? {
            from_agent::Body::Dialled(_) => {
                let (reader, writer, _) = connection.into_parts();
                let (half, received) = reader.into_raw();
                Ok((
                    DialReader { half, received },
                    DialWriter {
                        half: writer.into_raw(),
                    },
                ))
            }
            other => Err(unexpected("Dialled", &other).into()),
        }
    }
}

/// Bytes from the guest; their end is that of the guest's side.
pub struct DialReader {
    half: Box<dyn AsyncRead + Send + Unpin>,
    /// What came right behind the answer.
    received: BytesMut,
}

/// Bytes to the guest. [`shutdown`](tokio::io::AsyncWriteExt::shutdown) ends this direction alone.
pub struct DialWriter {
    half: Box<dyn AsyncWrite + Send + Unpin>,
}

impl fmt::Debug for DialReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DialReader").finish_non_exhaustive()
    }
}

impl fmt::Debug for DialWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DialWriter").finish_non_exhaustive()
    }
}

impl AsyncRead for DialReader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.received.is_empty() {
            return Pin::new(&mut self.half).poll_read(context, buffer);
        }
        let length = self.received.len().min(buffer.remaining());
        buffer.put_slice(&self.received.split_to(length));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for DialWriter {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.half).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.half).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.half).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests;
