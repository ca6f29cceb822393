//! The user's terminal: its size, its raw mode, and its way back from raw mode on any exit.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

/// What a program finds where nothing knows better (vt100).
const DEFAULT_SIZE: (u16, u16) = (24, 80);

/// How the terminal was before it was made raw. Global, because a panic must find it.
static BEFORE: Mutex<Option<(OwnedFd, Termios)>> = Mutex::new(None);

/// Rows and columns of the first of stdout, stdin and stderr that is a terminal.
pub(crate) fn size() -> (u16, u16) {
    let sizes = [
        tcgetwinsize(rustix::stdio::stdout()),
        tcgetwinsize(rustix::stdio::stdin()),
        tcgetwinsize(rustix::stdio::stderr()),
    ];
    sizes
        .into_iter()
        .flatten()
        .map(|size| (size.ws_row, size.ws_col))
        .find(|(rows, cols)| *rows > 0 && *cols > 0)
        .unwrap_or(DEFAULT_SIZE)
}

/// The terminal on stdin passes every byte on, unseen, until this is dropped.
#[derive(Debug)]
pub(crate) struct RawMode(());

impl RawMode {
    /// Does nothing if stdin is no terminal.
    pub(crate) fn enter() -> io::Result<Self> {
        Self::enter_on(rustix::stdio::stdin())
    }

    fn enter_on(terminal: BorrowedFd<'_>) -> io::Result<Self> {
        if isatty(terminal) {
            let before = tcgetattr(terminal)?;
            let mut raw = before.clone();
            raw.make_raw();
            *lock() = Some((terminal.try_clone_to_owned()?, before));
            tcsetattr(terminal, OptionalActions::Now, &raw)?;
        }
        Ok(Self(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// A panic ends the process without dropping anything: put the terminal back before it says why.
pub(crate) fn restore_on_panic() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        restore();
        usual(panic);
    }));
}

fn restore() {
    if let Some((terminal, before)) = lock().take() {
        // The terminal may be gone, and then there is nothing to put back. Not waiting for output that nobody takes.
        let _ = tcsetattr(terminal, OptionalActions::Now, &before);
    }
}

fn lock() -> std::sync::MutexGuard<'static, Option<(OwnedFd, Termios)>> {
    BEFORE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
    use rustix::termios::LocalModes;

    use super::*;

    #[test]
    fn the_terminal_is_raw_while_the_value_lives_and_a_panic_puts_it_back() {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
        let controller = openpt(flags).unwrap();
        unlockpt(&controller).unwrap();
        let terminal = ioctl_tiocgptpeer(&controller, flags).unwrap();
        let modes = || tcgetattr(&terminal).unwrap().local_modes;
        let before = modes();
        assert!(before.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG));

        let raw = RawMode::enter_on(terminal.as_fd()).unwrap();
        assert!(!modes().intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG));
        drop(raw);
        assert_eq!(modes(), before);

        // Leaked on purpose: a panic that aborts drops nothing.
        std::mem::forget(RawMode::enter_on(terminal.as_fd()).unwrap());
        restore_on_panic();
        std::panic::catch_unwind(|| panic!("as a bug would")).unwrap_err();
        assert_eq!(modes(), before);
    }
}
