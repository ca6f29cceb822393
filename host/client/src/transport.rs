//! Byte streams to an agent: our VMM's unix socket, a plain unix socket, AF_VSOCK.
//!
//! A [`Transport`] is two halves and the bytes that arrived while connecting. It knows nothing of frames.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use airlock_proto::{AGENT_PORT, GUEST_CID};
use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;
use tokio_vsock::{VsockAddr, VsockStream};

/// How long a connection may take to be accepted. A guest under software emulation on a busy host has been seen to
/// take seconds; a guest that takes longer than this does not run.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);

/// Longest `OK <port>\n` line: `OK `, ten digits, the line end, and room to see that it is something else.
const MAX_OK_LINE_BYTES: usize = 32;

/// Where an agent is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// The unix socket of a VMM that multiplexes vsock: `CONNECT <port>\n` goes in, `OK <port>\n` comes out.
    Hybrid {
        /// Path of the socket.
        socket: PathBuf,
        /// vsock port in the guest.
        port: u32,
    },
    /// An agent that listens on a unix socket itself (an ordinary process, in tests).
    Unix(PathBuf),
    /// The host kernel's AF_VSOCK.
    Vsock {
        /// The guest's context id.
        cid: u32,
        /// vsock port in the guest.
        port: u32,
    },
}

impl Address {
    /// The agent's port behind a VMM's multiplexing socket.
    pub fn hybrid(socket: impl Into<PathBuf>) -> Self {
        Self::Hybrid {
            socket: socket.into(),
            port: AGENT_PORT,
        }
    }

    /// The agent's port through the host kernel's AF_VSOCK; `cid` is [`GUEST_CID`] for guests of ours.
    #[must_use]
    pub fn vsock(cid: u32) -> Self {
        Self::Vsock {
            cid,
            port: AGENT_PORT,
        }
    }
}

impl Default for Address {
    fn default() -> Self {
        Self::vsock(GUEST_CID)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hybrid { socket, port } => write!(f, "{} (vsock port {port})", socket.display()),
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Vsock { cid, port } => write!(f, "vsock {cid}:{port}"),
        }
    }
}

/// Why no byte stream came about.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The socket could not be connected.
    #[error("cannot connect to {address}")]
    Connect {
        /// Where to.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// The VMM closed the connection instead of answering `OK`: nothing in the guest listens on the port.
    #[error("{address} closed the connection: nothing in the guest listens there")]
    Refused {
        /// Where to.
        address: String,
    },
    /// Something answered that is no VMM.
    #[error("{address} answered {line:?} where \"OK <port>\" was expected")]
    NotHybrid {
        /// Where to.
        address: String,
        /// What came.
        line: String,
    },
    /// No answer in time.
    #[error("{address} did not answer within {} s", CONNECT_TIMEOUT.as_secs())]
    Timeout {
        /// Where to.
        address: String,
    },
}

/// A connected byte stream.
pub struct Transport {
    pub(crate) reader: Box<dyn AsyncRead + Send + Unpin>,
    pub(crate) writer: Box<dyn AsyncWrite + Send + Unpin>,
    /// What was read beyond the connecting handshake.
    pub(crate) received: BytesMut,
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport").finish_non_exhaustive()
    }
}

impl Transport {
    /// Connects within [`CONNECT_TIMEOUT`].
    ///
    /// # Errors
    /// When nothing answers there; see [`TransportError`].
    pub async fn connect(address: &Address) -> Result<Self, TransportError> {
        match timeout(CONNECT_TIMEOUT, connect(address)).await {
            Ok(result) => result,
            Err(_) => Err(TransportError::Timeout {
                address: address.to_string(),
            }),
        }
    }

    /// Any two halves, for example of [`tokio::io::duplex`].
    pub fn new(
        reader: impl AsyncRead + Send + Unpin + 'static,
        writer: impl AsyncWrite + Send + Unpin + 'static,
    ) -> Self {
        Self {
            reader: Box::new(reader),
            writer: Box::new(writer),
            received: BytesMut::new(),
        }
    }
}

impl From<UnixStream> for Transport {
    fn from(stream: UnixStream) -> Self {
        let (reader, writer) = stream.into_split();
        Self::new(reader, writer)
    }
}

async fn connect(address: &Address) -> Result<Transport, TransportError> {
    let failed = |source| TransportError::Connect {
        address: address.to_string(),
        source,
    };
    match address {
        Address::Unix(path) => Ok(UnixStream::connect(path).await.map_err(failed)?.into()),
        Address::Vsock { cid, port } => {
            let stream = VsockStream::connect(VsockAddr::new(*cid, *port))
                .await
                .map_err(failed)?;
            let (reader, writer) = stream.into_split();
            Ok(Transport::new(reader, writer))
        }
        Address::Hybrid { socket, port } => connect_hybrid(address, socket, *port).await,
    }
}

async fn connect_hybrid(
    address: &Address,
    socket: &Path,
    port: u32,
) -> Result<Transport, TransportError> {
    let failed = |source| TransportError::Connect {
        address: address.to_string(),
        source,
    };
    let mut stream = UnixStream::connect(socket).await.map_err(failed)?;
    let request = format!("CONNECT {port}\n");
    let refused = || TransportError::Refused {
        address: address.to_string(),
    };
    if let Err(error) = stream.write_all(request.as_bytes()).await {
        return Err(if is_hang_up(&error) {
            refused()
        } else {
            failed(error)
        });
    }
    let mut received = BytesMut::with_capacity(64);
    loop {
        match stream.read_buf(&mut received).await {
            Ok(0) => return Err(refused()),
            Err(error) if is_hang_up(&error) => return Err(refused()),
            Err(error) => return Err(failed(error)),
            Ok(_) => {}
        }
        if let Some(end) = received.iter().position(|byte| *byte == b'\n') {
            let line = received.split_to(end + 1);
            if !is_ok_line(&line) {
                return Err(not_hybrid(address, &line));
            }
            let mut transport = Transport::from(stream);
            transport.received = received;
            return Ok(transport);
        }
        if received.len() > MAX_OK_LINE_BYTES {
            return Err(not_hybrid(address, &received));
        }
    }
}

fn not_hybrid(address: &Address, line: &[u8]) -> TransportError {
    let line = &line[..line.len().min(MAX_OK_LINE_BYTES)];
    TransportError::NotHybrid {
        address: address.to_string(),
        line: String::from_utf8_lossy(line).trim_end().to_owned(),
    }
}

fn is_ok_line(line: &[u8]) -> bool {
    line.strip_prefix(b"OK ")
        .and_then(|rest| rest.strip_suffix(b"\n"))
        .is_some_and(|digits| !digits.is_empty() && digits.iter().all(u8::is_ascii_digit))
}

fn is_hang_up(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ok_and_a_number_is_an_ok_line() {
        for line in [&b"OK 1\n"[..], b"OK 1073741824\n"] {
            assert!(is_ok_line(line), "{line:?}");
        }
        for line in [
            &b"OK\n"[..],
            b"OK \n",
            b"OK x\n",
            b"ok 1\n",
            b"OK 1",
            b"ERR 1\n",
        ] {
            assert!(!is_ok_line(line), "{line:?}");
        }
    }

    #[tokio::test]
    async fn a_socket_that_does_not_exist_is_named() {
        let error = Transport::connect(&Address::hybrid("/nowhere/vsock.sock"))
            .await
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot connect to /nowhere/vsock.sock (vsock port 1024)"
        );
    }
}
