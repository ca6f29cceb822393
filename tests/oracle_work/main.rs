//! The program that the oracle test runs, once under the agent and once under the operating system: it does what its
//! plan says. `airlock-oracle-work SEED RUN agent|os`; under `os` a leader that would never end exits with 0.
//! `hold` instead is the child that outlives it.

use std::process::{Command, ExitCode, Stdio};
use std::thread::sleep;
use std::time::Duration;

use airlock_tests::oracle_plan::{End, Plan, Step};
use rustix::fd::BorrowedFd;
use rustix::io::{self, Errno};
use rustix::process::{Resource, Rlimit, Signal};

/// A leader that nobody ends ends itself after this long, with a code that no plan has a reason for.
const NEVER: Duration = Duration::from_secs(60);
/// How long a holder looks for the leader's end; it looks this often.
const LEADER_LOOKS: u32 = 300_000;
const LEADER_LOOK: Duration = Duration::from_micros(200);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize| arguments.get(index).and_then(|a| a.parse::<u64>().ok());
    let (Some(seed), Some(run), Some(mode)) = (number(0), number(1), arguments.get(2)) else {
        eprintln!("usage: airlock-oracle-work SEED RUN agent|os");
        return ExitCode::from(2);
    };
    // A core dump is nobody's business here, and slow.
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    let _ = rustix::process::setrlimit(Resource::Core, none);
    let plan = Plan::new(seed, run);
    if let (true, Some(leader)) = (mode == "hold", number(3)) {
        hold(&plan, leader);
        return ExitCode::SUCCESS;
    }
    lead(&plan, &arguments);
    match plan.end {
        End::Code(code) => ExitCode::from(code),
        End::Signal(number) => {
            if let Some(signal) = Signal::from_named_raw(number.into()) {
                let _ = rustix::process::kill_process(rustix::process::getpid(), signal);
            }
            sleep(NEVER);
            ExitCode::from(99)
        }
        End::Never if mode == "os" => ExitCode::SUCCESS,
        End::Never => {
            sleep(NEVER);
            ExitCode::from(98)
        }
    }
}

fn lead(plan: &Plan, arguments: &[String]) {
    let mut offsets = [0; 2];
    let mut data = Vec::new();
    for step in &plan.steps {
        match *step {
            Step::Write { stream, bytes } => {
                data.resize(bytes as usize, 0);
                plan.fill(stream, offsets[stream], &mut data);
                write_all(stream, &data);
                offsets[stream] += bytes;
            }
            Step::Pause { us } => sleep(Duration::from_micros(us)),
            Step::Close { stream } => close(stream),
            Step::Fork => fork(plan, arguments),
        }
    }
}

fn close(stream: usize) {
    if let Ok(null) = std::fs::File::options().write(true).open("/dev/null") {
        let _ = match stream {
            0 => rustix::stdio::dup2_stdout(&null),
            _ => rustix::stdio::dup2_stderr(&null),
        };
    }
}

/// Nobody waits for the child: outliving its parent is what it is for.
fn fork(plan: &Plan, arguments: &[String]) {
    let held = |stream: usize| match plan.holder {
        Some(holder) if holder.streams[stream] => Stdio::inherit(),
        _ => Stdio::null(),
    };
    let child = Command::new("/proc/self/exe")
        .args([&arguments[0], &arguments[1], "hold"])
        .arg(std::process::id().to_string())
        .stdin(Stdio::null())
        .stdout(held(0))
        .stderr(held(1))
        .spawn();
    if child.is_err() {
        std::process::exit(97);
    }
}

fn hold(plan: &Plan, leader: u64) {
    let Some(holder) = plan.holder else { return };
    let is_orphan = || {
        let parent = rustix::process::getppid();
        parent.is_none_or(|pid| u64::from(pid.as_raw_nonzero().get().unsigned_abs()) != leader)
    };
    for _ in 0..LEADER_LOOKS {
        if is_orphan() {
            break;
        }
        sleep(LEADER_LOOK);
    }
    for (stream, bytes) in holder.writes.into_iter().enumerate() {
        let mut data = vec![0; bytes as usize];
        plan.fill(stream, plan.leader_bytes(stream), &mut data);
        write_all(stream, &data);
    }
    sleep(Duration::from_micros(holder.stays_us));
}

/// Nobody reading any more is no failure of ours: the other side's bytes are counted, not ours.
fn write_all(stream: usize, mut data: &[u8]) {
    let fd: BorrowedFd<'_> = match stream {
        0 => rustix::stdio::stdout(),
        _ => rustix::stdio::stderr(),
    };
    while !data.is_empty() {
        match io::write(fd, data) {
            Ok(written) => data = &data[written..],
            Err(Errno::INTR) => {}
            Err(_) => return,
        }
    }
}
