//! Pseudoterminals: a pair that leaks into no child, sized and owned before anyone can look at it.

use std::os::fd::{AsFd, OwnedFd};

use airlock_proto::v1::Tty;
use rustix::fs::{Gid, Mode, Uid};
use rustix::io::{self, Errno};
use rustix::pty::OpenptFlags;
use rustix::termios::{InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Winsize};

/// Group that terminals belong to, as devpts is mounted with (gid=5, "tty" in every distribution).
const TTY_GID: u32 = 5;

#[derive(Debug)]
pub(crate) struct Pty {
    /// The agent's side, not blocking.
    pub(crate) master: OwnedFd,
    /// The exec's side; to be dropped after the spawn, or its end would never show.
    pub(crate) slave: OwnedFd,
}

/// Opens a pair of the wanted size whose slave belongs to `uid`.
pub(crate) fn open(tty: &Tty, uid: u32) -> io::Result<Pty> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&master)?;
    io::ioctl_fionbio(&master, true)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    resize(&master, tty.rows, tty.cols)?;
    let mut modes = rustix::termios::tcgetattr(&slave)?;
    // So that erasing a character takes all its bytes away.
    modes.input_modes |= InputModes::IUTF8;
    rustix::termios::tcsetattr(&slave, OptionalActions::Now, &modes)?;
    if uid != 0 {
        // So that the user may open its own /dev/stdout; root needs no permission. Without privilege it is the user's
        // already.
        let owner = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(TTY_GID)));
        if rustix::fs::fchown(&slave, owner.0, owner.1).is_ok() {
            rustix::fs::fchmod(&slave, Mode::from_raw_mode(0o620))?;
        }
    }
    Ok(Pty { master, slave })
}

/// Sets the size; the kernel tells the foreground group (SIGWINCH).
pub(crate) fn resize(master: impl AsFd, rows: u32, cols: u32) -> io::Result<()> {
    let (Ok(ws_row), Ok(ws_col)) = (u16::try_from(rows), u16::try_from(cols)) else {
        return Err(Errno::INVAL);
    };
    let size = Winsize {
        ws_row,
        ws_col,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(master, size)
}

/// What must be typed for the reader to see the end of its input: the terminal's EOF character (termios(3), VEOF), twice
/// after an unfinished line, because the first one only hands over that line. Nothing in raw mode, which has no end.
pub(crate) fn end_of_input(master: impl AsFd, line_is_unfinished: bool) -> Vec<u8> {
    let Ok(modes) = rustix::termios::tcgetattr(master) else {
        return Vec::new();
    };
    if !modes.local_modes.contains(LocalModes::ICANON) {
        return Vec::new();
    }
    let eof = modes.special_codes[SpecialCodeIndex::VEOF];
    vec![eof; if line_is_unfinished { 2 } else { 1 }]
}
