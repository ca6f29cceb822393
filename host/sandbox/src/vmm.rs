//! The `airlock-vmm` process of one sandbox: starting it, commanding it, seeing it end.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::pipe::{PipeFlags, pipe_with};
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::process::{ProcessHandle, ProcessId};
use crate::registry::{Lock, RunDir};

/// The descriptor number at which the VMM finds its lifeline: its standard input.
pub const LIFELINE_FD: i32 = 0;
/// How long a control command may take: the VMM answers between two events of one thread.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest answer to a control command.
const MAX_CONTROL_BYTES: usize = 64 << 10;
/// How long processes of a killed VM may linger: the kernel frees their memory in that time.
const LOCK_RELEASE_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a VMM did not start, or did not answer.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// It could not be run.
    #[error("cannot start {}", program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Nobody answers at its control socket.
    #[error("the VMM does not answer at {}", socket.display())]
    Control {
        /// Its socket.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It could not do what it was told.
    #[error("the VMM refused: {0}")]
    Refused(String),
}

/// A VMM that this process started.
#[derive(Debug)]
pub struct Vmm {
    child: Child,
    id: ProcessId,
    handle: ProcessHandle,
    /// The VM ends when this closes. Never read.
    _lifeline: Option<OwnedFd>,
}

impl Vmm {
    /// Starts the VMM of `dir`, whose configuration is in place. It holds `lock` from now on; with `lifeline` it ends
    /// when this process does.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn spawn(
        program: &Path,
        dir: &RunDir,
        lock: &Lock,
        lifeline: bool,
    ) -> Result<Self, VmmError> {
        let failed = |source: io::Error| VmmError::Spawn {
            program: program.to_owned(),
            source,
        };
        let (stdin, lifeline) = if lifeline {
            let (reader, writer) =
                pipe_with(PipeFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
            (Stdio::from(reader), Some(writer))
        } else {
            (Stdio::null(), None)
        };
        // Standard streams are what a child inherits without a race: other children started at the same moment never
        // see them. So the lifeline is its stdin and the lock its stdout.
        let mut command = Command::new(program);
        command
            .arg("run")
            .arg("--config")
            .arg(dir.vmm_config())
            .current_dir("/")
            .stdin(stdin)
            .stdout(lock.share().map_err(failed)?)
            .stderr(log_file(&dir.vmm_log()).map_err(failed)?);
        detach::in_new_session(&mut command);
        let mut child = command.spawn().map_err(failed)?;
        let opened = ProcessId::of(child.id())
            .and_then(|id| Ok((id, id.open().ok_or(io::ErrorKind::NotFound)?)));
        match opened {
            Ok((id, handle)) => Ok(Self {
                child,
                id,
                handle,
                _lifeline: lifeline,
            }),
            Err(error) => {
                // It is our child and not yet waited for, so the number is still its own.
                let _ = child.kill();
                let _ = child.wait();
                Err(failed(error))
            }
        }
    }

    /// Which process it is.
    #[must_use]
    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// A handle to wait with.
    #[must_use]
    pub fn handle(&self) -> &ProcessHandle {
        &self.handle
    }

    /// Its exit status, if it has ended.
    pub fn exit_status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Ends it, with no way out, and waits until it is gone.
    pub fn kill(&mut self) {
        self.handle.kill();
        // Only fails for a process that is no child, which it is.
        let _ = self.child.wait();
    }
}

/// Sends one command (`status`, `stop`, `pause`, `resume`, `metrics`) and returns the answer's fields.
///
/// # Errors
/// When the VMM does not answer, or refuses.
pub async fn control(dir: &RunDir, command: &str) -> Result<serde_json::Value, VmmError> {
    let socket = dir.control_socket();
    let failed = |source| VmmError::Control {
        socket: socket.clone(),
        source,
    };
    let exchange = async {
        let mut stream = UnixStream::connect(&socket).await?;
        let line = format!("{}\n", serde_json::json!({ "cmd": command }));
        stream.write_all(line.as_bytes()).await?;
        let mut answer = Vec::new();
        while !answer.contains(&b'\n') && answer.len() < MAX_CONTROL_BYTES {
            if stream.read_buf(&mut answer).await? == 0 {
                break;
            }
        }
        Ok(answer)
    };
    let answer: Vec<u8> = match timeout(CONTROL_TIMEOUT, exchange).await {
        Ok(result) => result.map_err(failed)?,
        Err(_) => return Err(failed(io::ErrorKind::TimedOut.into())),
    };
    let value: serde_json::Value =
        serde_json::from_slice(&answer).map_err(|error| failed(error.into()))?;
    let verdict = Answer::deserialize(&value).map_err(|error| failed(error.into()))?;
    if verdict.ok {
        Ok(value)
    } else {
        Err(VmmError::Refused(verdict.error))
    }
}

#[derive(Deserialize)]
struct Answer {
    ok: bool,
    #[serde(default)]
    error: String,
}

/// Waits, blocking, until no process of the VM holds the lock of `dir`. Whether that happened in time. A folder that is
/// gone has no lock.
pub(crate) fn lock_released(dir: &RunDir) -> bool {
    let Ok(lock) = File::open(dir.path().join("lock")) else {
        return true;
    };
    let deadline = Instant::now() + LOCK_RELEASE_TIMEOUT;
    while flock(&lock, FlockOperation::NonBlockingLockShared).is_err() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

fn log_file(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
}

/// The one thing here that needs unsafe code.
mod detach {
    #![expect(
        unsafe_code,
        reason = "a child leaves the terminal's session between fork and exec"
    )]

    use std::os::unix::process::CommandExt;
    use std::process::Command;

    /// Makes the child the leader of a session of its own: neither Ctrl-C nor a closed terminal reaches it.
    pub(super) fn in_new_session(command: &mut Command) {
        let leave = || rustix::process::setsid().map(drop).map_err(Into::into);
        // SAFETY: between fork and exec only async-signal-safe functions may run. The closure makes one system call,
        // setsid, without libc, and converts its error number; it neither allocates nor takes a lock.
        unsafe { command.pre_exec(leave) };
    }
}
