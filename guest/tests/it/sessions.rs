//! Execs that outlive their connection.

use airlock_proto::v1::to_agent::Body;
use airlock_proto::v1::{
    Ack, Detach, DisconnectPolicy, ErrorCode, ExecAttach, ExecStart, Stdin, StdinMode, Stream,
    from_agent,
};

use crate::client::{Agent, Report, exec, is_alive, sh, wait_until};

fn kept(request: ExecStart) -> ExecStart {
    ExecStart {
        on_disconnect: DisconnectPolicy::DisconnectKeep.into(),
        replay_bytes: 1 << 20,
        ..request
    }
}

fn attach(id: &str, stdout_offset: u64) -> Body {
    Body::ExecAttach(ExecAttach {
        id: id.into(),
        stdout_offset,
        ..ExecAttach::default()
    })
}

#[test]
fn a_detached_start_leaves_the_connection_idle_and_the_output_kept() {
    let agent = Agent::start();
    let mut client = agent.client();
    let mut request = kept(sh("echo kept; echo too >&2; exit 3"));
    request.detach = true;
    let id = request.id.clone();
    client.send(Body::ExecStart(request));
    assert!(matches!(client.receive(), from_agent::Body::Started(_)));
    assert_eq!(
        client.run(exec(&["true"])).code(),
        0,
        "the connection is idle"
    );
    client.send(attach(&id, 0));
    let report = client.finish();
    assert_eq!(
        (report.stdout(), report.stderr(), report.code()),
        ("kept\n".into(), "too\n".into(), 3)
    );
}

#[test]
fn a_client_that_comes_back_gets_exactly_the_rest() {
    let agent = Agent::start();
    // More than the ring: acknowledgements, not luck, keep the bytes.
    let request = kept(sh("seq 1 400000"));
    let id = request.id.clone();
    let expected: String = (1..=400_000).map(|n| format!("{n}\n")).collect();
    let mut got = Vec::new();
    let mut client = agent.client();
    client.send(Body::ExecStart(request));
    client.send(Body::Ack(Ack::default()));
    let mut cuts = 0;
    let exit = 'all: loop {
        let until = got.len() + 300_000;
        loop {
            match client.receive() {
                from_agent::Body::Output(output) => {
                    assert_eq!(output.offset, got.len() as u64);
                    got.extend_from_slice(&output.data);
                    client.send(Body::Ack(Ack {
                        stdout_offset: got.len() as u64,
                        stderr_offset: 0,
                    }));
                    if got.len() > until {
                        break;
                    }
                }
                from_agent::Body::LeaderExited(exit) => break 'all exit,
                _ => {}
            }
        }
        // Gone without a word; back on a new connection.
        drop(client);
        cuts += 1;
        client = agent.client();
        client.send(attach(&id, got.len() as u64));
    };
    assert!(cuts > 3);
    assert!(
        got == expected.as_bytes(),
        "{} of {} bytes",
        got.len(),
        expected.len()
    );
    assert_eq!(exit.cause(), airlock_proto::v1::Cause::Normal);
}

#[test]
fn a_second_start_with_the_same_id_attaches() {
    let agent = Agent::start();
    let request = kept(sh("echo $$; sleep 0.2"));
    let mut first = agent.client();
    first.send(Body::ExecStart(request.clone()));
    let mut report = Report::default();
    while report.output[0].is_empty() {
        first.step(&mut report);
    }
    let mut second = agent.client();
    let again = second.run(request);
    assert_eq!(again.output, report.output);
    assert_eq!(
        again.started.unwrap().pid,
        report.started.as_ref().unwrap().pid
    );
    // The first was told that another has taken over.
    while first.step(&mut report) {}
    assert_eq!(report.error.unwrap().code(), ErrorCode::ErrorState);
}

#[test]
fn a_detached_connection_goes_on_and_the_exec_too() {
    let agent = Agent::start();
    let mut client = agent.client();
    let mut request = kept(sh("read line; echo got $line"));
    request.stdin = StdinMode::StdinStream.into();
    // Detaching is stronger than the policy.
    request.on_disconnect = DisconnectPolicy::DisconnectKill.into();
    let id = request.id.clone();
    client.send(Body::ExecStart(request));
    client.send(Body::Detach(Detach {}));
    let report = client.finish();
    assert!(report.exit.is_none());
    let pid = report.started.unwrap().pid;
    drop(client);
    let mut client = agent.client();
    assert!(is_alive(pid));
    client.send(attach(&id, 0));
    client.send(Body::Stdin(Stdin {
        offset: 0,
        data: "word\n".into(),
        eof: true,
    }));
    assert_eq!(client.finish().stdout(), "got word\n");
}

#[test]
fn without_a_ring_nobody_attached_means_bytes_are_counted_as_cut() {
    let agent = Agent::start();
    let mut client = agent.client();
    let mut request = sh("head -c 100000 /dev/zero; read line; echo end");
    request.stdin = StdinMode::StdinStream.into();
    request.detach = true;
    let id = request.id.clone();
    client.send(Body::ExecStart(request));
    client.receive();
    wait_until("it has written", || {
        let list = airlock_proto::v1::control::Request::ExecList(Default::default());
        let Some(airlock_proto::v1::control_reply::Reply::ExecList(list)) =
            client.control_reply(list).reply
        else {
            panic!()
        };
        list.execs[0].stdout_bytes == 100_000
    });
    client.send(attach(&id, 0));
    client.send(Body::Stdin(Stdin {
        offset: 0,
        data: "\n".into(),
        eof: true,
    }));
    let report = client.finish();
    assert_eq!(report.stdout(), "end\n");
    // The streams end in whichever order.
    let stdout = report
        .ends
        .iter()
        .find(|end| end.stream() == Stream::Stdout);
    let stdout = stdout.unwrap();
    assert_eq!((stdout.total_bytes, stdout.cut_bytes), (100_004, 100_000));
}

