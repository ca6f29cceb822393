//! The server's side of execs: starting, attaching, their events, deadlines and end. What an exec does is in
//! `crate::exec`.

use std::time::Instant;

use airlock_proto::v1::{
    self, Error, ErrorCode, ExecAttach, ExecStart, SpawnFailed, from_agent::Body,
};
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;

use super::connection::{ENDING_HOLD, State};
use super::{Agent, MAX_EXECS, MAX_FINISHED, MAX_REPLAY_TOTAL_BYTES};
use crate::exec::{self, Attachment, MAX_OBSERVERS, Means, StartError, YOUNG};
use crate::log;
use crate::process::tree::Tree;
use crate::reactor::{Ready, Token};
use crate::table::Key;

impl Agent {
    pub(super) fn exec_start(&mut self, connection: Key, request: &ExecStart, now: Instant) {
        if let Err(error) = exec::check_id(&request.id) {
            return self.spawn_failed(connection, error);
        }
        if let Some(known) = self.ids.get(&request.id) {
            // The client tries again what it could not know to have succeeded.
            if request.detach
                && let Some(exec) = self.execs.get(*known)
            {
                return self.send(connection, Body::Started(exec.started()));
            }
            let attach = ExecAttach {
                id: request.id.clone(),
                ..ExecAttach::default()
            };
            return self.exec_attach(connection, &attach, now);
        }
        if self.shutdown.is_some() {
            return self.error(
                connection,
                ErrorCode::ErrorState,
                "the guest is shutting down",
            );
        }
        if self.execs.is_full() && !self.forget_oldest() {
            let message = format!("{MAX_EXECS} execs are running");
            return self.error(connection, ErrorCode::ErrorExhausted, &message);
        }
        self.make_room_for_rings(request);
        let means = Means {
            spawner: &mut self.spawner,
            users: &mut self.users,
            cgroups: self.cgroups.as_mut(),
            null: &self.null,
            replay_left: MAX_REPLAY_TOTAL_BYTES.saturating_sub(self.replay_bytes),
        };
        let exec = match exec::start(request, means, now) {
            Ok(exec) => exec,
            Err(error) => return self.spawn_failed(connection, error),
        };
        self.replay_bytes += exec.replay_bytes;
        let Ok(key) = self.execs.insert(exec) else {
            // Room was made above, and nothing else inserts.
            return self.error(connection, ErrorCode::ErrorExhausted, "too many execs");
        };
        self.ids.insert(request.id.clone(), key);
        self.watch_leader(key, now);
        if let Some(exec) = self.execs.get_mut(key) {
            exec.attach(Attachment::new(connection, false, [0; 2]));
            // At once, so that it comes before an answer to whatever is right behind the request.
            exec.tell_started(&mut self.connections);
        }
        if let Some(connection) = self.connections.get_mut(connection) {
            connection.state = State::Exec(key);
            connection.hold_until = Some(now + YOUNG);
        }
        if request.detach {
            self.detach_after_start(key, connection, now);
        }
        self.to_pump.push(key);
    }

    /// A new exec's ring is worth more than the ones of execs that are over, oldest first.
    fn make_room_for_rings(&mut self, request: &ExecStart) {
        let wanted = exec::ring_bytes(request);
        while self.replay_bytes.saturating_add(wanted) > MAX_REPLAY_TOTAL_BYTES {
            if self.replay_bytes == 0 || !self.forget_oldest() {
                return;
            }
        }
    }

    /// Says Started and leaves the connection idle.
    fn detach_after_start(&mut self, key: Key, connection: Key, now: Instant) {
        let Some(exec) = self.execs.get_mut(key) else {
            return;
        };
        exec.drop_connection(connection, false, now);
        self.make_idle(connection);
    }

    fn make_idle(&mut self, connection: Key) {
        if let Some(connection) = self.connections.get_mut(connection) {
            connection.state = State::Idle;
            connection.hold_until = None;
        }
        self.list_for_flush(connection);
    }

    fn spawn_failed(&mut self, connection: Key, error: StartError) {
        let body = Body::SpawnFailed(SpawnFailed {
            stage: error.stage.into(),
            errno: error.errno,
            message: error.message,
        });
        self.send(connection, body);
    }

