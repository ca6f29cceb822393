//! Control requests: one answer each, then the connection is idle again.

use std::collections::VecDeque;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use airlock_proto::v1::control::Request;
use airlock_proto::v1::control_reply::Reply;
use airlock_proto::v1::{
    Control, ControlReply, Empty, Error, ErrorCode, ExecListReply, ExecResize, ExecSignal, Freeze,
    Ping, Pong, SpawnProbe, from_agent::Body,
};

use super::Agent;
use super::connection::State;
use super::probe::Probe;
use super::system;
use crate::exec::{ActionError, Exec};
use crate::table::Key;

/// agent.proto promises this number.
const MAX_PING_BYTES: usize = 64 << 10;
/// Execs in one page of a list: with 4 KiB of argv each they stay well below the frame limit.
const LIST_PAGE: usize = 16;

impl Agent {
    pub(super) fn control(&mut self, key: Key, control: Control, now: Instant) {
        match control.request {
            Some(Request::Ping(ping)) => self.ping(key, ping),
            Some(Request::ExecList(_)) => {
                let execs: VecDeque<Key> = self.execs.keys().into();
                self.list_execs(key, execs);
            }
            Some(Request::ExecSignal(request)) => self.control_signal(key, &request, now),
            Some(Request::ExecWait(request)) => self.exec_wait(key, &request.id),
            Some(Request::ExecResize(request)) => self.control_resize(key, &request),
            Some(Request::SystemStat(_)) => {
                let execs = self.execs.iter().filter(|(_, e)| e.is_running()).count();
                self.reply(key, Reply::SystemStat(system::stat(execs as u32)));
            }
            Some(Request::ClockSet(request)) => {
                let done = self
                    .machine_only()
                    .and_then(|()| system::set_clock(request.unix_ns));
                self.reply_done(key, done);
            }
            Some(Request::AddEntropy(request)) => {
                let done = self
                    .machine_only()
                    .and_then(|()| system::add_entropy(&request.data));
                self.reply_done(key, done);
            }
            Some(Request::Shutdown(request)) => self.shut_down(key, request.deadline_ms, now),
            Some(Request::Freeze(request)) => self.freeze(key, request),
            Some(Request::SpawnProbe(request)) => self.spawn_probe(key, &request),
            Some(Request::NetworkSet(_) | Request::PortWatch(_)) => {
                let message = "this request is not served yet";
                self.error(key, ErrorCode::ErrorUnimplemented, message);
            }
            None => self.error(
                key,
                ErrorCode::ErrorUnimplemented,
                "an unknown control request",
            ),
        }
    }

    pub(super) fn reply(&mut self, key: Key, reply: Reply) {
        let body = Body::Control(ControlReply {
            reply: Some(reply),
            more: false,
        });
        self.send(key, body);
    }

    fn reply_done(&mut self, key: Key, result: Result<(), Error>) {
        match result {
            Ok(()) => self.reply(key, Reply::Done(Empty {})),
            Err(error) => self.send(key, Body::Error(error)),
        }
    }

    fn machine_only(&self) -> Result<(), Error> {
        if self.options.machine {
            return Ok(());
        }
        Err(system::failure(
            ErrorCode::ErrorState,
            "this machine is not the agent's",
            0,
        ))
    }

