//! An agent process and a small blocking client for it.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use airlock_proto::codec::{self, Decoder};
use airlock_proto::v1::{
    Control, ControlReply, EnvVar, Error, ExecStart, FromAgent, Hello, HelloReply, LeaderExited,
    SpawnFailed, Started, StreamEnd, ToAgent, TreeEmpty, control, from_agent, leader_exited,
    to_agent,
};
use airlock_proto::{PROTOCOL_VERSION, PROTOCOL_VERSION_MIN};
use bytes::BytesMut;

/// Nothing in these tests takes this long unless it hangs.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A running agent; killed with its folder when dropped.
pub(crate) struct Agent {
    process: Child,
    folder: PathBuf,
    cgroup: Option<PathBuf>,
}

impl Agent {
    pub(crate) fn start() -> Self {
        Self::start_with(None)
    }

    /// With cgroup v2 if this machine lets us have a folder of it.
    pub(crate) fn start_with_cgroup() -> Option<Self> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
            let folder = PathBuf::from(format!(
                "{root}/airlock-test-{}-{number}",
                std::process::id()
            ));
            if fs::metadata(format!("{root}/cgroup.procs")).is_ok()
                && fs::create_dir(&folder).is_ok()
            {
                return Some(Self::start_with(Some(folder)));
            }
        }
        None
    }

    fn start_with(cgroup: Option<PathBuf>) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder =
            std::env::temp_dir().join(format!("airlock-agent-{}-{number}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_airlock-agent"));
        command
            .arg("serve")
            .arg("--unix")
            .arg(folder.join("agent.sock"));
        if let Some(cgroup) = &cgroup {
            command.arg("--cgroup").arg(cgroup);
        }
        let process = command.stdin(Stdio::null()).spawn().unwrap();
        let agent = Self {
            process,
            folder,
            cgroup,
        };
        wait_until("the agent listens", || {
            UnixStream::connect(agent.socket()).is_ok()
        });
        agent
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.join("agent.sock")
    }

    pub(crate) fn folder(&self) -> &PathBuf {
        &self.folder
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    pub(crate) fn raw(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        stream
    }

    /// A connection that has said hello.
    pub(crate) fn client(&self) -> Client {
        let mut client = Client {
            stream: self.raw(),
            inbox: BytesMut::new(),
            decoder: Decoder::default(),
        };
        client.hello();
        client
    }

    /// The agent's resident memory, in bytes.
    pub(crate) fn resident_bytes(&self) -> u64 {
        let statm = fs::read_to_string(format!("/proc/{}/statm", self.process.id())).unwrap();
        statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
    }

    pub(crate) fn open_descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.process.id()))
            .unwrap()
            .count()
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.process.try_wait().unwrap().is_some()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(cgroup) = &self.cgroup {
            let _ = fs::write(cgroup.join("cgroup.kill"), "1");
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.folder);
        if let Some(cgroup) = &self.cgroup {
            let start = Instant::now();
            while fs::remove_dir(cgroup).is_err() && start.elapsed() < Duration::from_secs(2) {
                remove_groups(&cgroup.join("exec"));
            }
        }
    }
}

fn remove_groups(folder: &std::path::Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let _ = fs::remove_dir(entry.path());
    }
    let _ = fs::remove_dir(folder);
}

/// Waits for a fact, up to the deadline.
pub(crate) fn wait_until(what: &str, mut fact: impl FnMut() -> bool) {
    let start = Instant::now();
    while !fact() {
        assert!(
            start.elapsed() < DEADLINE,
            "it has not come about that {what}"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whether a process exists and is not a zombie.
pub(crate) fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    inbox: BytesMut,
    decoder: Decoder<FromAgent>,
}

/// All that an exec said.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) started: Option<Started>,
    pub(crate) output: [Vec<u8>; 2],
    pub(crate) exit: Option<LeaderExited>,
    pub(crate) ends: Vec<StreamEnd>,
    pub(crate) tree: Option<TreeEmpty>,
    pub(crate) failed: Option<SpawnFailed>,
    pub(crate) error: Option<Error>,
    /// Output bytes that came behind LeaderExited.
    pub(crate) late_bytes: usize,
}

impl Report {
    pub(crate) fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.output[0]).into_owned()
    }

    pub(crate) fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.output[1]).into_owned()
    }

    /// The exit code; a panic if it was not a code.
    pub(crate) fn code(&self) -> u32 {
        match self.exit.as_ref().and_then(|e| e.status) {
            Some(leader_exited::Status::Code(code)) => code,
            _ => panic!("no exit code in {self:?}"),
        }
    }

    pub(crate) fn signal(&self) -> u32 {
        match self.exit.as_ref().and_then(|e| e.status) {
            Some(leader_exited::Status::Signal(signal)) => signal,
            _ => panic!("no signal in {self:?}"),
        }
    }
}

