//! What is measured, one function a row. Both machines take turns within a round; a row is the median over the rounds.

use std::time::{Duration, Instant};

use airlock_client::rpc::Connection;
use airlock_client::{Bytes, Command, Event};

use crate::machine::{self, Machine};
use crate::{Options, facts};

/// One line of the table. `None`: this machine has no such figure.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) ours: Option<f64>,
    pub(crate) baseline: Option<f64>,
    /// Whether a smaller figure is the better one.
    pub(crate) less_is_better: bool,
}

const PINGS: usize = 200;
const EXECS: usize = 100;
const CONNECTS: usize = 100;
/// Through each stream, in a round.
const BULK_BYTES: u64 = 64 << 20;

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Runs everything.
pub(crate) async fn measure(options: &Options) -> Result<Vec<Row>, String> {
    let mut rows = start_rows(options).await?;
    let ours = machine::ours(options).await?;
    let baseline = baseline(options).await?;
    let pair = [&ours, &baseline];

    let mut figures: [Vec<[f64; 2]>; 7] = Default::default();
    for round in 0..options.rounds {
        eprintln!("round {} of {}", round + 1, options.rounds);
        let mut measured = [[0.0; 2]; 7];
        for (side, machine) in pair.into_iter().enumerate() {
            measured[0][side] = ping(machine).await?;
            measured[1][side] = exec(machine).await?;
            measured[2][side] = spawn_floor(machine).await?;
            measured[3][side] = stdout(machine).await?;
            measured[4][side] = stdin(machine).await?;
            measured[5][side] = connect(machine).await?;
            measured[6][side] = measured[1][side] / measured[2][side];
        }
        for (all, one) in figures.iter_mut().zip(measured) {
            all.push(one);
        }
    }
    let mut row = |name, unit, index: usize, less_is_better| {
        let side = |side: usize| median(figures[index].iter().map(|pair| pair[side]).collect());
        rows.push(Row {
            name,
            unit,
            ours: side(0),
            baseline: side(1),
            less_is_better,
        });
    };
    row("ping, 64 bytes there and back", "us", 0, true);
    row("exec of a static `true`", "us", 1, true);
    row(
        "spawn and reap of the same `true` by the agent",
        "us",
        2,
        true,
    );
    row("exec over its spawn floor", "x", 6, true);
    row("stdout of one exec", "MiB/s", 3, false);
    row("stdin of one exec", "MiB/s", 4, false);
    row("connect, hello, close", "us", 5, true);
    if facts::kvm_exits().is_some() && options.engine == "kvm" {
        rows.push(exits_per_ping(&ours, &baseline).await?);
    }
    rows.push(Row {
        name: "memory of the VMM beyond the guest's",
        unit: "MiB",
        ours: memory(options, &ours),
        baseline: if options.engine == "kvm" {
            memory(options, &baseline)
        } else {
            None
        },
        less_is_better: true,
    });
    Ok(rows)
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn memory(options: &Options, machine: &Machine) -> Option<f64> {
    facts::own_memory_kib(machine.pid(), options.memory_mib).map(|kib| kib as f64 / 1024.0)
}

async fn baseline(options: &Options) -> Result<Machine, String> {
    if options.engine == "kvm" {
        machine::qemu_vhost(options).await
    } else {
        machine::process(options).await
    }
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
async fn start_rows(options: &Options) -> Result<Vec<Row>, String> {
    let mut times = [Vec::new(), Vec::new()];
    let mut exits = [Vec::new(), Vec::new()];
    for round in 0..options.rounds {
        eprintln!("start {} of {}", round + 1, options.rounds);
        // debugfs counts the VMs that live, so each is counted while it does, and alone.
        let ours = machine::ours(options).await?;
        times[0].push(ours.ready.as_secs_f64() * 1e3);
        exits[0].extend(facts::kvm_exits().map(|n| n as f64));
        drop(ours);
        if options.engine == "kvm" {
            let other = machine::qemu_vhost(options).await?;
            times[1].push(other.ready.as_secs_f64() * 1e3);
            exits[1].extend(facts::kvm_exits().map(|n| n as f64));
        } else {
            times[1].push(machine::qemu_alone(options)?.as_secs_f64() * 1e3);
        }
    }
    let [ours, baseline] = times.map(median);
    let mut rows = vec![Row {
        name: "start of the process to the agent's hello",
        unit: "ms",
        ours,
        baseline,
        less_is_better: true,
    }];
    if options.engine == "kvm" {
        let [ours, baseline] = exits.map(median);
        rows.push(Row {
            name: "KVM exits until then",
            unit: "",
            ours,
            baseline,
            less_is_better: true,
        });
    }
    Ok(rows)
}

async fn ping(machine: &Machine) -> Result<f64, String> {
    let payload = Bytes::from_static(&[0x5a; 64]);
    machine.session.ping(payload.clone()).await.map_err(text)?;
    let mut times = Vec::with_capacity(PINGS);
    for _ in 0..PINGS {
        let start = Instant::now();
        machine.session.ping(payload.clone()).await.map_err(text)?;
        times.push(micros(start.elapsed()));
    }
    Ok(median(times).unwrap_or_default())
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
async fn exits_per_ping(ours: &Machine, baseline: &Machine) -> Result<Row, String> {
    let mut sides = [None, None];
    for (side, machine) in sides.iter_mut().zip([ours, baseline]) {
        let before = facts::kvm_exits().unwrap_or_default();
        ping(machine).await?;
        let after = facts::kvm_exits().unwrap_or_default();
        *side = Some(after.saturating_sub(before) as f64 / (PINGS + 1) as f64);
    }
    let [ours, baseline] = sides;
    Ok(Row {
        name: "KVM exits per ping",
        unit: "",
        ours,
        baseline,
        less_is_better: true,
    })
}

async fn exec(machine: &Machine) -> Result<f64, String> {
    let mut times = Vec::with_capacity(EXECS);
    for warm_up in [true, false] {
        for _ in 0..if warm_up { 5 } else { EXECS } {
            let start = Instant::now();
            let output = machine
                .session
                .output(Command::new("true"), 1024)
                .await
                .map_err(text)?;
            let took = micros(start.elapsed());
            if !output.report.success() {
                return Err(format!("`true` ended otherwise: {:?}", output.report));
            }
            if !warm_up {
                times.push(took);
            }
        }
    }
    Ok(median(times).unwrap_or_default())
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
async fn spawn_floor(machine: &Machine) -> Result<f64, String> {
    let times = machine
        .session
        .spawn_probe("/bin/true", 100)
        .await
        .map_err(text)?;
    Ok(median(times.into_iter().map(|ns| ns as f64 / 1e3).collect()).unwrap_or_default())
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn rate(bytes: u64, took: Duration) -> f64 {
    bytes as f64 / (1 << 20) as f64 / took.as_secs_f64()
}

async fn stdout(machine: &Machine) -> Result<f64, String> {
    let count = BULK_BYTES >> 16;
    let command = Command::new("dd").args(["if=/dev/zero", "bs=65536", &format!("count={count}")]);
    let start = Instant::now();
    let mut exec = machine.session.exec(command).await.map_err(text)?;
    let mut received = 0_u64;
    while let Some(event) = exec.next().await.map_err(text)? {
        if let Event::Output {
            stream: airlock_client::Stream::Stdout,
            data,
            ..
        } = event
        {
            received += data.len() as u64;
        }
    }
    let took = start.elapsed();
    if received != BULK_BYTES {
        return Err(format!("{received} of {BULK_BYTES} bytes came out of dd"));
    }
    Ok(rate(received, took))
}

async fn stdin(machine: &Machine) -> Result<f64, String> {
    let command = Command::new("dd")
        .args(["of=/dev/null", "bs=65536"])
        .stdin();
    let start = Instant::now();
    let mut exec = machine.session.exec(command).await.map_err(text)?;
    let mut writer = exec.take_stdin().ok_or("no stdin")?;
    let chunk = Bytes::from(vec![0; 64 << 10]);
    let write = async {
        let mut left = BULK_BYTES;
        while left > 0 {
            let mut data =
                chunk.slice(..usize::try_from(left).unwrap_or(usize::MAX).min(chunk.len()));
            left -= data.len() as u64;
            while !data.is_empty() {
                writer.write(&mut data).await.map_err(text)?;
            }
        }
        writer.finish().await.map_err(text)
    };
    let (written, report) = tokio::join!(write, exec.wait());
    written?;
    if !report.success() {
        return Err(format!("dd ended otherwise: {report:?}"));
    }
    Ok(rate(BULK_BYTES, start.elapsed()))
}

async fn connect(machine: &Machine) -> Result<f64, String> {
    let mut times = Vec::with_capacity(CONNECTS);
    for _ in 0..CONNECTS {
        let start = Instant::now();
        let mut connection = Connection::connect(&machine.address).await.map_err(text)?;
        connection.hello().await.map_err(text)?;
        drop(connection);
        times.push(micros(start.elapsed()));
    }
    Ok(median(times).unwrap_or_default())
}
