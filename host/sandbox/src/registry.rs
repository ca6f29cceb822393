//! The registry: one folder per sandbox in the run root, and what it says about the sandbox's state.
//!
//! A folder is made under a hidden name, locked, and only then renamed to the sandbox's: a visible folder whose lock is
//! free belongs to nobody any more. The lock is the VMM's open file (it inherits it), so it is free exactly when every
//! process of the VM is gone, whatever killed them. Other programs read the folder at any time; files in it are
//! replaced, never rewritten.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::engine::Engine;
use crate::image::Defaults;
use crate::name::Name;
use crate::paths::{MAX_SOCKET_PATH_BYTES, Paths, PathsError};
use crate::process::ProcessId;
use crate::vmm::lock_released;

/// Longest file of ours that is read back: a record is under 2 KiB, an environment of an image may make it longer.
const MAX_JSON_BYTES: u64 = 1 << 20;
/// A hidden folder or file younger than this may still be in the making.
pub(crate) const ABANDONED_AFTER: Duration = Duration::from_secs(60);
/// Begins the name of a folder in the making, and of one being removed.
const HIDDEN_PREFIXES: [&str; 2] = [".new-", ".rm-"];

/// What is known of a sandbox, in `sandbox.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Same as the folder's.
    pub name: String,
    /// What runs its CPU.
    pub engine: Engine,
    /// Name of its root image.
    pub image: String,
    /// Name of its kernel.
    pub kernel: String,
    /// Number of vCPUs.
    pub cpus: u8,
    /// Guest memory.
    pub memory_mib: u32,
    /// Milliseconds since 1970.
    pub created_unix_ms: u64,
    /// Who launches it.
    pub creator: ProcessId,
    /// Its VMM, once that was started.
    pub vmm: Option<ProcessId>,
    /// How long it took until the agent answered, once it has.
    pub ready_ms: Option<u64>,
    /// Removed when its owner ends.
    pub ephemeral: bool,
    /// What its image says about commands.
    pub defaults: Defaults,
}

/// How the VM ended, in `exit.json`, written by the VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmExit {
    /// `guest_reset`, `stopped`, `lifeline`, `guest_fault` or `error`; `removed` is ours.
    pub reason: String,
    /// More, where there is more.
    #[serde(default)]
    pub detail: String,
}

impl VmExit {
    /// Someone removes the sandbox while it runs.
    pub(crate) fn removed() -> Self {
        Self {
            reason: "removed".to_owned(),
            detail: String::new(),
        }
    }
}

/// What a sandbox is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Its agent has not answered yet.
    Creating,
    /// Its agent has answered, and its VM runs.
    Running,
    /// Its VM ended and said how.
    Stopped,
    /// Its VM is gone without a word: killed, or the machine went down. Or whoever was making it is.
    Dead,
}

impl State {
    /// As `airlock ps` prints it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Dead => "dead",
        }
    }
}

/// Why the registry could not do something.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The run root cannot be used.
    #[error(transparent)]
    Paths(#[from] PathsError),
    /// A folder or file in it cannot be used.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Someone has the name.
    #[error("the name {name} is in use by a sandbox that is {}; choose another, or run: airlock rm {}{name}", state.as_str(), if matches!(state, State::Creating | State::Running) { "-f " } else { "" })]
    InUse {
        /// The name.
        name: Name,
        /// What has it.
        state: State,
    },
    /// Nobody has the name.
    #[error("there is no sandbox {0} (airlock ps lists them)")]
    NotFound(Name),
    /// Only a sandbox that has ended can be removed.
    #[error("sandbox {0} is running: stop it first, or remove it with -f")]
    Running(Name),
    /// Sockets in the run root could not be bound.
    #[error("the path {} would be {length} bytes long and a socket's is at most {MAX_SOCKET_PATH_BYTES}: set AIRLOCK_RUN to a shorter folder, or choose a shorter name", path.display())]
    TooLong {
        /// The longest path there may be.
        path: PathBuf,
        /// Its length.
        length: usize,
    },
}

/// The run root.
#[derive(Debug, Clone)]
pub struct Registry {
    root: PathBuf,
}

impl Registry {
    /// The registry in `paths.run`, which is made if it is not there.
    ///
    /// # Errors
    /// When the run root cannot be used.
    pub fn open(paths: &Paths) -> Result<Self, RegistryError> {
        paths.ensure_run()?;
        Ok(Self {
            root: paths.run.clone(),
        })
    }

