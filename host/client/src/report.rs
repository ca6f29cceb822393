//! How a command ended, as a value that cannot be mistaken for success.
//!
//! The leader's exit, the end of each stream and the end of the tree are separate facts (the laws of exec); a lost
//! connection is a report of its own and has no status at all.

use std::time::Duration;

use airlock_proto::v1;

/// What the leader's end was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It exited with this code.
    Code(u32),
    /// A signal ended it.
    Signal {
        /// Linux number.
        number: u32,
        /// Whether it left a core dump.
        core: bool,
    },
}

/// Why it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// Of itself.
    Normal,
    /// Its time was up.
    Timeout,
    /// The kernel killed it for memory.
    Oom,
    /// A client had it killed.
    Killed,
}

/// What it used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// CPU time in user space.
    pub user: Duration,
    /// CPU time in the kernel.
    pub system: Duration,
    /// From start to reaping, by the guest's clock.
    pub wall: Duration,
    /// Largest resident set of the leader.
    pub max_rss_kib: u64,
    /// Peak of the exec's cgroup; 0 where the guest's kernel does not tell.
    pub peak_memory_bytes: u64,
}

/// The leader has been reaped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Its exit.
    pub status: Status,
    /// Why.
    pub cause: Cause,
    /// What it used.
    pub usage: Usage,
}

impl Ended {
    /// `None` if the message has no status: an agent that does not know must not look like success.
    #[must_use]
    pub fn from_message(message: &v1::LeaderExited) -> Option<Self> {
        use v1::leader_exited::Status as Wire;
        let status = match message.status? {
            Wire::Code(code) => Status::Code(code),
            Wire::Signal(number) => Status::Signal {
                number,
                core: message.core_dumped,
            },
        };
        let cause = match message.cause() {
            v1::Cause::Normal => Cause::Normal,
            v1::Cause::Timeout => Cause::Timeout,
            v1::Cause::Oom => Cause::Oom,
            v1::Cause::Killed => Cause::Killed,
        };
        Some(Self {
            status,
            cause,
            usage: Usage {
                user: Duration::from_micros(message.user_us),
                system: Duration::from_micros(message.system_us),
                wall: Duration::from_micros(message.wall_us),
                max_rss_kib: message.max_rss_kib,
                peak_memory_bytes: message.peak_memory_bytes,
            },
        })
    }
}

/// What is known of a stream at its end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StreamTotals {
    /// Bytes written by the tree: delivered, or counted in `cut_bytes`.
    pub total_bytes: u64,
    /// Bytes that were read in the guest and not delivered.
    pub cut_bytes: u64,
    /// The stream was ended while a process still had it open.
    pub held_open: bool,
}

/// The connection ended before the exec did: nothing is known of its end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the command's end is not known: {detail}")]
pub struct Lost {
    /// Why the connection ended.
    pub detail: String,
}

/// All there is to know about an exec that is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitReport {
    /// The leader ended and was reaped.
    Ended {
        /// How, and why.
        ended: Ended,
        /// Standard output, or a terminal's output.
        stdout: StreamTotals,
        /// Standard error.
        stderr: StreamTotals,
        /// The agent had to kill what the leader left running.
        tree_killed: bool,
    },
    /// The connection ended first.
    Lost(Lost),
}

impl ExitReport {
    /// Whether the command is known to have exited with code 0 of its own accord.
    #[must_use]
    pub fn success(&self) -> bool {
        matches!(
            self,
            Self::Ended {
                ended: Ended {
                    status: Status::Code(0),
                    cause: Cause::Normal,
                    ..
                },
                ..
            }
        )
    }
}
