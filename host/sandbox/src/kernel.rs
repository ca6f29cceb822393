//! Guest kernels in the cache: found by name, with the modules they need.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use airlock_vmm::config::Discovery;
use serde::Deserialize;

use crate::image::{entries_with, is_entry_name};
use crate::paths::Paths;

/// The kernel built for airlock, taken if it is there.
pub const TUNED: &str = "tuned";
/// The distribution's kernel, quick to get, taken otherwise.
pub const DEBIAN: &str = "debian";

/// `kernel.json` as the build scripts write it.
#[derive(Debug, Deserialize)]
struct Manifest {
    image: PathBuf,
    discovery: Discovery,
    #[serde(default)]
    modules: Vec<String>,
}

/// A kernel that can be booted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// Its name.
    pub name: String,
    /// ELF or bzImage.
    pub image: PathBuf,
    /// How it learns about devices.
    pub discovery: Discovery,
    /// What init loads, in this order.
    pub modules: Vec<PathBuf>,
}

/// Why a kernel cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// There is none of that name.
    #[error("there is no kernel {name:?} in {}; run: images/kernel/build (tuned, minutes) or images/kernel/fetch-debian (seconds)", folder.display())]
    NotFound {
        /// The name.
        name: String,
        /// Where kernels are.
        folder: PathBuf,
    },
    /// Its description or one of its files is broken.
    #[error("kernel {name} is broken ({what}): delete {} and make it again with images/kernel/build or images/kernel/fetch-debian", folder.display())]
    Broken {
        /// The name.
        name: String,
        /// What is wrong.
        what: String,
        /// What to delete.
        folder: PathBuf,
    },
}

impl Kernel {
    /// The kernel called `name`; without one the tuned kernel, or Debian's where that is not built.
    ///
    /// # Errors
    /// When there is none, or it is visibly broken.
    pub fn find(paths: &Paths, name: Option<&str>) -> Result<Self, KernelError> {
        if let Some(name) = name {
            return Self::open(paths, name);
        }
        match Self::open(paths, TUNED) {
            Err(KernelError::NotFound { .. }) => Self::open(paths, DEBIAN),
            other => other,
        }
    }

    fn open(paths: &Paths, name: &str) -> Result<Self, KernelError> {
        let kernels = paths.cache.join("kernels");
        let not_found = || KernelError::NotFound {
            name: name.to_owned(),
            folder: kernels.clone(),
        };
        if !is_entry_name(name) {
            return Err(not_found());
        }
        // The name is a link to a folder named after its contents: follow it once, so that a rebuild in the meantime
        // cannot mix two kernels.
        let folder = match fs::canonicalize(kernels.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(not_found()),
            other => other.unwrap_or_else(|_| kernels.join(name)),
        };
        let broken = |what: String| KernelError::Broken {
            name: name.to_owned(),
            what,
            folder: folder.clone(),
        };
        let manifest: Manifest = fs::read_to_string(folder.join("kernel.json"))
            .and_then(|text| Ok(serde_json::from_str(&text)?))
            .map_err(|error| broken(format!("kernel.json: {error}")))?;
        let image = folder.join(&manifest.image);
        check_image(&image)
            .map_err(|what| broken(format!("{}: {what}", manifest.image.display())))?;
        let modules: Vec<_> = manifest
            .modules
            .iter()
            .map(|module| folder.join("modules").join(module))
            .collect();
        if let Some(missing) = modules.iter().find(|module| !module.is_file()) {
            return Err(broken(format!("{} is missing", missing.display())));
        }
        Ok(Self {
            name: name.to_owned(),
            image,
            discovery: manifest.discovery,
            modules,
        })
    }
}

/// Names of the kernels there are.
#[must_use]
pub fn names(paths: &Paths) -> Vec<String> {
    entries_with(&paths.cache.join("kernels"), "kernel.json")
}

/// Whether it begins like a kernel; the loader looks closer.
fn check_image(path: &Path) -> Result<(), String> {
    let file = File::open(path).map_err(|error| error.to_string())?;
    // The x86 boot protocol's magic is at 0x202 (Documentation/arch/x86/boot.rst).
    let mut head = [0; 0x206];
    file.read_exact_at(&mut head, 0)
        .map_err(|_| "it is too short for a kernel".to_owned())?;
    if head.starts_with(b"\x7fELF") || &head[0x202..] == b"HdrS" {
        Ok(())
    } else {
        Err("it is neither an ELF file nor a bzImage".to_owned())
    }
}
