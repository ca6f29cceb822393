//! What a VM leaves in its run folder: `exit.json`, or nothing.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use crate::config::VmConfig;
use crate::machine::{Exit, ExitReason};
use crate::tell;

/// Files that belong to a VM and that its process may remove.
const KNOWN_FILES: [&str; 13] = [
    "lock",
    "vsock.sock_1025",
    ".sandbox.json",
    ".vmm.json",
    "vsock.sock",
    "vmm.sock",
    "vmm.json",
    "vmm.log",
    "console.log",
    "sandbox.json",
    "scratch.img",
    "exit.json",
    "exit.json.new",
];
/// A kernel panic is the last thing on a console, with its call trace.
const PANIC_TAIL_BYTES: u64 = 16 * 1024;
const PANIC_MARK: &str = "Kernel panic";

/// A reset that followed a kernel panic is a fault, and the panic's first line says which.
pub fn with_kernel_panic(exit: Exit, console_log: &Path) -> Exit {
    if exit.reason != ExitReason::GuestReset {
        return exit;
    }
    match panic_line(console_log) {
        Ok(Some(line)) => Exit {
            reason: ExitReason::GuestFault,
            detail: line,
        },
        // A console that cannot be read tells nothing.
        Ok(None) | Err(_) => exit,
    }
}

fn panic_line(console_log: &Path) -> io::Result<Option<String>> {
    let mut file = File::open(console_log)?;
    let start = file.metadata()?.len().saturating_sub(PANIC_TAIL_BYTES);
    file.seek(SeekFrom::Start(start))?;
    let mut tail = Vec::new();
    file.take(PANIC_TAIL_BYTES).read_to_end(&mut tail)?;
    let text = String::from_utf8_lossy(&tail);
    Ok(text.lines().find_map(|line| {
        line.find(PANIC_MARK)
            .map(|at| line[at..].trim_end().to_owned())
    }))
}

/// Writes `exit.json`; or, for an ephemeral VM whose owner is gone, removes what is there. (An owner that is there wants
/// to know why the VM ended, and removes what is left.)
pub fn leave(config: &VmConfig, config_path: &Path, exit: &Exit, owner_is_gone: bool) {
    let result = if config.ephemeral && owner_is_gone {
        remove(config, config_path)
    } else {
        write_exit(&config.run_dir, exit)
    };
    if let Err(error) = result {
        tell!(
            "airlock-vmm: cannot leave {} in order: {error}",
            config.run_dir.display()
        );
    }
}

/// Whole or not at all: a reader never sees half a file.
fn write_exit(run_dir: &Path, exit: &Exit) -> io::Result<()> {
    let (new, path) = (run_dir.join("exit.json.new"), run_dir.join("exit.json"));
    fs::write(&new, serde_json::to_vec(exit)?)?;
    fs::rename(new, path)
}

/// Removes the files that are known, and the folder if nothing else is in it.
fn remove(config: &VmConfig, config_path: &Path) -> io::Result<()> {
    let known = KNOWN_FILES.iter().map(|name| config.run_dir.join(name));
    let configured = [
        &config.vsock_socket,
        &config.control_socket,
        &config.console_log,
    ]
    .map(Clone::clone);
    for path in known.chain(configured).chain([config_path.to_owned()]) {
        if path.starts_with(&config.run_dir) {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    fs::remove_dir(&config.run_dir)
}

#[cfg(test)]
mod tests;
