//! The oracle: random commands under the agent and the same commands under the operating system, compared. They write
//! up to 1 MiB to both streams in pieces of any size, exit or die by signals, leave children behind that hold their
//! streams, are killed or timed out. Not one byte and not one exit may differ.
//!
//! Environment:
//! - `AIRLOCK_SEED`: replays; without it a new one is drawn, and printed.
//! - `AIRLOCK_ORACLE_RUNS`, `AIRLOCK_ORACLE_VM_RUNS`: how many commands, against the agent as a process and in a VM.
//! - `AIRLOCK_ORACLE_ONLY`: this run only, as often as the number of runs says: a failure that needs luck.
//! - `AIRLOCK_ORACLE_JOBS`: how many at once.
//! - `AIRLOCK_ORACLE_SOCKET`: the `vsock.sock` of a VM that runs already, in the stead of one of the test's own.

mod agent;
mod drive;
mod judge;

use std::io::Write;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use airlock_client::Address;
use airlock_tests::Product;
use airlock_tests::oracle_plan::Plan;

use agent::Agent;
use drive::Driver;

/// Runs of each kind where nothing else is asked for: what two cores do in half a minute.
const RUNS: u64 = 4000;
const VM_RUNS: u64 = 200;
/// Differences after which there is no use in going on.
const MAX_FAILURES: usize = 5;
/// The program that is run, here; a VM gets a copy.
const WORK: &str = env!("CARGO_BIN_EXE_airlock-oracle-work");

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{name}={text:?} is no number")))
}

fn seed() -> u64 {
    number("AIRLOCK_SEED").unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        now.map_or(1, |d| d.as_nanos() as u64 % 1_000_000_000_000)
    })
}

/// Past libtest's capturing: the seed belongs into the log of a run that passes, too.
fn say(line: &str) {
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

#[derive(Default)]
struct Tally {
    next: AtomicU64,
    bytes: AtomicU64,
    failures: Mutex<Vec<String>>,
}

/// Where the runs go.
struct Target<'a> {
    name: &'a str,
    address: Address,
    /// The path of [`WORK`] there.
    work: PathBuf,
    user: String,
}

fn compare(target: &Target<'_>, runs: u64) {
    let seed = seed();
    let only = number("AIRLOCK_ORACLE_ONLY");
    let cores = std::thread::available_parallelism().map_or(2, |n| n.get() as u64);
    // Twice the cores: many a run sleeps.
    let jobs = number("AIRLOCK_ORACLE_JOBS").unwrap_or(2 * cores).max(1);
    say(&format!(
        "oracle, {}: AIRLOCK_SEED={seed}, {runs} runs",
        target.name
    ));
    let tally = Tally::default();
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| work(target, seed, runs, only, &tally));
        }
    });
    let seconds = start.elapsed().as_secs_f64();
    let failures = tally.failures.into_inner().expect("no thread panicked");
    let done = tally.next.load(Ordering::Relaxed).min(runs);
    say(&format!(
        "oracle, {}: AIRLOCK_SEED={seed}, {done} runs in {seconds:.1} s ({:.0} a second), {} MiB compared, {} differ",
        target.name,
        done as f64 / seconds,
        tally.bytes.load(Ordering::Relaxed) >> 20,
        failures.len()
    ));
    assert!(
        failures.is_empty(),
        "AIRLOCK_SEED={seed}\n{}",
        failures.join("\n")
    );
}

fn work(target: &Target<'_>, seed: u64, runs: u64, only: Option<u64>, tally: &Tally) {
    let mut driver = Driver::new(target);
    loop {
        let turn = tally.next.fetch_add(1, Ordering::Relaxed);
        let full = tally.failures.lock().expect("no thread panicked").len() >= MAX_FAILURES;
        if turn >= runs || full {
            return;
        }
        let run = only.unwrap_or(turn);
        let plan = Plan::new(seed, run);
        let truth = drive::under_the_os(seed, run);
        let seen = driver.under_the_agent(seed, run, &plan);
        let bytes = truth.streams.iter().map(|s| s.len() as u64).sum();
        tally.bytes.fetch_add(bytes, Ordering::Relaxed);
        let verdict = seen.and_then(|seen| judge::judge(&plan, &truth, &seen));
        if let Err(what) = verdict {
            let line = format!("run {run}: {what}; AIRLOCK_ORACLE_ONLY={run}; {plan:?}");
            say(&line);
            let mut failures = tally.failures.lock().expect("no thread panicked");
            failures.push(line);
        }
    }
}

#[test]
fn the_agent_as_a_process_differs_in_nothing_from_the_operating_system() {
    let runs = number("AIRLOCK_ORACLE_RUNS").unwrap_or(RUNS);
    let agent = Agent::start();
    let target = Target {
        name: "agent as a process",
        address: Address::Unix(agent.socket()),
        work: WORK.into(),
        user: agent::me(),
    };
    compare(&target, runs);
    agent.expect_nothing_left();
}

#[test]
fn the_agent_in_a_vm_differs_in_nothing_from_the_operating_system() {
    let runs = number("AIRLOCK_ORACLE_VM_RUNS").unwrap_or(VM_RUNS);
    if let Some(socket) = std::env::var_os("AIRLOCK_ORACLE_SOCKET") {
        return compare_in_vm(socket.into(), runs);
    }
    let product = Product::new();
    product
        .airlock(["up", "oracle", "--image", "busybox"])
        .expect_code(0);
    compare_in_vm(product.run_root().join("oracle/vsock.sock"), runs);
    product.airlock(["rm", "-f", "oracle"]).expect_code(0);
    product.expect_nothing_left();
}

fn compare_in_vm(socket: PathBuf, runs: u64) {
    let target = Target {
        name: "agent in a VM",
        address: Address::hybrid(socket),
        work: "/tmp/airlock-oracle-work".into(),
        user: String::new(),
    };
    Driver::new(&target).install(std::path::Path::new(WORK));
    compare(&target, runs);
}
