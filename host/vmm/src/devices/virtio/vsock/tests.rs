//! The whole device without a VM: real rings, real sockets, a driver in the test.

mod driver;
mod hostile;
mod random;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use driver::{BUFFER_BYTES, GUEST_WINDOW, GuestSocket, Rig};

use super::connection::{CONNECT_TIMEOUT, SHUTDOWN_TIMEOUT};
use super::mux::LARGE_WINDOW;
use super::spec::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_SEND};
use super::{RX_QUEUE, TX_QUEUE};

/// Later than any deadline that was set up to now.
fn after(timeout: Duration) -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(
        u64::try_from(now.tv_sec).unwrap(),
        u32::try_from(now.tv_nsec).unwrap(),
    ) + timeout
}

fn is_at_end(mut stream: &UnixStream) -> bool {
    matches!(stream.read(&mut [0; 1]), Ok(0))
}

fn read_available(mut stream: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
    }
    bytes
}

#[test]
fn bytes_go_both_ways() {
    let mut rig = Rig::new();
    let (mut host, guest) = rig.connect(1024);
    host.write_all(b"from the host").unwrap();
    let (header, payload) = rig.expect(Op::Data);
    assert_eq!(payload, b"from the host");
    assert_eq!((header.src_port, header.dst_port), (guest.host_port, 1024));
    rig.send(
        &Header {
            len: 14,
            ..guest.header(Op::Data)
        },
        b"from the guest",
    );
    assert_eq!(read_available(&host), b"from the guest");
    rig.expect_nothing();
}

#[test]
fn bytes_behind_the_connect_line_reach_the_guest_first() {
    let mut rig = Rig::new();
    let mut host = UnixStream::connect(&rig.path).unwrap();
    host.write_all(b"CONNECT 5\nearly").unwrap();
    let (request, _) = rig.expect(Op::Request);
    host.write_all(b" late").unwrap();
    rig.expect_nothing();
    let guest = GuestSocket::new(5, request.src_port);
    rig.send(&guest.header(Op::Response), &[]);
    assert_eq!(rig.expect(Op::Data).1, b"early");
    assert_eq!(rig.expect(Op::Data).1, b" late");
}

#[test]
fn a_refused_port_is_end_of_file_at_once() {
    let mut rig = Rig::new();
    let host = rig.dial(99);
    let (request, _) = rig.expect(Op::Request);
    rig.send(
        &GuestSocket::new(99, request.src_port).header(Op::Reset),
        &[],
    );
    assert!(is_at_end(&host));
    rig.expect_nothing();
    assert_eq!(rig.worker.mux.len(), 0);
}

#[test]
fn a_wrong_line_is_end_of_file() {
    let mut rig = Rig::new();
    for line in ["GET / HTTP/1.1\r\n", "CONNECT x\n", &"x".repeat(100)] {
        let mut host = UnixStream::connect(&rig.path).unwrap();
        host.write_all(line.as_bytes()).unwrap();
        rig.settle();
        assert!(is_at_end(&host), "{line}");
    }
    assert_eq!(rig.worker.mux.len(), 0);
    rig.expect_nothing();
}

#[test]
fn the_guest_reaches_listeners_of_the_host_and_nobody_else() {
    let mut rig = Rig::new();
    let listener = UnixListener::bind(format!("{}_7", rig.path.display())).unwrap();
    let guest = GuestSocket::new(50, 7);
    rig.send(&guest.header(Op::Request), &[]);
    rig.expect(Op::Response);
    let (mut host, _) = listener.accept().unwrap();
    host.write_all(b"hello").unwrap();
    assert_eq!(rig.expect(Op::Data).1, b"hello");
    rig.send(&GuestSocket::new(51, 8).header(Op::Request), &[]);
    let (reset, _) = rig.expect(Op::Reset);
    assert_eq!((reset.src_port, reset.dst_port), (8, 51));
}

#[test]
fn each_direction_ends_on_its_own() {
    let mut rig = Rig::new();
    let (mut host, guest) = rig.connect(1);
    host.write_all(b"the last").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rig.expect(Op::Data).1, b"the last");
    assert_eq!(rig.expect(Op::Shutdown).0.flags, SHUTDOWN_SEND);
    rig.send(
        &Header {
            len: 6,
            ..guest.header(Op::Data)
        },
        b"answer",
    );
    assert_eq!(read_available(&host), b"answer");
    rig.send(
        &Header {
            flags: SHUTDOWN_BOTH,
            ..guest.header(Op::Shutdown)
        },
        &[],
    );
    assert!(is_at_end(&host));
    rig.expect(Op::Reset);
    assert_eq!(rig.worker.mux.len(), 0);
}

#[test]
fn a_host_process_that_closes_takes_two_packets() {
    let mut rig = Rig::new();
    let (host, guest) = rig.connect(1);
    drop(host);
    assert_eq!(rig.expect(Op::Shutdown).0.flags, SHUTDOWN_BOTH);
    rig.expect_nothing();
    rig.send(&guest.header(Op::Reset), &[]);
    rig.expect_nothing();
    assert_eq!(rig.worker.mux.len(), 0);
}

