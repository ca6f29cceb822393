//! The server's side of file requests: whose turn it is. What a request does is in `crate::files`.

use std::time::{Duration, Instant};

use airlock_proto::v1::{FileData, FileRequest, file_request::Op, from_agent::Body};

use super::Agent;
use super::connection::State;
use super::system;
use crate::files::{self, Begun, Failure};
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
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        let State::File(work) = &mut connection.state else {
            return;
        };
        match work.data(data) {
            Ok(false) => {}
            Ok(true) => {
                connection.state = State::Idle;
                self.send(key, Body::File(files::done()));
            }
            Err(failure) => self.file_failed(key, failure),
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
