//! One command in a sandbox: start it, pull its events, feed its stdin, signal and resize it.
//!
//! [`Exec`] owns the receiving half of its connection; [`StdinWriter`] and [`ExecControl`] share the sending half and
//! can be used at the same time from other tasks. Stdin credit arrives among the events, so stdin moves only while
//! events are pulled. Dropping an [`Exec`] ends its connection, and with it (unless the start said otherwise) the
//! command.

mod attach;
mod command;
mod resume;
mod stdin;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use airlock_proto::v1::{self, from_agent, to_agent};
use bytes::{Bytes, BytesMut};
use tokio::sync::{Mutex, watch};
use tokio::time::timeout;

use crate::exec::attach::Acks;
pub use crate::exec::attach::Attach;
pub use crate::exec::command::Command;
pub use crate::exec::resume::ResumingExec;
use crate::exec::stdin::{Credit, Outgoing};
pub use crate::exec::stdin::{SendError, StdinWriter};
use crate::report::{Ended, ExitReport, Lost, StreamTotals};
use crate::rpc::{AgentError, Connection, Reader, RpcError, unexpected};
use crate::session::Session;

/// How long the agent may take to start a process. It forks in well under a millisecond; the figure is for a guest
/// that swaps or is emulated on a busy host.
pub const START_TIMEOUT: Duration = Duration::from_secs(30);

/// Which output a piece belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output, and everything a terminal shows.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Something that happened in an exec, in the order in which it did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Bytes of a stream. `data` is a slice of the receive buffer: keeping it keeps that buffer.
    Output {
        /// Which stream.
        stream: Stream,
        /// Place of the first byte in the stream.
        offset: u64,
        /// The bytes.
        data: Bytes,
    },
    /// The leader was reaped; every byte that was written before has been delivered. Output of its children may
    /// still follow.
    LeaderExited(Ended),
    /// A stream is over.
    StreamEnd {
        /// Which stream.
        stream: Stream,
        /// How much there was.
        totals: StreamTotals,
    },
    /// No process of the exec is left.
    TreeEmpty {
        /// The agent killed what was left.
        killed: bool,
    },
    /// Everything was reported. The last event.
    Done,
}

/// The step of a start that failed.
pub use v1::SpawnStage;

/// The process could not be started.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct SpawnFailure {
    /// At which step.
    pub stage: SpawnStage,
    /// Linux errno, or 0.
    pub errno: i32,
    /// One line for a person.
    pub message: String,
}

/// Why an exec did not start.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The guest could not start the process.
    #[error(transparent)]
    Spawn(#[from] SpawnFailure),
    /// The agent refused the request.
    #[error(transparent)]
    Agent(AgentError),
    /// Arguments and environment exceed what a frame carries.
    #[error("the command line and environment are too long: {0}")]
    TooLong(airlock_proto::codec::FrameError),
    /// The agent took longer than [`START_TIMEOUT`].
    #[error("the agent did not start the command within {} s", START_TIMEOUT.as_secs())]
    Timeout,
    /// The connection failed; whether the process ran is not known.
    #[error(transparent)]
    Rpc(RpcError),
}

impl From<RpcError> for ExecError {
    fn from(error: RpcError) -> Self {
        match error {
            RpcError::Agent(error) => Self::Agent(error),
            error => Self::Rpc(error),
        }
    }
}

/// A running command.
///
/// ```no_run
/// # use airlock_client::{Command, Event, Session, Address};
/// # async fn example(session: Session) -> Result<(), Box<dyn std::error::Error>> {
/// let mut exec = session.exec(Command::new("dmesg")).await?;
/// while let Some(event) = exec.next().await? {
///     if let Event::Output { data, .. } = event {
///         println!("{} bytes", data.len());
///     }
/// }
/// println!("{:?}", exec.report());
/// # Ok(())
/// # }
/// ```
pub struct Exec {
    id: String,
    pid: u32,
    reader: Option<Reader>,
    hello: Option<v1::HelloReply>,
    outgoing: Arc<Mutex<Outgoing>>,
    credit: watch::Sender<Credit>,
    stdin: Option<StdinWriter>,
    session: Option<Session>,
    progress: Progress,
    acks: Acks,
}

