//! The programs that sandboxes need: ours beside the running one, the system's in PATH.

use std::env;
use std::path::{Path, PathBuf};

/// Why a program of ours cannot be run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name} was found neither beside {} nor in PATH; build it with: cargo build --release -p {package}, or set {variable}", beside.display())]
pub struct NotFound {
    name: &'static str,
    package: &'static str,
    variable: &'static str,
    beside: PathBuf,
}

/// The VMM: `$AIRLOCK_VMM`, else beside the running program, else in PATH.
///
/// # Errors
/// When it is nowhere.
pub fn vmm() -> Result<PathBuf, NotFound> {
    ours("airlock-vmm", "airlock-vmm", "AIRLOCK_VMM")
}

/// The agent, which goes into the initramfs: `$AIRLOCK_AGENT`, else beside the running program, else in PATH.
///
/// # Errors
/// When it is nowhere.
pub fn agent() -> Result<PathBuf, NotFound> {
    ours("airlock-agent", "airlock-agent", "AIRLOCK_AGENT")
}

/// A program of the system. The sbin folders are looked into even where a user's PATH has none: `mke2fs` is there.
#[must_use]
pub fn system(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|file| is_executable(file))
}

fn ours(
    name: &'static str,
    package: &'static str,
    variable: &'static str,
) -> Result<PathBuf, NotFound> {
    if let Some(set) = env::var_os(variable).filter(|value| !value.is_empty()) {
        return Ok(set.into());
    }
    let running = env::current_exe().unwrap_or_default();
    let beside = running
        .parent()
        .unwrap_or_else(|| Path::new("/"))
        .to_owned();
    // A test binary lies one folder below the programs.
    [beside.join(name), beside.join("..").join(name)]
        .into_iter()
        .find(|file| is_executable(file))
        .or_else(|| system(name))
        .ok_or(NotFound {
            name,
            package,
            variable,
            beside,
        })
}

fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata()
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}
