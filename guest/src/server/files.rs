//! The server's side of file requests: whose turn it is. What a request does is in `crate::files`.

use std::time::{Duration, Instant};

use airlock_proto::v1::{ErrorCode, FileData, FileRequest, file_request::Op, from_agent::Body};
use rustix::event::epoll::EventFlags;

use super::Agent;
use super::connection::State;
use super::system;
use crate::files::{self, Begun, Failure, Work};
use crate::reactor::Token;
use crate::table::Key;

/// Time spent on files before others get their turn. A step is at most 128 KiB or some dozens of names.
const SLICE: Duration = Duration::from_millis(5);

impl Agent {
    pub(super) fn file(&mut self, key: Key, request: &FileRequest) {
        if matches!(request.op, Some(Op::Data(_))) {
            // Crossed the error that ended its write.
            return;
        }
        match files::begin(request) {
            Ok(Begun::Done(reply)) => self.send(key, Body::File(reply)),
            Ok(Begun::Work(work)) => {
                if work.is_self_driven() {
                    self.files.push_back(key);
                }
                if let Some(connection) = self.connections.get_mut(key) {
                    connection.state = State::File(work);
                }
            }
            Err(failure) => self.file_failed(key, failure),
        }
    }

    pub(super) fn file_data(&mut self, key: Key, data: &FileData) {
        self.write_on(key, |work| work.data(data));
    }

    /// A sync of a write is over.
    pub(super) fn on_file_synced(&mut self, key: Key) {
        self.write_on(key, Work::synced);
        // Frames that were left alone meanwhile.
        self.to_read.push(key);
    }

    fn write_on(&mut self, key: Key, go_on: impl Fn(&mut Work) -> Result<bool, Failure>) {
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        let State::File(work) = &mut connection.state else {
            return;
        };
        let result = go_on(work);
        let watched = work.new_sync().map_or(Ok(()), |fd| {
            self.reactor.add(fd, Token::FileSync(key), EventFlags::IN)
        });
        match (result, watched) {
            (Ok(_), Err(errno)) => {
                let message = format!("cannot watch another descriptor: {errno}");
                let code = ErrorCode::ErrorExhausted;
                let errno = errno.raw_os_error();
                self.file_failed(
                    key,
                    Failure {
                        code,
                        message,
                        errno,
                    },
                );
            }
            (Ok(false), Ok(())) => {}
            (Ok(true), Ok(())) => {
                connection.state = State::Idle;
                self.send(key, Body::File(files::done()));
            }
            (Err(failure), _) => self.file_failed(key, failure),
        }
    }

    /// Goes on with the requests that are under way, each a step in its turn.
    pub(super) fn files_some(&mut self) {
        let until = Instant::now() + SLICE;
        while let Some(key) = self.files.pop_front() {
            let Some(connection) = self.connections.get_mut(key) else {
                continue;
            };
            let State::File(work) = &mut connection.state else {
                continue;
            };
            if !work.is_self_driven() {
                continue;
            }
            if !connection.out.has_room() {
                // The flush that empties the queue brings it back.
                self.list_for_flush(key);
                continue;
            }
            match work.step(&mut connection.out) {
                Ok(false) => self.files.push_back(key),
                Ok(true) => connection.state = State::Idle,
                Err(failure) => self.file_failed(key, failure),
            }
            self.list_for_flush(key);
            if Instant::now() >= until {
                return;
            }
        }
    }

    fn file_failed(&mut self, key: Key, failure: Failure) {
        if let Some(connection) = self.connections.get_mut(key) {
            connection.state = State::Idle;
        }
        let error = system::failure(failure.code, &failure.message, failure.errno);
        self.send(key, Body::Error(error));
    }
}
