//! Running one command with our streams, terminal and signals connected to it.
//!
//! One loop pulls the command's events, hands output to the sinks and listens for signals. Nothing in it waits for a
//! reader or for the guest alone, so a signal is always seen.

use std::pin::pin;
use std::time::{Duration, Instant};

use airlock_sandbox::client::proto::v1::SignalTarget;
use airlock_sandbox::client::{
    Bytes, Cause, Ended, Event, Exec, ExecControl, ExecError, ExitReport, Lost, Session,
    SpawnFailure, Stream, StreamTotals,
};
use anyhow::Context;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::events;
use crate::exit;
use crate::hiargs::{Execution, Streams, What};
use crate::output::{Piece, Sinks, print, tell};
use crate::signals::{self, Signals};
use crate::stdin;
use crate::terminal::{self, RawMode};

/// After this many signals we go without waiting for the command's end.
const SIGNALS_TO_GIVE_UP: u32 = 3;
/// The guest keeps the command's time; one that says nothing this long after it was up does not run any more.
const TIMEOUT_MARGIN: Duration = Duration::from_secs(60);

/// How often the guest is asked whether it is still there: a halted guest keeps its connections open for ever.
const LIVENESS_INTERVAL: Duration = Duration::from_secs(10);
/// Each question waits for seconds; after this many without an answer the guest is given up.
const LIVENESS_MISSES: u32 = 3;

/// How it went.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// For our own exit.
    pub(crate) status: u8,
    pub(crate) end: End,
    pub(crate) took: Duration,
}

#[derive(Debug)]
pub(crate) enum End {
    Ended {
        ended: Ended,
        stdout: StreamTotals,
        stderr: StreamTotals,
        tree_killed: bool,
    },
    Lost(Lost),
    NotStarted(SpawnFailure),
    /// A signal ended us before the command's end was known.
    Interrupted(signals::Number),
}

impl Outcome {
    /// For `--report`.
    pub(crate) fn json(&self) -> Value {
        match &self.end {
            End::Ended {
                ended,
                stdout,
                stderr,
                tree_killed,
            } => {
                let mut value = events::ended_json(ended);
                value["stdout"] = events::totals_json(stdout);
                value["stderr"] = events::totals_json(stderr);
                value["tree_killed"] = json!(tree_killed);
                value
            }
            End::Lost(lost) => json!({"cause": "lost", "detail": lost.detail}),
            End::NotStarted(failure) => {
                let mut value = events::failure_json(failure);
                value["cause"] = json!("not_started");
                value
            }
            End::Interrupted(number) => json!({"cause": "interrupted", "signal": number}),
        }
    }
}

/// Runs it to its end.
pub(crate) async fn execute(
    session: &Session,
    execution: Execution,
    signals: &mut Signals,
) -> anyhow::Result<Outcome> {
    let start = Instant::now();
    let outcome = |status, end| {
        Ok(Outcome {
            status,
            end,
            took: start.elapsed(),
        })
    };
    let starting = async {
        match execution.what {
            What::Start(command) => session.exec(*command).await,
            What::Attach(attach) => session.attach(attach).await,
        }
    };
    let started = tokio::select! {
        started = starting => started,
        number = signals.end() => return outcome(exit::of_signal(number), End::Interrupted(number)),
    };
    let exec = match started {
        Ok(exec) => exec,
        Err(ExecError::Spawn(failure)) => {
            tell!("airlock: {failure}");
            if execution.streams.json {
                print(&format!("{}\n", events::not_started(&failure)))?;
            }
            return outcome(exit::of_spawn_failure(&failure), End::NotStarted(failure));
        }
        Err(ExecError::Rpc(error)) => {
            let detail = error.to_string();
            return outcome(exit::OWN_FAILURE, End::Lost(Lost { detail }));
        }
        Err(error) => return Err(error.into()),
    };
    let raw = if execution.streams.tty && execution.streams.stdin {
        Some(RawMode::enter().context("cannot make the terminal raw")?)
    } else {
        None
    };
    let timeout = execution.streams.timeout;
    let running = Attached::new(exec, execution.streams).run(session, signals);
    let (status, end) = match timeout {
        None => running.await?,
        Some(time) => match tokio::time::timeout(time + TIMEOUT_MARGIN, running).await {
            Ok(result) => result?,
            Err(_) => {
                let detail = "the guest did not report that its time was up".to_owned();
                (exit::OWN_FAILURE, End::Lost(Lost { detail }))
            }
        },
    };
    drop(raw);
    if let End::Ended {
        ended,
        stdout,
        stderr,
        ..
    } = &end
    {
        if ended.cause == Cause::Oom {
            tell!(
                "airlock: the sandbox had no memory left, and the guest's kernel killed the command"
            );
        }
        let cut = stdout.cut_bytes + stderr.cut_bytes;
        if cut > 0 {
            tell!("airlock: {cut} bytes of the command's output could not be delivered");
        }
    }
    outcome(status, end)
}