    /// Registers an exec's leader.
    fn watch_leader(&mut self, key: Key, now: Instant) {
        let leader = self.execs.get(key).and_then(|exec| exec.leader_fd());
        let result = leader.map(|fd| self.reactor.add(fd, Token::Leader(key), EventFlags::IN));
        if let Some(Err(errno)) = result {
            self.give_up_on(key, errno, now);
        }
    }

    /// Registers an exec's streams once they are to be watched.
    fn watch_streams(&mut self, key: Key, now: Instant) {
        let Some(exec) = self.execs.get_mut(key) else {
            return;
        };
        let mut result = Ok(());
        for (index, fd) in exec.outputs_to_watch() {
            let token = if index == 0 {
                Token::Stdout(key)
            } else {
                Token::Stderr(key)
            };
            result = result.and_then(|()| self.reactor.add(fd, token, EventFlags::IN));
        }
        if let Some(fd) = exec.stdin_to_watch() {
            let added = || self.reactor.add(fd, Token::Stdin(key), EventFlags::OUT);
            result = result.and_then(|()| added());
        }
        if let Err(errno) = result {
            self.give_up_on(key, errno, now);
        }
    }

    /// Out of kernel memory: an exec nobody can watch must not run on.
    fn give_up_on(&mut self, key: Key, errno: Errno, now: Instant) {
        if let Some(exec) = self.execs.get_mut(key) {
            log::error(format_args!("cannot watch exec {}: {errno}", exec.id));
            exec.kill_rest(now);
        }
    }

    pub(super) fn exec_attach(&mut self, connection: Key, request: &ExecAttach, now: Instant) {
        let key = self.ids.get(&request.id).copied();
        let Some((key, exec)) = key.and_then(|key| Some((key, self.execs.get_mut(key)?))) else {
            let message = format!("no exec {:?}", request.id);
            return self.error(connection, ErrorCode::ErrorNotFound, &message);
        };
        let displaced = if exec.replay_bytes == 0 || !request.observe {
            exec.controller()
        } else {
            None
        };
        if request.observe && (exec.replay_bytes == 0 || exec.connections().count() > MAX_OBSERVERS)
        {
            let message =
                "this exec takes no (more) observers: it has no replay buffer, or too many";
            return self.error(connection, ErrorCode::ErrorState, message);
        }
        let offsets = if exec.replay_bytes == 0 {
            exec.totals()
        } else {
            [request.stdout_offset, request.stderr_offset]
        };
        if offsets
            .iter()
            .zip(exec.totals())
            .any(|(wanted, total)| *wanted > total)
        {
            let message = "the offset lies behind the end of the stream";
            return self.error(connection, ErrorCode::ErrorInvalid, message);
        }
        if let Some(displaced) = displaced {
            // The client is back on another connection before the agent has seen the first one go.
            exec.drop_connection(displaced, false, now);
        }
        exec.attach(Attachment::new(connection, request.observe, offsets));
        if let Some(connection) = self.connections.get_mut(connection) {
            connection.state = State::Exec(key);
        }
        if let Some(displaced) = displaced {
            let message = "another connection has attached to the exec";
            self.error(displaced, ErrorCode::ErrorState, message);
            self.make_idle(displaced);
        }
        self.to_pump.push(key);
    }

    pub(super) fn on_output(&mut self, key: Key, index: usize, event: Ready) {
        if let Some(exec) = self.execs.get_mut(key) {
            exec.output_event(index, event.hung_up);
            self.to_pump.push(key);
        }
    }

    pub(super) fn on_leader(&mut self, key: Key, now: Instant) {
        let Some(exec) = self.execs.get_mut(key) else {
            return;
        };
        // What is in the pipes belongs before the report; moving it first also shows most streams' end.
        exec.expect_end();
        exec.pump(&mut self.connections);
        if !exec.reap_leader(now) {
            return;
        }
        if exec.has_tree()
            && let Some(cgroup) = exec.tree_cgroup()
            && !exec.sees_empty_tree()
        {
            // cgroup.events polls as EPOLLPRI when it changes.
            let _ = self
                .reactor
                .add(cgroup.events(), Token::Cgroup(key), EventFlags::PRI);
            // It may have changed between the look and the registration.
            exec.look_at_tree(now);
        }
        self.to_pump.push(key);
        self.answer_waiters(key);
    }

    pub(super) fn on_tree(&mut self, key: Key, now: Instant) {
        if let Some(exec) = self.execs.get_mut(key) {
            exec.look_at_tree(now);
            self.to_pump.push(key);
        }
    }

