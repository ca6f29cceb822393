//! The state machine against packets and times that a test makes up.

use super::*;

const CID: u64 = 3;
const WINDOW: u32 = 1000;
const KEY: Key = Key {
    host_port: 7,
    guest_port: 1024,
};
const START: Duration = Duration::from_secs(100);

fn packet(op: Op) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: KEY.guest_port,
        dst_port: KEY.host_port,
        socket_type: TYPE_STREAM,
        op: op as u16,
        buf_alloc: 500,
        ..Header::default()
    }
}

fn data(len: u32) -> Header {
    Header {
        len,
        ..packet(Op::Data)
    }
}

fn shutdown(flags: u32) -> Header {
    Header {
        flags,
        ..packet(Op::Shutdown)
    }
}

/// The packets that the connection owes, as (operation, flags).
fn owed(connection: &mut Connection) -> Vec<(Op, u32)> {
    std::iter::from_fn(|| connection.take_packet(CID))
        .map(|header| (Op::parse(header.op).unwrap(), header.flags))
        .collect()
}

fn dialling() -> Connection {
    let mut connection = Connection::greeting(WINDOW, START);
    connection.dial(KEY, START);
    assert_eq!(owed(&mut connection), [(Op::Request, 0)]);
    connection
}

fn open() -> Connection {
    let mut connection = dialling();
    connection.on_packet(&packet(Op::Response), START);
    assert!(connection.take_actions().greet);
    assert_eq!(
        (connection.phase(), connection.deadline()),
        (Phase::Open, None)
    );
    connection
}

fn closes(connection: &mut Connection) -> bool {
    connection.take_actions().close
}

#[test]
fn a_refused_connection_closes_and_says_nothing() {
    let mut connection = dialling();
    connection.on_packet(&packet(Op::Reset), START);
    assert!(closes(&mut connection));
    assert_eq!(
        (connection.phase(), owed(&mut connection)),
        (Phase::Closed, vec![])
    );
}

#[test]
fn connecting_has_a_time_out_on_both_sides() {
    let mut connection = Connection::greeting(WINDOW, START);
    connection.on_deadline(START + CONNECT_TIMEOUT - Duration::from_millis(1));
    assert_eq!(connection.phase(), Phase::Greeting);
    connection.on_deadline(START + CONNECT_TIMEOUT);
    assert!(closes(&mut connection));
    assert_eq!(
        connection.phase(),
        Phase::Closed,
        "the guest never heard of it"
    );

    let mut connection = dialling();
    connection.on_deadline(START + CONNECT_TIMEOUT);
    assert!(closes(&mut connection));
    assert_eq!(owed(&mut connection), [(Op::Reset, 0)]);
    assert_eq!(connection.phase(), Phase::Closed);
}

#[test]
fn a_host_process_that_leaves_early_bothers_only_a_guest_that_knows() {
    let mut connection = Connection::greeting(WINDOW, START);
    connection.dial(KEY, START);
    connection.on_host_gone(START);
    assert_eq!(owed(&mut connection), []);
    assert_eq!(connection.phase(), Phase::Closed);

    let mut connection = dialling();
    connection.on_host_gone(START);
    assert_eq!(owed(&mut connection), [(Op::Reset, 0)]);
}

#[test]
fn operations_in_the_wrong_state_are_reset() {
    for op in [
        Op::Data,
        Op::CreditUpdate,
        Op::CreditRequest,
        Op::Shutdown,
        Op::Request,
    ] {
        let mut connection = dialling();
        connection.on_packet(&packet(op), START);
        assert_eq!(
            owed(&mut connection),
            [(Op::Reset, 0)],
            "{op:?} before RESPONSE"
        );
        assert!(closes(&mut connection));
    }
    for op in [Op::Request, Op::Response] {
        let mut connection = open();
        connection.on_packet(&packet(op), START);
        assert_eq!(
            owed(&mut connection),
            [(Op::Reset, 0)],
            "{op:?} on an open connection"
        );
    }
    for header in [
        Header { op: 0, ..data(1) },
        Header { op: 99, ..data(1) },
        Header {
            socket_type: 2,
            ..data(1)
        },
    ] {
        let mut connection = open();
        assert_eq!(connection.on_packet(&header, START), 0);
        assert_eq!(owed(&mut connection), [(Op::Reset, 0)], "{header:?}");
    }
}

