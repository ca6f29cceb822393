//! The end: SIGTERM to every exec, a deadline, then kill, sync, and the reset that the host waits for.

use std::time::{Duration, Instant};

use airlock_proto::v1::control_reply::Reply;
use airlock_proto::v1::{Empty, Signal, SignalTarget};

use super::Agent;
use super::connection::State;
use crate::table::Key;
use crate::{init, log};

/// After the kill, how long the workload's end is waited for before the machine goes anyway.
const KILLED_WAIT: Duration = Duration::from_secs(2);
/// Time for the last answer to reach the host.
const ANSWER_WAIT: Duration = Duration::from_millis(200);
/// How often the workload is looked at; execs that end wake the loop by themselves.
const LOOK: Duration = Duration::from_millis(10);

#[derive(Debug)]
pub(super) struct Shutdown {
    answer_to: Key,
    phase: Phase,
    deadline: Instant,
    look_at: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Asked,
    Killed,
    Answering,
}

impl Shutdown {
    pub(super) fn next_look(&self) -> Instant {
        self.look_at.min(self.deadline)
    }
}

impl Agent {
    pub(super) fn shut_down(&mut self, key: Key, deadline_ms: u64, now: Instant) {
        log::info(format_args!(
            "shutting down, {deadline_ms} ms for the workload"
        ));
        let terminate = Signal {
            signal: libc::SIGTERM as u32,
            target: SignalTarget::TargetTree.into(),
        };
        for exec_key in self.execs.keys() {
            if let Some(exec) = self.execs.get_mut(exec_key) {
                // One that has ended already needs no signal.
                let _ = exec.signal(&terminate, now);
                self.to_pump.push(exec_key);
            }
        }
        if let Some(connection) = self.connections.get_mut(key) {
            connection.state = State::ShuttingDown;
        }
        self.shutdown = Some(Shutdown {
            answer_to: key,
            phase: Phase::Asked,
            deadline: now + Duration::from_millis(deadline_ms.min(u64::from(u32::MAX))),
            look_at: now,
        });
    }

    /// Takes the shutdown as far as it can go now.
    pub(super) fn progress_shutdown(&mut self, now: Instant) {
        let Some(mut shutdown) = self.shutdown.take() else {
            return;
        };
        shutdown.look_at = now + LOOK;
        let past = now >= shutdown.deadline;
        let gone = self.workload_is_gone();
        match shutdown.phase {
            Phase::Asked if past && !gone => {
                self.kill_workload(now);
                shutdown.phase = Phase::Killed;
                shutdown.deadline = now + KILLED_WAIT;
            }
            Phase::Asked | Phase::Killed if gone || past => {
                rustix::fs::sync();
                if let Some(connection) = self.connections.get_mut(shutdown.answer_to) {
                    connection.state = State::Idle;
                }
                self.reply(shutdown.answer_to, Reply::Done(Empty {}));
                shutdown.phase = Phase::Answering;
                shutdown.deadline = now + ANSWER_WAIT;
                shutdown.look_at = now;
            }
            Phase::Answering => {
                let waiting = self.connections.get(shutdown.answer_to);
                let sent = waiting.is_none_or(|c| c.out.is_empty());
                if sent || past {
                    self.end();
                }
            }
            Phase::Asked | Phase::Killed => {}
        }
        self.shutdown = Some(shutdown);
    }

    fn workload_is_gone(&self) -> bool {
        match &self.cgroups {
            Some(cgroups) => !cgroups.is_populated(),
            None => self.execs.iter().all(|(_, exec)| !exec.has_tree()),
        }
    }

    fn kill_workload(&mut self, now: Instant) {
        for exec_key in self.execs.keys() {
            if let Some(exec) = self.execs.get_mut(exec_key) {
                exec.kill_rest(now);
                self.to_pump.push(exec_key);
            }
        }
        if let Some(cgroups) = &self.cgroups {
            cgroups.kill_all();
        }
    }

    fn end(&mut self) {
        if self.options.machine {
            init::power::reset();
        }
        self.finished = true;
    }
}
