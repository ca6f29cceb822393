//! `airlock run`: boot, run, stream, remove.

use airlock_sandbox::{Name, Paths};
use anyhow::bail;

use crate::commands::{POST_MORTEM_TIMEOUT, boot, open_report, write_report};
use crate::execute::{End, execute};
use crate::hiargs;
use crate::lowargs::{RunArgs, SessionOptions};
use crate::signals::Signals;

pub(crate) async fn run(args: RunArgs, verbose: bool) -> anyhow::Result<u8> {
    let env_files = hiargs::check_early(&args.exec, &args.command, false)?;
    let paths = Paths::from_env()?;
    let report = open_report(args.report)?;
    let mut signals = Signals::catch()?;
    let spec = hiargs::launch_spec(args.machine, Name::random(), true);
    let mut sandbox = match boot(&paths, &spec, &mut signals, verbose).await? {
        Ok(sandbox) => sandbox,
        Err(status) => return Ok(status),
    };
    let execution = hiargs::execution(
        args.exec,
        env_files,
        args.command,
        &SessionOptions::default(),
        &sandbox.record.defaults,
    )?;
    let outcome = execute(&sandbox.session.clone(), execution, &mut signals).await?;
    write_report(
        report,
        sandbox.record.engine.as_str(),
        sandbox.record.ready_ms,
        &outcome,
    )?;
    if let End::Lost(lost) = &outcome.end {
        match sandbox.end_within(POST_MORTEM_TIMEOUT).await {
            Some(cause) => bail!("the VM ended while the command ran: {cause}"),
            None => bail!("{lost}"),
        }
    }
    sandbox.remove()?;
    Ok(outcome.status)
}
