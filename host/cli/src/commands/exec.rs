//! `airlock exec`: a command in a sandbox that runs.

use airlock_sandbox::{Paths, Registry, stop};
use anyhow::bail;

use crate::commands::{POST_MORTEM_TIMEOUT, open_report, write_report};
use crate::execute::{End, execute};
use crate::hiargs;
use crate::lowargs::ExecArgs;
use crate::signals::Signals;

pub(crate) async fn exec(args: ExecArgs) -> anyhow::Result<u8> {
    let env_files = hiargs::check_early(&args.exec, &args.command)?;
    let dir = Registry::open(&Paths::from_env()?)?.find(&args.name)?;
    let (session, record) = stop::attach(&dir)?;
    let report = open_report(args.report)?;
    let mut signals = Signals::catch()?;
    let execution = hiargs::execution(args.exec, env_files, args.command, &record.defaults)?;
    let outcome = execute(&session, execution, &mut signals).await?;
    write_report(report, record.engine.as_str(), None, &outcome)?;
    if let End::Lost(lost) = &outcome.end {
        match stop::end_within(&dir, POST_MORTEM_TIMEOUT).await {
            Some(cause) => bail!("the VM ended while the command ran: {cause}"),
            None => bail!("{lost}"),
        }
    }
    Ok(outcome.status)
}
