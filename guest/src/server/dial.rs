//! Dialled ports: the connection becomes the raw bytes of a socket in the guest, both ways, half-closes kept.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;

use airlock_proto::v1::dial::Target;
use airlock_proto::v1::{self, Dial, ErrorCode, from_agent::Body};
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType};

use super::Agent;
use super::connection::{RECEIVE_BYTES, State};
use super::system;
use crate::out_queue::OutQueue;
use crate::reactor::{Ready, Token};
use crate::table::Key;

/// A dialled socket.
#[derive(Debug)]
pub(super) struct Dialled {
    target: OwnedFd,
    connected: bool,
    target_readable: bool,
    to_target: OutQueue,
    /// No more comes from the target, or from the host; and the other side has been told.
    target_ended: bool,
    host_ended: bool,
    host_end_told: bool,
    target_end_told: bool,
}

/// What became of moving bytes.
#[derive(Debug, PartialEq, Eq)]
enum Moved {
    Going,
    Over,
}

impl Agent {
    pub(super) fn dial(&mut self, key: Key, request: &Dial) {
        let target = match open(request) {
            Ok(target) => target,
            Err((code, message, errno)) => {
                let error = system::failure(code, &message, errno.map_or(0, Errno::raw_os_error));
                return self.send(key, Body::Error(error));
            }
        };
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP;
        if self
            .reactor
            .add(&target, Token::DialTarget(key), flags)
            .is_err()
        {
            return self.error(
                key,
                ErrorCode::ErrorExhausted,
                "cannot watch another socket",
            );
        }
        if let Some(connection) = self.connections.get_mut(key) {
            let mut to_target = OutQueue::default();
            // Bytes right behind the request are the target's.
            to_target.push_raw(&connection.take_inbox());
            connection.state = State::Dialled(Box::new(Dialled {
                target,
                connected: false,
                target_readable: false,
                to_target,
                target_ended: false,
                host_ended: false,
                host_end_told: false,
                target_end_told: false,
            }));
        }
    }

    pub(super) fn on_dial_target(&mut self, key: Key, event: Ready) {
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        let State::Dialled(dialled) = &mut connection.state else {
            return;
        };
        if !dialled.connected {
            if !event.writable && !event.hung_up {
                return;
            }
            if let Ok(Err(errno)) | Err(errno) = rustix::net::sockopt::socket_error(&dialled.target)
            {
                connection.state = State::Idle;
                let message = format!("cannot connect: {errno}");
                let error = system::failure(ErrorCode::ErrorIo, &message, errno.raw_os_error());
                return self.send(key, Body::Error(error));
            }
            dialled.connected = true;
            connection.out.push(Body::Dialled(v1::Dialled {}));
        }
        dialled.target_readable |= event.readable || event.hung_up;
        self.pump_dialled(key);
    }

    /// Moves bytes both ways until neither side gives or takes more, or others must have their turn.
    pub(super) fn pump_dialled(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(key) else {
            return;
        };
        let State::Dialled(dialled) = &mut connection.state else {
            return;
        };
        if !dialled.connected {
            return;
        }
        let to_target = to_target(dialled, &connection.fd, &mut connection.readable);
        let to_host = to_host(dialled, &connection.fd, &mut connection.out);
        let over = to_target == Moved::Over
            || to_host == Moved::Over
            || (dialled.host_end_told && dialled.target_end_told);
        if over {
            connection.closing = true;
        }
        let more = (connection.readable && !dialled.host_ended && dialled.to_target.is_empty())
            || (dialled.target_readable && !dialled.target_ended && connection.out.is_empty());
        if more && !over {
            self.to_read.push(key);
        }
        self.list_for_flush(key);
    }
}

fn to_target(dialled: &mut Dialled, host: &OwnedFd, readable: &mut bool) -> Moved {
    while *readable && !dialled.host_ended && dialled.to_target.has_room() {
        match dialled.to_target.read_raw(host, RECEIVE_BYTES) {
            Ok(0) => dialled.host_ended = true,
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => *readable = false,
            Err(_) => return Moved::Over,
        }
    }
    match dialled.to_target.write_to(&dialled.target) {
        Ok(true) if dialled.host_ended && !dialled.host_end_told => {
            dialled.host_end_told = true;
            // The target may have closed by itself meanwhile.
            let _ = rustix::net::shutdown(&dialled.target, Shutdown::Write);
        }
        Ok(_) => {}
        Err(_) => return Moved::Over,
    }
    Moved::Going
}

fn to_host(dialled: &mut Dialled, host: &OwnedFd, out: &mut OutQueue) -> Moved {
    while dialled.target_readable && !dialled.target_ended && out.has_room() {
        match out.read_raw(&dialled.target, RECEIVE_BYTES) {
            Ok(0) => dialled.target_ended = true,
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => dialled.target_readable = false,
            Err(_) => return Moved::Over,
        }
    }
    match out.write_to(host) {
        Ok(true) if dialled.target_ended && !dialled.target_end_told => {
            dialled.target_end_told = true;
            let _ = rustix::net::shutdown(host, Shutdown::Write);
        }
        Ok(_) => {}
        Err(_) => return Moved::Over,
    }
    Moved::Going
}

type Refusal = (ErrorCode, String, Option<Errno>);

/// A socket that is connecting to what was asked for.
fn open(request: &Dial) -> Result<OwnedFd, Refusal> {
    let invalid = |message: &str| (ErrorCode::ErrorInvalid, message.to_owned(), None);
    match &request.target {
        Some(Target::Tcp(tcp)) => {
            let host = match tcp.host.as_str() {
                "" | "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
                // Names would need a resolver, which would run the guest's configuration in the agent.
                other => other
                    .parse()
                    .map_err(|_| invalid("the host must be an address or localhost"))?,
            };
            let port = u16::try_from(tcp.port).ok().filter(|port| *port != 0);
            let port = port.ok_or_else(|| invalid("the port must be 1 to 65535"))?;
            let address = SocketAddr::new(host, port);
            let family = match host {
                IpAddr::V4(_) => AddressFamily::INET,
                IpAddr::V6(_) => AddressFamily::INET6,
            };
            connect(family, &address)
        }
        Some(Target::UnixPath(path)) => {
            let address = SocketAddrUnix::new(&path[..])
                .map_err(|_| invalid("the socket's path is too long or has a NUL byte"))?;
            connect(AddressFamily::UNIX, &address)
        }
        None => Err(invalid("nothing to dial")),
    }
}

fn connect(
    family: AddressFamily,
    address: &impl rustix::net::addr::SocketAddrArg,
) -> Result<OwnedFd, Refusal> {
    let failed = |errno: Errno| {
        let message = format!("cannot connect: {errno}");
        (ErrorCode::ErrorIo, message, Some(errno))
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket =
        rustix::net::socket_with(family, SocketType::STREAM, flags, None).map_err(failed)?;
    match rustix::net::connect(&socket, address) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(errno) => Err(failed(errno)),
    }
}
