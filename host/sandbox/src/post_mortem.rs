//! Why a VM ended, in one line, from what it left: the console, `exit.json`, the VMM's log and exit status.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use crate::registry::{RunDir, VmExit};

/// How much of a log's end is read: a kernel panic with its registers and stack is about 4 KiB.
const TAIL_BYTES: u64 = 16 << 10;
/// How many lines of the console are worth showing.
const TAIL_LINES: usize = 12;

/// The files to look into, opened while they exist: an ephemeral VMM removes its folder when it ends.
#[derive(Debug)]
pub(crate) struct Evidence {
    dir: RunDir,
    console: Option<File>,
    vmm_log: Option<File>,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PostMortem {
    /// One line.
    pub(crate) cause: String,
    /// The console's last lines, if they tell more.
    pub(crate) console: Vec<String>,
}

impl Evidence {
    /// Opens what there is.
    pub(crate) fn secure(dir: &RunDir) -> Self {
        Self {
            dir: dir.clone(),
            console: File::open(dir.console_log()).ok(),
            vmm_log: File::open(dir.vmm_log()).ok(),
        }
    }

    /// Reads it. `status` is the VMM's own, if it was our child and has ended.
    pub(crate) fn examine(&mut self, status: Option<ExitStatus>) -> PostMortem {
        // The console may have been made only after the start.
        if self.console.is_none() {
            self.console = File::open(self.dir.console_log()).ok();
        }
        let console = self.console.as_mut().map(tail).unwrap_or_default();
        let vmm_log = self.vmm_log.as_mut().map(tail).unwrap_or_default();
        conclude(self.dir.vm_exit().as_ref(), &console, &vmm_log, status)
    }

    /// The console's last lines.
    pub(crate) fn console_lines(&mut self) -> Vec<String> {
        if self.console.is_none() {
            self.console = File::open(self.dir.console_log()).ok();
        }
        last_lines(&self.console.as_mut().map(tail).unwrap_or_default())
    }
}

/// The verdict, on data alone.
fn conclude(
    exit: Option<&VmExit>,
    console: &str,
    vmm_log: &str,
    status: Option<ExitStatus>,
) -> PostMortem {
    let said = vmm_log.lines().rev().find(|line| !line.trim().is_empty());
    let (cause, show_console) = match (panic_line(console), exit) {
        (Some(panic), _) => (format!("the guest's kernel panicked: {panic}"), true),
        (None, Some(exit)) => verdict(exit),
        (None, None) => match status.and_then(|status| status.signal()) {
            Some(number) => (format!("airlock-vmm was killed by signal {number}"), false),
            None => (
                said.map_or_else(
                    || "airlock-vmm ended without a word".to_owned(),
                    |line| format!("airlock-vmm ended: {line}"),
                ),
                true,
            ),
        },
    };
    PostMortem {
        cause,
        console: if show_console {
            last_lines(console)
        } else {
            Vec::new()
        },
    }
}

fn verdict(exit: &VmExit) -> (String, bool) {
    let with_detail = |what: &str| {
        if exit.detail.is_empty() {
            what.to_owned()
        } else {
            format!("{what}: {}", exit.detail)
        }
    };
    match exit.reason.as_str() {
        "guest_reset" => ("the guest powered off".to_owned(), true),
        "stopped" => ("it was stopped".to_owned(), false),
        "removed" => ("the sandbox was removed".to_owned(), false),
        "lifeline" => ("its owner ended".to_owned(), false),
        "guest_fault" => (with_detail("the guest crashed"), true),
        "error" => (with_detail("airlock-vmm failed"), false),
        other => (with_detail(other), true),
    }
}

/// What the kernel says after "Kernel panic - not syncing: " (kernel/panic.c).
fn panic_line(console: &str) -> Option<&str> {
    let (_, after) = console.rsplit_once("Kernel panic")?;
    let line = after.lines().next()?.trim();
    Some(line.strip_prefix("- not syncing:").unwrap_or(line).trim())
}

fn last_lines(text: &str) -> Vec<String> {
    let mut lines: Vec<_> = text
        .lines()
        .rev()
        .map(printable)
        .filter(|line| !line.trim().is_empty())
        .take(TAIL_LINES)
        .collect();
    lines.reverse();
    lines
}

/// The guest chooses these bytes and a terminal will show them.
fn printable(line: &str) -> String {
    line.chars().filter(|c| !c.is_control()).take(300).collect()
}

fn tail(file: &mut File) -> String {
    let mut read = || {
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(bytes)
    };
    // A log that cannot be read tells nothing, and something else is being reported already.
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(reason: &str, detail: &str) -> VmExit {
        VmExit {
            reason: reason.to_owned(),
            detail: detail.to_owned(),
        }
    }

    #[test]
    fn a_kernel_panic_is_named_even_though_the_vm_reports_a_reset() {
        let console = "[ 0.1] hello\n[    0.5] Kernel panic - not syncing: VFS: Unable to mount root fs\n[ 0.5] CPU: 0\n";
        let found = conclude(Some(&exit("guest_reset", "")), console, "", None);
        assert_eq!(
            found.cause,
            "the guest's kernel panicked: VFS: Unable to mount root fs"
        );
        assert_eq!(found.console.len(), 3);
    }

    #[test]
    fn a_killed_vmm_is_named_as_such() {
        let found = conclude(None, "", "", Some(ExitStatus::from_raw(9)));
        assert_eq!(found.cause, "airlock-vmm was killed by signal 9");
    }

    #[test]
    fn the_vmms_own_words_are_passed_on() {
        let found = conclude(
            Some(&exit("error", "cannot allocate 9999 MiB")),
            "",
            "",
            None,
        );
        assert_eq!(found.cause, "airlock-vmm failed: cannot allocate 9999 MiB");
        let found = conclude(
            None,
            "",
            "one\ncannot read config\n\n",
            Some(ExitStatus::from_raw(256)),
        );
        assert_eq!(found.cause, "airlock-vmm ended: cannot read config");
    }

    #[test]
    fn control_characters_of_the_guest_do_not_reach_the_terminal() {
        assert_eq!(last_lines("a\x1b[2Jb\n\n"), ["a[2Jb"]);
    }
}
