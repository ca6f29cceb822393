//! Runs one command, under the operating system or under the agent, and takes down all that can be seen of it.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use airlock_client::proto::v1;
use airlock_client::{Bytes, Event, ExitReport, Session, Status, Stream};
use airlock_tests::oracle_plan::{Ender, Holders, Plan};
use tokio::time::{sleep, timeout};

use crate::{Target, WORK};

/// A run takes milliseconds; one that takes this long hangs.
const RUN_DEADLINE: Duration = Duration::from_secs(50);
/// What a slow reader takes over a piece of output.
const SLOW: Duration = Duration::from_micros(700);
/// Grace of a time-out: longer than any test may take, so that SIGTERM is what ends the leader.
const GRACE_MS: u64 = 60_000;

/// What the operating system says of a run.
pub(crate) struct Truth {
    pub(crate) streams: [Vec<u8>; 2],
    pub(crate) status: Status,
}

/// What came from the agent.
pub(crate) struct Seen {
    pub(crate) streams: [Vec<u8>; 2],
    /// Bytes of each stream that had come when the exit was reported.
    pub(crate) before_exit: [usize; 2],
    pub(crate) report: ExitReport,
}

pub(crate) fn under_the_os(seed: u64, run: u64) -> Truth {
    let output = Command::new(WORK)
        .args([&seed.to_string(), &run.to_string(), "os"])
        .current_dir("/")
        .stdin(Stdio::null())
        .output()
        .expect("the oracle's program starts");
    let status = match (output.status.code(), output.status.signal()) {
        (Some(code), _) => Status::Code(code.unsigned_abs()),
        (None, signal) => Status::Signal {
            number: signal.unwrap_or(0).unsigned_abs(),
            core: output.status.core_dumped(),
        },
    };
    Truth {
        streams: [output.stdout, output.stderr],
        status,
    }
}

pub(crate) struct Driver {
    runtime: tokio::runtime::Runtime,
    session: Session,
    work: Vec<u8>,
    user: String,
}

impl Driver {
    pub(crate) fn new(target: &Target<'_>) -> Self {
        Self {
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime can be made"),
            session: Session::new(target.address.clone()),
            work: target.work.as_os_str().as_encoded_bytes().to_vec(),
            user: target.user.clone(),
        }
    }

    /// Copies the program to where this driver runs it.
    pub(crate) fn install(&self, program: &Path) {
        let bytes = Bytes::from(std::fs::read(program).expect("the program was built"));
        let to = String::from_utf8_lossy(&self.work).into_owned();
        let command = airlock_client::Command::new("sh")
            .args(["-c", "cat > \"$0\" && chmod 755 \"$0\"", &to])
            .stdin();
        self.runtime.block_on(async {
            let mut exec = self.session.exec(command).await.expect("the VM answers");
            let mut stdin = exec.take_stdin().expect("it was asked for");
            let writing = async move {
                stdin.write(&mut bytes.clone()).await?;
                stdin.finish().await
            };
            let (report, written) = tokio::join!(exec.wait(), writing);
            written.expect("the program is taken");
            assert!(report.success(), "{report:?}");
        });
    }

    pub(crate) fn under_the_agent(
        &mut self,
        seed: u64,
        run: u64,
        plan: &Plan,
    ) -> Result<Seen, String> {
        let start = self.request(seed, run, plan);
        let running = timeout_of(run_one(&self.session, start, plan));
        self.runtime.block_on(running)
    }

    fn request(&self, seed: u64, run: u64, plan: &Plan) -> v1::ExecStart {
        let argument = |text: String| Bytes::from(text.into_bytes());
        let (holders, holder_grace_ms) = match plan.holders {
            Holders::Grace { ms } => (v1::HolderPolicy::HoldersGrace, ms),
            Holders::Wait => (v1::HolderPolicy::HoldersWait, 0),
            Holders::Kill => (v1::HolderPolicy::HoldersKill, 0),
        };
        v1::ExecStart {
            argv: vec![
                Bytes::from(self.work.clone()),
                argument(seed.to_string()),
                argument(run.to_string()),
                argument("agent".to_owned()),
            ],
            cwd: Bytes::from_static(b"/"),
            user: self.user.clone(),
            holders: holders.into(),
            holder_grace_ms,
            timeout_ms: match plan.ender {
                Ender::Timeout { ms } => ms,
                _ => 0,
            },
            grace_ms: GRACE_MS,
            replay_bytes: plan.replay_bytes,
            ..v1::ExecStart::default()
        }
    }
}

async fn timeout_of(running: impl Future<Output = Result<Seen, String>>) -> Result<Seen, String> {
    match timeout(RUN_DEADLINE, running).await {
        Ok(result) => result,
        Err(_) => Err(format!("it hangs: no end after {RUN_DEADLINE:?}")),
    }
}

async fn run_one(session: &Session, start: v1::ExecStart, plan: &Plan) -> Result<Seen, String> {
    let mut exec = session
        .exec(airlock_client::Command::from(start))
        .await
        .map_err(|error| format!("it did not start: {error}"))?;
    let mut streams = [Vec::new(), Vec::new()];
    let mut before_exit = [0; 2];
    let mut kill_at = match plan.ender {
        Ender::Client { after_bytes } => Some(after_bytes),
        _ => None,
    };
    loop {
        let come: usize = streams.iter().map(Vec::len).sum();
        if kill_at.is_some_and(|at| come as u64 >= at) {
            kill_at = None;
            let killed = exec.control().signal(9, v1::SignalTarget::TargetTree).await;
            killed.map_err(|error| format!("it was not killed: {error}"))?;
        }
        match exec.next().await {
            Ok(Some(Event::Output {
                stream,
                offset,
                data,
            })) => {
                let kept = &mut streams[usize::from(stream == Stream::Stderr)];
                if offset != kept.len() as u64 {
                    return Err(format!("{stream:?} jumps to {offset}"));
                }
                kept.extend_from_slice(&data);
                if plan.slow_reader {
                    sleep(SLOW).await;
                }
            }
            Ok(Some(Event::LeaderExited(_))) => {
                before_exit = [0, 1].map(|s: usize| streams[s].len())
            }
            Ok(Some(_)) => {}
            Ok(None) => break,
            Err(lost) => return Err(format!("it was lost: {lost}")),
        }
    }
    Ok(Seen {
        streams,
        before_exit,
        report: exec.report(),
    })
}
