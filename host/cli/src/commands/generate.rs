//! `airlock completions` and `airlock man`: made from the command line's own description.

use anyhow::Context;
use clap::CommandFactory;

use crate::lowargs::{Cli, CompletionsArgs, ManArgs};
use crate::output::print;

pub(crate) fn completions(args: &CompletionsArgs) -> anyhow::Result<u8> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "airlock", &mut script);
    print(&String::from_utf8_lossy(&script))?;
    Ok(0)
}

pub(crate) fn man(args: &ManArgs) -> anyhow::Result<u8> {
    let mut command = Cli::command();
    command.build();
    if let Some(name) = &args.command {
        command = command
            .find_subcommand(name)
            .with_context(|| format!("airlock has no command {name:?}"))?
            .clone();
        // As git does it: airlock-run(1).
        command = command.display_name(format!("airlock-{name}"));
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(command).render(&mut page)?;
    print(&String::from_utf8_lossy(&page))?;
    Ok(0)
}
