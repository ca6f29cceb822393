//! The signals that reach `airlock` itself.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Linux SIGKILL.
pub(crate) const KILL: u32 = 9;

/// One that asks us to end, by Linux number.
pub(crate) type Number = u32;

/// From its making on, these signals no longer end the process.
#[derive(Debug)]
pub(crate) struct Signals {
    hangup: Signal,
    interrupt: Signal,
    quit: Signal,
    terminate: Signal,
    window_change: Signal,
}

impl Signals {
    pub(crate) fn catch() -> io::Result<Self> {
        Ok(Self {
            hangup: signal(SignalKind::hangup())?,
            interrupt: signal(SignalKind::interrupt())?,
            quit: signal(SignalKind::quit())?,
            terminate: signal(SignalKind::terminate())?,
            window_change: signal(SignalKind::window_change())?,
        })
    }

    /// The next signal that asks for an end. Safe to cancel.
    pub(crate) async fn end(&mut self) -> Number {
        // The streams last as long as the process.
        tokio::select! {
            _ = self.hangup.recv() => 1,
            _ = self.interrupt.recv() => 2,
            _ = self.quit.recv() => 3,
            _ = self.terminate.recv() => 15,
        }
    }

    /// The next signal of either kind; `None`: the terminal has another size.
    pub(crate) async fn next(&mut self) -> Option<Number> {
        tokio::select! {
            _ = self.hangup.recv() => Some(1),
            _ = self.interrupt.recv() => Some(2),
            _ = self.quit.recv() => Some(3),
            _ = self.terminate.recv() => Some(15),
            _ = self.window_change.recv() => None,
        }
    }
}
