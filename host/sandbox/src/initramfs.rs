//! The initramfs: our static agent as `/init`, two device nodes, and the kernel's modules. An uncompressed newc archive
//! in the cache, made again when the agent or a module changes.

use std::collections::hash_map::DefaultHasher;
use std::fs::{self, File};
use std::hash::{Hash, Hasher};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cpio::newc::{Builder, ModeFileType, trailer};

use crate::kernel::Kernel;
use crate::paths::Paths;
use crate::registry::is_older_than;

/// Raised when the archive's layout changes.
const LAYOUT: u32 = 1;
/// Archives of older agents are removed after this: a VM that was just launched may not have read its own yet.
const OUTDATED_AFTER: Duration = Duration::from_secs(24 * 3600);

/// Why there is no initramfs.
#[derive(Debug, thiserror::Error)]
#[error("cannot make the initramfs: {}", path.display())]
pub struct InitramfsError {
    path: PathBuf,
    source: io::Error,
}

/// The archive for `kernel` with `agent` in it, from the cache or made now.
///
/// # Errors
/// When a part cannot be read or the cache cannot be written.
pub fn cached(paths: &Paths, kernel: &Kernel, agent: &Path) -> Result<PathBuf, InitramfsError> {
    let folder = paths.cache.join("initramfs");
    let archive = folder.join(format!("{}-{:016x}.cpio", kernel.name, key(kernel, agent)?));
    if archive.is_file() {
        return Ok(archive);
    }
    fs::create_dir_all(&folder).map_err(at(&folder))?;
    let new = folder.join(format!(".new-{:016x}", crate::random()));
    let made =
        write(&new, kernel, agent).and_then(|()| fs::rename(&new, &archive).map_err(at(&archive)));
    if made.is_err() {
        // The error to tell is the first.
        let _ = fs::remove_file(&new);
    }
    made?;
    remove_outdated(&folder, &kernel.name, &archive);
    Ok(archive)
}

/// Names, sizes, times and inodes of the parts: looking at the contents would cost more than the boot's own reading.
fn key(kernel: &Kernel, agent: &Path) -> Result<u64, InitramfsError> {
    let mut hasher = DefaultHasher::new();
    LAYOUT.hash(&mut hasher);
    for part in std::iter::once(agent).chain(kernel.modules.iter().map(PathBuf::as_path)) {
        let meta = fs::metadata(part).map_err(at(part))?;
        (part, meta.len(), meta.dev(), meta.ino()).hash(&mut hasher);
        (meta.mtime(), meta.mtime_nsec()).hash(&mut hasher);
    }
    Ok(hasher.finish())
}

fn write(path: &Path, kernel: &Kernel, agent: &Path) -> Result<(), InitramfsError> {
    let mut out = BufWriter::new(File::create(path).map_err(at(path))?);
    let mut archive = Archive {
        out: &mut out,
        next_ino: 1,
    };
    archive.folder("dev").map_err(at(path))?;
    // Without these two the standard library of PID 1 aborts before main.
    archive.device("dev/console", 5, 1).map_err(at(path))?;
    archive.device("dev/null", 1, 3).map_err(at(path))?;
    archive.file("init", 0o755, agent)?;
    if !kernel.modules.is_empty() {
        archive.folder("modules").map_err(at(path))?;
    }
    for (number, module) in kernel.modules.iter().enumerate() {
        // Init loads them in the order of their names.
        let name = module.file_name().unwrap_or_default().to_string_lossy();
        archive.file(&format!("modules/{number:02}-{name}"), 0o644, module)?;
    }
    trailer(&mut out).map_err(at(path))?;
    out.flush().map_err(at(path))
}

struct Archive<W> {
    out: W,
    next_ino: u32,
}

impl<W: Write> Archive<W> {
    fn entry(&mut self, name: &str, mode: u32, kind: ModeFileType) -> Builder {
        let ino = self.next_ino;
        self.next_ino += 1;
        Builder::new(name)
            .ino(ino)
            .mode(mode)
            .set_mode_file_type(kind)
    }

    fn folder(&mut self, name: &str) -> io::Result<()> {
        let entry = self.entry(name, 0o755, ModeFileType::Directory).nlink(2);
        entry.write(&mut self.out, 0).finish()?;
        Ok(())
    }

    fn device(&mut self, name: &str, major: u32, minor: u32) -> io::Result<()> {
        let entry = self
            .entry(name, 0o600, ModeFileType::Char)
            .rdev_major(major)
            .rdev_minor(minor);
        entry.write(&mut self.out, 0).finish()?;
        Ok(())
    }

    fn file(&mut self, name: &str, mode: u32, source: &Path) -> Result<(), InitramfsError> {
        let contents = fs::read(source).map_err(at(source))?;
        let length = u32::try_from(contents.len())
            .map_err(|_| io::Error::other("it is larger than 4 GiB"))
            .map_err(at(source))?;
        let entry = self.entry(name, mode, ModeFileType::Regular);
        let mut writer = entry.write(&mut self.out, length);
        writer
            .write_all(&contents)
            .and_then(|()| writer.finish().map(drop))
            .map_err(at(source))
    }
}

/// Removes what earlier agents left. Nothing depends on it, so nothing is said if it fails.
fn remove_outdated(folder: &Path, kernel: &str, current: &Path) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let name = entry.file_name();
        let of_this_kernel = name
            .to_str()
            .and_then(|name| name.strip_prefix(kernel))
            .is_some_and(|rest| rest.starts_with('-'));
        let abandoned = name.to_str().is_some_and(|name| name.starts_with(".new-"));
        if (of_this_kernel || abandoned) && path != current && is_older_than(&path, OUTDATED_AFTER)
        {
            let _ = fs::remove_file(path);
        }
    }
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> InitramfsError {
    let path = path.to_owned();
    move |source| InitramfsError { path, source }
}

#[cfg(test)]
mod tests;