/// Waits until the guest has not answered for a while.
async fn guest_gone(session: &Session) {
    let mut misses = 0;
    while misses < LIVENESS_MISSES {
        tokio::time::sleep(LIVENESS_INTERVAL).await;
        match session.ping(Bytes::new()).await {
            Ok(_) => misses = 0,
            Err(_) => misses += 1,
        }
    }
}

/// A running command and what it is connected to.
struct Attached {
    exec: Exec,
    control: ExecControl,
    streams: Streams,
    sinks: Sinks,
    taken: watch::Receiver<[u64; 2]>,
    signals_seen: u32,
    /// Our own status, whatever the command's end is.
    status: Option<u8>,
    stdout_broken: bool,
    /// Nobody reads stderr any more.
    stderr_broken: bool,
}

/// One thing that happened.
enum Step {
    Signal(Option<signals::Number>),
    Event(Result<Option<Event>, Lost>),
    HandedOver,
    /// Output was written, and the guest need not keep it any longer.
    Taken,
    /// The stream takes no more.
    Refused(Stream),
}

impl Attached {
    fn new(mut exec: Exec, streams: Streams) -> Self {
        if let Some(writer) = exec.take_stdin() {
            // A failed connection is seen by the events too.
            tokio::spawn(async move { drop(stdin::pass_on(writer).await) });
        }
        let sinks = Sinks::new(streams.from);
        Self {
            control: exec.control(),
            exec,
            streams,
            taken: sinks.taken(),
            sinks,
            signals_seen: 0,
            status: None,
            stdout_broken: false,
            stderr_broken: false,
        }
    }

    async fn run(mut self, session: &Session, signals: &mut Signals) -> anyhow::Result<(u8, End)> {
        // The window may have changed between its measuring and the start.
        self.resize().await;
        if self.streams.kept {
            // From here on the guest keeps for us what we have not written. If this fails, the events say why.
            let _ = self.control.acknowledge(self.streams.from).await;
        }
        let mut piece = self.streams.json.then(|| {
            let started = events::started(self.exec.id(), self.exec.pid());
            (Stream::Stdout, line(&started))
        });
        let mut over = false;
        let mut gone = pin!(guest_gone(session));
        while !over || piece.is_some() {
            let step = tokio::select! {
                step = self.step(over, &mut piece, signals) => step,
                () = &mut gone => {
                    let detail = "the guest does not answer any more (halted, or hung)".to_owned();
                    return Ok((exit::OWN_FAILURE, End::Lost(Lost { detail })));
                }
            };
            match step {
                Step::Signal(signal) => {
                    if let Some(number) = self.note_signal(signal).await {
                        return Ok((exit::of_signal(number), End::Interrupted(number)));
                    }
                }
                Step::Event(Ok(Some(event))) => piece = self.piece_of(event),
                Step::HandedOver => {}
                Step::Event(Ok(None)) => over = true,
                Step::Event(Err(lost)) => {
                    over = true;
                    let lost = events::lost(&lost);
                    piece = self.streams.json.then(|| (Stream::Stdout, line(&lost)));
                }
                Step::Taken => {
                    let taken = *self.taken.borrow_and_update();
                    // If this fails, the events say why.
                    let _ = self.control.acknowledge(taken).await;
                }
                Step::Refused(Stream::Stdout) if self.streams.kept => {
                    return Ok((exit::BROKEN_PIPE, End::Interrupted(signals::PIPE)));
                }
                Step::Refused(Stream::Stdout) => self.note_broken_stdout().await,
                Step::Refused(Stream::Stderr) => self.note_broken_stderr().await,
            }
        }
        self.finish(signals).await
    }

    /// What an event gives us to write, and where to.
    fn piece_of(&mut self, event: Event) -> Option<(Stream, Piece)> {
        let mut takes = None;
        if let Event::Output {
            stream,
            offset,
            data,
        } = &event
        {
            takes = Some((*stream, offset + data.len() as u64));
            if let Some(recording) = &mut self.streams.recording {
                recording.output(*stream, data);
            }
        }
        if self.streams.json {
            let piece = line(&events::event(&event)?);
            return Some((Stream::Stdout, Piece { takes, ..piece }));
        }
        match event {
            Event::Output { stream, data, .. } => Some((stream, Piece { data, takes })),
            _ => None,
        }
    }

