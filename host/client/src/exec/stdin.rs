//! The sending side of a running exec, shared by its stdin, its signals and its resizes.
//!
//! Every send can be cancelled at any await: a frame is queued whole, and one that was begun is finished by the next
//! send. A send ends at once when the exec does.

use std::fmt;
use std::sync::Arc;

use airlock_proto::{MAX_DATA_BYTES, codec, v1};
use bytes::{Buf, Bytes};
use tokio::sync::{Mutex, watch};

use crate::rpc::{RpcError, Writer};

/// How far stdin may be sent.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Credit {
    /// Bytes with an offset below this may be sent.
    pub(crate) up_to: u64,
    /// The process reads no more.
    pub(crate) closed: bool,
    /// The exec is over, or its connection lost.
    pub(crate) ended: bool,
}

/// The sending half, as long as the exec runs.
pub(crate) struct Outgoing {
    writer: Option<Writer>,
    used: bool,
}

impl fmt::Debug for Outgoing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outgoing")
            .field("used", &self.used)
            .finish_non_exhaustive()
    }
}

impl Outgoing {
    pub(crate) fn new(writer: Writer) -> Self {
        Self {
            writer: Some(writer),
            used: false,
        }
    }

    /// Takes the half away from whoever still has a handle; returns it if nothing was sent through it.
    pub(crate) fn end(&mut self) -> Option<Writer> {
        self.writer.take().filter(|_| !self.used)
    }
}

/// Why something was not sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The exec is over.
    #[error("the command has ended")]
    Ended,
    /// The process reads its stdin no more. Usual: `head` does it.
    #[error("the command does not read its stdin any more")]
    Closed,
    /// The connection failed; the exec's next event says the same.
    #[error(transparent)]
    Rpc(RpcError),
}

/// Queues one frame with `queue` and sends it.
pub(crate) async fn send(
    outgoing: &Mutex<Outgoing>,
    credit: &mut watch::Receiver<Credit>,
    queue: impl FnOnce(&mut Writer) -> Result<(), SendError>,
) -> Result<(), SendError> {
    let mut ended = credit.clone();
    let sending = async {
        let mut outgoing = outgoing.lock().await;
        outgoing.used = true;
        let Some(writer) = outgoing.writer.as_mut() else {
            return Err(SendError::Ended);
        };
        writer.flush().await.map_err(SendError::Rpc)?;
        queue(writer)?;
        writer.flush().await.map_err(SendError::Rpc)
    };
    let result = tokio::select! {
        result = sending => result,
        _ = ended.wait_for(|credit| credit.ended) => Err(SendError::Ended),
    };
    if matches!(result, Err(SendError::Ended)) {
        // Dropping the exec could not close the half while this send held it.
        if let Ok(mut outgoing) = outgoing.try_lock() {
            outgoing.end();
        }
    }
    result
}

/// The stdin of a running exec.
///
/// ```no_run
/// # use airlock_client::{Bytes, Command, Session, SendError};
/// # async fn example(session: Session) -> Result<(), Box<dyn std::error::Error>> {
/// let mut exec = session.exec(Command::new("sort").stdin()).await?;
/// let Some(mut stdin) = exec.take_stdin() else { return Ok(()) };
/// // Credit arrives among the events, so both sides must move: write in a task of its own.
/// let writing = async move {
///     stdin.write(&mut Bytes::from_static(b"b\na\n")).await?;
///     stdin.finish().await
/// };
/// let (output, written) = tokio::join!(exec.output(1 << 20), writing);
/// written?;
/// assert_eq!(&output.stdout[..], b"a\nb\n");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct StdinWriter {
    outgoing: Arc<Mutex<Outgoing>>,
    credit: watch::Receiver<Credit>,
    offset: u64,
    eof_sent: bool,
}

impl StdinWriter {
    pub(crate) fn new(
        outgoing: Arc<Mutex<Outgoing>>,
        credit: watch::Receiver<Credit>,
        offset: u64,
    ) -> Self {
        Self {
            outgoing,
            credit,
            offset,
            eof_sent: false,
        }
    }

    /// Sends all of `data`, as fast as the guest grants credit. `data` is advanced past what was sent, so a cancelled
    /// call can be repeated with the same value.
    ///
    /// # Errors
    /// [`SendError::Closed`] when the process reads no more, [`SendError::Ended`] when it is over.
    pub async fn write(&mut self, data: &mut Bytes) -> Result<(), SendError> {
        while !data.is_empty() {
            let room = self.room().await?;
            let length = room.min(data.len()).min(MAX_DATA_BYTES);
            let Self {
                outgoing,
                credit,
                offset,
                ..
            } = self;
            send(outgoing, credit, |writer| {
                let head = codec::stdin_head(*offset, length);
                writer.queue_parts(&head, data.slice(..length));
                *offset += length as u64;
                data.advance(length);
                Ok(())
            })
            .await?;
        }
        Ok(())
    }

    /// Says that no more comes. Repeating it does nothing.
    ///
    /// # Errors
    /// When the exec is over, or its connection lost.
    pub async fn finish(&mut self) -> Result<(), SendError> {
        if self.eof_sent {
            return Ok(());
        }
        let body = v1::to_agent::Body::Stdin(v1::Stdin {
            offset: self.offset,
            data: Bytes::new(),
            eof: true,
        });
        let eof_sent = &mut self.eof_sent;
        send(&self.outgoing, &mut self.credit, |writer| {
            writer.queue(body).map_err(|_| SendError::Ended)?;
            *eof_sent = true;
            Ok(())
        })
        .await
    }

    /// Waits until at least one byte may be sent.
    async fn room(&mut self) -> Result<usize, SendError> {
        let offset = self.offset;
        let credit = self
            .credit
            .wait_for(|credit| credit.up_to > offset || credit.closed || credit.ended)
            .await
            .map_err(|_| SendError::Ended)?;
        if credit.ended {
            return Err(SendError::Ended);
        }
        if credit.closed {
            return Err(SendError::Closed);
        }
        Ok(usize::try_from(credit.up_to - offset).unwrap_or(usize::MAX))
    }
}