impl fmt::Debug for Exec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exec")
            .field("id", &self.id)
            .field("pid", &self.pid)
            .field("progress", &self.progress)
            .finish_non_exhaustive()
    }
}

/// What has been reported so far.
#[derive(Debug, Default)]
struct Progress {
    ended: Option<Ended>,
    next_offsets: [u64; 2],
    totals: [StreamTotals; 2],
    tree_killed: bool,
    done: bool,
    lost: Option<Lost>,
    /// It was the connection that failed, and another one may do better.
    lost_connection: bool,
    /// Output before the first byte that came was no longer kept: how much.
    skipped: [u64; 2],
    /// Attached to, so output may begin later than was asked for.
    may_skip: bool,
}

impl Progress {
    fn report(&self) -> ExitReport {
        match (&self.lost, self.ended) {
            (None, Some(ended)) if self.done => ExitReport::Ended {
                ended,
                stdout: self.totals[0],
                stderr: self.totals[1],
                tree_killed: self.tree_killed,
            },
            (Some(lost), _) => ExitReport::Lost(lost.clone()),
            (None, _) => ExitReport::Lost(Lost {
                detail: "it is still running".to_owned(),
            }),
        }
    }
}

impl Exec {
    /// Starts `start` on a connection without a running request. A finished exec gives the connection back to
    /// `session`.
    pub(crate) async fn start(
        mut connection: Connection,
        start: &v1::ExecStart,
        session: Option<Session>,
    ) -> Result<Self, ExecError> {
        let body = to_agent::Body::ExecStart(start.clone());
        let first = match timeout(START_TIMEOUT, connection.request(body)).await {
            Err(_) => return Err(ExecError::Timeout),
            Ok(Err(RpcError::Frame(error))) => return Err(ExecError::TooLong(error)),
            Ok(other) => other?,
        };
        match first {
            from_agent::Body::Started(started) => {
                let wants_stdin = start.stdin() == v1::StdinMode::StdinStream;
                // Without a ring nothing is kept, and nothing need be acknowledged.
                let acks = Acks::new(start.hold_output && start.replay_bytes > 0);
                let mut exec = Self::running(connection, started, wants_stdin, session, acks);
                // The agent may have known the id, from a connection whose Started was lost.
                exec.progress.may_skip = start.replay_bytes > 0;
                Ok(exec)
            }
            from_agent::Body::SpawnFailed(failed) => {
                if let Some(session) = session {
                    session.put_back(connection);
                }
                Err(SpawnFailure {
                    stage: failed.stage(),
                    errno: failed.errno,
                    message: failed.message,
                }
                .into())
            }
            other => Err(unexpected("Started", &other).into()),
        }
    }

    fn running(
        connection: Connection,
        started: v1::Started,
        wants_stdin: bool,
        session: Option<Session>,
        acks: Acks,
    ) -> Self {
        let (reader, writer, hello) = connection.into_parts();
        let outgoing = Arc::new(Mutex::new(Outgoing::new(writer)));
        let credit = watch::Sender::new(Credit {
            up_to: started.stdin_credit,
            ..Credit::default()
        });
        let stdin = wants_stdin.then(|| {
            StdinWriter::new(
                Arc::clone(&outgoing),
                credit.subscribe(),
                started.stdin_offset,
            )
        });
        Self {
            id: started.id,
            pid: started.pid,
            reader: Some(reader),
            hello,
            outgoing,
            credit,
            stdin,
            session,
            progress: Progress::default(),
            acks,
        }
    }

    /// The id it has in the guest.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The leader's process id in the guest.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its stdin, once, if the start asked for one.
    pub fn take_stdin(&mut self) -> Option<StdinWriter> {
        self.stdin.take()
    }

    /// A handle that signals and resizes; any number of them, in any task.
    #[must_use]
    pub fn control(&self) -> ExecControl {
        ExecControl {
            outgoing: Arc::clone(&self.outgoing),
            credit: self.credit.subscribe(),
        }
    }

