//! The `airlock` command: parses what was typed, does it, and exits with a status that says how it went.
//!
//! Only here are clap, anyhow and progress bars. An error is printed once, as a chain, by [`main`].

#![deny(
    clippy::print_stderr,
    reason = "eprintln! panics when stderr is full or closed; tell! does not"
)]

mod commands;
mod copy;
mod events;
mod execute;
mod exit;
mod forward;
mod hiargs;
mod limits;
mod lowargs;
mod output;
mod progress;
mod record;
mod signals;
mod stdin;
mod terminal;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use crate::exit::OWN_FAILURE;
use crate::lowargs::{Cli, Command};
use crate::output::tell;

fn main() -> ExitCode {
    terminal::restore_on_panic();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Usage errors begin like every other error of ours. Help and version go to stdout.
            if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
                tell!("airlock: error: no command given\n");
            } else if error.use_stderr() {
                let _ = write!(std::io::stderr(), "airlock: ");
            }
            // Nobody is left to tell if this fails.
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::from(OWN_FAILURE)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    let status = match run(cli) {
        Ok(status) => status,
        Err(error) if output::is_broken_pipe(&error) => exit::BROKEN_PIPE,
        Err(error) => {
            tell!("airlock: error: {}", chain(&error));
            OWN_FAILURE
        }
    };
    // Not a return: a thread may still be reading from the terminal.
    std::process::exit(status.into())
}

fn run(cli: Cli) -> anyhow::Result<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let verbose = cli.verbose;
    let result = runtime.block_on(async {
        match cli.command {
            Command::Run(args) => commands::run::run(*args, verbose).await,
            Command::Up(args) => commands::up::up(*args, verbose).await,
            Command::Exec(args) => commands::exec::exec(*args).await,
            Command::Cp(args) => commands::cp::cp(args).await,
            Command::PortForward(args) => commands::forward::forward(args).await,
            Command::Shell(args) => commands::exec::shell(*args).await,
            Command::Ps(args) => match &args.execs {
                Some(name) => commands::sessions::list(name, args.list.json).await,
                None => commands::list::ps(&args.list),
            },
            Command::Kill(args) => commands::sessions::kill(&args).await,
            Command::Wait(args) => commands::sessions::wait(&args).await,
            Command::Images(args) => commands::list::images(&args),
            Command::Logs(args) => match &args.exec {
                Some(id) => commands::sessions::logs(&args.name, id, args.follow).await,
                None => commands::logs::logs(&args),
            },
            Command::Stop(args) => commands::stop::stop(&args).await,
            Command::Rm(args) => commands::stop::rm(&args).await,
            Command::Doctor(args) => commands::doctor::doctor(&args),
            Command::Completions(args) => commands::generate::completions(&args),
            Command::Man(args) => commands::generate::man(&args),
        }
    });
    // A thread that is blocked in a read must not hold the exit up.
    runtime.shutdown_background();
    result
}

/// The error and what caused it, each said once: some sources are part of their error's own text already.
fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_chain_is_one_line_and_says_nothing_twice() {
        let error = anyhow::anyhow!("no such file")
            .context("cannot open a: no such file")
            .context("cannot start");
        assert_eq!(chain(&error), "cannot start: cannot open a: no such file");
    }
}