    fn ping(&mut self, key: Key, ping: Ping) {
        if ping.payload.len() > MAX_PING_BYTES {
            let message = format!("a ping carries at most {MAX_PING_BYTES} bytes");
            return self.error(key, ErrorCode::ErrorInvalid, &message);
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let pong = Pong {
            payload: ping.payload,
            guest_unix_ns: now.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)),
        };
        self.reply(key, Reply::Pong(pong));
    }

    /// Sends the list in pages, as the connection takes them.
    pub(super) fn list_execs(&mut self, key: Key, mut execs: VecDeque<Key>) {
        loop {
            let Some(connection) = self.connections.get_mut(key) else {
                return;
            };
            if !connection.out.has_room() {
                connection.state = State::Listing(execs);
                return self.list_for_flush(key);
            }
            let page = execs.drain(..execs.len().min(LIST_PAGE));
            let infos = page
                .filter_map(|exec| Some(self.execs.get(exec)?.info()))
                .collect();
            let more = !execs.is_empty();
            connection.state = State::Idle;
            connection.out.push(Body::Control(ControlReply {
                reply: Some(Reply::ExecList(ExecListReply { execs: infos })),
                more,
            }));
            if !more {
                return self.list_for_flush(key);
            }
        }
    }

    fn find(&mut self, key: Key, id: &str) -> Option<Key> {
        let found = self.ids.get(id).copied();
        if found.is_none() {
            let message = format!("no exec {id:?}");
            self.error(key, ErrorCode::ErrorNotFound, &message);
        }
        found
    }

    fn control_signal(&mut self, key: Key, request: &ExecSignal, now: Instant) {
        let Some(exec_key) = self.find(key, &request.id) else {
            return;
        };
        let signal = request.signal.unwrap_or_default();
        let result = self
            .execs
            .get_mut(exec_key)
            .map_or(Err(ActionError::Ended), |exec| exec.signal(&signal, now));
        self.to_pump.push(exec_key);
        self.reply_done(key, result.map_err(action_failure));
    }

    fn control_resize(&mut self, key: Key, request: &ExecResize) {
        let Some(exec_key) = self.find(key, &request.id) else {
            return;
        };
        let size = request.size.unwrap_or_default();
        let exec = self.execs.get(exec_key);
        let result = exec.map_or(Err(ActionError::Ended), |e| e.resize(size.rows, size.cols));
        self.reply_done(key, result.map_err(action_failure));
    }

    fn exec_wait(&mut self, key: Key, id: &str) {
        let Some(exec_key) = self.find(key, id) else {
            return;
        };
        match self.execs.get(exec_key) {
            Some(exec) if exec.is_running() => {
                if let Some(connection) = self.connections.get_mut(key) {
                    connection.state = State::Waiting(exec_key);
                }
            }
            exec => {
                let info = exec.map(Exec::info).unwrap_or_default();
                self.reply(key, Reply::ExecInfo(info));
            }
        }
    }

    /// An exec's leader has ended: answers those who wait for it.
    pub(super) fn answer_waiters(&mut self, exec_key: Key) {
        let waits = |state: &State| matches!(state, State::Waiting(exec) if *exec == exec_key);
        let waiting = self.connections.iter().filter(|(_, c)| waits(&c.state));
        let waiting: Vec<Key> = waiting.map(|(key, _)| key).collect();
        for key in waiting {
            let info = self.execs.get(exec_key).map(Exec::info).unwrap_or_default();
            if let Some(connection) = self.connections.get_mut(key) {
                connection.state = State::Idle;
            }
            self.reply(key, Reply::ExecInfo(info));
        }
    }

    fn freeze(&mut self, key: Key, request: Freeze) {
        let Some(cgroups) = &self.cgroups else {
            let message = "without cgroup v2 nothing can be frozen";
            return self.error(key, ErrorCode::ErrorState, message);
        };
        let done = cgroups.freeze(request.frozen).map_err(|errno| {
            let message = format!("cgroup.freeze: {errno}");
            system::failure(ErrorCode::ErrorIo, &message, errno.raw_os_error())
        });
        self.reply_done(key, done);
    }

    fn spawn_probe(&mut self, key: Key, request: &SpawnProbe) {
        match Probe::new(request.count, &request.program) {
            Some(probe) => {
                if let Some(connection) = self.connections.get_mut(key) {
                    connection.state = State::Probing(probe);
                    self.probes.push(key);
                }
            }
            None => self.error(
                key,
                ErrorCode::ErrorInvalid,
                "a probe spawns an absolute path 1 to 10000 times",
            ),
        }
    }
}

fn action_failure(error: ActionError) -> Error {
    let (code, errno) = match error {
        ActionError::Ended | ActionError::NoTerminal => (ErrorCode::ErrorState, 0),
        ActionError::BadSignal => (ErrorCode::ErrorInvalid, libc::EINVAL),
        ActionError::Kernel(errno) => (ErrorCode::ErrorIo, errno.raw_os_error()),
    };
    system::failure(code, &error.to_string(), errno)
}
