//! The signals that reach `airlock` itself.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Linux SIGHUP.
pub(crate) const HANGUP: u32 = 1;
/// Linux SIGKILL.
pub(crate) const KILL: u32 = 9;
/// Linux SIGPIPE.
pub(crate) const PIPE: u32 = 13;

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

/// Linux names by number, from 1 on (signal(7), x86).
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];
/// The highest of the real-time signals.
const LAST: Number = 64;

/// A signal as kill(1) takes it: a number, or a name with or without SIG.
pub(crate) fn parse(text: &str) -> Result<Number, String> {
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let by_name = (1..).zip(NAMES).find(|(_, known)| *known == name);
    by_name
        .map(|(number, _)| number)
        .or_else(|| text.parse().ok().filter(|n| (1..=LAST).contains(n)))
        .ok_or_else(|| format!("{text:?} is no signal: use a name such as TERM, or 1 to {LAST}"))
}

/// What a signal is called.
pub(crate) fn name(number: Number) -> String {
    let index = usize::try_from(number).ok().and_then(|n| n.checked_sub(1));
    match index.and_then(|index| NAMES.get(index)) {
        Some(name) => format!("SIG{name}"),
        None => format!("signal {number}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_named_as_kill_names_them() {
        for (text, number) in [
            ("TERM", 15),
            ("sigkill", 9),
            ("2", 2),
            ("SYS", 31),
            ("64", 64),
        ] {
            assert_eq!(parse(text), Ok(number), "{text}");
        }
        for text in ["", "0", "65", "-1", "SIG", "NOSUCH"] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert_eq!((name(15), name(40)), ("SIGTERM".into(), "signal 40".into()));
    }
}
