//! The control socket: one JSON object per line each way, several clients, nothing unbounded.
//!
//! `{"cmd":"status"|"pause"|"resume"|"metrics"|"stop"}` is answered by `{"ok":true,...}` or `{"ok":false,"error":"..."}`.
//! The same loop waits for everything else that ends a VM: its engine, SIGTERM and the lifeline.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::{Value, json};

use crate::lifeline::{self, Lifeline};
use crate::machine::{Exit, ExitReason, ExitSlot, Machine};

/// Longest command: the protocol's are under 30 bytes.
const MAX_LINE_BYTES: usize = 4096;
/// A VM's owners are few; more connections than this are closed at once.
const MAX_CLIENTS: usize = 16;

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Another process answers there.
    #[error("another VM already runs with the control socket {0}")]
    InUse(PathBuf),
    /// The socket cannot be made.
    #[error("cannot listen on the control socket {0}")]
    Listen(PathBuf, #[source] io::Error),
    /// Signals cannot be waited for.
    #[error("cannot wait for signals")]
    Signals(#[source] io::Error),
}

/// Everything that the process's first thread waits for.
#[derive(Debug)]
pub struct Control {
    listener: UnixListener,
    path: PathBuf,
    signals: SignalFd,
    clients: Vec<Client>,
}

impl Control {
    /// Listens on `path` and takes SIGTERM, SIGINT and SIGHUP over. Call before other threads exist: they inherit
    /// that these signals are blocked.
    pub fn listen(path: &Path) -> Result<Self, ControlError> {
        let listen_error = |error| ControlError::Listen(path.to_owned(), error);
        if UnixStream::connect(path).is_ok() {
            return Err(ControlError::InUse(path.to_owned()));
        }
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(listen_error(error)),
            _ => {} // a socket that a killed process has left
        }
        let listener = UnixListener::bind(path).map_err(listen_error)?;
        listener.set_nonblocking(true).map_err(listen_error)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
            .map_err(listen_error)?;
        let signals = stop_signals().map_err(ControlError::Signals)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            signals,
            clients: Vec::new(),
        })
    }

    /// Answers clients until the VM ends, and says why it ended.
    pub fn serve(
        &mut self,
        machine: &dyn Machine,
        exit: &ExitSlot,
        lifeline: Option<&Lifeline>,
    ) -> Exit {
        loop {
            if let Some(exit) = exit.get() {
                return exit;
            }
            if let Err(error) = self.wait_and_answer(machine, exit, lifeline) {
                exit.report(
                    ExitReason::Error,
                    format!("the control thread cannot wait for events: {error}"),
                );
            }
        }
    }

    fn wait_and_answer(
        &mut self,
        machine: &dyn Machine,
        exit: &ExitSlot,
        lifeline: Option<&Lifeline>,
    ) -> io::Result<()> {
        let wait = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let mut fds = vec![
            wait(exit.as_fd()),
            wait(self.listener.as_fd()),
            wait(self.signals.as_fd()),
        ];
        fds.extend(
            self.clients
                .iter()
                .map(|client| wait(client.stream.as_fd())),
        );
        fds.extend(lifeline.map(|lifeline| wait(lifeline.as_fd())));
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => return Ok(()),
            other => other?,
        };
        let ready: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        let [_, listener, signals, rest @ ..] = &ready[..] else {
            return Ok(());
        };
        let (clients, lifeline) = rest.split_at(self.clients.len());
        if lifeline.iter().any(|&revents| lifeline::is_end(revents)) {
            exit.report(
                ExitReason::Lifeline,
                "the process that owned this VM is gone",
            );
        }
        if !signals.is_empty()
            && let Ok(Some(signal)) = self.signals.read_signal()
        {
            exit.report(ExitReason::Stopped, format!("signal {}", signal.ssi_signo));
        }
        let mut ready_clients = clients.iter();
        self.clients.retain_mut(|client| {
            let is_ready = ready_clients
                .next()
                .is_some_and(|revents| !revents.is_empty());
            !is_ready || client.answer(machine, exit)
        });
        if !listener.is_empty() {
            self.accept();
        }
        Ok(())
    }

    fn accept(&mut self) {
        // An error here is the client's: it went away, or this process has too many descriptors open.
        while let Ok((stream, _)) = self.listener.accept() {
            if self.clients.len() < MAX_CLIENTS && stream.set_nonblocking(true).is_ok() {
                self.clients.push(Client {
                    stream,
                    line: Vec::new(),
                });
            }
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The signals that ask for an orderly stop, as a descriptor.
fn stop_signals() -> io::Result<SignalFd> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block()?;
    Ok(SignalFd::with_flags(
        &signals,
        SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC,
    )?)
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    line: Vec<u8>,
}

impl Client {
    /// Reads what there is and answers every whole line. False: the client is done, or breaks the rules.
    fn answer(&mut self, machine: &dyn Machine, exit: &ExitSlot) -> bool {
        let mut buffer = [0; MAX_LINE_BYTES];
        match self.stream.read(&mut buffer) {
            Ok(0) => return false,
            Ok(bytes) => self.line.extend_from_slice(&buffer[..bytes]),
            Err(error) => {
                return matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted);
            }
        }
        while let Some(end) = self.line.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.line.drain(..=end).collect();
            let mut answer = execute(&line, machine, exit).to_string();
            answer.push('\n');
            // Answers are far smaller than a socket's buffer; who does not read them is not waited for.
            if self.stream.write_all(answer.as_bytes()).is_err() {
                return false;
            }
        }
        self.line.len() < MAX_LINE_BYTES
    }
}

/// Does one command.
fn execute(line: &[u8], machine: &dyn Machine, exit: &ExitSlot) -> Value {
    let command = match serde_json::from_slice::<Value>(line) {
        Ok(command) => command,
        Err(error) => return failure(format!("not a JSON object: {error}")),
    };
    let done = |result: Result<(), String>| match result {
        Ok(()) => json!({"ok": true}),
        Err(error) => failure(error),
    };
    match command.get("cmd").and_then(Value::as_str) {
        Some("status") => {
            let state = if machine.is_paused() {
                "paused"
            } else {
                "running"
            };
            json!({"ok": true, "state": state, "pid": std::process::id()})
        }
        Some("pause") => done(machine.pause()),
        Some("resume") => done(machine.resume()),
        Some("metrics") => json!({"ok": true, "metrics": machine.metrics()}),
        Some("stop") => {
            exit.report(ExitReason::Stopped, "asked for on the control socket");
            json!({"ok": true})
        }
        Some(other) => failure(format!(
            "unknown command {other:?}, possible are status, pause, resume, metrics, stop"
        )),
        None => failure("the member \"cmd\" is missing".to_owned()),
    }
}

fn failure(error: String) -> Value {
    json!({"ok": false, "error": error})
}

#[cfg(test)]
mod tests;
