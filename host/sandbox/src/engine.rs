//! Which engine runs the guest's CPU: measured once per boot of the host, and said in one line.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::paths::Paths;
use crate::programs;

/// Name of QEMU's program, as its Debian package installs it.
pub const QEMU: &str = "qemu-system-x86_64";
/// Hidden, so that it is no sandbox.
const PROBE_FILE: &str = ".kvm-probe.json";

/// What runs the guest's CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// Our VMM on KVM.
    Kvm,
    /// QEMU's software CPU.
    Qemu,
}

impl Engine {
    /// As the command line and reports say it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Qemu => "qemu",
        }
    }
}

/// What the user asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// KVM where it is good, else QEMU.
    #[default]
    Auto,
    /// KVM, or an error.
    Kvm,
    /// QEMU, whatever KVM is.
    Qemu,
}

/// What `airlock-vmm probe` found out about KVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// The verdict.
    pub kvm: KvmVerdict,
    /// One line for a person.
    #[serde(default)]
    pub detail: String,
    /// How long the loop took.
    #[serde(default)]
    pub loop_us: Option<u64>,
}

/// How good KVM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvmVerdict {
    /// It runs the guest's kernel on the CPU.
    Good,
    /// It interprets it.
    Slow,
    /// There is no /dev/kvm.
    Absent,
    /// We may not open it.
    Denied,
    /// It opens and does not work.
    Failed,
}

/// An engine and the reason for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    /// Which.
    pub engine: Engine,
    /// Why, in one line.
    pub why: String,
    /// The user left the choice to us and does not get the fast one.
    pub fallback: bool,
    /// QEMU's program, if that is the engine.
    pub qemu: Option<PathBuf>,
}

/// Why no engine can be used.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// KVM was asked for.
    #[error("engine kvm cannot be used: {0}; use --engine qemu, or leave it to auto")]
    Kvm(String),
    /// QEMU was asked for.
    #[error(
        "engine qemu cannot be used: {QEMU} was not found in PATH; run: apt-get install qemu-system-x86"
    )]
    Qemu,
    /// Neither.
    #[error(
        "no engine can be used: {0}, and {QEMU} was not found in PATH; run: apt-get install qemu-system-x86"
    )]
    Neither(String),
    /// The VMM is missing.
    #[error(transparent)]
    Program(#[from] programs::NotFound),
    /// The measurement did not work.
    #[error("{} probe did not work: {what}", program.display())]
    Probe {
        /// The VMM.
        program: PathBuf,
        /// What happened.
        what: String,
    },
}

impl Probe {
    /// The verdict as a sentence.
    #[must_use]
    pub fn sentence(&self) -> String {
        let loop_ms = self.loop_us.map_or_else(String::new, |us| {
            format!(
                " ({}.{} ms for a loop that takes well under 1)",
                us / 1000,
                us % 1000 / 100
            )
        });
        match self.kvm {
            KvmVerdict::Good => "KVM works".to_owned(),
            KvmVerdict::Slow => format!("this host's KVM interprets the guest's kernel{loop_ms}"),
            KvmVerdict::Absent => "there is no /dev/kvm".to_owned(),
            KvmVerdict::Denied => format!(
                "/dev/kvm may not be opened ({}): add your user to the group kvm",
                self.detail
            ),
            KvmVerdict::Failed => format!("KVM does not work ({})", self.detail),
        }
    }
}

/// Chooses. Measures KVM if that has not been done in this boot of the host.
///
/// # Errors
/// When what was asked for cannot be used, or nothing can.
pub fn choose(paths: &Paths, choice: EngineChoice) -> Result<Chosen, EngineError> {
    let qemu = programs::system(QEMU);
    if choice == EngineChoice::Qemu {
        return decide(choice, None, qemu);
    }
    let probe = probe(paths)?;
    decide(choice, Some(&probe), qemu)
}

/// The decision, on data alone.
fn decide(
    choice: EngineChoice,
    probe: Option<&Probe>,
    qemu: Option<PathBuf>,
) -> Result<Chosen, EngineError> {
    let usable = probe.is_some_and(|probe| probe.kvm == KvmVerdict::Good);
    let sentence = probe.map_or_else(|| "it was asked for".to_owned(), Probe::sentence);
    match (choice, usable, qemu) {
        (EngineChoice::Auto | EngineChoice::Kvm, true, _) => Ok(Chosen {
            engine: Engine::Kvm,
            why: sentence,
            fallback: false,
            qemu: None,
        }),
        (EngineChoice::Kvm, false, _) => Err(EngineError::Kvm(sentence)),
        (EngineChoice::Auto, false, None) => Err(EngineError::Neither(sentence)),
        (EngineChoice::Qemu, _, None) => Err(EngineError::Qemu),
        (EngineChoice::Auto | EngineChoice::Qemu, _, Some(qemu)) => Ok(Chosen {
            engine: Engine::Qemu,
            why: sentence,
            fallback: choice == EngineChoice::Auto,
            qemu: Some(qemu),
        }),
    }
}

