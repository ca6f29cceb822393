//! What happens to an exec over time: its leader ends, its tree empties, a deadline passes, a client signals or goes.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use airlock_proto::v1::{
    Cause, DisconnectPolicy, HolderPolicy, LeaderExited, Signal as SignalRequest, SignalTarget,
    leader_exited,
};

use super::Exec;
use super::source::Source;
use crate::cgroup::ExecCgroup;
use crate::process::signals::{self, Ended, Status, reap};
use crate::process::tree::Tree;
use crate::pty;
use crate::table::Key;

/// After a kill under [`HolderPolicy::HoldersKill`], how long a stream that something outside the tree holds is waited
/// for.
const KILLED_HOLDER_GRACE: Duration = Duration::from_millis(2000);
/// First wait before looking at a tree again that has no event, or that must die; doubled up to the longest.
const TREE_FIRST_WAIT: Duration = Duration::from_millis(2);
const TREE_LONGEST_WAIT: Duration = Duration::from_millis(500);
/// Doublings of that wait, after which it is long past the longest.
const MAX_TREE_LOOKS: u32 = 16;
/// Exit code by which shells tell that a child was killed by SIGKILL.
const SHELL_KILLED_CODE: u8 = 128 + 9;

/// Why a signal or a resize was not done.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ActionError {
    #[error("the exec has ended")]
    Ended,
    #[error("the exec has no terminal")]
    NoTerminal,
    #[error("no such signal")]
    BadSignal,
    #[error("the kernel refused: {0}")]
    Kernel(rustix::io::Errno),
}

impl Exec {
    pub(crate) fn leader_fd(&self) -> Option<&OwnedFd> {
        self.leader.as_ref()
    }

    /// The leader's descriptor fired: reaps it and takes down how it ended. False: it has not ended after all.
    pub(crate) fn reap_leader(&mut self, now: Instant) -> bool {
        if self.leader.is_none() {
            return false;
        }
        let Some(ended) = reap(self.pid, false) else {
            return false;
        };
        self.leader = None;
        // Whoever keeps the streams open after this is to be heard.
        self.deadlines.watch = None;
        self.exit = Some(self.describe_exit(&ended, now));
        for source in &mut self.sources {
            source.leader_exited();
        }
        self.look_at_tree(now);
        let held = self.sources.iter().any(|s| !s.has_ended());
        match self.policy.holders {
            HolderPolicy::HoldersGrace => {
                self.deadlines.holders = held.then_some(now + self.policy.holder_grace);
            }
            HolderPolicy::HoldersWait => {}
            HolderPolicy::HoldersKill => {
                self.kill_rest(now);
                self.deadlines.holders = held.then_some(now + KILLED_HOLDER_GRACE);
            }
        }
        true
    }

    fn describe_exit(&self, ended: &Ended, now: Instant) -> LeaderExited {
        let cgroup = match &self.tree {
            Some(Tree::Cgroup(cgroup)) => Some(cgroup),
            _ => None,
        };
        let (status, core_dumped) = match ended.status {
            Status::Code(code) => (leader_exited::Status::Code(code.into()), false),
            Status::Signal {
                number,
                core_dumped,
            } => (leader_exited::Status::Signal(number.into()), core_dumped),
        };
        LeaderExited {
            status: Some(status),
            core_dumped,
            cause: self.cause(ended.status, cgroup).into(),
            user_us: ended.user_us,
            system_us: ended.system_us,
            max_rss_kib: ended.max_rss_kib,
            peak_memory_bytes: cgroup.map_or(0, ExecCgroup::memory_peak),
            wall_us: u64::try_from(now.saturating_duration_since(self.started).as_micros())
                .unwrap_or(u64::MAX),
        }
    }

    fn cause(&self, status: Status, cgroup: Option<&ExecCgroup>) -> Cause {
        if self.timed_out {
            return Cause::Timeout;
        }
        let (killed, number) = match status {
            Status::Signal { number, .. } => (number == libc::SIGKILL as u8, Some(number)),
            Status::Code(code) => (code == SHELL_KILLED_CODE, None),
        };
        if killed && cgroup.is_some_and(|c| c.oom_kills() > 0) {
            return Cause::Oom;
        }
        match number {
            Some(number) if self.client_signals & signal_bit(number.into()) != 0 => Cause::Killed,
            _ => Cause::Normal,
        }
    }

    /// Looks whether the tree is empty; asks for another look where no event will tell.
    pub(crate) fn look_at_tree(&mut self, now: Instant) {
        self.deadlines.tree = None;
        let Some(tree) = self.tree.as_ref().filter(|_| !self.tree_is_empty) else {
            return;
        };
        if self.exit.is_some() && tree.is_empty() {
            self.tree_is_empty = true;
            self.must_empty = false;
            return;
        }
        if self.killing {
            tree.kill();
        }
        if self.killing || (self.exit.is_some() && matches!(tree, Tree::Walk { .. })) {
            let wait = TREE_FIRST_WAIT * 2_u32.saturating_pow(self.tree_looks);
            self.tree_looks = (self.tree_looks + 1).min(MAX_TREE_LOOKS);
            self.deadlines.tree = Some(now + wait.min(TREE_LONGEST_WAIT));
        }
    }