    /// The next event; `None` after [`Event::Done`]. Safe to cancel.
    ///
    /// # Errors
    /// [`Lost`] when the connection ends first, now and at every later call.
    pub async fn next(&mut self) -> Result<Option<Event>, Lost> {
        if self.progress.done {
            return Ok(None);
        }
        loop {
            if let Some(lost) = &self.progress.lost {
                return Err(lost.clone());
            }
            let received = self.receive().await;
            match received.and_then(|body| self.note(body)) {
                Ok(Some(Event::Done)) => {
                    self.give_back();
                    return Ok(Some(Event::Done));
                }
                Ok(Some(event)) => return Ok(Some(event)),
                Ok(None) => {}
                Err(error) => {
                    self.progress.lost_connection = matches!(error, RpcError::Lost(_));
                    let lost = Lost {
                        detail: error.to_string(),
                    };
                    self.progress.lost = Some(lost.clone());
                    self.credit.send_modify(|credit| credit.ended = true);
                    self.reader = None;
                    return Err(lost);
                }
            }
        }
    }

    /// Pulls the remaining events, letting go of output, and says how it ended.
    pub async fn wait(&mut self) -> ExitReport {
        while let Ok(Some(_)) = self.next().await {}
        self.report()
    }

    /// Pulls the remaining events and keeps output up to `limit_bytes` for each stream; what is beyond is counted in
    /// the result's `dropped_bytes`.
    pub async fn output(&mut self, limit_bytes: usize) -> Output {
        let mut kept = Kept::new(limit_bytes);
        while let Ok(Some(event)) = self.next().await {
            kept.take(&event);
        }
        kept.output(self.report())
    }

    /// What is known now. Before [`Event::Done`] that is [`ExitReport::Lost`], with "still running" as the detail as
    /// long as nothing is lost.
    #[must_use]
    pub fn report(&self) -> ExitReport {
        self.progress.report()
    }

    /// The leader's end, if that has been reported, whatever came or did not come after it.
    #[must_use]
    pub fn ended(&self) -> Option<Ended> {
        self.progress.ended
    }

    /// Keeps what a message says; `None` if it is nothing for the caller.
    fn note(&mut self, body: from_agent::Body) -> Result<Option<Event>, RpcError> {
        let broken = |what: &str| Err(RpcError::Protocol(what.to_owned()));
        let progress = &mut self.progress;
        let event = match body {
            from_agent::Body::Output(output) => {
                let stream = stream_of(output.stream)?;
                let next = &mut progress.next_offsets[stream as usize];
                if output.offset < *next || (output.offset > *next && !progress.may_skip) {
                    return broken("output bytes are missing or came twice");
                }
                progress.skipped[stream as usize] += output.offset - *next;
                let Some(after) = next.checked_add(output.data.len() as u64) else {
                    return broken("an output offset overflows");
                };
                *next = after;
                Event::Output {
                    stream,
                    offset: output.offset,
                    data: output.data,
                }
            }
            from_agent::Body::LeaderExited(exited) => {
                let Some(ended) = Ended::from_message(&exited) else {
                    return broken("an exit without a status");
                };
                progress.ended = Some(ended);
                Event::LeaderExited(ended)
            }
            from_agent::Body::StreamEnd(end) => {
                let stream = stream_of(end.stream)?;
                let totals = StreamTotals {
                    total_bytes: end.total_bytes,
                    cut_bytes: end.cut_bytes,
                    held_open: end.held_open,
                };
                progress.totals[stream as usize] = totals;
                Event::StreamEnd { stream, totals }
            }
            from_agent::Body::TreeEmpty(empty) => {
                progress.tree_killed |= empty.killed;
                Event::TreeEmpty {
                    killed: empty.killed,
                }
            }
            from_agent::Body::StdinCredit(granted) => {
                self.credit.send_modify(|credit| {
                    credit.up_to = credit.up_to.max(granted.up_to);
                    credit.closed |= granted.closed;
                });
                return Ok(None);
            }
            from_agent::Body::ExecDone(_) if progress.ended.is_none() => {
                return broken("ExecDone before LeaderExited");
            }
            from_agent::Body::ExecDone(_) => {
                progress.done = true;
                Event::Done
            }
            from_agent::Body::Error(error) => return Err(AgentError::from(error).into()),
            other => return Err(unexpected("an event of the exec", &other)),
        };
        Ok(Some(event))
    }

