//! A command whose connection may be lost: it is found again on another one, and goes on where the caller was.
//!
//! The guest keeps what was not acknowledged (and holds the command up rather than let it go), so nothing is missed;
//! the offset says what was had already, so nothing comes twice.

use std::time::Duration;

use airlock_proto::v1;
use tokio::time::{Instant, sleep};

use crate::control::ControlError;
use crate::exec::{Attach, Command, Event, Exec, ExecError, Kept, Output, Progress, Stream};
use crate::report::{ExitReport, Lost};
use crate::rpc::RpcError;
use crate::session::Session;

/// Ring of each stream where the command does not say: what is on its way at any moment fits several times.
const DEFAULT_REPLAY_BYTES: u64 = 1 << 20;
/// How long an outage may last where the caller does not say: a VMM that is restarted, a guest that is paused for a
/// snapshot.
const DEFAULT_PATIENCE: Duration = Duration::from_secs(30);
/// Pause after the first try of an outage; doubled after each, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// A running command that survives the loss of its connection: an [`Exec`] that attaches again by itself.
///
/// Events come once each and output without gap or repetition, however often the connection is cut. It has no stdin:
/// input that was on its way when a connection broke could not be told from input that had arrived. Dropping it leaves
/// the command running.
///
/// ```no_run
/// # use airlock_client::{Command, Session, Address};
/// # async fn example(session: Session) -> Result<(), Box<dyn std::error::Error>> {
/// let mut build = session.exec_resuming(Command::new("make").arg("check")).await?;
/// let output = build.output(16 << 20).await;
/// println!("{:?} after {} lost connections", output.report, build.reconnects());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct ResumingExec {
    session: Session,
    id: String,
    pid: u32,
    exec: Option<Exec>,
    outage: Option<Outage>,
    patience: Duration,
    reconnects: u64,
    progress: Progress,
    /// Per stream: its end was told.
    end_told: [bool; 2],
    tree_told: bool,
}

/// Since when there is no connection.
#[derive(Debug)]
struct Outage {
    since: Instant,
    pause: Duration,
    why: String,
}

impl Outage {
    fn new() -> Self {
        Self {
            since: Instant::now(),
            pause: Duration::ZERO,
            why: String::new(),
        }
    }
}

impl ResumingExec {
    pub(crate) async fn start(session: Session, command: Command) -> Result<Self, ExecError> {
        let mut start = command.into_start();
        start.stdin = v1::StdinMode::StdinNone.into();
        start.on_disconnect = v1::DisconnectPolicy::DisconnectKeep.into();
        start.hold_output = true;
        if start.replay_bytes == 0 {
            start.replay_bytes = DEFAULT_REPLAY_BYTES;
        }
        let exec = session.exec(Command::from(start)).await?;
        Ok(Self {
            session,
            id: exec.id.clone(),
            pid: exec.pid,
            exec: Some(exec),
            outage: None,
            patience: DEFAULT_PATIENCE,
            reconnects: 0,
            progress: Progress::default(),
            end_told: [false; 2],
            tree_told: false,
        })
    }

    /// How long an outage may last before the command counts as lost; without it 30 s.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
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

    /// How often it was found again.
    #[must_use]
    pub fn reconnects(&self) -> u64 {
        self.reconnects
    }

    /// Signals it, also while its connection is lost.
    ///
    /// # Errors
    /// When the agent does not answer, or it has ended.
    pub async fn signal(&self, number: u32, target: v1::SignalTarget) -> Result<(), ControlError> {
        self.session.signal(&self.id, number, target).await
    }

    /// The next event; `None` after [`Event::Done`]. Asking for one says that the last one has been dealt with. Safe to
    /// cancel.
    ///
    /// # Errors
    /// [`Lost`] when it could not be found again within the patience, or the guest knows it no more; now and at every
    /// later call.
    pub async fn next(&mut self) -> Result<Option<Event>, Lost> {
        loop {
            if self.progress.done {
                return Ok(None);
            }
            if let Some(lost) = &self.progress.lost {
                return Err(lost.clone());
            }
            let Some(exec) = &mut self.exec else {
                self.reconnect().await;
                continue;
            };
            match exec.next().await {
                Ok(Some(event)) => {
                    self.outage = None;
                    if let Some(event) = self.note(event) {
                        return Ok(Some(event));
                    }
                }
                // Done was the last event of this connection, and it is noted.
                Ok(None) => self.exec = None,
                Err(lost) if exec.progress.lost_connection => {
                    self.leave(lost.detail);
                }
                Err(lost) => self.progress.lost = Some(lost),
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

    /// What is known now; see [`Exec::report`].
    #[must_use]
    pub fn report(&self) -> ExitReport {
        self.progress.report()
    }

    /// Keeps what an event says; `None` if the caller has heard it before.
    fn note(&mut self, mut event: Event) -> Option<Event> {
        let progress = &mut self.progress;
        let is_new = match &mut event {
            Event::Output {
                stream,
                offset,
                data,
            } => {
                progress.next_offsets[*stream as usize] = *offset + data.len() as u64;
                true
            }
            Event::LeaderExited(ended) => progress.ended.replace(*ended).is_none(),
            Event::StreamEnd { stream, totals } => {
                let index = *stream as usize;
                // The agent counts what this connection did not get; the ones before had their own.
                totals.cut_bytes += progress.skipped[index];
                if !self.end_told[index] {
                    progress.totals[index] = *totals;
                }
                !std::mem::replace(&mut self.end_told[index], true)
            }
            Event::TreeEmpty { killed } => {
                progress.tree_killed |= *killed;
                !std::mem::replace(&mut self.tree_told, true)
            }
            Event::Done => {
                progress.done = true;
                self.exec = None;
                true
            }
        };
        is_new.then_some(event)
    }

    /// Lets go of the connection that failed.
    fn leave(&mut self, why: String) {
        if let Some(exec) = self.exec.take() {
            for (sum, skipped) in self.progress.skipped.iter_mut().zip(exec.progress.skipped) {
                *sum += skipped;
            }
        }
        self.outage.get_or_insert_with(Outage::new).why = why;
    }

    /// Tries once to find it again (a pause after the last try), or gives up. A connection on which nothing comes counts
    /// as a try that failed.
    async fn reconnect(&mut self) {
        let outage = self.outage.get_or_insert_with(Outage::new);
        if outage.since.elapsed() >= self.patience {
            let seconds = self.patience.as_secs_f64();
            let detail = format!("it was not found again within {seconds} s: {}", outage.why);
            self.progress.lost = Some(Lost { detail });
            return;
        }
        sleep(outage.pause).await;
        outage.pause = (outage.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        let [stdout, stderr] = self.progress.next_offsets;
        let attach = Attach::new(&self.id)
            .from(Stream::Stdout, stdout)
            .from(Stream::Stderr, stderr);
        match self.session.attach(attach).await {
            Ok(exec) => {
                self.exec = Some(exec);
                self.reconnects += 1;
            }
            Err(
                error @ (ExecError::Timeout
                | ExecError::Rpc(
                    RpcError::Lost(_) | RpcError::Transport(_) | RpcError::HelloTimeout,
                )),
            ) => outage.why = error.to_string(),
            // The agent does not know it: it was restarted, or has forgotten it.
            Err(error) => {
                let detail = error.to_string();
                self.progress.lost = Some(Lost { detail });
            }
        }
    }
}

#[cfg(test)]
mod tests;