    pub(super) fn on_timers(&mut self, now: Instant) {
        while let Some((at, key)) = self.timers.first().copied()
            && at <= now
        {
            self.timers.pop_first();
            if let Some(exec) = self.execs.get_mut(key) {
                exec.scheduled = None;
                exec.on_deadline(now);
                self.to_pump.push(key);
            }
        }
    }

    pub(super) fn reschedule(&mut self, key: Key) {
        let Some(exec) = self.execs.get_mut(key) else {
            return;
        };
        let next = exec.next_deadline();
        if next == exec.scheduled {
            return;
        }
        if let Some(old) = exec.scheduled {
            self.timers.remove(&(old, key));
        }
        if let Some(next) = next {
            self.timers.insert((next, key));
        }
        exec.scheduled = next;
    }

    /// Moves an exec's output, tells what is to be told, and takes note of its end.
    pub(super) fn pump(&mut self, key: Key, now: Instant) {
        let Some(exec) = self.execs.get_mut(key) else {
            return;
        };
        if let Some(Tree::Cgroup(cgroup)) = exec.take_empty_tree()
            && let Some(cgroups) = &mut self.cgroups
        {
            cgroups.give_back(cgroup);
        }
        let pumped = exec.pump(&mut self.connections);
        let connections: Vec<Key> = exec.connections().collect();
        let ending = exec.streams_ended() && exec.is_running();
        for connection in connections {
            if let Some(connection) = self.connections.get_mut(connection)
                && ending
                && connection.hold_until.is_none()
                && !connection.out.is_empty()
            {
                connection.hold_until = Some(now + ENDING_HOLD);
            }
            self.list_for_flush(connection);
        }
        for connection in pumped.done {
            self.make_idle(connection);
        }
        if pumped.again {
            self.to_pump.push(key);
        }
        self.watch_streams(key, now);
        self.reschedule(key);
        self.retire(key);
    }

    /// An exec that is over stays known for a while; beyond the limit the oldest is forgotten.
    fn retire(&mut self, key: Key) {
        let Some(exec) = self.execs.get_mut(key) else {
            return;
        };
        if !exec.is_over() || exec.retired {
            return;
        }
        exec.retired = true;
        self.retired.push_back(key);
        if self.retired.len() > MAX_FINISHED {
            self.forget_oldest();
        }
    }

    /// Forgets the oldest exec that is over, that nobody is attached to and that has no process left.
    fn forget_oldest(&mut self) -> bool {
        let forgettable = |key: &Key| {
            let exec = self.execs.get(*key);
            exec.is_none_or(|exec| !exec.is_attached() && !exec.has_tree())
        };
        let Some(at) = self.retired.iter().position(forgettable) else {
            return false;
        };
        if let Some(key) = self.retired.remove(at)
            && let Some(exec) = self.execs.remove(key)
        {
            self.ids.remove(&exec.id);
            self.replay_bytes = self.replay_bytes.saturating_sub(exec.replay_bytes);
            if let Some(at) = exec.scheduled {
                self.timers.remove(&(at, key));
            }
        }
        true
    }

    pub(super) fn exec_stdin(
        &mut self,
        connection: Key,
        key: Key,
        stdin: &v1::Stdin,
        now: Instant,
    ) {
        let Some(exec) = self.execs.get_mut(key) else {
            return;
        };
        if exec.controller() != Some(connection) {
            return self.error(connection, ErrorCode::ErrorState, "observers have no stdin");
        }
        match exec.stdin.accept(stdin.offset, &stdin.data, stdin.eof) {
            Ok(()) => self.to_pump.push(key),
            Err(error) => {
                exec.drop_connection(connection, true, now);
                self.to_pump.push(key);
                self.protocol_error(connection, &error.to_string());
            }
        }
    }

    pub(super) fn error(&mut self, connection: Key, code: ErrorCode, message: &str) {
        let body = Body::Error(Error {
            code: code.into(),
            message: message.to_owned(),
            errno: 0,
        });
        self.send(connection, body);
    }

    pub(super) fn send(&mut self, connection: Key, body: Body) {
        if let Some(connection) = self.connections.get_mut(connection)
            && !connection.out.push(body)
        {
            // A frame of ours over the limit is a mistake of ours; a client must not wait for it for ever.
            log::error(format_args!("a reply exceeds the frame limit"));
            connection.closing = true;
        }
        self.list_for_flush(connection);
    }
}
