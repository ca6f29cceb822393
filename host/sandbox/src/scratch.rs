//! The scratch disk: what a sandbox writes. An empty ext4 file system is made once per size and copied for each sandbox;
//! both are sparse, so a copy takes about a millisecond and a few hundred kilobytes.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;

use rustix::fs::{SeekFrom, copy_file_range, ftruncate, seek};
use rustix::io::Errno;

use crate::paths::Paths;
use crate::programs;

/// The smallest ext4 of use: below this its own tables take a good part.
const MIN_SCRATCH_MIB: u64 = 16;
/// ext4 with 4 KiB blocks and without 64-bit block numbers ends at 16 TiB.
const MAX_SCRATCH_MIB: u64 = 16 << 20;
/// Room for a compiler and its objects; it is sparse, so unused room costs nothing.
const DEFAULT_SCRATCH_MIB: u64 = 8 << 10;

/// Where a sandbox's writes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScratchSpec {
    /// To a disk of this size.
    DiskMib(u64),
    /// To the guest's memory.
    Memory,
}

impl Default for ScratchSpec {
    fn default() -> Self {
        Self::DiskMib(DEFAULT_SCRATCH_MIB)
    }
}

impl fmt::Display for ScratchSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DiskMib(mib) => write!(f, "{mib}M"),
            Self::Memory => f.write_str("memory"),
        }
    }
}

impl FromStr for ScratchSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "memory" {
            return Ok(Self::Memory);
        }
        match parse_mib(text)? {
            mib if (MIN_SCRATCH_MIB..=MAX_SCRATCH_MIB).contains(&mib) => Ok(Self::DiskMib(mib)),
            mib => Err(format!(
                "{mib} MiB asked for, possible are {MIN_SCRATCH_MIB}M to {}T",
                MAX_SCRATCH_MIB >> 20
            )),
        }
    }
}

/// A size as users type it: a number with M, G or T (a plain number is MiB), in MiB.
///
/// # Errors
/// When it is none, in words for the user.
pub fn parse_mib(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'M' | b'm') => (&text[..text.len() - 1], 0),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 10),
        Some(b'T' | b't') => (&text[..text.len() - 1], 20),
        _ => (text, 0),
    };
    digits
        .parse::<u64>()
        .ok()
        .filter(|_| digits.bytes().all(|b| b.is_ascii_digit()))
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| {
            format!("{text:?} is no size: use a number with M, G or T, for example 512M")
        })
}

/// Why there is no scratch disk.
#[derive(Debug, thiserror::Error)]
pub enum ScratchError {
    /// A program is missing.
    #[error("mke2fs was not found; run: apt-get install e2fsprogs, or use --scratch memory")]
    NoMke2fs,
    /// It failed.
    #[error("mke2fs could not make a scratch disk of {mib} MiB: {said}")]
    Mke2fs {
        /// The size.
        mib: u64,
        /// Its last words.
        said: String,
    },
    /// A file could not be written.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A disk of one sandbox's, in the cache's folder and not in the run root: that is often a small file system in memory.
/// Its file has no name from the start, so it goes with the last process that has it open, whatever ends that process.
#[derive(Debug)]
pub struct ScratchDisk {
    file: File,
}

impl ScratchDisk {
    /// A copy of the empty file system of `mib` MiB.
    ///
    /// # Errors
    /// When the file system cannot be made or copied.
    pub fn create(paths: &Paths, mib: u64) -> Result<Self, ScratchError> {
        let folder = paths.cache.join("scratch");
        fs::create_dir_all(&folder).map_err(failed("make", &folder))?;
        let template = template(&folder, mib)?;
        let path = folder.join(format!(".disk-{:016x}", crate::random()));
        let file = create_private(&path).map_err(failed("make", &path))?;
        fs::remove_file(&path).map_err(failed("remove", &path))?;
        copy_sparse(&template, &file).map_err(failed("write", &path))?;
        Ok(Self { file })
    }

    /// Where another process of this user can open it, as long as this value lives.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            self.file.as_raw_fd()
        ))
    }
}

/// The empty file system, made when it is not there.
fn template(folder: &Path, mib: u64) -> Result<PathBuf, ScratchError> {
    let template = folder.join(format!("empty-{mib}M-v1.ext4"));
    if template.is_file() {
        return Ok(template);
    }
    let mke2fs = programs::system("mke2fs").ok_or(ScratchError::NoMke2fs)?;
    let new = folder.join(format!(".new-{:016x}", crate::random()));
    let made = make_empty(&mke2fs, &new, mib)
        .and_then(|()| fs::rename(&new, &template).map_err(failed("write", &template)));
    if made.is_err() {
        // The error to tell is the first.
        let _ = fs::remove_file(&new);
    }
    made.map(|()| template)
}

fn make_empty(mke2fs: &Path, path: &Path, mib: u64) -> Result<(), ScratchError> {
    let file = create_private(path).map_err(failed("make", path))?;
    ftruncate(&file, mib << 20).map_err(|error| failed("make", path)(error.into()))?;
    // No journal: the disk dies with its VM. No reserve for root. The inode tables are known to be zero already, which
    // keeps the guest from writing them in the background.
    let output = Command::new(mke2fs)
        .args([
            "-q", "-F", "-t", "ext4", "-m", "0", "-b", "4096", "-I", "256",
        ])
        .args([
            "-O",
            "^has_journal,^resize_inode,^metadata_csum,^64bit,uninit_bg",
        ])
        .args([
            "-E",
            "lazy_itable_init=1,nodiscard,assume_storage_prezeroed=1",
        ])
        .args(["-L", "scratch"])
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .map_err(failed("run mke2fs on", path))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(ScratchError::Mke2fs {
        mib,
        said: said.lines().last().unwrap_or("nothing").to_owned(),
    })
}

/// Copies what is not a hole. The kernel shares the blocks where the file system can.
fn copy_sparse(from: &Path, target: &File) -> io::Result<()> {
    let source = File::open(from)?;
    let length = source.metadata()?.len();
    ftruncate(target, length)?;
    let mut at = 0;
    while at < length {
        let start = match seek(&source, SeekFrom::Data(at)) {
            Ok(start) => start,
            // No data up to the end.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(&source, SeekFrom::Hole(start))?;
        copy_range(&source, target, start, end)?;
        at = end;
    }
    Ok(())
}

fn copy_range(source: &File, target: &File, start: u64, end: u64) -> io::Result<()> {
    let (mut from, mut to) = (start, start);
    while from < end {
        let length = usize::try_from(end - from).unwrap_or(usize::MAX);
        match copy_file_range(source, Some(&mut from), target, Some(&mut to), length) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            // Not between these two file systems: the slow way.
            Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {
                return copy_bytes(source, target, from, end);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn copy_bytes(source: &File, target: &File, start: u64, end: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let mut buffer = vec![0; 1 << 16];
    let mut at = start;
    while at < end {
        let length = buffer
            .len()
            .min(usize::try_from(end - at).unwrap_or(usize::MAX));
        source.read_exact_at(&mut buffer[..length], at)?;
        target.write_all_at(&buffer[..length], at)?;
        at += length as u64;
    }
    Ok(())
}

fn create_private(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ScratchError {
    let path = path.to_owned();
    move |source| ScratchError::Io { what, path, source }
}

#[cfg(test)]
mod tests;
