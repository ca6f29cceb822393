//! Control requests and dialled sockets.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;

use airlock_proto::v1::control::Request;
use airlock_proto::v1::control_reply::Reply;
use airlock_proto::v1::to_agent::Body;
use airlock_proto::v1::{
    Dial, ErrorCode, ExecList, ExecResize, ExecSignal, ExecWait, Ping, Resize, Shutdown, Signal,
    SignalTarget, SpawnProbe, SystemStat, TcpTarget, Tty, dial, from_agent,
};

use crate::client::{Agent, Client, exec, is_alive, sh};

fn error_code(frame: from_agent::Body) -> ErrorCode {
    match frame {
        from_agent::Body::Error(error) => error.code(),
        other => panic!("not an error: {other:?}"),
    }
}

#[test]
fn ping_comes_back_with_the_guests_time() {
    let agent = Agent::start();
    let payload = vec![7; 64 << 10];
    let reply = agent.client().control_reply(Request::Ping(Ping {
        payload: payload.clone().into(),
    }));
    let Some(Reply::Pong(pong)) = reply.reply else {
        panic!()
    };
    assert_eq!(pong.payload, payload);
    assert!(pong.guest_unix_ns > 1_700_000_000_000_000_000);
}

#[test]
fn execs_are_listed_signalled_and_waited_for_from_another_connection() {
    let agent = Agent::start();
    let mut owner = agent.client();
    let mut request = exec(&["sleep", "60"]);
    request.id = "named".into();
    owner.send(Body::ExecStart(request));
    owner.receive();
    let mut control = agent.client();
    let Some(Reply::ExecList(list)) = control.control_reply(Request::ExecList(ExecList {})).reply
    else {
        panic!()
    };
    assert_eq!(list.execs.len(), 1);
    assert!(list.execs[0].running && list.execs[0].id == "named");
    assert_eq!(list.execs[0].argv, ["sleep", "60"]);
    let mut waiter = agent.client();
    waiter.send(Body::Control(airlock_proto::v1::Control {
        request: Some(Request::ExecWait(ExecWait { id: "named".into() })),
    }));
    let signal = Some(Signal {
        signal: 15,
        target: SignalTarget::TargetGroup.into(),
    });
    let reply = control.control_reply(Request::ExecSignal(ExecSignal {
        id: "named".into(),
        signal,
    }));
    assert!(matches!(reply.reply, Some(Reply::Done(_))));
    let from_agent::Body::Control(reply) = waiter.receive() else {
        panic!()
    };
    let Some(Reply::ExecInfo(info)) = reply.reply else {
        panic!()
    };
    assert!(!info.running && info.exit.is_some());
    assert_eq!(owner.finish().signal(), 15);
    let again = control.control(Request::ExecSignal(ExecSignal {
        id: "named".into(),
        signal,
    }));
    assert_eq!(error_code(again), ErrorCode::ErrorState);
    let wait = control.control_reply(Request::ExecWait(ExecWait { id: "named".into() }));
    assert!(
        matches!(wait.reply, Some(Reply::ExecInfo(_))),
        "a finished exec answers at once"
    );
    let nobody = control.control(Request::ExecWait(ExecWait {
        id: "nobody".into(),
    }));
    assert_eq!(error_code(nobody), ErrorCode::ErrorNotFound);
}

#[test]
fn law_9_a_resize_after_the_exit_or_without_a_terminal_is_an_error() {
    let agent = Agent::start();
    let mut client = agent.client();
    let resize = |client: &mut Client, id: &str| {
        let size = Some(Resize { rows: 1, cols: 1 });
        client.control(Request::ExecResize(ExecResize {
            id: id.into(),
            size,
        }))
    };
    let mut request = exec(&["true"]);
    request.tty = Some(Tty::default());
    let id = request.id.clone();
    client.run(request);
    assert_eq!(error_code(resize(&mut client, &id)), ErrorCode::ErrorState);
    let request = exec(&["true"]);
    let id = request.id.clone();
    client.run(request);
    assert_eq!(error_code(resize(&mut client, &id)), ErrorCode::ErrorState);
    assert_eq!(
        error_code(resize(&mut client, "before-start")),
        ErrorCode::ErrorNotFound
    );
}

#[test]
fn a_long_list_comes_in_pages() {
    let agent = Agent::start();
    let mut client = agent.client();
    let long = "x".repeat(6000);
    for _ in 0..70 {
        client.run(exec(&["true", &long]));
    }
    client.send(Body::Control(airlock_proto::v1::Control {
        request: Some(Request::ExecList(ExecList {})),
    }));
    let (mut execs, mut pages) = (0, 0);
    loop {
        let from_agent::Body::Control(reply) = client.receive() else {
            panic!()
        };
        let Some(Reply::ExecList(list)) = reply.reply else {
            panic!()
        };
        execs += list.execs.len();
        pages += 1;
        assert!(
            list.execs
                .iter()
                .all(|e| e.argv.iter().map(|a| a.len()).sum::<usize>() <= 4096)
        );
        if !reply.more {
            break;
        }
    }
    assert_eq!(
        (execs, pages),
        (64, 4),
        "finished execs are kept up to a number"
    );
}

#[test]
fn system_stat_tells_of_the_machine() {
    let agent = Agent::start();
    let reply = agent
        .client()
        .control_reply(Request::SystemStat(SystemStat {}));
    let Some(Reply::SystemStat(stat)) = reply.reply else {
        panic!()
    };
    assert!(stat.memory_total_bytes > 0 && stat.agent_rss_bytes > 0 && stat.cpus > 0);
}