    /// The folder itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Takes the name for a new sandbox: the folder exists, its lock is held by the result.
    ///
    /// # Errors
    /// [`RegistryError::InUse`] when someone has the name, whatever their state.
    pub fn create(&self, name: &Name, record: &Record) -> Result<(RunDir, Lock), RegistryError> {
        let dir = self.dir(name);
        dir.check_socket_paths()?;
        let hidden = self.root.join(format!(".new-{:016x}", crate::random()));
        let made = RunDir {
            name: name.clone(),
            path: hidden.clone(),
        };
        let result = made.fill(record).and_then(|lock| {
            match renameat_with(CWD, &hidden, CWD, &dir.path, RenameFlags::NOREPLACE) {
                Ok(()) => Ok(lock),
                Err(Errno::EXIST) => Err(RegistryError::InUse {
                    name: name.clone(),
                    state: dir.state(),
                }),
                Err(error) => Err(failed("make", &dir.path)(error.into())),
            }
        });
        match result {
            Ok(lock) => Ok((dir, lock)),
            Err(error) => {
                // Hidden and ours; doctor clears what cannot be removed now.
                let _ = fs::remove_dir_all(&hidden);
                Err(error)
            }
        }
    }

    /// The sandbox of that name, whatever its state.
    ///
    /// # Errors
    /// When there is none.
    pub fn find(&self, name: &Name) -> Result<RunDir, RegistryError> {
        let dir = self.dir(name);
        if dir.path.is_dir() {
            Ok(dir)
        } else {
            Err(RegistryError::NotFound(name.clone()))
        }
    }

    /// Every sandbox, by name.
    ///
    /// # Errors
    /// When the run root cannot be read.
    pub fn list(&self) -> Result<Vec<RunDir>, RegistryError> {
        let mut found = Vec::new();
        for entry in self.entries()? {
            let name = entry.file_name().and_then(|name| name.to_str());
            // Whatever else someone put there is no sandbox, and not ours to remove.
            if let Some(name) = name.and_then(|name| name.parse().ok())
                && entry.is_dir()
            {
                found.push(self.dir(&name));
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// Folders that were never finished, or whose removal was not, old enough that nobody is still at it.
    ///
    /// # Errors
    /// When the run root cannot be read.
    pub fn abandoned(&self) -> Result<Vec<PathBuf>, RegistryError> {
        let mut found = Vec::new();
        for path in self.entries()? {
            let hidden = path
                .file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| {
                    HIDDEN_PREFIXES
                        .iter()
                        .any(|prefix| name.starts_with(prefix))
                });
            if hidden && is_older_than(&path, ABANDONED_AFTER) && !is_locked(&path.join("lock")) {
                found.push(path);
            }
        }
        Ok(found)
    }

    fn entries(&self) -> Result<Vec<PathBuf>, RegistryError> {
        fs::read_dir(&self.root)
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
            .map_err(failed("read", &self.root))
    }

    fn dir(&self, name: &Name) -> RunDir {
        RunDir {
            name: name.clone(),
            path: self.root.join(name),
        }
    }
}

/// One sandbox's folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunDir {
    name: Name,
    path: PathBuf,
}

/// Held as long as any process of the VM, or its creator, has it open.
#[derive(Debug)]
pub struct Lock {
    file: File,
}

impl Lock {
    /// The open file, for a child process to hold.
    ///
    /// # Errors
    /// When no descriptor is to be had.
    pub fn share(&self) -> io::Result<File> {
        self.file.try_clone()
    }
}

impl RunDir {
    /// The sandbox's name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Unix socket that reaches into the guest.
    #[must_use]
    pub fn vsock_socket(&self) -> PathBuf {
        self.path.join("vsock.sock")
    }

    /// Unix socket that guest-initiated connections to host port `port` arrive at.
    #[must_use]
    pub fn vsock_port_socket(&self, port: u32) -> PathBuf {
        self.path.join(format!("vsock.sock_{port}"))
    }

    /// The VMM's control socket.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.path.join("vmm.sock")
    }

    /// The guest's console.
    #[must_use]
    pub fn console_log(&self) -> PathBuf {
        self.path.join("console.log")
    }

    /// What the VMM had to say.
    #[must_use]
    pub fn vmm_log(&self) -> PathBuf {
        self.path.join("vmm.log")
    }

    /// The VMM's configuration.
    #[must_use]
    pub fn vmm_config(&self) -> PathBuf {
        self.path.join("vmm.json")
    }

    /// What is known of the sandbox; `None` if the file is missing or garbled.
    #[must_use]
    pub fn record(&self) -> Option<Record> {
        self.read_json("sandbox.json")
    }

    /// How the VM ended, if it said so.
    #[must_use]
    pub fn vm_exit(&self) -> Option<VmExit> {
        self.read_json("exit.json")
    }

