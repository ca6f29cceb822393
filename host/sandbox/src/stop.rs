//! Ending and removing sandboxes that another process launched, and reaching those that run.

use std::time::Duration;

use airlock_client::{Address, Session};

use crate::post_mortem::Evidence;
use crate::process::ProcessHandle;
use crate::registry::{Record, RegistryError, RunDir, State, VmExit};
use crate::vmm::{self, lock_released};

/// How long the workload has between SIGTERM and SIGKILL when a sandbox is stopped.
pub const DEFAULT_STOP_DEADLINE: Duration = Duration::from_secs(5);
/// What the guest may take beyond that: sync and reset.
const GUEST_END_TIMEOUT: Duration = Duration::from_secs(5);
/// What the VMM may take to end once it is told to.
const VMM_END_TIMEOUT: Duration = Duration::from_secs(3);
/// What a killed process may take to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a sandbox did not end, or cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// Its folder is in the way.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// There is nothing to stop or to use.
    #[error("sandbox {name} is {}{}", .state.as_str(), what_to_do(.name, *.state, .why.as_deref()))]
    NotRunning {
        /// Its name.
        name: String,
        /// What it is instead.
        state: State,
        /// How that came.
        why: Option<String>,
    },
    /// Its VMM survived everything.
    #[error("the VMM of sandbox {name} (process {pid}) does not end")]
    Survived {
        /// Its name.
        name: String,
        /// Its VMM.
        pid: u32,
    },
    /// The record is gone, so that its process is not known.
    #[error(
        "sandbox {0} has no readable sandbox.json, yet something holds its lock: end the airlock-vmm process that names its folder, then run: airlock rm {0}"
    )]
    NoRecord(String),
}

fn what_to_do(name: &str, state: State, why: Option<&str>) -> String {
    let why = why.map(|why| format!(" ({why})")).unwrap_or_default();
    match state {
        State::Creating | State::Running => {
            "; wait until it is running, or remove it with: airlock rm -f ".to_owned() + name
        }
        State::Stopped | State::Dead => format!("{why}; to remove it, run: airlock rm {name}"),
    }
}

/// How a sandbox was ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoppedBy {
    /// The guest, on request.
    Guest,
    /// The VMM: the guest did not answer or did not end.
    Vmm,
    /// SIGKILL: neither did the VMM.
    Kill,
}

/// A sandbox that runs, for commands.
///
/// # Errors
/// When it does not run.
pub fn attach(dir: &RunDir) -> Result<(Session, Record), StopError> {
    match (dir.state(), dir.record()) {
        (State::Running, Some(record)) => {
            Ok((Session::new(Address::hybrid(dir.vsock_socket())), record))
        }
        (state, _) => Err(not_running(dir, state)),
    }
}

/// Ends a sandbox: the guest is asked, then the VMM is told, then it is killed. Its folder stays.
///
/// # Errors
/// When it does not run, or does not end.
pub async fn stop(dir: &RunDir, deadline: Duration) -> Result<StoppedBy, StopError> {
    let state = dir.state();
    if !matches!(state, State::Running | State::Creating) {
        return Err(not_running(dir, state));
    }
    let handle = vmm_of(dir)?;
    if state == State::Running {
        let session = Session::new(Address::hybrid(dir.vsock_socket()));
        let asked = session.shutdown(deadline).await.is_ok();
        if asked && ended_within(&handle, deadline + GUEST_END_TIMEOUT).await {
            return confirm(dir, StoppedBy::Guest);
        }
    }
    let told = vmm::control(dir, "stop").await.is_ok();
    if told && ended_within(&handle, VMM_END_TIMEOUT).await {
        return confirm(dir, StoppedBy::Vmm);
    }
    kill(dir, &handle).await?;
    confirm(dir, StoppedBy::Kill)
}

/// Removes a sandbox; with `force` one that runs is ended first, without asking its guest.
///
/// # Errors
/// When it runs and `force` is not given, or it cannot be ended or removed.
pub async fn remove(dir: &RunDir, force: bool) -> Result<(), StopError> {
    if force && matches!(dir.state(), State::Running | State::Creating) {
        let handle = vmm_of(dir)?;
        // For whoever runs a command in it. What happens to the sandbox does not depend on it.
        let _ = dir.write_json("exit.json", &VmExit::removed());
        kill(dir, &handle).await?;
        lock_released(dir);
    }
    Ok(dir.remove()?)
}

/// Why a sandbox's VM ended, if it does within `limit`; for a connection that was lost.
pub async fn end_within(dir: &RunDir, limit: Duration) -> Option<String> {
    let mut evidence = Evidence::secure(dir);
    let handle = dir
        .record()
        .and_then(|record| record.vmm)
        .and_then(|id| id.open());
    let ended = match handle {
        Some(handle) => ended_within(&handle, limit).await,
        None => true,
    };
    ended.then(|| {
        if dir.path().exists() {
            evidence.examine(None).cause
        } else {
            "the sandbox was removed".to_owned()
        }
    })
}

async fn kill(dir: &RunDir, handle: &ProcessHandle) -> Result<(), StopError> {
    handle.kill();
    if ended_within(handle, KILL_TIMEOUT).await {
        return Ok(());
    }
    Err(StopError::Survived {
        name: dir.name().to_string(),
        pid: dir
            .record()
            .and_then(|record| record.vmm)
            .map_or(0, |vmm| vmm.pid),
    })
}

fn confirm(dir: &RunDir, by: StoppedBy) -> Result<StoppedBy, StopError> {
    // QEMU dies with its VMM, a moment later.
    if lock_released(dir) {
        return Ok(by);
    }
    Err(StopError::Survived {
        name: dir.name().to_string(),
        pid: dir
            .record()
            .and_then(|record| record.vmm)
            .map_or(0, |vmm| vmm.pid),
    })
}

async fn ended_within(handle: &ProcessHandle, limit: Duration) -> bool {
    handle.ended_within(limit).await.unwrap_or(false)
}

/// The process to end: its VMM, or while there is none its creator.
fn vmm_of(dir: &RunDir) -> Result<ProcessHandle, StopError> {
    dir.record()
        .and_then(|record| record.vmm.unwrap_or(record.creator).open())
        .ok_or_else(|| StopError::NoRecord(dir.name().to_string()))
}

fn not_running(dir: &RunDir, state: State) -> StopError {
    let why = match state {
        State::Dead if dir.is_locked() => Some("what was starting it was killed".to_owned()),
        State::Stopped | State::Dead => Some(Evidence::secure(dir).examine(None).cause),
        State::Creating | State::Running => None,
    };
    StopError::NotRunning {
        name: dir.name().to_string(),
        state,
        why,
    }
}