#[test]
fn a_guest_that_exceeds_its_credit_or_sends_after_its_end_is_reset() {
    let mut connection = open();
    assert_eq!(connection.on_packet(&data(WINDOW), START), WINDOW);
    assert_eq!(connection.on_packet(&data(1), START), 0);
    assert_eq!(owed(&mut connection), [(Op::Reset, 0)]);

    let mut connection = open();
    assert_eq!(connection.on_packet(&data(u32::MAX), START), 0);
    assert_eq!(owed(&mut connection), [(Op::Reset, 0)]);

    let mut connection = open();
    connection.on_packet(&shutdown(SHUTDOWN_SEND), START);
    assert_eq!(connection.on_packet(&data(1), START), 0);
    assert_eq!(owed(&mut connection), [(Op::Reset, 0)]);
}

#[test]
fn credit_wraps_and_is_told_when_half_is_gone() {
    let mut connection = open();
    // 2^32 bytes and more in each direction.
    let mut sent: u64 = 0;
    let step: u32 = 400;
    let mut updates = 0;
    while sent < (1 << 32) + 10_000 {
        // The whole range at once would need as many rounds as bytes; jump close to the wrap first.
        if sent == 4000 {
            let jump = u32::MAX - 10_000;
            for counter in [
                &mut connection.received,
                &mut connection.forwarded,
                &mut connection.told,
            ] {
                *counter = counter.wrapping_add(jump);
            }
            connection.sent = connection.sent.wrapping_add(jump);
            connection.guest_fwd_cnt = connection.guest_fwd_cnt.wrapping_add(jump);
            sent += u64::from(jump);
        }
        assert_eq!(
            connection.on_packet(
                &Header {
                    fwd_cnt: connection.sent,
                    ..data(step)
                },
                START
            ),
            step
        );
        connection.on_forwarded(step, START);
        assert_eq!(connection.sendable(), 500);
        connection.on_sent(step);
        assert_eq!(connection.sendable(), 100);
        sent += u64::from(step);
        if let Some(header) = connection.take_packet(CID) {
            assert_eq!(
                (header.op, header.buf_alloc),
                (Op::CreditUpdate as u16, WINDOW)
            );
            assert_eq!(header.fwd_cnt, connection.received);
            updates += 1;
        }
    }
    assert_eq!(u64::from(connection.received), sent - (1 << 32));
    assert!(updates >= 10);
    assert_eq!(connection.phase(), Phase::Open);
}

#[test]
fn a_guest_that_lies_about_credit_only_stalls_itself() {
    let mut connection = open();
    connection.on_packet(
        &Header {
            fwd_cnt: 12345,
            ..packet(Op::CreditUpdate)
        },
        START,
    );
    assert_eq!(connection.sendable(), 0);
    connection.on_packet(
        &Header {
            buf_alloc: 0,
            ..packet(Op::CreditUpdate)
        },
        START,
    );
    assert_eq!(connection.sendable(), 0);
}

#[test]
fn a_silent_guest_without_room_is_asked_once() {
    let mut connection = open();
    connection.on_sent(500);
    connection.on_credit_exhausted(START);
    connection.on_deadline(START + CREDIT_PATIENCE);
    assert_eq!(owed(&mut connection), [(Op::CreditRequest, 0)]);
    connection.on_packet(&packet(Op::CreditUpdate), START);
    connection.on_credit_exhausted(START);
    assert_eq!(
        connection.deadline(),
        None,
        "it has answered that there is none"
    );
    connection.on_packet(
        &Header {
            fwd_cnt: 500,
            ..packet(Op::CreditUpdate)
        },
        START,
    );
    connection.on_sent(500);
    connection.on_credit_exhausted(START);
    assert!(connection.deadline().is_some());
    connection.on_packet(&packet(Op::CreditRequest), START);
    assert_eq!(owed(&mut connection), [(Op::CreditUpdate, 0)]);
}

#[test]
fn each_direction_ends_on_its_own() {
    let mut connection = open();
    connection.on_host_finished(START);
    assert_eq!(owed(&mut connection), [(Op::Shutdown, SHUTDOWN_SEND)]);
    assert_eq!(connection.on_packet(&data(300), START), 300);
    connection.on_packet(&shutdown(SHUTDOWN_SEND), START);
    assert_eq!(
        connection.take_actions(),
        HostActions::default(),
        "300 bytes are still to be delivered"
    );
    connection.on_forwarded(299, START);
    assert_eq!(connection.take_actions(), HostActions::default());
    connection.on_forwarded(1, START);
    let actions = connection.take_actions();
    assert!(actions.shut_write && actions.close);
    assert_eq!(owed(&mut connection), [(Op::Reset, 0)]);
}