    /// Replaces the record.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_record(&self, record: &Record) -> Result<(), RegistryError> {
        self.write_json("sandbox.json", record)
    }

    /// What the sandbox is doing now.
    #[must_use]
    pub fn state(&self) -> State {
        if self.is_orphan() {
            return State::Dead;
        }
        if self.is_locked() {
            return match self.record() {
                Some(record) if record.ready_ms.is_some() => State::Running,
                _ => State::Creating,
            };
        }
        match self.vm_exit() {
            Some(_) => State::Stopped,
            None => State::Dead,
        }
    }

    /// Whether a process of its VM, or one that is making it, is left.
    pub(crate) fn is_locked(&self) -> bool {
        is_locked(&self.path.join("lock"))
    }

    /// Whether whoever was making it is gone, and it never became ready.
    fn is_orphan(&self) -> bool {
        let waiting = |record: &Record| record.ready_ms.is_none();
        match self.record().filter(waiting) {
            // It may have ended just now, after its last word: look again.
            Some(record) if !record.creator.is_running() => {
                self.record().is_none_or(|r| waiting(&r))
            }
            _ => false,
        }
    }

    /// Removes the folder of a sandbox that has ended, and the VM of one whose maker was killed before it was ready.
    ///
    /// # Errors
    /// [`RegistryError::Running`] when it has not ended; see [`crate::stop`].
    pub fn remove(&self) -> Result<(), RegistryError> {
        if self.is_locked() && !self.end_orphan() {
            return Err(RegistryError::Running(self.name.clone()));
        }
        self.remove_unchecked()
    }

    /// Ends a VM that nobody waits for any more. Whether all of it is gone.
    fn end_orphan(&self) -> bool {
        if self.state() != State::Dead {
            return false;
        }
        let vmm = self.record().and_then(|record| record.vmm);
        if let Some(vmm) = vmm.and_then(ProcessId::open) {
            vmm.kill();
        }
        lock_released(self)
    }

    /// Removes the folder of a sandbox whose processes the caller knows to be gone. A folder that is gone already is
    /// fine: an ephemeral VMM removes its own.
    pub(crate) fn remove_unchecked(&self) -> Result<(), RegistryError> {
        // First out of sight in one step, so that nobody finds half a folder.
        let root = self.path.parent().unwrap_or_else(|| Path::new("/"));
        let hidden = root.join(format!(".rm-{:016x}", crate::random()));
        match fs::rename(&self.path, &hidden) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            result => result.map_err(failed("remove", &self.path))?,
        }
        fs::remove_dir_all(&hidden).map_err(failed("remove", &hidden))
    }

    /// The longest socket path there may be is that of the highest guest-initiated port.
    fn check_socket_paths(&self) -> Result<(), RegistryError> {
        let path = self.vsock_port_socket(u32::MAX);
        let length = path.as_os_str().len();
        if length > MAX_SOCKET_PATH_BYTES {
            return Err(RegistryError::TooLong { path, length });
        }
        Ok(())
    }

    fn fill(&self, record: &Record) -> Result<Lock, RegistryError> {
        DirBuilder::new()
            .mode(0o700)
            .create(&self.path)
            .map_err(failed("make", &self.path))?;
        let path = self.path.join("lock");
        // Append, because the VMM holds it as its standard output: a stray print must not fail.
        let file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed("make", &path))?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|error| failed("lock", &path)(error.into()))?;
        self.write_record(record)?;
        Ok(Lock { file })
    }

    fn read_json<T: for<'de> Deserialize<'de>>(&self, file: &str) -> Option<T> {
        let mut text = String::new();
        File::open(self.path.join(file))
            .ok()?
            .take(MAX_JSON_BYTES)
            .read_to_string(&mut text)
            .ok()?;
        serde_json::from_str(&text).ok()
    }

    /// Writes a file that readers see whole or not at all.
    pub(crate) fn write_json(
        &self,
        file: &str,
        value: &impl Serialize,
    ) -> Result<(), RegistryError> {
        let path = self.path.join(file);
        let hidden = self.path.join(format!(".{file}"));
        let write = || {
            let mut out = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&hidden)?;
            out.write_all(&serde_json::to_vec(value)?)?;
            fs::rename(&hidden, &path)
        };
        write().map_err(failed("write", &path))
    }
}

/// Whether a file was last changed longer ago than `age`. One that cannot be looked at was not.
pub(crate) fn is_older_than(path: &Path, age: Duration) -> bool {
    fs::symlink_metadata(path)
        .and_then(|meta| meta.modified())
        .is_ok_and(|made| {
            SystemTime::now()
                .duration_since(made)
                .is_ok_and(|since| since > age)
        })
}

/// Whether any process holds the lock. A lock file that cannot be opened is held by nobody.
fn is_locked(path: &Path) -> bool {
    match File::open(path) {
        // A shared lock, so that two who look at the same time do not see each other.
        Ok(file) => matches!(
            flock(&file, FlockOperation::NonBlockingLockShared),
            Err(Errno::WOULDBLOCK)
        ),
        Err(_) => false,
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RegistryError {
    let path = path.to_owned();
    move |source| RegistryError::Io { what, path, source }
}

#[cfg(test)]
mod tests;
