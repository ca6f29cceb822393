//! `airlock-agent`: as PID 1 the guest's init; `serve --unix PATH` runs the agent as an ordinary process, for tests.

use std::process::ExitCode;

use airlock_agent::{Listen, Options, init, log, server};

const USAGE: &str = "usage: airlock-agent serve --unix PATH [--cgroup DIR]\n\
                     As PID 1 it takes no arguments: it is the init of an airlock guest.";

fn main() -> ExitCode {
    if std::process::id() == 1 {
        init::run();
    }
    let options = match parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(what) => {
            eprintln!("airlock-agent: {what}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    log::to_stderr();
    match server::serve(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("airlock-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    match arguments.next().as_deref() {
        Some("serve") => {}
        Some(other) => return Err(format!("unknown mode {other:?}")),
        None => return Err("no mode given, and this is not PID 1".to_owned()),
    }
    let mut unix = None;
    let mut cgroup = None;
    while let Some(flag) = arguments.next() {
        let value = arguments
            .next()
            .ok_or_else(|| format!("{flag} needs a value"))?;
        match flag.as_str() {
            "--unix" => unix = Some(value),
            "--cgroup" => cgroup = Some(value.into()),
            _ => return Err(format!("unknown option {flag:?}")),
        }
    }
    let path = unix.ok_or("serve needs --unix PATH")?;
    Ok(Options {
        listen: Listen::Unix(path.into()),
        cgroup,
        machine: false,
        restarts: 0,
    })
}