#[test]
fn the_guest_may_end_first_and_go_on_receiving() {
    let mut connection = open();
    connection.on_packet(&shutdown(SHUTDOWN_SEND), START);
    assert_eq!(
        connection.take_actions(),
        HostActions {
            shut_write: true,
            ..HostActions::default()
        }
    );
    assert_eq!(connection.sendable(), 500);
    assert!(connection.wants_host_bytes());
    connection.on_sent(500);
    connection.on_host_finished(START);
    assert_eq!(owed(&mut connection), [(Op::Reset, 0)]);
}

#[test]
fn a_guest_that_closes_is_confirmed_once_its_bytes_are_delivered() {
    let mut connection = open();
    assert_eq!(connection.on_packet(&data(10), START), 10);
    connection.on_packet(&shutdown(SHUTDOWN_BOTH), START);
    assert!(connection.take_actions().shut_read);
    assert_eq!((connection.sendable(), owed(&mut connection)), (0, vec![]));
    connection.on_forwarded(10, START);
    assert_eq!(owed(&mut connection), [(Op::Reset, 0)]);
}

#[test]
fn bytes_outlive_the_guest_that_sent_them() {
    let mut connection = open();
    assert_eq!(connection.on_packet(&data(10), START), 10);
    connection.on_packet(&packet(Op::Reset), START);
    assert_eq!(connection.phase(), Phase::Draining);
    assert!(!connection.is_known_to_guest() && connection.host_takes_data());
    connection.on_forwarded(10, START);
    assert!(closes(&mut connection));
    assert_eq!(
        (connection.phase(), owed(&mut connection)),
        (Phase::Closed, vec![])
    );
}

#[test]
fn a_host_process_that_closed_is_confirmed_or_times_out() {
    let gone = || {
        let mut connection = open();
        connection.on_host_gone(START);
        assert!(connection.owes_only_shutdown());
        connection.on_host_finished(START);
        assert_eq!(owed(&mut connection), [(Op::Shutdown, SHUTDOWN_BOTH)]);
        assert!(closes(&mut connection));
        // What the guest sent before it knew is thrown away.
        assert_eq!(connection.on_packet(&data(100), START), 0);
        assert_eq!((connection.phase(), connection.held()), (Phase::Closing, 0));
        connection
    };
    let mut connection = gone();
    connection.on_packet(&packet(Op::Reset), START);
    assert_eq!(
        (connection.phase(), owed(&mut connection)),
        (Phase::Closed, vec![])
    );

    let mut connection = gone();
    connection.on_packet(&shutdown(SHUTDOWN_BOTH), START);
    assert_eq!(owed(&mut connection), [(Op::Reset, 0)]);

    let mut connection = gone();
    connection.on_deadline(START + SHUTDOWN_TIMEOUT - Duration::from_millis(1));
    assert_eq!(connection.phase(), Phase::Closing);
    connection.on_deadline(START + SHUTDOWN_TIMEOUT);
    assert_eq!(owed(&mut connection), [(Op::Reset, 0)]);
}

#[test]
fn bytes_of_a_host_process_that_closed_are_still_delivered() {
    let mut connection = open();
    connection.on_sent(500);
    connection.on_host_gone(START);
    assert_eq!(owed(&mut connection), [(Op::Shutdown, SHUTDOWN_RECEIVE)]);
    assert_eq!(
        (connection.phase(), connection.sendable()),
        (Phase::Open, 0)
    );
    connection.on_packet(
        &Header {
            fwd_cnt: 500,
            ..packet(Op::CreditUpdate)
        },
        START,
    );
    assert_eq!(connection.sendable(), 500);
    connection.on_host_finished(START);
    assert_eq!(owed(&mut connection), [(Op::Shutdown, SHUTDOWN_BOTH)]);
}

#[test]
fn hints_are_permanent() {
    let mut connection = open();
    connection.on_packet(&shutdown(SHUTDOWN_RECEIVE), START);
    assert!(connection.take_actions().shut_read);
    connection.on_packet(&shutdown(0), START);
    assert_eq!(connection.sendable(), 0);
    connection.on_packet(&shutdown(SHUTDOWN_SEND), START);
    assert_eq!(
        owed(&mut connection),
        [(Op::Reset, 0)],
        "both hints together end it"
    );
}

#[test]
fn a_connection_of_the_guest_owes_a_response_before_data() {
    let mut connection = Connection::accepted(KEY, WINDOW, &packet(Op::Request));
    assert_eq!(connection.sendable(), 500);
    assert_eq!(connection.deadline(), None);
    assert_eq!(owed(&mut connection), [(Op::Response, 0)]);
}
