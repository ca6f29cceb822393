//! The spawn floor: starts a program the way every exec is started, and measures from before the clone to after reaping.
//! A few at a time, so that execs go on meanwhile.

use std::rc::Rc;
use std::time::{Duration, Instant};

use airlock_proto::v1::control_reply::Reply;
use airlock_proto::v1::{ErrorCode, SpawnProbeReply};

use super::Agent;
use super::connection::State;
use crate::process::{Command, NoOp, SpawnError, Stdio, signals};
use std::os::fd::AsFd;

/// agent.proto promises this number.
const MAX_COUNT: u32 = 10_000;
/// Time spent probing before others get their turn.
const SLICE: Duration = Duration::from_millis(5);

#[derive(Debug)]
pub(super) struct Probe {
    /// `None`: the no-op.
    program: Option<Rc<Command>>,
    count: usize,
    spawn_ns: Vec<u64>,
}

impl Probe {
    /// `None` if the request is out of range.
    pub(super) fn new(count: u32, program: &[u8]) -> Option<Self> {
        let program = match program {
            [] => None,
            [b'/', ..] if !program.contains(&0) => Some(Rc::new(Command::bare(program))),
            _ => return None,
        };
        (1..=MAX_COUNT).contains(&count).then(|| Self {
            program,
            count: count as usize,
            spawn_ns: Vec::with_capacity(count as usize),
        })
    }
}

impl Agent {
    /// Goes on with the probes that are under way.
    pub(super) fn probe_some(&mut self) {
        let Some(key) = self.probes.pop() else { return };
        let until = Instant::now() + SLICE;
        loop {
            let program = match self
                .connections
                .get_mut(key)
                .map(|connection| &connection.state)
            {
                Some(State::Probing(probe)) => probe.program.clone(),
                _ => return,
            };
            let result = self.probe_once(program.as_deref());
            let Some(connection) = self.connections.get_mut(key) else {
                return;
            };
            let State::Probing(probe) = &mut connection.state else {
                return;
            };
            match result {
                Ok(ns) => probe.spawn_ns.push(ns),
                Err(error) => {
                    connection.state = State::Idle;
                    return self.error(key, ErrorCode::ErrorExhausted, &error.to_string());
                }
            }
            if probe.spawn_ns.len() == probe.count {
                let spawn_ns = std::mem::take(&mut probe.spawn_ns);
                connection.state = State::Idle;
                return self.reply(key, Reply::SpawnProbe(SpawnProbeReply { spawn_ns }));
            }
            if Instant::now() >= until {
                // To the front: the others' turn comes first.
                return self.probes.insert(0, key);
            }
        }
    }

    fn probe_once(&mut self, program: Option<&Command>) -> Result<u64, SpawnError> {
        let no_op = match &self.no_op {
            Some(no_op) => no_op,
            None => {
                let no_op =
                    NoOp::new().map_err(|e| SpawnError::resources("the no-op program", e))?;
                self.no_op.insert(no_op)
            }
        };
        let cgroup = match &mut self.cgroups {
            Some(cgroups) => Some(
                cgroups
                    .take(None)
                    .map_err(|e| SpawnError::resources("a cgroup", e))?,
            ),
            None => None,
        };
        let stdio = Stdio {
            fds: [self.null.as_fd(); 3],
            controlling_tty: false,
        };
        let start = Instant::now();
        let folder = cgroup.as_ref().map(crate::cgroup::ExecCgroup::folder);
        let spawned = self
            .spawner
            .spawn(program.unwrap_or(&no_op.command), stdio, folder);
        if let Ok(child) = &spawned {
            signals::reap(child.pid, true);
        }
        let elapsed = start.elapsed();
        if let (Some(cgroups), Some(cgroup)) = (&mut self.cgroups, cgroup) {
            cgroups.put_back(cgroup);
        }
        spawned?;
        Ok(u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX))
    }
}
