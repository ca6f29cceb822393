//! The host's side: the multiplexer's unix socket, the `CONNECT` line, and listeners for connections of the guest.
//!
//! Everything is non-blocking. No connection state lives here.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType,
    accept_with, bind, connect, listen, recv, send, shutdown, socket_with,
};

/// Connections that wait for `accept`; the kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 1024;
/// `CONNECT 4294967295\n` is 19 bytes; a longer line is wrong, and so is one that has not ended here.
pub(crate) const CONNECT_LINE_BYTES: usize = 32;
/// `_4294967295` is appended to the path for connections of the guest, and a path in `sockaddr_un` ends with NUL.
const LONGEST_PATH: usize = 107 - 11;

/// Why the multiplexer's socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// `sockaddr_un` has no room for it.
    #[error(
        "the path of the vsock socket is {length} bytes long and at most {LONGEST_PATH} are possible: {path}; choose a shorter run folder"
    )]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// Something else has the path.
    #[error("{0} exists and is not a socket; remove it")]
    NotASocket(PathBuf),
    /// Another process serves it.
    #[error("{0} is served by another process; is this sandbox already running?")]
    InUse(PathBuf),
    /// The host refused.
    #[error("cannot listen on {path}")]
    Host {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The multiplexer's listening socket; its file is removed on drop.
#[derive(Debug)]
pub(crate) struct HostSockets {
    listener: OwnedFd,
    path: PathBuf,
}

impl HostSockets {
    /// Listens on `path`, in place of a socket that a dead process has left.
    pub(crate) fn listen(path: &Path) -> Result<Self, ListenError> {
        let length = path.as_os_str().len();
        if length > LONGEST_PATH {
            return Err(ListenError::PathTooLong {
                path: path.to_owned(),
                length,
            });
        }
        let host = |error: Errno| ListenError::Host {
            path: path.to_owned(),
            source: error.into(),
        };
        let address = SocketAddrUnix::new(path).map_err(host)?;
        remove_stale(path, &address)?;
        let listener = stream_socket().map_err(host)?;
        // The mode of the inode that bind makes comes from the socket's: nobody else can connect at any moment.
        fchmod(&listener, Mode::RUSR | Mode::WUSR).map_err(host)?;
        bind(&listener, &address).map_err(host)?;
        let sockets = Self {
            listener,
            path: path.to_owned(),
        };
        listen(&sockets.listener, BACKLOG).map_err(host)?;
        Ok(sockets)
    }

    pub(crate) fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// The next host process that has connected.
    pub(crate) fn accept(&self) -> Result<OwnedFd, Errno> {
        accept_with(&self.listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC)
    }

    /// Connects to whoever listens for the guest's connections to `host_port`.
    pub(crate) fn dial(&self, host_port: u32) -> Result<OwnedFd, Errno> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{host_port}"));
        let address = SocketAddrUnix::new(path)?;
        let socket = stream_socket()?;
        // A unix socket connects at once or not at all: EAGAIN is a full backlog.
        connect(&socket, &address)?;
        Ok(socket)
    }
}

impl Drop for HostSockets {
    fn drop(&mut self) {
        // Nobody is left to be told; the next run replaces a stale file.
        let _ = fs::remove_file(&self.path);
    }
}

fn stream_socket() -> Result<OwnedFd, Errno> {
    socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )
}

fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), ListenError> {
    let host = |source: io::Error| ListenError::Host {
        path: path.to_owned(),
        source,
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(host(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(ListenError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    let probe = stream_socket().map_err(|error| host(error.into()))?;
    match connect(&probe, address) {
        // A full backlog is a living listener, too.
        Ok(()) | Err(Errno::AGAIN) => Err(ListenError::InUse(path.to_owned())),
        Err(_) => fs::remove_file(path).map_err(host),
    }
}

/// The first bytes of a host connection: the `CONNECT` line, and what came in the same breath.
#[derive(Debug)]
pub(crate) struct Greeting {
    bytes: [u8; CONNECT_LINE_BYTES],
    start: u8,
    end: u8,
}

/// What reading a greeting led to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Greeted {
    /// The line is complete; bytes after it are in [`Greeting::early`].
    Port(u32),
    /// More is to come.
    Incomplete,
    /// Not a `CONNECT` line, or the end of the connection.
    Bad,
}

impl Greeting {
    pub(crate) fn new() -> Self {
        Self {
            bytes: [0; CONNECT_LINE_BYTES],
            start: 0,
            end: 0,
        }
    }

    /// Reads on.
    pub(crate) fn read(&mut self, socket: BorrowedFd<'_>) -> Greeted {
        loop {
            let end = usize::from(self.end);
            let count = match recv(socket, &mut self.bytes[end..], RecvFlags::empty()) {
                Ok((0, _)) => return Greeted::Bad,
                Ok((count, _)) => count,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Greeted::Incomplete,
                Err(_) => return Greeted::Bad,
            };
            // At most CONNECT_LINE_BYTES.
            self.end += u8::try_from(count).unwrap_or(0);
            let filled = &self.bytes[..usize::from(self.end)];
            if let Some(newline) = filled.iter().position(|&byte| byte == b'\n') {
                self.start = u8::try_from(newline + 1).unwrap_or(self.end);
                return parse_connect(&filled[..newline]).map_or(Greeted::Bad, Greeted::Port);
            }
            if filled.len() == CONNECT_LINE_BYTES {
                return Greeted::Bad;
            }
        }
    }

    /// Bytes for the guest that came with the line.
    pub(crate) fn early(&self) -> &[u8] {
        &self.bytes[usize::from(self.start)..usize::from(self.end)]
    }

    /// The guest has the first `count` of them.
    pub(crate) fn consume(&mut self, count: usize) {
        let left = self.early().len();
        self.start += u8::try_from(count.min(left)).unwrap_or(0);
    }
}

/// `CONNECT <port>`, decimal, nothing else.
fn parse_connect(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?;
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Answers a `CONNECT` line. The socket is fresh, so there is room for it or nobody to read it.
pub(crate) fn send_ok(socket: BorrowedFd<'_>, host_port: u32) -> bool {
    let line = format!("OK {host_port}\n");
    send(socket, line.as_bytes(), SendFlags::NOSIGNAL) == Ok(line.len())
}

/// Ends the connection so that the host process reads end-of-file after its last byte, and not ECONNRESET, which a unix
/// socket reports when it is closed over unread bytes.
pub(crate) fn close_gently(socket: OwnedFd) {
    // It fails if the host process is gone, and then there is nothing to be gentle about.
    if shutdown(&socket, Shutdown::Both).is_err() {
        return;
    }
    // No more can arrive now, and what is there is bounded by the sender's socket buffer; the bound here is a backstop.
    let mut scratch = [0u8; 4096];
    for _ in 0..256 {
        match recv(&socket, &mut scratch, RecvFlags::empty()) {
            Ok((0, _)) | Err(_) => break,
            Ok(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixListener, UnixStream};
    use vmm_sys_util::tempdir::TempDir;

    #[test]
    fn connect_lines() {
        assert_eq!(parse_connect(b"CONNECT 1024"), Some(1024));
        assert_eq!(parse_connect(b"CONNECT 4294967295"), Some(u32::MAX));
        for bad in [
            &b"CONNECT"[..],
            b"CONNECT ",
            b"CONNECT 4294967296",
            b"CONNECT +1",
            b"CONNECT -1",
            b"connect 1",
            b"CONNECT 1 ",
        ] {
            assert_eq!(parse_connect(bad), None, "{bad:?}");
        }
    }

    fn greet(input: &[u8]) -> (Greeted, Greeting) {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        ours.write_all(input).unwrap();
        let mut greeting = Greeting::new();
        (greeting.read(theirs.as_fd()), greeting)
    }

    #[test]
    fn a_greeting_is_bounded_and_keeps_early_bytes() {
        let (greeted, mut greeting) = greet(b"CONNECT 7\nhello");
        assert_eq!(
            (greeted, greeting.early()),
            (Greeted::Port(7), &b"hello"[..])
        );
        greeting.consume(2);
        assert_eq!(greeting.early(), b"llo");
        greeting.consume(100);
        assert_eq!(greeting.early(), b"");
        assert_eq!(greet(b"CONNE").0, Greeted::Incomplete);
        assert_eq!(greet(&[b'x'; 32]).0, Greeted::Bad);
        assert_eq!(greet(&[b'\n'; 3]).0, Greeted::Bad);
    }

    #[test]
    fn the_socket_is_private_replaces_a_stale_one_and_goes_away() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("vsock.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a dead process leaves its socket");
        let sockets = HostSockets::listen(&path).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert!(matches!(
            HostSockets::listen(&path),
            Err(ListenError::InUse(_))
        ));
        let _client = UnixStream::connect(&path).unwrap();
        // The first is the probe of the second listener.
        drop(sockets.accept().unwrap());
        drop(sockets.accept().unwrap());
        assert_eq!(sockets.accept().unwrap_err(), Errno::AGAIN);
        drop(sockets);
        assert!(!path.exists());
    }

    #[test]
    fn clear_errors() {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("file");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(
            HostSockets::listen(&path),
            Err(ListenError::NotASocket(_))
        ));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        let long = folder.as_path().join("x".repeat(100));
        assert!(matches!(
            HostSockets::listen(&long),
            Err(ListenError::PathTooLong { .. })
        ));
    }

    #[test]
    fn closing_over_unread_bytes_is_end_of_file_and_not_an_error() {
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.write_all(&[1; 10_000]).unwrap();
        (&ours).write_all(b"last words").unwrap();
        close_gently(ours.into());
        let mut heard = Vec::new();
        theirs.read_to_end(&mut heard).unwrap();
        assert_eq!(heard, b"last words");
    }
}