    /// Waits for a signal, and for the next event or for a place for the last one's output.
    async fn step(
        &mut self,
        over: bool,
        piece: &mut Option<(Stream, Piece)>,
        signals: &mut Signals,
    ) -> Step {
        let stream = piece.as_ref().map_or(Stream::Stdout, |(stream, _)| *stream);
        tokio::select! {
            signal = signals.next() => Step::Signal(signal),
            Ok(()) = self.taken.changed(), if self.streams.kept && !over => Step::Taken,
            event = self.exec.next(), if piece.is_none() => Step::Event(event),
            place = self.sinks.place(stream), if piece.is_some() => match (place, piece.take()) {
                (Some(place), Some((_, piece))) => {
                    place.send(piece);
                    Step::HandedOver
                }
                (None, Some((stream, piece))) => {
                    self.sinks.give_up(&piece);
                    Step::Refused(stream)
                }
                (_, None) => Step::HandedOver,
            },
        }
    }

    /// Forwards the first signal and kills at the second. The number of the signal to give up with, if it is time to.
    async fn note_signal(&mut self, signal: Option<signals::Number>) -> Option<signals::Number> {
        let Some(number) = signal else {
            self.resize().await;
            return None;
        };
        self.signals_seen += 1;
        if self.signals_seen >= SIGNALS_TO_GIVE_UP {
            return Some(number);
        }
        // At a terminal Ctrl-C and Ctrl-\ reach the command as bytes. What comes as a signal there is meant for us: a
        // closed window, or a kill.
        let ours = self.streams.tty && matches!(number, 1 | 15);
        if self.streams.kept && (ours || number == signals::HANGUP) {
            // The command is to outlive us.
            return Some(number);
        }
        if ours {
            self.status = Some(exit::of_signal(number));
        }
        // If the command has ended already, its end is on the way to us.
        let _ = if ours || self.signals_seen > 1 {
            self.control
                .signal(signals::KILL, SignalTarget::TargetTree)
                .await
        } else {
            self.control.signal(number, SignalTarget::TargetGroup).await
        };
        None
    }

    async fn note_broken_stdout(&mut self) {
        if !self.stdout_broken {
            self.stdout_broken = true;
            self.kill().await;
        }
    }

    /// A full disk under stderr is no reason to stop; a reader that has gone is, as with `2>&1 | head`.
    async fn note_broken_stderr(&mut self) {
        if !self.stderr_broken && self.sinks.stderr_reader_has_gone() {
            self.stderr_broken = true;
            self.kill().await;
        }
    }

    /// What SIGPIPE would do to the last program of a pipeline that runs here.
    async fn kill(&mut self) {
        // If it has ended already, its end is on the way to us.
        let _ = self
            .control
            .signal(signals::KILL, SignalTarget::TargetTree)
            .await;
    }

    async fn resize(&mut self) {
        if self.streams.tty {
            let (rows, cols) = terminal::size();
            if let Some(recording) = &mut self.streams.recording {
                recording.resized(rows, cols);
            }
            // If it has ended, its size is of no interest.
            let _ = self.control.resize(rows, cols).await;
        }
    }

    /// Waits for the last output to be written, and says how it ended.
    async fn finish(self, signals: &mut Signals) -> anyhow::Result<(u8, End)> {
        let report = self.exec.report();
        let stderr_broken = self.stderr_broken;
        drop(self.streams.recording);
        let [stdout_result, _] = tokio::select! {
            written = self.sinks.finish() => written,
            number = signals.end() => return Ok((exit::of_signal(number), End::Interrupted(number))),
        };
        let end = match report {
            ExitReport::Ended {
                ended,
                stdout,
                stderr,
                tree_killed,
            } => End::Ended {
                ended,
                stdout,
                stderr,
                tree_killed,
            },
            ExitReport::Lost(lost) => End::Lost(lost),
        };
        match stdout_result {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {
                return Ok((exit::BROKEN_PIPE, end));
            }
            other => other.context("cannot write to stdout")?,
        }
        if stderr_broken {
            return Ok((exit::BROKEN_PIPE, end));
        }
        let of_command = match &end {
            End::Ended { ended, .. } => exit::of_ended(ended),
            _ => exit::OWN_FAILURE,
        };
        Ok((self.status.unwrap_or(of_command), end))
    }
}

/// One event for `--json`.
fn line(value: &Value) -> Piece {
    Piece::plain(format!("{value}\n"))
}