#[test]
fn the_spawn_floor_is_measured() {
    let agent = Agent::start();
    let reply = agent
        .client()
        .control_reply(Request::SpawnProbe(SpawnProbe {
            count: 200,
            ..SpawnProbe::default()
        }));
    let Some(Reply::SpawnProbe(probe)) = reply.reply else {
        panic!()
    };
    assert_eq!(probe.spawn_ns.len(), 200);
    assert!(
        probe
            .spawn_ns
            .iter()
            .all(|ns| (1_000..1_000_000_000).contains(ns))
    );
    let refused = agent.client().control(Request::SpawnProbe(SpawnProbe {
        count: 0,
        ..SpawnProbe::default()
    }));
    assert_eq!(error_code(refused), ErrorCode::ErrorInvalid);
    let real = agent
        .client()
        .control_reply(Request::SpawnProbe(SpawnProbe {
            count: 3,
            program: "/bin/true".into(),
        }));
    assert!(matches!(real.reply, Some(Reply::SpawnProbe(probe)) if probe.spawn_ns.len() == 3));
    let relative = agent.client().control(Request::SpawnProbe(SpawnProbe {
        count: 3,
        program: "true".into(),
    }));
    assert_eq!(error_code(relative), ErrorCode::ErrorInvalid);
}

#[test]
fn the_clock_of_a_machine_that_is_not_the_agents_is_left_alone() {
    let agent = Agent::start();
    let mut client = agent.client();
    let request = Request::ClockSet(airlock_proto::v1::ClockSet { unix_ns: 1 });
    assert_eq!(error_code(client.control(request)), ErrorCode::ErrorState);
}

#[test]
fn a_shutdown_lets_the_workload_end_then_kills_it() {
    let mut agent = Agent::start();
    let mut polite = agent.client();
    polite.send(Body::ExecStart(sh(
        "trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.01; done",
    )));
    let mut stubborn = agent.client();
    stubborn.send(Body::ExecStart(sh(
        "trap '' TERM; echo ready; while :; do sleep 0.01; done",
    )));
    let mut reports = [
        crate::client::Report::default(),
        crate::client::Report::default(),
    ];
    while reports[0].output[0].is_empty() {
        polite.step(&mut reports[0]);
    }
    while reports[1].output[0].is_empty() {
        stubborn.step(&mut reports[1]);
    }
    let mut control = agent.client();
    let reply = control.control_reply(Request::Shutdown(Shutdown { deadline_ms: 300 }));
    assert!(matches!(reply.reply, Some(Reply::Done(_))));
    while polite.step(&mut reports[0]) {}
    assert_eq!(
        (reports[0].code(), reports[0].stdout()),
        (0, "ready\nbye\n".into())
    );
    assert!(!is_alive(reports[1].started.as_ref().unwrap().pid));
    crate::client::wait_until("the agent has ended", || agent.has_ended());
}

fn dial(agent: &Agent, target: dial::Target) -> (Client, from_agent::Body) {
    let mut client = agent.client();
    client.send(Body::Dial(Dial {
        target: Some(target),
    }));
    let answer = client.receive();
    (client, answer)
}

fn echoes_until_half_close(mut client: Client, mut server: impl Read + Write) {
    let data: Vec<u8> = (0..1_000_000_u32).map(|n| n as u8).collect();
    let mut writer = client.stream.try_clone().unwrap();
    let sent = data.clone();
    let writing = std::thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let mut got = Vec::new();
    server.read_to_end(&mut got).unwrap();
    assert!(got == data, "what was sent arrives, and so does its end");
    server.write_all(b"after the half-close").unwrap();
    drop(server);
    let mut back = Vec::new();
    client.stream.read_to_end(&mut back).unwrap();
    assert_eq!(back, b"after the half-close");
    writing.join().unwrap();
}

#[test]
fn a_dialled_tcp_port_is_raw_bytes_with_half_close() {
    let agent = Agent::start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = u32::from(listener.local_addr().unwrap().port());
    let target = dial::Target::Tcp(TcpTarget {
        host: "localhost".into(),
        port,
    });
    let (client, answer) = dial(&agent, target);
    assert!(matches!(answer, from_agent::Body::Dialled(_)), "{answer:?}");
    echoes_until_half_close(client, listener.accept().unwrap().0);
}

#[test]
fn a_dialled_unix_socket_is_raw_bytes_with_half_close() {
    let agent = Agent::start();
    let path = agent.folder().join("service");
    let listener = UnixListener::bind(&path).unwrap();
    let path = path.to_str().unwrap().to_owned();
    let (client, answer) = dial(&agent, dial::Target::UnixPath(path.into()));
    assert!(matches!(answer, from_agent::Body::Dialled(_)), "{answer:?}");
    echoes_until_half_close(client, listener.accept().unwrap().0);
}

#[test]
fn a_port_nobody_listens_on_is_an_error_and_the_connection_goes_on() {
    let agent = Agent::start();
    let target = dial::Target::Tcp(TcpTarget {
        host: "127.0.0.1".into(),
        port: 1,
    });
    let (mut client, answer) = dial(&agent, target);
    match answer {
        from_agent::Body::Error(error) => assert_eq!(error.errno, libc::ECONNREFUSED),
        other => panic!("{other:?}"),
    }
    assert_eq!(client.run(exec(&["true"])).code(), 0);
    let (_, answer) = dial(&agent, dial::Target::UnixPath("/no/such".into()));
    assert_eq!(error_code(answer), ErrorCode::ErrorIo);
}