/// A verdict and what it holds for.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct CachedProbe {
    boot_id: String,
    program: PathBuf,
    probe: Probe,
}

/// What is known of KVM, from this boot's cache or measured now.
///
/// # Errors
/// When the VMM is missing or cannot measure.
pub fn probe(paths: &Paths) -> Result<Probe, EngineError> {
    let program = programs::vmm()?;
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let cache = paths.run.join(PROBE_FILE);
    let cached = fs::read(&cache)
        .ok()
        .and_then(|text| serde_json::from_slice::<CachedProbe>(&text).ok())
        .filter(|cached| cached.boot_id == boot_id && cached.program == program);
    if let Some(cached) = cached {
        return Ok(cached.probe);
    }
    let probe = measure(&program)?;
    // Whether the device is there and may be opened can change at any time, and costs nothing to see.
    if !matches!(probe.kvm, KvmVerdict::Absent | KvmVerdict::Denied) {
        let cached = CachedProbe {
            boot_id,
            program,
            probe,
        };
        // Without the cache the next launch measures again: nothing worth an error.
        let _ = write_cache(&cache, &cached);
        return Ok(cached.probe);
    }
    Ok(probe)
}

/// Forgets the verdict, so that the next look measures.
pub fn forget_probe(paths: &Paths) {
    // Not being there is what is wanted.
    let _ = fs::remove_file(paths.run.join(PROBE_FILE));
}

fn measure(program: &Path) -> Result<Probe, EngineError> {
    let failed = |what: String| EngineError::Probe {
        program: program.to_owned(),
        what,
    };
    let output = Command::new(program)
        .arg("probe")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(error.to_string()))?;
    serde_json::from_slice(&output.stdout).map_err(|_| {
        let said = String::from_utf8_lossy(&output.stderr);
        failed(format!(
            "{}: {}",
            output.status,
            said.lines().last().unwrap_or("it printed nothing")
        ))
    })
}

fn write_cache(path: &Path, cached: &CachedProbe) -> io::Result<()> {
    let new = path.with_extension(format!("{:016x}", crate::random()));
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&new)?;
    let text = serde_json::to_vec(cached)?;
    file.write_all(&text)
        .and_then(|()| fs::rename(&new, path))
        // On a full disk it would stay, and so would the next one.
        .inspect_err(|_| drop(fs::remove_file(&new)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(kvm: KvmVerdict) -> Probe {
        Probe {
            kvm,
            detail: "Permission denied".to_owned(),
            loop_us: Some(22_400),
        }
    }

    #[test]
    fn auto_takes_kvm_only_where_it_is_good() {
        let qemu = Some(PathBuf::from("/usr/bin/qemu-system-x86_64"));
        let chosen = decide(
            EngineChoice::Auto,
            Some(&probe(KvmVerdict::Good)),
            qemu.clone(),
        )
        .unwrap();
        assert_eq!((chosen.engine, chosen.fallback), (Engine::Kvm, false));
        for verdict in [
            KvmVerdict::Slow,
            KvmVerdict::Absent,
            KvmVerdict::Denied,
            KvmVerdict::Failed,
        ] {
            let chosen = decide(EngineChoice::Auto, Some(&probe(verdict)), qemu.clone()).unwrap();
            assert_eq!(
                (chosen.engine, chosen.fallback),
                (Engine::Qemu, true),
                "{verdict:?}"
            );
            let error = decide(EngineChoice::Kvm, Some(&probe(verdict)), qemu.clone()).unwrap_err();
            assert!(matches!(error, EngineError::Kvm(_)), "{verdict:?}");
            let error = decide(EngineChoice::Auto, Some(&probe(verdict)), None).unwrap_err();
            assert!(matches!(error, EngineError::Neither(_)), "{verdict:?}");
        }
    }

    #[test]
    fn qemu_is_taken_when_asked_for_without_looking_at_kvm() {
        let chosen = decide(EngineChoice::Qemu, None, Some("/q".into())).unwrap();
        assert_eq!((chosen.engine, chosen.fallback), (Engine::Qemu, false));
        assert!(matches!(
            decide(EngineChoice::Qemu, None, None),
            Err(EngineError::Qemu)
        ));
    }

    #[test]
    fn an_interpreting_kvm_is_named_with_its_measurement() {
        assert_eq!(
            probe(KvmVerdict::Slow).sentence(),
            "this host's KVM interprets the guest's kernel (22.4 ms for a loop that takes well under 1)"
        );
    }
}
