//! AF_VSOCK sockets that never block: rustix has no address type for them, and the `vsock` crate's connect waits for
//! the host while the agent's one thread has execs to serve.

#![expect(unsafe_code, reason = "sockaddr_vm is known to libc only")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: sockaddr_vm is integers only; all zeros is a valid value.
    let mut address: libc::sockaddr_vm = unsafe { MaybeUninit::zeroed().assume_init() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: takes integers; a result that is not negative is a descriptor nobody else has.
    unsafe {
        let fd = libc::socket(libc::AF_VSOCK, kind, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

const ADDRESS_BYTES: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

pub(super) fn listen(port: u32) -> io::Result<OwnedFd> {
    let fd = socket()?;
    let address = address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the address and its length go together.
    let result = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), ADDRESS_BYTES) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: takes integers.
    if unsafe { libc::listen(fd.as_raw_fd(), BACKLOG) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fd)
}

/// A connection and the context id of its peer.
pub(super) fn accept(listener: &OwnedFd) -> io::Result<(OwnedFd, u32)> {
    let mut peer = address(0, 0);
    let mut length = ADDRESS_BYTES;
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the kernel writes at most `length` bytes to `peer`; a result that is not negative is a new descriptor.
    unsafe {
        let address = (&raw mut peer).cast();
        let fd = libc::accept4(listener.as_raw_fd(), address, &raw mut length, flags);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((OwnedFd::from_raw_fd(fd), peer.svm_cid))
    }
}

/// Starts connecting; the socket becomes writable when that has come to an end.
pub(super) fn connect(cid: u32, port: u32) -> io::Result<OwnedFd> {
    let fd = socket()?;
    let address = address(cid, port);
    // SAFETY: the address and its length go together.
    let result =
        unsafe { libc::connect(fd.as_raw_fd(), (&raw const address).cast(), ADDRESS_BYTES) };
    if result < 0 {
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINPROGRESS) {
            return Err(error);
        }
    }
    Ok(fd)
}