impl Client {
    fn hello(&mut self) -> HelloReply {
        self.send(to_agent::Body::Hello(Hello {
            protocol_min: PROTOCOL_VERSION_MIN,
            protocol_max: PROTOCOL_VERSION,
            client: "test".into(),
        }));
        match self.receive() {
            from_agent::Body::Hello(reply) => reply,
            other => panic!("not a hello: {other:?}"),
        }
    }

    pub(crate) fn send(&mut self, body: to_agent::Body) {
        let mut bytes = BytesMut::new();
        codec::encode(&ToAgent { body: Some(body) }, &mut bytes).unwrap();
        self.stream.write_all(&bytes).unwrap();
    }

    pub(crate) fn receive(&mut self) -> from_agent::Body {
        self.try_receive().expect("the agent closed the connection")
    }

    /// The next frame; None if the agent closed the connection.
    pub(crate) fn try_receive(&mut self) -> Option<from_agent::Body> {
        loop {
            if let Some(frame) = self.decoder.next(&mut self.inbox).unwrap() {
                return Some(frame.body.unwrap());
            }
            let mut chunk = [0; 64 << 10];
            match self.stream.read(&mut chunk) {
                Ok(0) => return None,
                Ok(length) => self.inbox.extend_from_slice(&chunk[..length]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("nothing came from the agent: {error}"),
            }
        }
    }

    /// Starts an exec and takes all it says.
    pub(crate) fn run(&mut self, request: ExecStart) -> Report {
        self.send(to_agent::Body::ExecStart(request));
        self.finish()
    }

    /// Takes all that the exec on this connection says.
    pub(crate) fn finish(&mut self) -> Report {
        let mut report = Report::default();
        while self.step(&mut report) {}
        report
    }

    /// Takes the next thing the exec says; false if it was the last.
    pub(crate) fn step(&mut self, report: &mut Report) -> bool {
        match self.receive() {
            from_agent::Body::Started(started) => report.started = Some(started),
            from_agent::Body::Output(output) => {
                let stream = output.stream as usize;
                if report.output[stream].is_empty() && output.offset > 0 {
                    // An attach in the middle of a stream.
                } else {
                    assert_eq!(
                        output.offset,
                        report.output[stream].len() as u64,
                        "no gap, no overlap"
                    );
                }
                if report.exit.is_some() {
                    report.late_bytes += output.data.len();
                }
                report.output[stream].extend_from_slice(&output.data);
            }
            from_agent::Body::LeaderExited(exit) => report.exit = Some(exit),
            from_agent::Body::StreamEnd(end) => report.ends.push(end),
            from_agent::Body::TreeEmpty(tree) => report.tree = Some(tree),
            from_agent::Body::StdinCredit(_) => {}
            from_agent::Body::ExecDone(_) => return false,
            from_agent::Body::SpawnFailed(failed) => {
                report.failed = Some(failed);
                return false;
            }
            from_agent::Body::Error(error) => {
                report.error = Some(error);
                return false;
            }
            other => panic!("not a frame of an exec: {other:?}"),
        }
        true
    }

    pub(crate) fn control(&mut self, request: control::Request) -> from_agent::Body {
        self.send(to_agent::Body::Control(Control {
            request: Some(request),
        }));
        self.receive()
    }

    pub(crate) fn control_reply(&mut self, request: control::Request) -> ControlReply {
        match self.control(request) {
            from_agent::Body::Control(reply) => reply,
            other => panic!("not a control reply: {other:?}"),
        }
    }
}

/// An exec of `argv` under a fresh id, as the user that runs the tests.
pub(crate) fn exec(argv: &[&str]) -> ExecStart {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    ExecStart {
        id: format!("e{number}"),
        argv: argv.iter().map(|a| a.as_bytes().to_vec().into()).collect(),
        user: me(),
        cwd: "/".into(),
        ..ExecStart::default()
    }
}

/// An exec of a shell script.
pub(crate) fn sh(script: &str) -> ExecStart {
    exec(&["/bin/sh", "-c", script])
}

pub(crate) fn me() -> String {
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    format!("{}:{}", uid.as_raw(), gid.as_raw())
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

pub(crate) fn variable(name: &str, value: &str) -> EnvVar {
    EnvVar {
        name: name.as_bytes().to_vec().into(),
        value: value.as_bytes().to_vec().into(),
    }
}