#[test]
fn a_guest_that_answers_nothing_is_given_up_in_time() {
    let mut rig = Rig::new();
    let host = rig.dial(1);
    rig.expect(Op::Request);
    rig.worker
        .on_timer(after(CONNECT_TIMEOUT), &mut rig.watch)
        .unwrap();
    assert!(is_at_end(&host));
    rig.send(&GuestSocket::new(9, 9).header(Op::Reset), &[]);
    rig.expect(Op::Reset);

    let (host, _) = rig.connect(1);
    drop(host);
    rig.expect(Op::Shutdown);
    rig.worker
        .on_timer(after(SHUTDOWN_TIMEOUT), &mut rig.watch)
        .unwrap();
    rig.offer_buffers(0);
    rig.expect(Op::Reset);
    assert_eq!(rig.worker.mux.len(), 0);
}

#[test]
fn a_silent_host_process_is_given_up_in_time() {
    let mut rig = Rig::new();
    let host = UnixStream::connect(&rig.path).unwrap();
    rig.settle();
    assert_eq!(rig.worker.mux.len(), 1);
    rig.worker
        .on_timer(after(CONNECT_TIMEOUT), &mut rig.watch)
        .unwrap();
    assert!(is_at_end(&host));
    assert_eq!(rig.worker.mux.len(), 0);
}

#[test]
fn a_slow_host_process_costs_one_window_and_loses_nothing() {
    let mut rig = Rig::new();
    let (host, mut guest) = rig.connect(1);
    guest.host_buf_alloc = LARGE_WINDOW;
    let packet: Vec<u8> = (0..60_000u32).map(|n| n.to_le_bytes()[0]).collect();
    let mut sent = Vec::new();
    // Until the credit is gone: nobody reads at the host.
    while guest.credit() as usize >= packet.len() {
        let length = u32::try_from(packet.len()).unwrap();
        rig.send(
            &Header {
                len: length,
                ..guest.header(Op::Data)
            },
            &packet,
        );
        guest.sent = guest.sent.wrapping_add(length);
        sent.extend_from_slice(&packet);
        while let Some((header, _)) = rig.next_packet() {
            guest.on_packet(&header);
        }
        rig.offer_buffers(usize::MAX);
    }
    assert!(sent.len() >= LARGE_WINDOW as usize - packet.len());
    rig.send(
        &Header {
            flags: SHUTDOWN_BOTH,
            ..guest.header(Op::Shutdown)
        },
        &[],
    );
    // Its kernel waits no longer, and yet what it sent arrives.
    rig.send(&guest.header(Op::Reset), &[]);
    let mut heard = Vec::new();
    while heard.len() < sent.len() {
        let more = read_available(&host);
        assert!(
            !more.is_empty() || rig.turn(),
            "stuck after {} of {} bytes",
            heard.len(),
            sent.len()
        );
        heard.extend_from_slice(&more);
    }
    assert!(heard == sent);
    rig.settle();
    assert!(is_at_end(&host));
    assert_eq!(rig.worker.mux.len(), 0);
}

#[test]
fn a_guest_without_buffers_is_served_when_it_has_some() {
    let mut rig = Rig::without_buffers();
    let mut host = rig.dial(1);
    rig.expect_nothing();
    rig.offer_buffers(1);
    let (request, _) = rig.next_packet().unwrap();
    let guest = GuestSocket::new(1, request.src_port);
    rig.send(&guest.header(Op::Response), &[]);
    assert_eq!(
        driver::read_line(&host),
        format!("OK {}\n", guest.host_port)
    );
    host.write_all(&[7; 3 * BUFFER_BYTES]).unwrap();
    rig.expect_nothing();
    for _ in 0..3 {
        rig.offer_buffers(1);
        let (_, payload) = rig.next_packet().unwrap();
        assert_eq!(payload, [7; BUFFER_BYTES]);
        rig.expect_nothing();
    }
}

#[test]
fn a_burst_is_one_interrupt() {
    let mut rig = Rig::new();
    let (mut host, mut guest) = rig.connect(1);
    // Reads grow to full size.
    for _ in 0..3 {
        host.write_all(&[1; GUEST_WINDOW as usize]).unwrap();
        rig.settle();
        while let Some((header, _)) = rig.next_packet() {
            guest.on_packet(&header);
        }
        guest.read = guest.received;
        rig.offer_buffers(usize::MAX);
        rig.send(&guest.header(Op::CreditUpdate), &[]);
    }
    let before = rig.interrupts.count(RX_QUEUE);
    host.write_all(&[1; GUEST_WINDOW as usize]).unwrap();
    rig.settle();
    assert_eq!(rig.interrupts.count(RX_QUEUE), before + 1);

    let before = rig.interrupts.count(TX_QUEUE);
    for _ in 0..4 {
        rig.queue_packet(
            &Header {
                len: 3,
                ..guest.header(Op::Data)
            },
            b"abc",
        );
    }
    rig.kick();
    assert_eq!(read_available(&host), b"abcabcabcabc");
    // Told at the latest when the driver could run out, or a little later.
    assert!(rig.interrupts.count(TX_QUEUE) <= before + 1);
    rig.worker
        .on_timer(after(CONNECT_TIMEOUT), &mut rig.watch)
        .unwrap();
    assert_eq!(rig.interrupts.count(TX_QUEUE), before + 1);
}

#[test]
fn stopping_leaves_nothing_open() {
    let mut rig = Rig::new();
    let (host, _) = rig.connect(1);
    let greeting = UnixStream::connect(&rig.path).unwrap();
    rig.settle();
    crate::devices::virtio::QueueWorker::stop(&mut rig.worker, &mut rig.watch);
    assert!(is_at_end(&host) && is_at_end(&greeting));
    assert!(!rig.turn());
}