    /// The tree, once it was seen empty.
    pub(crate) fn take_empty_tree(&mut self) -> Option<Tree> {
        if self.tree_is_empty {
            self.tree.take()
        } else {
            None
        }
    }

    pub(crate) fn tree_cgroup(&self) -> Option<&ExecCgroup> {
        match &self.tree {
            Some(Tree::Cgroup(cgroup)) => Some(cgroup),
            _ => None,
        }
    }

    /// Kills what is left and does not count the exec as over before that is proven.
    pub(crate) fn kill_rest(&mut self, now: Instant) {
        if self.tree.is_none() || self.tree_is_empty {
            return;
        }
        self.killing = true;
        self.must_empty = true;
        self.tree_looks = 0;
        self.look_at_tree(now);
    }

    /// When [`Self::on_deadline`] must be called next.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let d = &self.deadlines;
        if self.is_over() {
            // What is left of the tree was left on purpose; only its end is still worth a look.
            return d.tree;
        }
        [d.watch, d.timeout, d.kill, d.holders, d.tree]
            .into_iter()
            .flatten()
            .min()
    }

    pub(crate) fn on_deadline(&mut self, now: Instant) {
        let passed = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if passed(self.deadlines.watch) {
            self.deadlines.watch = None;
        }
        if passed(self.deadlines.timeout) {
            self.deadlines.timeout = None;
            if !self.is_over() {
                self.time_out(now);
            }
        }
        if passed(self.deadlines.kill) {
            self.deadlines.kill = None;
            self.kill_rest(now);
        }
        if passed(self.deadlines.holders) {
            self.deadlines.holders = None;
            self.sources.iter_mut().for_each(Source::give_up_on_holders);
        }
        if passed(self.deadlines.tree) {
            self.look_at_tree(now);
        }
    }

    fn time_out(&mut self, now: Instant) {
        // A leader that has ended ended by itself, and its report said so.
        self.timed_out = self.exit.is_none();
        self.must_empty = true;
        if let Some(tree) = &self.tree {
            tree.signal(libc::SIGTERM);
            // A stopped process acts on SIGTERM only when it goes on.
            tree.signal(libc::SIGCONT);
        }
        self.deadlines.kill = Some(now + self.policy.grace);
    }

    /// A client's signal.
    pub(crate) fn signal(
        &mut self,
        request: &SignalRequest,
        now: Instant,
    ) -> Result<(), ActionError> {
        let number = i32::try_from(request.signal).unwrap_or(0);
        if !(1..=64).contains(&number) {
            return Err(ActionError::BadSignal);
        }
        let tree = self.tree.as_ref().filter(|_| !self.tree_is_empty);
        match (&self.leader, tree, request.target()) {
            (Some(leader), _, SignalTarget::TargetLeader) => {
                signals::send_to_pidfd(leader, number).map_err(ActionError::Kernel)?;
            }
            (_, Some(tree), SignalTarget::TargetGroup) => tree.signal_group(self.pid, number),
            (_, Some(_), SignalTarget::TargetTree) if number == libc::SIGKILL => {
                self.kill_rest(now)
            }
            (_, Some(tree), SignalTarget::TargetTree) => tree.signal(number),
            _ => return Err(ActionError::Ended),
        }
        self.client_signals |= signal_bit(number as u32);
        Ok(())
    }

    pub(crate) fn resize(&self, rows: u32, cols: u32) -> Result<(), ActionError> {
        if !self.is_tty {
            return Err(ActionError::NoTerminal);
        }
        let terminal = self.sources.first().filter(|_| self.exit.is_none());
        let terminal = terminal.and_then(Source::fd).ok_or(ActionError::Ended)?;
        pty::resize(terminal, rows, cols).map_err(ActionError::Kernel)
    }

    /// The client wants to leave the exec running: a full ring must not hold it up.
    pub(crate) fn detach(&mut self) {
        self.detached = true;
        self.acknowledged = None;
    }

    /// A connection is no longer attached. If it was lost and was the controller, the exec's policy decides.
    pub(crate) fn drop_connection(&mut self, connection: Key, lost: bool, now: Instant) {
        let Some(at) = self
            .attachments
            .iter()
            .position(|a| a.connection == connection)
        else {
            return;
        };
        let gone = self.attachments.remove(at);
        let kill = self.policy.on_disconnect == DisconnectPolicy::DisconnectKill && !self.detached;
        if lost && !gone.observer && kill && !self.is_over() {
            self.client_signals |= signal_bit(libc::SIGKILL as u32);
            self.kill_rest(now);
        }
    }
}

fn signal_bit(number: u32) -> u64 {
    1_u64.checked_shl(number.wrapping_sub(1)).unwrap_or(0)
}
