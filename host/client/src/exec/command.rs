//! What to run: a builder over the protocol's ExecStart.

use std::collections::hash_map::RandomState;
use std::ffi::OsStr;
use std::hash::{BuildHasher, Hasher};
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use airlock_proto::v1;
use bytes::Bytes;

/// A command line and the surroundings it runs in. Nothing is passed through a shell.
///
/// ```
/// use std::time::Duration;
/// use airlock_client::Command;
///
/// let command = Command::new("make")
///     .args(["-j2", "check"])
///     .env("CFLAGS", "-O1")
///     .cwd("/src")
///     .user("nobody")
///     .timeout(Duration::from_secs(600));
/// assert_eq!(command.start().timeout_ms, 600_000);
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Command {
    start: v1::ExecStart,
}

impl From<v1::ExecStart> for Command {
    /// Every field of the protocol, for what the builder has no method for.
    fn from(start: v1::ExecStart) -> Self {
        Self { start }
    }
}

impl Command {
    /// `program` is looked up in the exec's PATH if it has no slash.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            start: v1::ExecStart {
                argv: vec![bytes_of(program)],
                ..v1::ExecStart::default()
            },
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.start.argv.push(bytes_of(arg));
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.start.argv.extend(args.into_iter().map(bytes_of));
        self
    }

    /// Sets a variable; a later one of the same name wins.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        let name = bytes_of(name);
        self.start.env.retain(|variable| variable.name != name);
        self.start.env.push(v1::EnvVar {
            name,
            value: bytes_of(value),
        });
        self
    }

    /// Leaves out the agent's default variables (PATH, HOME and so on).
    #[must_use]
    pub fn env_clear(mut self) -> Self {
        self.start.env_clear = true;
        self
    }

    /// Absolute path in the guest; without it the user's home, or `/`.
    #[must_use]
    pub fn cwd(mut self, path: impl AsRef<OsStr>) -> Self {
        self.start.cwd = bytes_of(path);
        self
    }

    /// `name`, `uid`, `name:group` or `uid:gid`; without it root.
    #[must_use]
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.start.user = user.into();
        self
    }

    /// Gives it a terminal of this size; `term` is its TERM.
    #[must_use]
    pub fn tty(mut self, rows: u16, cols: u16, term: impl Into<String>) -> Self {
        self.start.tty = Some(v1::Tty {
            rows: rows.into(),
            cols: cols.into(),
            term: term.into(),
        });
        self
    }

    /// Opens a stdin for [`take_stdin`](crate::Exec::take_stdin); without it stdin is empty.
    #[must_use]
    pub fn stdin(mut self) -> Self {
        self.start.stdin = v1::StdinMode::StdinStream.into();
        self
    }

    /// Ends it (SIGTERM, and after a grace the whole tree) when it has run this long. Rounded up to milliseconds.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.start.timeout_ms = milliseconds(timeout);
        self
    }

    /// Time between SIGTERM and the end of the tree at a timeout; without it 2 s.
    #[must_use]
    pub fn grace(mut self, grace: Duration) -> Self {
        self.start.grace_ms = milliseconds(grace);
        self
    }

    /// The id it has in the guest, 1 to 64 of `[A-Za-z0-9._-]`; without it a random one. Starting a second command
    /// with an id that the guest knows attaches to the first.
    #[must_use]
    pub fn id(mut self, id: impl Into<String>) -> Self {
        self.start.id = id.into();
        self
    }

    /// Lets it outlive its connection, with the last `replay_bytes` (at most 16 MiB) of each stream kept for whoever
    /// attaches. Without this a lost connection ends it.
    #[must_use]
    pub fn keep(mut self, replay_bytes: u64) -> Self {
        self.start.on_disconnect = v1::DisconnectPolicy::DisconnectKeep.into();
        self.start.replay_bytes = replay_bytes;
        self
    }

    /// With [`keep`](Self::keep): output stays kept until it is acknowledged, and the command waits rather than let any
    /// go, also while nobody is attached. The [`Exec`](crate::Exec) acknowledges what its caller has taken.
    #[must_use]
    pub fn hold_output(mut self) -> Self {
        self.start.hold_output = true;
        self
    }

    /// Most memory its whole process tree may use.
    #[must_use]
    pub fn memory_limit(mut self, bytes: u64) -> Self {
        self.limits().memory_bytes = bytes;
        self
    }

    /// Most processes and threads it may have.
    #[must_use]
    pub fn pids_limit(mut self, count: u64) -> Self {
        self.limits().pids = count;
        self
    }

    /// Most CPU time it may use, in thousandths of one CPU.
    #[must_use]
    pub fn cpu_limit(mut self, thousandths: u32) -> Self {
        // The protocol counts microseconds for each 100 ms.
        self.limits().cpu_quota_us = u64::from(thousandths) * 100;
        self
    }

    fn limits(&mut self) -> &mut v1::Limits {
        self.start.limits.get_or_insert_default()
    }

    /// The message as it stands.
    #[must_use]
    pub fn start(&self) -> &v1::ExecStart {
        &self.start
    }

    /// The message to send: with an id, because a repeated start with the same id cannot run twice.
    pub(crate) fn into_start(mut self) -> v1::ExecStart {
        if self.start.id.is_empty() {
            self.start.id = format!("x-{:016x}", RandomState::new().build_hasher().finish());
        }
        self.start
    }
}

/// At least 1, because 0 means none.
fn milliseconds(duration: Duration) -> u64 {
    let whole = u64::try_from(duration.as_micros().div_ceil(1000)).unwrap_or(u64::MAX);
    whole.max(1)
}

fn bytes_of(text: impl AsRef<OsStr>) -> Bytes {
    Bytes::copy_from_slice(text.as_ref().as_bytes())
}
