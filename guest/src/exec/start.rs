//! Starting an exec: descriptors, cgroup, spawn, and the record of it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use airlock_proto::is_exec_id;
use airlock_proto::v1::{ExecStart, SpawnStage, StdinMode, Stream, Tty};
use bytes::Bytes;
use rustix::fs::{Gid, Uid};
use rustix::io::{self, Errno};
use rustix::pipe::{PipeFlags, pipe_with};

use super::ring::Ring;
use super::source::Source;
use super::stdin::Stdin;
use super::{Deadlines, Exec, Policy};
use crate::cgroup::{Cgroups, ExecCgroup};
use crate::process::tree::Tree;
use crate::process::{Command, SpawnError, Spawner, Stdio, prepare};
use crate::pty;
use crate::users::Users;

/// Grace where the request says 0; agent.proto promises this number.
const DEFAULT_GRACE: Duration = Duration::from_millis(2000);
/// Longest time a request can ask for; beyond it a deadline would not fit the clock.
const MAX_DURATION: Duration = Duration::from_secs(366 * 24 * 3600);
/// Most commands are over within this time. Until then only the leader is watched: what such a command writes wakes
/// nobody, and all it has to say is found in one go when it ends.
pub(crate) const YOUNG: Duration = Duration::from_millis(2);
/// argv bytes kept for lists; agent.proto promises this number.
const MAX_LISTED_ARGV_BYTES: usize = 4096;
/// Largest replay ring of one stream.
const MAX_REPLAY_BYTES: u64 = 16 << 20;

pub(crate) type StartError = SpawnError;

/// What starting takes from the agent.
#[derive(Debug)]
pub(crate) struct Means<'a> {
    pub(crate) spawner: &'a mut Spawner,
    pub(crate) users: &'a mut Users,
    pub(crate) cgroups: Option<&'a mut Cgroups>,
    /// An open /dev/null.
    pub(crate) null: &'a OwnedFd,
    /// Bytes that replay rings may still take.
    pub(crate) replay_left: usize,
}

/// The id must be one before anything is done under its name.
pub(crate) fn check_id(id: &str) -> Result<(), StartError> {
    if is_exec_id(id) {
        return Ok(());
    }
    let message = format!("exec id {id:?} is not 1 to 64 of [A-Za-z0-9._-]");
    Err(StartError::new(
        SpawnStage::SpawnRequest,
        libc::EINVAL,
        message,
    ))
}

/// Starts what `request` asks for.
pub(crate) fn start(
    request: &ExecStart,
    mut means: Means<'_>,
    now: Instant,
) -> Result<Exec, StartError> {
    let command = prepare(request, means.users)?;
    let rings = make_rings(request, means.replay_left)?;
    let streams = match &request.tty {
        Some(tty) => Streams::terminal(tty, request.stdin(), &command)?,
        None => Streams::pipes(request.stdin(), &command)?,
    };
    let cgroup = match means.cgroups.as_deref_mut() {
        Some(cgroups) => Some(take_cgroup(cgroups, request)?),
        None => None,
    };
    let stdio = Stdio {
        fds: streams.child.stdio(means.null),
        controlling_tty: request.tty.is_some(),
    };
    let spawned = means
        .spawner
        .spawn(&command, stdio, cgroup.as_ref().map(ExecCgroup::folder));
    // The child's ends must be closed here, or the streams' end would never show.
    drop(streams.child);
    Ok(match spawned {
        Ok(child) => {
            let tree = cgroup.map_or(Tree::Walk { leader: child.pid }, Tree::Cgroup);
            let outputs = streams.outputs.into_iter().zip(rings);
            let sources = outputs
                .map(|((stream, fd), ring)| Source::new(stream, fd, request.tty.is_some(), ring))
                .collect();
            let policy = policy(request);
            Exec {
                id: request.id.clone(),
                pid: child.pid,
                argv: listed(&request.argv),
                is_tty: request.tty.is_some(),
                started: now,
                start_unix_ns: unix_ns(),
                deadlines: Deadlines {
                    watch: Some(now + YOUNG),
                    timeout: policy.timeout.map(|t| now + t),
                    ..Deadlines::default()
                },
                policy,
                leader: Some(child.pidfd),
                exit: None,
                sources,
                stdin: Stdin::new(streams.input, request.tty.is_some()),
                stdin_is_watched: false,
                streams_are_watched: false,
                tree: Some(tree),
                tree_is_empty: false,
                tree_looks: 0,
                attachments: Vec::new(),
                detached: request.detach,
                scheduled: None,
                timed_out: false,
                must_empty: false,
                killing: false,
                client_signals: 0,
                acknowledged: request.hold_output.then_some([0; 2]),
                replay_bytes: ring_bytes(request),
                retired: false,
            }
        }
        Err(error) => {
            if let (Some(cgroups), Some(cgroup)) = (means.cgroups, cgroup) {
                cgroups.give_back(cgroup);
            }
            return Err(error);
        }
    })
}

fn take_cgroup(cgroups: &mut Cgroups, request: &ExecStart) -> Result<ExecCgroup, StartError> {
    cgroups
        .take(request.limits.as_ref())
        .map_err(|errno| SpawnError::resources("a cgroup with these limits", errno))
}

