//! A process on the host, held in a way that a recycled number cannot fool.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

/// A process id together with when that process started: the pair is never used twice in one boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// The number.
    pub pid: u32,
    /// Start time in clock ticks since boot, field 22 of /proc/PID/stat (proc(5)).
    pub start_ticks: u64,
}

impl ProcessId {
    /// This process.
    ///
    /// # Errors
    /// When /proc is not there.
    pub fn own() -> io::Result<Self> {
        Self::of(std::process::id())
    }

    /// The process that has the number now.
    ///
    /// # Errors
    /// When there is none.
    pub fn of(pid: u32) -> io::Result<Self> {
        Ok(Self {
            pid,
            start_ticks: start_ticks(pid)?,
        })
    }

    /// Whether it still runs (a zombie does not).
    #[must_use]
    pub fn is_running(self) -> bool {
        self.open().is_some() && !is_zombie(self.pid)
    }

    /// A handle that stays on this very process; `None` if it is gone.
    #[must_use]
    pub fn open(self) -> Option<ProcessHandle> {
        let pid = Pid::from_raw(i32::try_from(self.pid).ok()?)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // The number may have been recycled before the handle was opened, but not after: so compare now.
        (start_ticks(self.pid).ok()? == self.start_ticks).then_some(ProcessHandle { pidfd })
    }
}

/// A process that cannot be mistaken for another, running or not.
#[derive(Debug)]
pub struct ProcessHandle {
    pidfd: OwnedFd,
}

impl ProcessHandle {
    /// Ends it, with no way out. Doing so to one that has ended is fine.
    pub fn kill(&self) {
        // The only error that can occur is that it is gone already.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Waits until it has ended. Whether it did in time.
    ///
    /// # Errors
    /// When the handle cannot be polled.
    pub async fn ended_within(&self, limit: Duration) -> io::Result<bool> {
        match timeout(limit, self.ended()).await {
            Ok(ended) => ended.map(|()| true),
            Err(_) => Ok(false),
        }
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// When the handle cannot be polled.
    pub async fn ended(&self) -> io::Result<()> {
        poll::readable(self.pidfd.try_clone()?).await
    }
}

/// The one thing here that needs unsafe code.
mod poll {
    #![expect(
        unsafe_code,
        reason = "tokio has no safe way to poll a descriptor of a kind it does not know"
    )]

    use std::io;
    use std::os::fd::OwnedFd;

    use tokio::io::Interest;
    use tokio::io::unix::AsyncFd;

    /// Waits until `fd` is readable: a pidfd is once its process has ended (pidfd_open(2)).
    pub(super) async fn readable(fd: OwnedFd) -> io::Result<()> {
        // SAFETY: the descriptor must stay open and the same until `polled` is dropped. `polled` owns it, is never
        // handed out, and an OwnedFd always returns the one descriptor that it closes when dropped.
        let polled = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
        polled.readable().await.map(drop)
    }
}

fn stat(pid: u32) -> io::Result<String> {
    fs::read_to_string(format!("/proc/{pid}/stat"))
}

/// The fields after the command name, which is in parentheses and may hold any character.
fn fields_after_name(stat: &str) -> impl Iterator<Item = &str> {
    stat.rsplit_once(')')
        .map_or("", |(_, rest)| rest)
        .split_ascii_whitespace()
}

fn start_ticks(pid: u32) -> io::Result<u64> {
    // Field 22; the first after the name is field 3.
    fields_after_name(&stat(pid)?)
        .nth(22 - 3)
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has an unknown form")))
}

fn is_zombie(pid: u32) -> bool {
    stat(pid).is_ok_and(|stat| matches!(fields_after_name(&stat).next(), Some("Z" | "X")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recycled_process_number_is_not_taken_for_the_process() {
        let own = ProcessId::own().unwrap();
        assert!(own.is_running());
        let recycled = ProcessId {
            start_ticks: own.start_ticks + 1,
            ..own
        };
        assert!(!recycled.is_running());
        assert!(recycled.open().is_none());
    }

    #[test]
    fn a_command_name_with_parentheses_and_spaces_does_not_shift_the_fields() {
        let fields: Vec<_> = fields_after_name("7 (a) S (b) R 1 2").collect();
        assert_eq!(fields, ["R", "1", "2"]);
    }
}
