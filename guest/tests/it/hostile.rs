//! Clients that do what they should not: nothing happens to the agent, or to anybody else.

use std::io::{Read, Write};

use airlock_proto::codec;
use airlock_proto::v1::to_agent::Body;
use airlock_proto::v1::{ErrorCode, Hello, Stdin, StdinMode, ToAgent, from_agent};
use airlock_proto::{MAX_TO_AGENT_BYTES, STDIN_WINDOW_BYTES};
use bytes::BytesMut;

use crate::client::{Agent, exec, sh, wait_until};

fn serves(agent: &Agent) {
    assert_eq!(agent.client().run(exec(&["true"])).code(), 0);
}

fn protocol_error(frame: Option<from_agent::Body>) {
    match frame {
        Some(from_agent::Body::Error(error)) => assert_eq!(error.code(), ErrorCode::ErrorProtocol),
        other => panic!("not an error: {other:?}"),
    }
}

#[test]
fn garbage_closes_its_own_connection_only() {
    let agent = Agent::start();
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[1, 0, 0, 0, 0xff],
        &[0; 64],
    ] {
        let mut stream = agent.raw();
        stream.write_all(garbage).unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert!(rest.len() < 300);
    }
    serves(&agent);
}

#[test]
fn a_length_over_the_limit_is_refused_before_its_body() {
    let agent = Agent::start();
    let before = agent.resident_bytes();
    let mut client = agent.client();
    client
        .stream
        .write_all(&(MAX_TO_AGENT_BYTES as u32 + 1).to_le_bytes())
        .unwrap();
    protocol_error(client.try_receive());
    assert!(client.try_receive().is_none());
    assert!(agent.resident_bytes() - before < 1 << 20);
    serves(&agent);
}

#[test]
fn a_frame_may_come_byte_by_byte() {
    let agent = Agent::start();
    let mut client = agent.client();
    let mut bytes = BytesMut::new();
    let body = Some(Body::ExecStart(exec(&["/bin/echo", "split"])));
    codec::encode(&ToAgent { body }, &mut bytes).unwrap();
    for byte in bytes {
        client.stream.write_all(&[byte]).unwrap();
    }
    assert_eq!(client.finish().stdout(), "split\n");
}

#[test]
fn many_frames_may_come_at_once() {
    let agent = Agent::start();
    let mut stream = agent.raw();
    let mut bytes = BytesMut::new();
    let hello = Hello {
        protocol_min: 1,
        protocol_max: 9,
        client: String::new(),
    };
    for body in [
        Body::Hello(hello),
        Body::ExecStart(exec(&["/bin/echo", "early"])),
    ] {
        codec::encode(&ToAgent { body: Some(body) }, &mut bytes).unwrap();
    }
    stream.write_all(&bytes).unwrap();
    let mut all = Vec::new();
    let mut chunk = [0; 1024];
    while !all.windows(5).any(|w| w == b"early") {
        let length = stream.read(&mut chunk).unwrap();
        assert!(length > 0);
        all.extend_from_slice(&chunk[..length]);
    }
}

#[test]
fn the_first_frame_must_be_hello_and_the_versions_must_meet() {
    let agent = Agent::start();
    let mut client = agent.client();
    client.send(Body::Hello(Hello {
        protocol_min: 1,
        protocol_max: 1,
        client: String::new(),
    }));
    protocol_error(client.try_receive());
    let mut stream = agent.raw();
    let mut bytes = BytesMut::new();
    let hello = Hello {
        protocol_min: 100,
        protocol_max: 200,
        client: String::new(),
    };
    codec::encode(
        &ToAgent {
            body: Some(Body::Hello(hello)),
        },
        &mut bytes,
    )
    .unwrap();
    stream.write_all(&bytes).unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert!(rest.windows(14).any(|w| w == b"speaks protoco"), "{rest:?}");
}

#[test]
fn stdin_beyond_the_credit_ends_the_connection_and_the_exec() {
    let agent = Agent::start();
    let mut client = agent.client();
    let mut request = exec(&["sleep", "60"]);
    request.stdin = StdinMode::StdinStream.into();
    client.send(Body::ExecStart(request));
    let data = vec![0; 64 << 10];
    for index in 0..=STDIN_WINDOW_BYTES / data.len() as u64 {
        let offset = index * data.len() as u64;
        client.send(Body::Stdin(Stdin {
            offset,
            data: data.clone().into(),
            eof: false,
        }));
    }
    let mut pid = None;
    loop {
        match client.try_receive() {
            Some(from_agent::Body::Started(started)) => pid = Some(started.pid),
            Some(from_agent::Body::Error(error)) => {
                assert_eq!(error.code(), ErrorCode::ErrorProtocol);
                break;
            }
            Some(other) => panic!("{other:?}"),
            None => panic!("closed without a word"),
        }
    }
    wait_until("the exec is gone", || {
        !crate::client::is_alive(pid.unwrap())
    });
    serves(&agent);
}

#[test]
fn a_client_that_never_reads_its_answers_gets_no_more_of_them() {
    let agent = Agent::start();
    let before = agent.resident_bytes();
    let client = agent.client();
    client
        .stream
        .set_write_timeout(Some(std::time::Duration::from_millis(300)))
        .unwrap();
    let mut bytes = BytesMut::new();
    let ping = airlock_proto::v1::Ping {
        payload: vec![1; 60_000].into(),
    };
    let request = Some(airlock_proto::v1::control::Request::Ping(ping));
    let body = Some(Body::Control(airlock_proto::v1::Control { request }));
    codec::encode(&ToAgent { body }, &mut bytes).unwrap();
    let mut sent = 0;
    while sent < 2000 && (&client.stream).write_all(&bytes).is_ok() {
        sent += 1;
    }
    assert!(
        sent < 2000,
        "the agent took {sent} pings and kept the answers"
    );
    assert!(agent.resident_bytes() - before < 4 << 20);
    serves(&agent);
}

#[test]
fn clients_that_vanish_at_any_moment_leave_nothing_behind() {
    let agent = Agent::start();
    serves(&agent);
    let before = agent.open_descriptors();
    for round in 0..100 {
        let mut client = agent.client();
        client.send(Body::ExecStart(sh("cat /dev/zero")));
        if round % 2 == 0 {
            client.receive();
        }
    }
    wait_until("everything is closed", || {
        agent.open_descriptors() <= before
    });
    serves(&agent);
}

#[test]
fn an_unknown_message_is_an_error_not_a_hang() {
    let agent = Agent::start();
    let mut client = agent.client();
    // Field 99 of ToAgent, empty.
    client
        .stream
        .write_all(&[3, 0, 0, 0, 0x9a, 0x06, 0])
        .unwrap();
    protocol_error(client.try_receive());
    serves(&agent);
}
