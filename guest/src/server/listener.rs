//! Where connections come from: vsock from the host and nobody else, a unix socket in tests, and the doorbell that the
//! agent rings itself.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;

use airlock_proto::{AGENT_PORT, DOORBELL_PORT};

use super::vsock;
use crate::{Listen, log};

#[derive(Debug)]
pub(super) enum Listener {
    Vsock(OwnedFd),
    Unix(UnixListener),
}

impl Listener {
    pub(super) fn open(listen: &Listen) -> io::Result<Self> {
        match listen {
            Listen::Vsock => Ok(Self::Vsock(vsock::listen(AGENT_PORT)?)),
            Listen::Unix(path) => {
                let listener = UnixListener::bind(path)?;
                listener.set_nonblocking(true)?;
                Ok(Self::Unix(listener))
            }
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Vsock(fd) => fd.as_fd(),
            Self::Unix(listener) => listener.as_fd(),
        }
    }

    /// The next connection that may be served; None when none is waiting.
    pub(super) fn accept(&self) -> io::Result<Option<OwnedFd>> {
        loop {
            let accepted = match self {
                Self::Vsock(fd) => vsock::accept(fd),
                // Whoever may open the test's socket is its host.
                Self::Unix(listener) => listener.accept().and_then(|(stream, _)| {
                    stream.set_nonblocking(true)?;
                    Ok((stream.into(), libc::VMADDR_CID_HOST))
                }),
            };
            match accepted {
                Ok((fd, libc::VMADDR_CID_HOST)) => return Ok(Some(fd)),
                // A guest's own user, by loopback (CID 1) or by the guest's own CID: the agent is not for them.
                Ok((_, cid)) => log::info(format_args!("refused a connection from cid {cid}")),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The peer gave up while it waited.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Tells the host that the agent can serve: a connection that is served like an accepted one. None where there is
    /// no host to tell.
    pub(super) fn ring_doorbell(&self) -> Option<OwnedFd> {
        match self {
            Self::Vsock(_) => vsock::connect(libc::VMADDR_CID_HOST, DOORBELL_PORT).ok(),
            Self::Unix(_) => None,
        }
    }
}