#[test]
fn an_observer_watches_and_touches_nothing() {
    let agent = Agent::start();
    let mut owner = agent.client();
    let mut request = kept(sh("read line; echo $line"));
    request.stdin = StdinMode::StdinStream.into();
    let id = request.id.clone();
    owner.send(Body::ExecStart(request));
    owner.receive();
    let mut observer = agent.client();
    observer.send(Body::ExecAttach(ExecAttach {
        id,
        observe: true,
        ..ExecAttach::default()
    }));
    owner.send(Body::Stdin(Stdin {
        offset: 0,
        data: "seen\n".into(),
        eof: true,
    }));
    assert_eq!(owner.finish().stdout(), "seen\n");
    assert_eq!(observer.finish().stdout(), "seen\n");
}

#[test]
fn attaching_to_nothing_is_an_error() {
    let agent = Agent::start();
    let mut client = agent.client();
    client.send(attach("nobody", 0));
    assert_eq!(
        client.finish().error.unwrap().code(),
        ErrorCode::ErrorNotFound
    );
}

#[test]
fn a_held_ring_holds_the_exec_up_until_its_client_leaves_on_purpose() {
    let agent = Agent::start();
    let mut request = kept(sh("head -c 3000000 /dev/zero"));
    request.hold_output = true;
    let id = request.id.clone();
    let mut client = agent.client();
    client.send(Body::ExecStart(request));
    client.receive();
    // Lost without a single acknowledgement: the ring fills, and every byte is still there.
    drop(client);
    let mut client = agent.client();
    wait_until("the ring is full, and no more than full", || {
        let list = airlock_proto::v1::control::Request::ExecList(Default::default());
        let Some(airlock_proto::v1::control_reply::Reply::ExecList(list)) =
            client.control_reply(list).reply
        else {
            panic!("a list was expected");
        };
        assert!(list.execs[0].stdout_bytes <= 1 << 20);
        list.execs[0].stdout_bytes == 1 << 20
    });
    client.send(attach(&id, 0));
    client.receive();
    let from_agent::Body::Output(output) = client.receive() else {
        panic!("output was expected");
    };
    assert_eq!(output.offset, 0);
    client.send(Body::Detach(Detach {}));
    while !matches!(client.receive(), from_agent::Body::ExecDone(_)) {}
    let wait = airlock_proto::v1::control::Request::ExecWait(airlock_proto::v1::ExecWait { id });
    assert!(matches!(
        agent.client().control_reply(wait).reply,
        Some(airlock_proto::v1::control_reply::Reply::ExecInfo(info)) if !info.running
    ));
}

#[test]
fn a_detached_start_that_is_tried_again_attaches_to_nothing() {
    let agent = Agent::start();
    let mut request = kept(sh("echo once; sleep 0.2"));
    request.detach = true;
    let id = request.id.clone();
    let mut client = agent.client();
    let mut pids = Vec::new();
    for _ in 0..2 {
        client.send(Body::ExecStart(request.clone()));
        let from_agent::Body::Started(started) = client.receive() else {
            panic!("Started was expected");
        };
        pids.push(started.pid);
    }
    assert_eq!(pids[0], pids[1]);
    assert_eq!(
        client.run(exec(&["true"])).code(),
        0,
        "the connection is idle"
    );
    client.send(attach(&id, 0));
    assert_eq!(client.finish().stdout(), "once\n");
}

#[test]
fn finished_execs_give_up_their_rings_for_new_ones() {
    let agent = Agent::start();
    let mut client = agent.client();
    // Each takes half of what all rings may take.
    for _ in 0..6 {
        let mut request = sh("echo out");
        request.replay_bytes = 16 << 20;
        assert_eq!(client.run(request).stdout(), "out\n");
    }
}

#[test]
fn a_client_that_attaches_hears_how_much_input_there_was() {
    let agent = Agent::start();
    let mut request = kept(sh("cat"));
    request.stdin = StdinMode::StdinStream.into();
    let id = request.id.clone();
    let mut client = agent.client();
    client.send(Body::ExecStart(request));
    let stdin = |offset, data: &'static str, eof| {
        Body::Stdin(Stdin {
            offset,
            data: data.into(),
            eof,
        })
    };
    client.send(stdin(0, "before ", false));
    let mut report = Report::default();
    while report.output[0].is_empty() {
        client.step(&mut report);
    }
    drop(client);
    let mut client = agent.client();
    client.send(attach(&id, 0));
    let from_agent::Body::Started(started) = client.receive() else {
        panic!("Started was expected");
    };
    assert_eq!(started.stdin_offset, 7);
    client.send(stdin(started.stdin_offset, "after", true));
    assert_eq!(client.finish().stdout(), "before after");
}
