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

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use airlock_sandbox::{LaunchSpec, Launched, Paths, launch};
use anyhow::Context;
use serde_json::{Value, json};

use crate::execute::Outcome;
use crate::output::tell;
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
        tell!("airlock: engine {engine}: {}", launched.engine.why);
    }
    if verbose {
        let ready_ms = launched.record.ready_ms.unwrap_or_default();
        tell!(
            "airlock: sandbox {} with kernel {} was ready in {ready_ms} ms",
            launched.dir.name(),
            launched.record.kernel
        );
    }
    Ok(Ok(launched))
}

/// The file that `--report` names, empty until there is something to say.
#[derive(Debug)]
struct Report {
    path: PathBuf,
    file: File,
}

/// Makes it before the command runs: one that cannot be written is to be known before an hour's work, not after it.
fn open_report(path: Option<PathBuf>) -> anyhow::Result<Option<Report>> {
    path.map(|path| {
        File::create(&path)
            .with_context(|| cannot_write(&path))
            .map(|file| Report { path, file })
    })
    .transpose()
}

fn cannot_write(report: &Path) -> String {
    format!("cannot write the report {}", report.display())
}

/// Writes what `--report` asks for.
fn write_report(
    report: Option<Report>,
    engine: &str,
    ready_ms: Option<u64>,
    outcome: &Outcome,
) -> anyhow::Result<()> {
    let Some(Report { path, mut file }) = report else {
        return Ok(());
    };
    let report: Value = json!({
        "engine": engine,
        "ready_ms": ready_ms,
        "exec_ms": u64::try_from(outcome.took.as_millis()).unwrap_or(u64::MAX),
        "status": outcome.status,
        "exit": outcome.json(),
    });
    file.write_all(format!("{report:#}\n").as_bytes())
        .with_context(|| cannot_write(&path))
}
