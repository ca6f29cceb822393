//! `airlock logs`: the guest's console, or the VMM's words.

use std::fs;
use std::io::{self, IsTerminal, Write};

use airlock_sandbox::{Paths, Registry};
use anyhow::Context;

use crate::lowargs::LogsArgs;

pub(crate) fn logs(args: &LogsArgs) -> anyhow::Result<u8> {
    let dir = Registry::open(&Paths::from_env()?)?.find(&args.name)?;
    let path = if args.vmm {
        dir.vmm_log()
    } else {
        dir.console_log()
    };
    let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut stdout = io::stdout().lock();
    if stdout.is_terminal() {
        stdout.write_all(harmless(&bytes).as_bytes())?;
    } else {
        stdout.write_all(&bytes)?;
    }
    stdout.flush()?;
    Ok(0)
}

/// The guest chose these bytes, and a terminal would obey them.
pub(crate) fn harmless(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .chars()
        .filter(|c| !c.is_control() || matches!(c, '\n' | '\t'))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_cannot_command_the_terminal_it_is_shown_on() {
        assert_eq!(
            harmless(b"a\tb\r\n\x1b]0;title\x07\xff"),
            "a\tb\n]0;title\u{fffd}"
        );
    }
}
