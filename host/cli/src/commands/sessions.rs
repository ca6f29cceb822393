//! Commands that run in a sandbox apart from us: list, signal, wait, and what they have written.

use airlock_sandbox::client::proto::v1::{ExecInfo, SignalTarget};
use airlock_sandbox::client::{
    Attach, ControlError, Ended, Event, ExecError, RpcError, Session, Status,
};
use airlock_sandbox::{Name, Paths, Registry, RunDir, stop};
use anyhow::{anyhow, bail};
use serde_json::json;

use crate::commands::POST_MORTEM_TIMEOUT;
use crate::commands::list::{age, table};
use crate::commands::logs::harmless;
use crate::events;
use crate::exit;
use crate::lowargs::{KillArgs, WaitArgs};
use crate::output::{Piece, Sinks, print};
use crate::signals;

/// Longest command line in a list for people.
const MAX_LISTED_CHARS: usize = 60;

fn sandbox(name: &Name) -> anyhow::Result<(RunDir, Session)> {
    let dir = Registry::open(&Paths::from_env()?)?.find(name)?;
    let (session, _) = stop::attach(&dir)?;
    Ok((dir, session))
}

/// Says of an unknown id where to look, and leaves other errors as they are.
fn about_id(error: ControlError, name: &Name, id: &str) -> anyhow::Error {
    match error {
        ControlError::Rpc(RpcError::Agent(error)) if is_unknown(&error) => unknown(name, id),
        error => error.into(),
    }
}

pub(super) fn is_unknown(error: &airlock_sandbox::client::AgentError) -> bool {
    error.code == airlock_sandbox::client::proto::v1::ErrorCode::ErrorNotFound
}

pub(super) fn unknown(name: &Name, id: &str) -> anyhow::Error {
    anyhow!("sandbox {name} knows no command {id:?}; to see them, run: airlock ps --execs {name}")
}

/// One command, by its id.
pub(super) async fn find(session: &Session, name: &Name, id: &str) -> anyhow::Result<ExecInfo> {
    let execs = session.list().await?;
    let found = execs.into_iter().find(|info| info.id == id);
    found.ok_or_else(|| unknown(name, id))
}

pub(crate) async fn list(name: &Name, as_json: bool) -> anyhow::Result<u8> {
    let (_, session) = sandbox(name)?;
    let mut execs = session.list().await?;
    execs.sort_by_key(|info| info.start_unix_ns);
    if as_json {
        let list: Vec<_> = execs.iter().map(in_json).collect();
        print(&format!("{:#}\n", json!(list)))?;
        return Ok(0);
    }
    let mut rows =
        vec![["ID", "PID", "STATE", "AGE", "STDOUT", "STDERR", "COMMAND"].map(str::to_owned)];
    rows.extend(execs.iter().map(row));
    print(&table(&rows))?;
    Ok(0)
}

fn ended(info: &ExecInfo) -> Option<Ended> {
    info.exit.as_ref().and_then(Ended::from_message)
}

fn in_json(info: &ExecInfo) -> serde_json::Value {
    let argv: Vec<_> = info
        .argv
        .iter()
        .map(|arg| String::from_utf8_lossy(arg))
        .collect();
    json!({
        "id": info.id, "pid": info.pid, "argv": argv, "tty": info.tty, "running": info.running,
        "start_unix_ms": info.start_unix_ns / 1_000_000,
        "stdout_bytes": info.stdout_bytes, "stderr_bytes": info.stderr_bytes,
        "tree_empty": info.tree_empty, "exit": ended(info).map(|ended| events::ended_json(&ended)),
    })
}

fn row(info: &ExecInfo) -> [String; 7] {
    let state = match ended(info) {
        _ if info.running => "running".to_owned(),
        None => "?".to_owned(),
        Some(ended) => {
            let status = match ended.status {
                Status::Code(code) => format!("exit {code}"),
                Status::Signal { number, .. } => signals::name(number),
            };
            match events::cause(ended.cause) {
                "normal" => status,
                cause => format!("{status} ({cause})"),
            }
        }
    };
    let argv = info.argv.join(&b' ');
    let command: String = harmless(&argv)
        .chars()
        .filter(|c| *c != '\n' && *c != '\t')
        .take(MAX_LISTED_CHARS)
        .collect();
    [
        harmless(info.id.as_bytes()),
        info.pid.to_string(),
        state,
        age(info.start_unix_ns / 1_000_000),
        info.stdout_bytes.to_string(),
        info.stderr_bytes.to_string(),
        command,
    ]
}

pub(crate) async fn kill(args: &KillArgs) -> anyhow::Result<u8> {
    let (_, session) = sandbox(&args.name)?;
    let target = if args.tree {
        SignalTarget::TargetTree
    } else {
        SignalTarget::TargetLeader
    };
    let sent = session.signal(&args.id, args.signal, target).await;
    sent.map_err(|error| about_id(error, &args.name, &args.id))?;
    Ok(0)
}

pub(crate) async fn wait(args: &WaitArgs) -> anyhow::Result<u8> {
    let (dir, session) = sandbox(&args.name)?;
    let info = match session.wait(&args.id).await {
        Ok(info) => info,
        Err(ControlError::Rpc(RpcError::Lost(lost))) => {
            match stop::end_within(&dir, POST_MORTEM_TIMEOUT).await {
                Some(cause) => bail!("the VM ended while the command ran: {cause}"),
                None => bail!("the command's end is not known: {lost}"),
            }
        }
        Err(error) => return Err(about_id(error, &args.name, &args.id)),
    };
    match ended(&info) {
        Some(ended) => Ok(exit::of_ended(&ended)),
        None => bail!("the agent does not say how command {:?} ended", args.id),
    }
}

/// Prints what is kept, as an observer: whoever is attached stays so.
pub(crate) async fn logs(name: &Name, id: &str, follow: bool) -> anyhow::Result<u8> {
    let (_, session) = sandbox(name)?;
    let info = find(&session, name, id).await?;
    let until = [info.stdout_bytes, info.stderr_bytes];
    let mut exec = match session.attach(Attach::new(id).observe()).await {
        Ok(exec) => exec,
        Err(ExecError::Agent(error)) if is_unknown(&error) => return Err(unknown(name, id)),
        Err(error) => return Err(error.into()),
    };
    let sinks = Sinks::new([0; 2]);
    let mut seen = [0; 2];
    let is_enough = |seen: [u64; 2]| !follow && seen[0] >= until[0] && seen[1] >= until[1];
    while !is_enough(seen) {
        match exec.next().await? {
            Some(Event::Output {
                stream,
                offset,
                data,
            }) => {
                seen[stream as usize] = offset + data.len() as u64;
                let Some(place) = sinks.place(stream).await else {
                    // The reader has had enough.
                    break;
                };
                place.send(Piece::plain(data));
            }
            // Nothing of it was kept, or not to the end.
            Some(Event::StreamEnd { stream, .. }) => seen[stream as usize] = u64::MAX,
            Some(_) => {}
            None => break,
        }
    }
    match sinks.finish().await {
        [Err(error), _] if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        [Err(_), _] => Ok(exit::BROKEN_PIPE),
        _ => Ok(0),
    }
}
