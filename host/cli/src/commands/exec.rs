//! `airlock exec` and `airlock shell`: a command in a sandbox that runs.

use std::io::{IsTerminal, stdin};

use airlock_sandbox::client::{Command, ExecError, Session};
use airlock_sandbox::{Paths, Registry, stop};
use anyhow::{bail, ensure};

use crate::commands::sessions;
use crate::commands::{POST_MORTEM_TIMEOUT, open_report, write_report};
use crate::events;
use crate::execute::{End, execute};
use crate::exit;
use crate::hiargs::{self, What};
use crate::lowargs::{ExecArgs, ExecOptions, SessionOptions, ShellArgs};
use crate::output::{print, tell};
use crate::signals::Signals;

pub(crate) async fn exec(args: ExecArgs) -> anyhow::Result<u8> {
    let env_files = match args.session.attach {
        None => hiargs::check_early(&args.exec, &args.command, args.session.detach)?,
        Some(_) => hiargs::EnvFiles::default(),
    };
    let dir = Registry::open(&Paths::from_env()?)?.find(&args.name)?;
    let (session, record) = stop::attach(&dir)?;
    let report = open_report(args.report)?;
    let mut signals = Signals::catch()?;
    let execution = match &args.session.attach {
        Some(id) => {
            let info = sessions::find(&session, &args.name, id).await?;
            let from = args.session.from.unwrap_or_default();
            hiargs::attachment(&args.exec, id, from, info.tty)?
        }
        None => {
            let defaults = &record.defaults;
            hiargs::execution(args.exec, env_files, args.command, &args.session, defaults)?
        }
    };
    let json = execution.streams.json;
    let execution = match execution.what {
        What::Start(command) if args.session.detach => {
            return start_detached(&session, *command, json).await;
        }
        _ => execution,
    };
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

async fn start_detached(session: &Session, command: Command, json: bool) -> anyhow::Result<u8> {
    match session.exec_detached(command).await {
        Ok(started) => {
            let line = match json {
                true => events::started(&started.id, started.pid).to_string(),
                false => started.id,
            };
            print(&format!("{line}\n"))?;
            Ok(0)
        }
        Err(ExecError::Spawn(failure)) => {
            tell!("airlock: {failure}");
            if json {
                print(&format!("{}\n", events::not_started(&failure)))?;
            }
            Ok(exit::of_spawn_failure(&failure))
        }
        Err(error) => Err(error.into()),
    }
}

/// The image's shell, on our terminal.
pub(crate) async fn shell(args: ShellArgs) -> anyhow::Result<u8> {
    ensure!(
        stdin().is_terminal(),
        "a shell needs a terminal, and stdin is none: use airlock exec -i {} sh",
        args.name
    );
    exec(ExecArgs {
        exec: ExecOptions {
            env: args.env,
            workdir: args.workdir,
            user: args.user,
            record: args.record,
            interactive: true,
            tty: true,
            ..ExecOptions::default()
        },
        session: SessionOptions::default(),
        report: None,
        name: args.name,
        command: Vec::new(),
    })
    .await
}
