//! Which frame may come when, and whose business it is.

use std::time::Instant;

use airlock_proto::v1::{
    Error, ErrorCode, Hello, HelloReply, file_request::Op, from_agent::Body, to_agent,
};
use airlock_proto::{PROTOCOL_VERSION, PROTOCOL_VERSION_MIN};

use super::Agent;
use super::connection::State;
use crate::table::Key;

impl Agent {
    /// Handles the frames that have arrived. False: the connection is gone, or its frames must wait.
    pub(super) fn handle_frames(&mut self, key: Key, now: Instant) -> bool {
        loop {
            let Some(connection) = self.connections.get_mut(key) else {
                return false;
            };
            if connection.closing {
                return false;
            }
            match &connection.state {
                State::Dialled(_) => return true,
                // A client that asks and does not read its answers is answered no more until it does.
                State::Idle if !connection.out.has_room() => return false,
                State::File(work) if work.is_waiting() => return false,
                _ => {}
            }
            match connection.next_frame() {
                Ok(None) => return true,
                Ok(Some(frame)) => match frame.body {
                    Some(body) => self.handle(key, body, now),
                    // A message of a newer host, sent without asking for our version.
                    None => self.protocol_error(key, "an unknown message"),
                },
                Err(error) => self.protocol_error(key, &error.to_string()),
            }
        }
    }

    fn handle(&mut self, key: Key, body: to_agent::Body, now: Instant) {
        use to_agent::Body as In;
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        let exec = match connection.state {
            State::Exec(exec) => Some(exec),
            _ => None,
        };
        let idle = matches!(connection.state, State::Idle);
        match (body, exec) {
            (In::Hello(hello), _) if matches!(connection.state, State::Greeting) => {
                self.hello(key, &hello);
            }
            (_, _) if matches!(connection.state, State::Greeting) => {
                self.protocol_error(key, "the first frame must be Hello");
            }
            (In::Stdin(stdin), Some(exec)) => self.exec_stdin(key, exec, &stdin, now),
            (In::Signal(signal), Some(exec)) => self.exec_signal(key, exec, &signal, now),
            (In::Resize(size), Some(exec)) => {
                // A resize that crosses the exec's end must not look like an answer to the next request; a client
                // that wants to know asks with ExecResize.
                if let Some(exec) = self.execs.get(exec).filter(|e| e.controller() == Some(key)) {
                    let _ = exec.resize(size.rows, size.cols);
                }
            }
            (In::Ack(ack), Some(exec_key)) => {
                if let Some(exec) = self.execs.get_mut(exec_key) {
                    exec.acknowledge([ack.stdout_offset, ack.stderr_offset]);
                    self.to_pump.push(exec_key);
                }
            }
            (In::Detach(_), Some(exec)) => self.exec_detach(key, exec, now),
            // These crossed the exec's last frame on the way.
            (In::Stdin(_) | In::Signal(_) | In::Resize(_) | In::Ack(_) | In::Detach(_), None)
                if idle => {}
            (In::ExecStart(request), None) if idle => self.exec_start(key, &request, now),
            (In::ExecAttach(request), None) if idle => self.exec_attach(key, &request, now),
            (In::Control(control), None) if idle => self.control(key, control, now),
            (In::Dial(dial), None) if idle => self.dial(key, &dial),
            (In::File(request), None) if idle => self.file(key, &request),
            (In::File(request), None) if matches!(connection.state, State::File(_)) => {
                match request.op {
                    Some(Op::Data(data)) => self.file_data(key, &data),
                    _ => self.protocol_error(key, "a file request within another"),
                }
            }
            _ => self.protocol_error(key, "a frame that does not fit here"),
        }
    }

    fn hello(&mut self, key: Key, hello: &Hello) {
        let protocol = hello.protocol_max.min(PROTOCOL_VERSION);
        if protocol < hello.protocol_min.max(PROTOCOL_VERSION_MIN) {
            let message = format!(
                "the agent speaks protocol {PROTOCOL_VERSION_MIN} to {PROTOCOL_VERSION}, the host {} to {}",
                hello.protocol_min, hello.protocol_max
            );
            self.error(key, ErrorCode::ErrorVersion, &message);
            if let Some(connection) = self.connections.get_mut(key) {
                connection.closing = true;
            }
            return;
        }
        let body = Body::Hello(HelloReply {
            protocol,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: self.boot_id.clone(),
            generation: 0,
            agent_restarts: self.options.restarts,
        });
        if let Some(connection) = self.connections.get_mut(key) {
            connection.state = State::Idle;
        }
        self.send(key, body);
    }

    /// Says what was wrong and closes: after such a frame nothing on the connection means anything.
    pub(super) fn protocol_error(&mut self, key: Key, message: &str) {
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        connection.out.push(Body::Error(Error {
            code: ErrorCode::ErrorProtocol.into(),
            message: message.to_owned(),
            errno: 0,
        }));
        connection.closing = true;
        connection.hold_until = None;
        self.list_for_flush(key);
    }

    fn exec_signal(
        &mut self,
        key: Key,
        exec_key: Key,
        signal: &airlock_proto::v1::Signal,
        now: Instant,
    ) {
        if let Some(exec) = self.execs.get_mut(exec_key)
            && exec.controller() == Some(key)
        {
            // It may have ended meanwhile; its exit is the answer.
            let _ = exec.signal(signal, now);
            self.to_pump.push(exec_key);
        }
    }

    fn exec_detach(&mut self, key: Key, exec_key: Key, now: Instant) {
        if let Some(exec) = self.execs.get_mut(exec_key) {
            if exec.controller() == Some(key) {
                exec.detach();
            }
            exec.drop_connection(key, false, now);
            self.to_pump.push(exec_key);
        }
        if let Some(connection) = self.connections.get_mut(key) {
            connection.state = State::Idle;
            connection.hold_until = None;
        }
        self.send(key, Body::ExecDone(airlock_proto::v1::ExecDone {}));
    }
}
