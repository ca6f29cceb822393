//! Root images in the cache: found by name, looked at just far enough that a broken one is named before the boot.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::paths::Paths;

/// File systems the agent mounts as a base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FsType {
    /// Read-only by design.
    Erofs,
    /// Mounted read-only.
    Ext4,
}

impl FsType {
    /// As mount(8) calls it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Erofs => "erofs",
            Self::Ext4 => "ext4",
        }
    }
}

/// What an image says about the commands that run in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Defaults {
    /// Variables besides the agent's own.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Working directory; empty: the user's home.
    #[serde(default)]
    pub cwd: String,
    /// User; empty: root.
    #[serde(default)]
    pub user: String,
    /// What `airlock run -it` without a command starts.
    #[serde(default)]
    pub shell: String,
}

/// `image.json` as the build scripts write it.
#[derive(Debug, Deserialize)]
struct Manifest {
    rootfs: PathBuf,
    fstype: FsType,
    #[serde(flatten)]
    defaults: Defaults,
}

/// A root image that can be booted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Its name.
    pub name: String,
    /// The file system.
    pub rootfs: PathBuf,
    /// What kind that is.
    pub fstype: FsType,
    /// What it says about commands.
    pub defaults: Defaults,
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// There is none of that name.
    #[error("there is no image {name:?} in {}; there {}; build one with: images/busybox/build (seconds) or images/debian/build (a minute)", folder.display(), are(.known))]
    NotFound {
        /// The name.
        name: String,
        /// Where images are.
        folder: PathBuf,
        /// Which there are.
        known: Vec<String>,
    },
    /// Its description is broken.
    #[error("image {name} is broken ({what}): delete {} and build it again with: images/{name}/build", folder.display())]
    Broken {
        /// The name.
        name: String,
        /// What is wrong.
        what: String,
        /// What to delete.
        folder: PathBuf,
    },
}

fn are(known: &[String]) -> String {
    match known {
        [] => "are none".to_owned(),
        [one] => format!("is {one}"),
        many => format!("are {}", many.join(", ")),
    }
}

impl Image {
    /// The image called `name`.
    ///
    /// # Errors
    /// When there is none, or it is visibly broken.
    pub fn find(paths: &Paths, name: &str) -> Result<Self, ImageError> {
        let images = paths.cache.join("images");
        // The name is a link to a folder named after its contents: follow it once, so that a rebuild in the meantime
        // cannot mix two images.
        let link = images.join(name);
        let folder = fs::canonicalize(&link).unwrap_or(link);
        let not_found = || ImageError::NotFound {
            name: name.to_owned(),
            folder: images.clone(),
            known: names(paths),
        };
        if !is_entry_name(name) {
            return Err(not_found());
        }
        let text = match fs::read_to_string(folder.join("image.json")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(not_found()),
            other => other,
        };
        let broken = |what: String| ImageError::Broken {
            name: name.to_owned(),
            what,
            folder: folder.clone(),
        };
        let manifest: Manifest = text
            .map_err(|error| broken(format!("image.json: {error}")))
            .and_then(|text| {
                serde_json::from_str(&text).map_err(|error| broken(format!("image.json: {error}")))
            })?;
        let rootfs = folder.join(&manifest.rootfs);
        check_superblock(&rootfs, manifest.fstype)
            .map_err(|what| broken(format!("{}: {what}", manifest.rootfs.display())))?;
        Ok(Self {
            name: name.to_owned(),
            rootfs,
            fstype: manifest.fstype,
            defaults: manifest.defaults,
        })
    }
}

/// Names of the images there are, broken or not.
#[must_use]
pub fn names(paths: &Paths) -> Vec<String> {
    entries_with(&paths.cache.join("images"), "image.json")
}

/// Folders in `folder` that hold `file`, by name. What the build scripts name after its contents is left out: a link
/// with a plain name leads to it.
pub(crate) fn entries_with(folder: &Path, file: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut names: Vec<_> = entries
        .flatten()
        .filter(|entry| entry.path().join(file).is_file())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| is_entry_name(name) && !is_named_by_contents(name))
        .collect();
    names.sort();
    names
}

/// `debian-39cc5e58d2da3204`, and `debian-39cc5e58d2da3204.new` while it is made.
fn is_named_by_contents(name: &str) -> bool {
    name.rsplit_once('-').is_some_and(|(_, hash)| {
        let hash = hash.strip_suffix(".new").unwrap_or(hash);
        hash.len() == 16 && hash.bytes().all(|b| b.is_ascii_hexdigit())
    })
}

/// Whether `name` stays inside its folder.
pub(crate) fn is_entry_name(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\0'])
}

/// Compares the size that the superblock states with the file's: a download or build that was cut short is the usual
/// damage.
fn check_superblock(path: &Path, fstype: FsType) -> Result<(), String> {
    let file = File::open(path).map_err(|error| error.to_string())?;
    let length = file.metadata().map_err(|error| error.to_string())?.len();
    // Both file systems have their superblock at 1024 (fs/erofs/erofs_fs.h, Documentation/filesystems/ext4/super.rst).
    let mut block = [0; 128];
    file.read_exact_at(&mut block, 1024)
        .map_err(|_| format!("its {length} bytes are too few for a file system"))?;
    let word = |at: usize| {
        u64::from(u32::from_le_bytes([
            block[at],
            block[at + 1],
            block[at + 2],
            block[at + 3],
        ]))
    };
    let stated = match fstype {
        // magic at 0, log2 of the block size at 12, number of blocks at 36.
        FsType::Erofs if word(0) == 0xe0f5_e1e2 => word(36) << (block[12] & 31),
        // Number of blocks at 4, log2 of the block size in KiB at 24, magic (16 bits) at 56.
        FsType::Ext4 if word(56) & 0xffff == 0xef53 => word(4) << (10 + (block[24] & 15)),
        _ => return Err(format!("it is no {} file system", fstype.as_str())),
    };
    if stated > length {
        return Err(format!(
            "{stated} bytes are expected and {length} are there"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
