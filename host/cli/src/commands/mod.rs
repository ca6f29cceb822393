//! One module for each thing that `airlock` does.

pub(crate) mod cp;
pub(crate) mod doctor;
pub(crate) mod exec;
pub(crate) mod forward;
pub(crate) mod generate;
pub(crate) mod list;
pub(crate) mod logs;
pub(crate) mod run;
pub(crate) mod sessions;
pub(crate) mod stop;
pub(crate) mod up;

use std::fs;
use std::path::Path;
use std::time::Duration;

use airlock_sandbox::{LaunchSpec, Launched, Paths, launch};
use anyhow::Context;
use serde_json::{Value, json};

use crate::execute::Outcome;
use crate::progress;
use crate::signals::Signals;

/// How long a VM whose connection was lost may take to end and say why. A guest that powers off closes its sockets well
/// before its last word, on a busy host by seconds.
const POST_MORTEM_TIMEOUT: Duration = Duration::from_secs(10);

/// A sandbox, or the signal that came while it was booting; then nothing is left of it.
async fn boot(
    paths: &Paths,
    spec: &LaunchSpec,
    signals: &mut Signals,
    verbose: bool,
) -> anyhow::Result<Result<Launched, u8>> {
    let launched = tokio::select! {
        launched = progress::shown("booting the sandbox", launch(paths, spec)) => launched?,
        number = signals.end() => return Ok(Err(crate::exit::of_signal(number))),
    };
    let engine = launched.engine.engine.as_str();
    if launched.engine.fallback || verbose {
        eprintln!("airlock: engine {engine}: {}", launched.engine.why);
    }
    if verbose {
        let ready_ms = launched.record.ready_ms.unwrap_or_default();
        eprintln!(
            "airlock: sandbox {} with kernel {} was ready in {ready_ms} ms",
            launched.dir.name(),
            launched.record.kernel
        );
    }
    Ok(Ok(launched))
}

/// Writes what `--report` asks for.
fn write_report(
    file: Option<&Path>,
    engine: &str,
    ready_ms: Option<u64>,
    outcome: &Outcome,
) -> anyhow::Result<()> {
    let Some(file) = file else {
        return Ok(());
    };
    let report: Value = json!({
        "engine": engine,
        "ready_ms": ready_ms,
        "exec_ms": u64::try_from(outcome.took.as_millis()).unwrap_or(u64::MAX),
        "status": outcome.status,
        "exit": outcome.json(),
    });
    fs::write(file, format!("{report:#}\n"))
        .with_context(|| format!("cannot write the report {}", file.display()))
}
