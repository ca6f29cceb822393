//! Coming to a command that runs already, leaving it running, and telling the guest which output has been taken.

use std::time::Duration;

use airlock_proto::v1::{self, from_agent, to_agent};
use tokio::time::timeout;

use crate::exec::{
    Exec, ExecControl, ExecError, START_TIMEOUT, SendError, SpawnFailure, Stream, stdin,
};
use crate::rpc::{AgentError, Connection, RpcError, unexpected};
use crate::session::Session;

/// How long the agent may take to let go. It answers at once; the figure is for output on the way and slow guests.
const DETACH_TIMEOUT: Duration = Duration::from_secs(15);

/// Which command to go on with, and from where.
#[derive(Debug, Clone)]
pub struct Attach {
    request: v1::ExecAttach,
    stdin: bool,
    manual_acks: bool,
}

impl Attach {
    /// All that is kept of the exec `id`'s output, from the start.
    pub fn new(id: impl Into<String>) -> Self {
        Self {
            request: v1::ExecAttach {
                id: id.into(),
                ..v1::ExecAttach::default()
            },
            stdin: false,
            manual_acks: false,
        }
    }

    /// The first byte wanted of a stream. What is not kept any more is passed over and counted in the stream's
    /// `cut_bytes`.
    #[must_use]
    pub fn from(mut self, stream: Stream, offset: u64) -> Self {
        match stream {
            Stream::Stdout => self.request.stdout_offset = offset,
            Stream::Stderr => self.request.stderr_offset = offset,
        }
        self
    }

    /// Output only: whoever controls the exec stays who it is, and neither they nor the exec wait for us.
    #[must_use]
    pub fn observe(mut self) -> Self {
        self.request.observe = true;
        self
    }

    /// Opens its stdin, where the last client's ended, if the start asked for one.
    #[must_use]
    pub fn stdin(mut self) -> Self {
        self.stdin = true;
        self
    }

    /// The caller acknowledges, with [`ExecControl::acknowledge`], what it has taken care of; without this, an event is
    /// taken to be dealt with when the next one is asked for.
    #[must_use]
    pub fn manual_acks(mut self) -> Self {
        self.manual_acks = true;
        self
    }
}

/// Acknowledgements of output, if [`Exec::next`] sends them.
#[derive(Debug)]
pub(super) struct Acks {
    automatic: bool,
    sent: Option<[u64; 2]>,
}

impl Acks {
    pub(super) fn new(automatic: bool) -> Self {
        Self {
            automatic,
            sent: None,
        }
    }
}

impl Exec {
    /// Attaches on a connection without a running request.
    pub(crate) async fn attach(
        mut connection: Connection,
        attach: &Attach,
    ) -> Result<Self, ExecError> {
        let body = to_agent::Body::ExecAttach(attach.request.clone());
        let Ok(first) = timeout(START_TIMEOUT, connection.request(body)).await else {
            return Err(ExecError::Timeout);
        };
        let started = match first? {
            from_agent::Body::Started(started) => started,
            other => return Err(unexpected("Started", &other).into()),
        };
        // The connection does not go back to the session: acknowledgements would cross the exec's end on it.
        let acks = Acks::new(!attach.manual_acks && !attach.request.observe);
        let mut exec = Self::running(connection, started, attach.stdin, None, acks);
        exec.progress.may_skip = true;
        exec.progress.next_offsets = [attach.request.stdout_offset, attach.request.stderr_offset];
        Ok(exec)
    }

    /// Starts `start`, which asks to be detached, and gives the connection back to `session`.
    pub(crate) async fn start_detached(
        mut connection: Connection,
        start: &v1::ExecStart,
        session: Session,
    ) -> Result<v1::Started, ExecError> {
        let body = to_agent::Body::ExecStart(start.clone());
        let answer = match timeout(START_TIMEOUT, connection.request(body)).await {
            Err(_) => return Err(ExecError::Timeout),
            Ok(Err(RpcError::Frame(error))) => return Err(ExecError::TooLong(error)),
            Ok(other) => other?,
        };
        let result = match answer {
            from_agent::Body::Started(started) => Ok(started),
            from_agent::Body::SpawnFailed(failed) => Err(SpawnFailure::from(failed).into()),
            other => return Err(unexpected("Started", &other).into()),
        };
        session.put_back(connection);
        result
    }

    /// Leaves the command running, whatever its policy for lost connections is. Output that was not acknowledged is
    /// kept as far as its ring reaches.
    ///
    /// # Errors
    /// When the connection is lost first: whether the command goes on is then its policy's business.
    pub async fn detach(mut self) -> Result<(), RpcError> {
        let Some(mut reader) = self.reader.take() else {
            return Ok(());
        };
        let mut credit = self.credit.subscribe();
        let detaching = async {
            let detach = to_agent::Body::Detach(v1::Detach {});
            let sent = stdin::send(&self.outgoing, &mut credit, |writer| {
                writer.queue(detach).map_err(|_| SendError::Ended)
            });
            match sent.await {
                Err(SendError::Rpc(error)) => return Err(error),
                Ok(()) | Err(SendError::Ended | SendError::Closed) => {}
            }
            loop {
                match reader.receive().await? {
                    from_agent::Body::ExecDone(_) => return Ok(()),
                    from_agent::Body::Error(error) => return Err(AgentError::from(error).into()),
                    // What was on its way.
                    _ => {}
                }
            }
        };
        match timeout(DETACH_TIMEOUT, detaching).await {
            Ok(result) => result,
            Err(_) => Err(RpcError::Lost("it did not answer the detaching".to_owned())),
        }
    }

    /// The next message, with what was taken acknowledged before waiting for more: the guest may be waiting for that.
    pub(super) async fn receive(&mut self) -> Result<from_agent::Body, RpcError> {
        let Some(reader) = &mut self.reader else {
            return Err(RpcError::Lost("it was given back".to_owned()));
        };
        if let Some(body) = reader.arrived()? {
            return Ok(body);
        }
        let taken = self.progress.next_offsets;
        if self.acks.automatic && self.acks.sent != Some(taken) {
            let mut control = ExecControl {
                outgoing: self.outgoing.clone(),
                credit: self.credit.subscribe(),
            };
            tokio::select! {
                biased;
                // If this fails, so does the receiving, and says why.
                _ = control.acknowledge(taken) => self.acks.sent = Some(taken),
                body = reader.receive() => return body,
            }
        }
        reader.receive().await
    }
}

impl ExecControl {
    /// Says that output before these offsets, of stdout and of stderr, is wanted no more: the guest may forget it. From
    /// the first acknowledgement on the guest keeps all that is not acknowledged, and the command waits when its ring
    /// is full.
    ///
    /// # Errors
    /// When the exec is over, or its connection lost.
    pub async fn acknowledge(&mut self, offsets: [u64; 2]) -> Result<(), SendError> {
        let [stdout_offset, stderr_offset] = offsets;
        self.send(to_agent::Body::Ack(v1::Ack {
            stdout_offset,
            stderr_offset,
        }))
        .await
    }
}

impl From<v1::SpawnFailed> for SpawnFailure {
    fn from(failed: v1::SpawnFailed) -> Self {
        Self {
            stage: failed.stage(),
            errno: failed.errno,
            message: failed.message,
        }
    }
}
