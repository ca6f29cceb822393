//! What a host has and lacks for running sandboxes, and what killed processes left on it.

use std::fs;
use std::path::PathBuf;

use serde::Serialize;

use crate::engine::{self, KvmVerdict, QEMU};
use crate::image::{self, Image};
use crate::kernel::{self, Kernel};
use crate::paths::Paths;
use crate::programs;
use crate::registry::{ABANDONED_AFTER, Registry, RegistryError, State, is_older_than};

/// How a check went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// As it should be.
    Ok,
    /// Sandboxes run, and something could be better.
    Warning,
    /// No sandbox can run.
    Error,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: &'static str,
    /// How it went.
    pub severity: Severity,
    /// What was seen.
    pub seen: String,
    /// What to do about it; empty where there is nothing.
    pub advice: String,
}

impl Finding {
    fn ok(check: &'static str, seen: impl Into<String>) -> Self {
        Self::new(check, Severity::Ok, seen, "")
    }

    fn new(check: &'static str, severity: Severity, seen: impl Into<String>, advice: &str) -> Self {
        Self {
            check,
            severity,
            seen: seen.into(),
            advice: advice.to_owned(),
        }
    }
}

/// Looks at everything. With `fix`, what killed processes left is removed.
#[must_use]
pub fn examine(paths: &Paths, fix: bool) -> Vec<Finding> {
    let mut findings = vec![run_root(paths)];
    if fix {
        // Perhaps the user has just been let into the group.
        engine::forget_probe(paths);
    }
    findings.extend(engines(paths));
    findings.push(agent());
    findings.push(mke2fs());
    findings.push(kernels(paths));
    findings.push(images(paths));
    findings.push(leftovers(paths, fix));
    findings
}

fn run_root(paths: &Paths) -> Finding {
    match paths.ensure_run() {
        Ok(()) => Finding::ok("run folder", paths.run.display().to_string()),
        Err(error) => Finding::new("run folder", Severity::Error, error.to_string(), ""),
    }
}

fn engines(paths: &Paths) -> Vec<Finding> {
    let qemu = programs::system(QEMU);
    let probe = engine::probe(paths);
    let kvm_usable = probe
        .as_ref()
        .is_ok_and(|probe| probe.kvm == KvmVerdict::Good);
    let kvm = match &probe {
        Ok(probe) if kvm_usable => Finding::ok("engine kvm", probe.sentence()),
        Ok(probe) => Finding::new(
            "engine kvm",
            Severity::Warning,
            probe.sentence(),
            "sandboxes run on engine qemu, which is slower",
        ),
        Err(error) => Finding::new("engine kvm", Severity::Error, error.to_string(), ""),
    };
    let qemu = match (qemu, kvm_usable) {
        (Some(path), _) => Finding::ok("engine qemu", path.display().to_string()),
        (None, true) => Finding::new(
            "engine qemu",
            Severity::Ok,
            format!("{QEMU} was not found; it is not needed here"),
            "",
        ),
        (None, false) => Finding::new(
            "engine qemu",
            Severity::Error,
            format!("{QEMU} was not found"),
            "run: apt-get install qemu-system-x86",
        ),
    };
    vec![kvm, qemu]
}

fn agent() -> Finding {
    match programs::agent() {
        Ok(path) if path.is_file() => Finding::ok("agent", path.display().to_string()),
        Ok(path) => Finding::new(
            "agent",
            Severity::Error,
            format!("{} is not there", path.display()),
            "",
        ),
        Err(error) => Finding::new("agent", Severity::Error, error.to_string(), ""),
    }
}

fn mke2fs() -> Finding {
    match programs::system("mke2fs") {
        Some(path) => Finding::ok("scratch disks", path.display().to_string()),
        None => Finding::new(
            "scratch disks",
            Severity::Warning,
            "mke2fs was not found",
            "run: apt-get install e2fsprogs, or use --scratch memory",
        ),
    }
}