fn streams_of(request: &ExecStart) -> usize {
    if request.tty.is_some() { 1 } else { 2 }
}

/// What the rings of `request` take together.
pub(crate) fn ring_bytes(request: &ExecStart) -> usize {
    let each = usize::try_from(request.replay_bytes).unwrap_or(usize::MAX);
    each.saturating_mul(streams_of(request))
}

fn make_rings(request: &ExecStart, left: usize) -> Result<[Option<Ring>; 2], StartError> {
    let bytes = request.replay_bytes;
    if bytes == 0 {
        return Ok([None, None]);
    }
    if bytes > MAX_REPLAY_BYTES {
        let message = format!("replay_bytes {bytes} exceeds the limit of {MAX_REPLAY_BYTES}");
        return Err(StartError::new(
            SpawnStage::SpawnRequest,
            libc::EINVAL,
            message,
        ));
    }
    let streams = streams_of(request);
    if bytes as usize * streams > left {
        let message = format!("replay buffers of other execs leave {left} bytes");
        return Err(StartError::new(
            SpawnStage::SpawnResources,
            libc::ENOMEM,
            message,
        ));
    }
    let ring = || Some(Ring::new(bytes as usize));
    Ok([ring(), (streams == 2).then(ring).flatten()])
}

fn policy(request: &ExecStart) -> Policy {
    let duration = |ms: u64| Duration::from_millis(ms).min(MAX_DURATION);
    let or_default = |ms: u64| if ms == 0 { DEFAULT_GRACE } else { duration(ms) };
    Policy {
        timeout: (request.timeout_ms != 0).then(|| duration(request.timeout_ms)),
        grace: or_default(request.grace_ms),
        holders: request.holders(),
        holder_grace: or_default(request.holder_grace_ms),
        on_disconnect: request.on_disconnect(),
    }
}

fn listed(argv: &[Bytes]) -> Vec<Bytes> {
    let mut left = MAX_LISTED_ARGV_BYTES;
    argv.iter()
        .map_while(|argument| {
            let kept = &argument[..argument.len().min(left)];
            let more = left > 0;
            left -= kept.len();
            // A copy: a slice of the request would keep all of it.
            more.then(|| Bytes::copy_from_slice(kept))
        })
        .collect()
}

fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

/// The descriptors of an exec, both sides.
struct Streams {
    child: ChildEnds,
    input: Option<OwnedFd>,
    outputs: Vec<(Stream, OwnedFd)>,
}

enum ChildEnds {
    Terminal(OwnedFd),
    Pipes {
        input: Option<OwnedFd>,
        output: OwnedFd,
        error: OwnedFd,
    },
}

impl ChildEnds {
    fn stdio<'a>(&'a self, null: &'a OwnedFd) -> [BorrowedFd<'a>; 3] {
        match self {
            Self::Terminal(slave) => [slave.as_fd(); 3],
            Self::Pipes {
                input,
                output,
                error,
            } => [input.as_ref().unwrap_or(null), output, error].map(AsFd::as_fd),
        }
    }
}

impl Streams {
    fn terminal(tty: &Tty, stdin: StdinMode, command: &Command) -> Result<Self, StartError> {
        let failed = |errno: Errno| {
            let message = format!("cannot open a terminal: {errno}");
            StartError::new(SpawnStage::SpawnTty, errno.raw_os_error(), message)
        };
        let pty = pty::open(tty, command.identity.uid).map_err(failed)?;
        let input = match stdin {
            StdinMode::StdinNone => None,
            StdinMode::StdinStream => {
                Some(io::fcntl_dupfd_cloexec(&pty.master, 3).map_err(failed)?)
            }
        };
        Ok(Self {
            input,
            outputs: vec![(Stream::Stdout, pty.master)],
            child: ChildEnds::Terminal(pty.slave),
        })
    }

    fn pipes(stdin: StdinMode, command: &Command) -> Result<Self, StartError> {
        let failed = |errno| SpawnError::resources("a pipe", errno);
        let uid = command.identity.uid;
        let (out_reader, output) = pipe(uid).map_err(failed)?;
        let (err_reader, error) = pipe(uid).map_err(failed)?;
        for reader in [&out_reader, &err_reader] {
            io::ioctl_fionbio(reader, true).map_err(failed)?;
        }
        let (child_input, input) = match stdin {
            StdinMode::StdinNone => (None, None),
            StdinMode::StdinStream => {
                let (reader, writer) = pipe(uid).map_err(failed)?;
                io::ioctl_fionbio(&writer, true).map_err(failed)?;
                (Some(reader), Some(writer))
            }
        };
        Ok(Self {
            child: ChildEnds::Pipes {
                input: child_input,
                output,
                error,
            },
            input,
            outputs: vec![(Stream::Stdout, out_reader), (Stream::Stderr, err_reader)],
        })
    }
}

/// A pipe; the agent sets its own end not to block, the exec's end blocks as programs expect.
fn pipe(uid: u32) -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    if uid != 0 {
        // So that the exec may open its own /dev/stdout. Without privilege it is the same user's anyway.
        let _ = rustix::fs::fchown(&writer, Some(Uid::from_raw(uid)), None::<Gid>);
    }
    Ok((reader, writer))
}