    /// Returns the connection to the session, unless something was sent on it besides the start: such a message may
    /// have crossed the end of the exec, and would then meet an idle connection.
    fn give_back(&mut self) {
        self.credit.send_modify(|credit| credit.ended = true);
        let Some(reader) = self.reader.take() else {
            return;
        };
        // Whoever holds the lock is sending.
        let Ok(mut outgoing) = self.outgoing.try_lock() else {
            return;
        };
        let Some(writer) = outgoing.end() else {
            return;
        };
        if let Some(session) = self.session.take() {
            session.put_back(Connection::from_parts(reader, writer, self.hello.take()));
        }
    }
}

impl Drop for Exec {
    fn drop(&mut self) {
        // Lets a blocked sender go, so that the connection closes although it shares the sending half.
        self.credit.send_modify(|credit| credit.ended = true);
        if let Ok(mut outgoing) = self.outgoing.try_lock() {
            outgoing.end();
        }
    }
}

fn stream_of(number: i32) -> Result<Stream, RpcError> {
    match v1::Stream::try_from(number) {
        Ok(v1::Stream::Stdout) => Ok(Stream::Stdout),
        Ok(v1::Stream::Stderr) => Ok(Stream::Stderr),
        Err(_) => Err(RpcError::Protocol(format!("there is no stream {number}"))),
    }
}

/// A finished exec and what it wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Standard output, from its start.
    pub stdout: Bytes,
    /// Standard error, from its start.
    pub stderr: Bytes,
    /// Bytes beyond the limit, of stdout and of stderr.
    pub dropped_bytes: [u64; 2],
    /// How it ended.
    pub report: ExitReport,
}

/// Output on its way to an [`Output`].
struct Kept {
    streams: [BytesMut; 2],
    dropped_bytes: [u64; 2],
    limit_bytes: usize,
}

impl Kept {
    fn new(limit_bytes: usize) -> Self {
        Self {
            streams: [BytesMut::new(), BytesMut::new()],
            dropped_bytes: [0; 2],
            limit_bytes,
        }
    }

    fn take(&mut self, event: &Event) {
        if let Event::Output { stream, data, .. } = event {
            let buffer = &mut self.streams[*stream as usize];
            let room = self
                .limit_bytes
                .saturating_sub(buffer.len())
                .min(data.len());
            buffer.extend_from_slice(&data[..room]);
            self.dropped_bytes[*stream as usize] += (data.len() - room) as u64;
        }
    }

    fn output(self, report: ExitReport) -> Output {
        let [stdout, stderr] = self.streams.map(BytesMut::freeze);
        Output {
            stdout,
            stderr,
            dropped_bytes: self.dropped_bytes,
            report,
        }
    }
}

/// Signals and resizes a running exec.
#[derive(Debug, Clone)]
pub struct ExecControl {
    outgoing: Arc<Mutex<Outgoing>>,
    credit: watch::Receiver<Credit>,
}

impl ExecControl {
    /// Sends signal `number` (Linux numbering) to the leader, its process group or the whole tree.
    ///
    /// # Errors
    /// When the exec is over, or its connection lost.
    pub async fn signal(&mut self, number: u32, target: v1::SignalTarget) -> Result<(), SendError> {
        self.send(to_agent::Body::Signal(v1::Signal {
            signal: number,
            target: target.into(),
        }))
        .await
    }

    /// Tells a terminal exec its new size.
    ///
    /// # Errors
    /// When the exec is over, or its connection lost.
    pub async fn resize(&mut self, rows: u16, cols: u16) -> Result<(), SendError> {
        self.send(to_agent::Body::Resize(v1::Resize {
            rows: rows.into(),
            cols: cols.into(),
        }))
        .await
    }

    async fn send(&mut self, body: to_agent::Body) -> Result<(), SendError> {
        stdin::send(&self.outgoing, &mut self.credit, |writer| {
            writer.queue(body).map_err(|_| SendError::Ended)
        })
        .await
    }
}

#[cfg(test)]
mod tests;