fn kernels(paths: &Paths) -> Finding {
    let names = kernel::names(paths);
    let broken = names
        .iter()
        .find_map(|name| Kernel::find(paths, Some(name)).err());
    match (names.as_slice(), broken) {
        (_, Some(error)) => Finding::new("kernels", Severity::Error, error.to_string(), ""),
        ([], None) => Finding::new(
            "kernels",
            Severity::Error,
            "there is none",
            "run: images/kernel/fetch-debian (seconds) or images/kernel/build (minutes)",
        ),
        (names, None) => Finding::ok("kernels", names.join(", ")),
    }
}

fn images(paths: &Paths) -> Finding {
    let names = image::names(paths);
    let broken = names.iter().find_map(|name| Image::find(paths, name).err());
    match (names.as_slice(), broken) {
        (_, Some(error)) => Finding::new("images", Severity::Error, error.to_string(), ""),
        ([], None) => Finding::new(
            "images",
            Severity::Error,
            "there is none",
            "run: images/busybox/build (seconds)",
        ),
        (names, None) => Finding::ok("images", names.join(", ")),
    }
}

fn leftovers(paths: &Paths, fix: bool) -> Finding {
    let found = match Leftovers::find(paths) {
        Ok(found) => found,
        Err(error) => return Finding::new("leftovers", Severity::Warning, error.to_string(), ""),
    };
    let what = found.describe();
    if what.is_empty() {
        return Finding::ok("leftovers", "none");
    }
    if !fix {
        return Finding::new(
            "leftovers",
            Severity::Warning,
            what,
            "run: airlock doctor --fix",
        );
    }
    match found.remove() {
        Ok(()) => Finding::ok("leftovers", format!("removed {what}")),
        Err(error) => Finding::new("leftovers", Severity::Warning, error.to_string(), ""),
    }
}

/// What belongs to nobody any more.
struct Leftovers {
    dead: Vec<crate::registry::RunDir>,
    folders: Vec<PathBuf>,
    files: Vec<PathBuf>,
}

impl Leftovers {
    fn find(paths: &Paths) -> Result<Self, RegistryError> {
        let registry = Registry::open(paths)?;
        let sandboxes = registry.list()?;
        Ok(Self {
            dead: sandboxes
                .into_iter()
                .filter(|dir| dir.state() == State::Dead)
                .collect(),
            folders: registry.abandoned()?,
            files: unfinished_files(paths),
        })
    }

    fn describe(&self) -> String {
        let mut parts = Vec::new();
        if !self.dead.is_empty() {
            let names: Vec<_> = self.dead.iter().map(|dir| dir.name().as_str()).collect();
            parts.push(format!("dead sandboxes: {}", names.join(", ")));
        }
        if !self.folders.is_empty() {
            parts.push(format!("{} unfinished folders", self.folders.len()));
        }
        if !self.files.is_empty() {
            parts.push(format!(
                "{} unfinished files in the cache",
                self.files.len()
            ));
        }
        parts.join("; ")
    }

    fn remove(self) -> Result<(), RegistryError> {
        for dir in &self.dead {
            dir.remove()?;
        }
        let io = |path: &PathBuf| {
            let path = path.clone();
            move |source| RegistryError::Io {
                what: "remove",
                path,
                source,
            }
        };
        for folder in &self.folders {
            fs::remove_dir_all(folder).map_err(io(folder))?;
        }
        for file in &self.files {
            fs::remove_file(file).map_err(io(file))?;
        }
        Ok(())
    }
}

/// Files of ours in the cache that were being made when their process was killed. They are hidden, and made in seconds.
fn unfinished_files(paths: &Paths) -> Vec<PathBuf> {
    ["scratch", "initramfs"]
        .iter()
        .filter_map(|folder| fs::read_dir(paths.cache.join(folder)).ok())
        .flat_map(|entries| entries.flatten())
        .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"."))
        .map(|entry| entry.path())
        .filter(|path| is_older_than(path, ABANDONED_AFTER))
        .collect()
}
