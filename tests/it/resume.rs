//! The client library and the real agent as an ordinary process, over connections that break: what is promised about
//! attaching, acknowledging and resuming, without a VM.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command as Process, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use airlock_client::proto::v1;
use airlock_client::{
    Address, Attach, Cause, Command, Event, ExecError, ExitReport, Session, Stream, Transport,
    TransportError,
};
use airlock_tests::{binary, wait_until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

const DEADLINE: Duration = Duration::from_secs(60);

static SERIAL: AtomicU32 = AtomicU32::new(0);

/// An agent that runs here; gone with its folder when dropped.
struct Agent {
    process: Child,
    folder: PathBuf,
}

impl Agent {
    fn start() -> Self {
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("alr-{}-{serial}", std::process::id()));
        fs::create_dir_all(&folder).expect("the temp folder is writable");
        let process = Process::new(binary("airlock-agent"))
            .args(["serve", "--unix"])
            .arg(folder.join("agent.sock"))
            .stdin(Stdio::null())
            .spawn()
            .expect("the agent starts");
        let agent = Self { process, folder };
        wait_until("the agent listens", DEADLINE, || {
            std::os::unix::net::UnixStream::connect(agent.socket()).is_ok()
        })
        .expect("the agent listens");
        agent
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("agent.sock")
    }

    fn session(&self) -> Session {
        Session::new(Address::Unix(self.socket()))
    }

    /// A session whose connections break after up to `most_bytes` from the agent, at bytes that `seed` chooses.
    fn cutting_session(&self, seed: u64, most_bytes: u64) -> Session {
        let socket = self.socket();
        let state = Arc::new(AtomicU64::new(seed | 1));
        Session::with_connector(move || {
            let (socket, state) = (socket.clone(), Arc::clone(&state));
            async move {
                let refused = |_| TransportError::Refused {
                    address: "the agent".to_owned(),
                };
                // Long enough for the command to overrun its ring if nothing held it.
                tokio::time::sleep(Duration::from_millis(20)).await;
                let agent = UnixStream::connect(&socket).await.map_err(refused)?;
                let random = state
                    .load(Ordering::Relaxed)
                    .wrapping_mul(0x5851_f42d_4c95_7f2d)
                    + 11;
                state.store(random, Ordering::Relaxed);
                let (host, ours) = UnixStream::pair().map_err(refused)?;
                tokio::spawn(pass_on(agent, ours, (random >> 33) % most_bytes));
                Ok(Transport::from(host))
            }
        })
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Passes bytes both ways, and drops both ends when `budget` bytes have come from the agent.
async fn pass_on(agent: UnixStream, host: UnixStream, budget: u64) {
    let (agent_reader, mut agent_writer) = agent.into_split();
    let (mut host_reader, mut host_writer) = host.into_split();
    let mut limited = agent_reader.take(budget);
    tokio::select! {
        _ = tokio::io::copy(&mut limited, &mut host_writer) => {}
        _ = tokio::io::copy(&mut host_reader, &mut agent_writer) => {}
    }
    let _ = host_writer.shutdown().await;
}

fn run<T>(story: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime can be made");
    runtime.block_on(async {
        tokio::time::timeout(DEADLINE, story)
            .await
            .expect("the story ends in time")
    })
}

fn sh(script: &str) -> Command {
    Command::new("sh").args(["-c", script])
}

fn lines(until: u32) -> Vec<u8> {
    (1..=until)
        .flat_map(|n| format!("{n}\n").into_bytes())
        .collect()
}

#[test]
fn a_command_whose_connection_is_cut_again_and_again_loses_no_byte() {
    let agent = Agent::start();
    run(async {
        let mut reconnects = 0;
        for seed in 0..8 {
            // A ring far smaller than the output: only acknowledgements keep the two together.
            let command = sh("seq 1 300000 & seq 1 60000 >&2; wait; exit 9").keep(100_000);
            let session = agent.cutting_session(seed, 300_000);
            let mut exec = loop {
                match session.exec_resuming(command.clone()).await {
                    Ok(exec) => break exec,
                    Err(ExecError::Rpc(_)) => {}
                    Err(error) => panic!("seed {seed}: {error}"),
                }
            };
            let output = exec.output(16 << 20).await;
            assert!(output.stdout == lines(300_000), "seed {seed}: stdout");
            assert!(output.stderr == lines(60_000), "seed {seed}: stderr");
            let ExitReport::Ended { ended, stdout, .. } = output.report else {
                panic!("seed {seed}: {:?}", output.report);
            };
            assert_eq!(ended.status, airlock_client::Status::Code(9));
            assert_eq!((ended.cause, stdout.cut_bytes), (Cause::Normal, 0));
            reconnects += exec.reconnects();
        }
        assert!(reconnects > 20, "only {reconnects} cuts were survived");
    });
}

#[test]
fn a_detached_command_outlives_its_session_and_is_attached_to_from_an_offset() {
    let agent = Agent::start();
    run(async {
        let command = sh("echo one; echo two; exit 5").id("left").keep(1 << 16);
        let started = agent.session().exec_detached(command).await.unwrap();
        assert_eq!(started.id, "left");
        let session = agent.session();
        let info = session.wait("left").await.unwrap();
        assert!(!info.running);
        let mut exec = session
            .attach(Attach::new("left").from(Stream::Stdout, 4))
            .await
            .unwrap();
        let output = exec.output(1 << 10).await;
        assert_eq!(&output.stdout[..], b"two\n");
        let unknown = session.attach(Attach::new("nobody")).await.unwrap_err();
        assert!(matches!(unknown, ExecError::Agent(_)), "{unknown}");
    });
}

#[test]
fn a_command_that_was_left_on_purpose_goes_on_and_one_whose_client_fell_silent_waits() {
    let agent = Agent::start();
    run(async {
        let session = agent.session();
        let command = sh("seq 1 200000").id("held").keep(1 << 16).hold_output();
        let exec = session.exec(command).await.unwrap();
        // Nothing was taken, so nothing may be let go.
        drop(exec);
        let mut exec = session
            .attach(Attach::new("held").manual_acks())
            .await
            .unwrap();
        let Some(Event::Output { offset: 0, .. }) = exec.next().await.unwrap() else {
            panic!("the first byte was expected");
        };
        exec.control().acknowledge([1, 0]).await.unwrap();
        drop(exec);
        let attach = Attach::new("held").from(Stream::Stdout, 1);
        let exec = session.attach(attach).await.unwrap();
        exec.detach().await.unwrap();
        let info = session.wait("held").await.unwrap();
        assert!(!info.running);
        assert_eq!(info.stdout_bytes, lines(200_000).len() as u64);
        // What was not kept is counted.
        let mut exec = session.attach(Attach::new("held")).await.unwrap();
        let output = exec.output(1 << 20).await;
        let ExitReport::Ended { stdout, .. } = output.report else {
            panic!("{:?}", output.report);
        };
        assert_eq!(
            output.stdout.len() as u64 + stdout.cut_bytes,
            stdout.total_bytes
        );
        assert!(stdout.cut_bytes > 0);
        assert!(lines(200_000).ends_with(&output.stdout));
    });
}

#[test]
fn an_observer_sees_all_and_input_goes_on_where_it_was() {
    let agent = Agent::start();
    run(async {
        let session = agent.session();
        let command = Command::new("cat").stdin().id("cat").keep(1 << 16);
        let mut first = session.exec(command).await.unwrap();
        let mut stdin = first.take_stdin().unwrap();
        stdin.write(&mut "one ".into()).await.unwrap();
        let Some(Event::Output { .. }) = first.next().await.unwrap() else {
            panic!("an echo was expected");
        };
        drop((first, stdin));
        let mut observer = session.attach(Attach::new("cat").observe()).await.unwrap();
        let mut second = session.attach(Attach::new("cat").stdin()).await.unwrap();
        let mut stdin = second.take_stdin().unwrap();
        let writing = async {
            stdin.write(&mut "two".into()).await.unwrap();
            stdin.finish().await.unwrap();
        };
        let (output, watched, ()) =
            tokio::join!(second.output(1 << 10), observer.output(1 << 10), writing);
        assert_eq!(&output.stdout[..], b"one two");
        assert_eq!(&watched.stdout[..], b"one two");
    });
}

#[test]
fn a_list_longer_than_a_page_arrives_whole() {
    let agent = Agent::start();
    run(async {
        let session = agent.session();
        for number in 0..40 {
            let command = Command::new("sleep").arg("60").id(format!("e{number}"));
            session.exec_detached(command).await.unwrap();
        }
        assert_eq!(session.list().await.unwrap().len(), 40);
        for info in session.list().await.unwrap() {
            let tree = v1::SignalTarget::TargetTree;
            session.signal(&info.id, 9, tree).await.unwrap();
            let info = session.wait(&info.id).await.unwrap();
            assert_eq!(info.exit.unwrap().cause(), v1::Cause::Killed);
        }
    });
}
