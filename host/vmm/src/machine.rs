//! A running VM as its process sees it, whatever the engine: how it ends, and what the control socket can ask of it.
//!
//! An engine's threads report their end through [`ExitSlot`], of which the first report wins; `main.rs` waits for it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

use rustix::event::{EventfdFlags, eventfd};
use serde::{Deserialize, Serialize};

/// Why a VM ended; `exit.json` in the run folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// What a caller matches on.
    pub reason: ExitReason,
    /// One line for people.
    pub detail: String,
}

/// The ways a VM ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The guest reset or powered itself off.
    GuestReset,
    /// The control socket or SIGTERM said so.
    Stopped,
    /// The process that held the lifeline is gone.
    Lifeline,
    /// The guest did something its CPU could not go on from.
    GuestFault,
    /// The VMM, or its host, failed.
    Error,
}

impl ExitReason {
    /// Ends that were asked for.
    pub fn is_orderly(self) -> bool {
        matches!(self, Self::GuestReset | Self::Stopped | Self::Lifeline)
    }
}

/// What the control socket can ask of a VM. All calls return promptly.
pub trait Machine: Send {
    /// Whether the vCPUs are held.
    fn is_paused(&self) -> bool;
    /// Holds all vCPUs; returns when none runs any more.
    fn pause(&self) -> Result<(), String>;
    /// Lets them run again.
    fn resume(&self) -> Result<(), String>;
    /// Counters, as a JSON object.
    fn metrics(&self) -> serde_json::Value;
    /// Ends the VM: no guest instruction runs, no device touches the host once this returns.
    fn stop(self: Box<Self>);
}

/// Where the first thread that sees the VM's end says so.
#[derive(Debug)]
pub struct ExitSlot {
    exit: Mutex<Option<Exit>>,
    event: OwnedFd,
}

impl ExitSlot {
    /// An empty slot.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            exit: Mutex::new(None),
            event: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
        })
    }

    /// Reports the end; only the first report counts.
    pub fn report(&self, reason: ExitReason, detail: impl Into<String>) {
        let mut exit = self
            .exit
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if exit.is_none() {
            *exit = Some(Exit {
                reason,
                detail: detail.into(),
            });
            // Cannot fail: the counter is far from its limit of 2^64 - 2.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
    }

    /// The report, if there is one.
    pub fn get(&self) -> Option<Exit> {
        self.exit
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .clone()
    }
}

impl AsFd for ExitSlot {
    /// Readable once there is a report.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// An error with all its causes, on one line.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
