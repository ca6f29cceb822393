//! What users of comparable systems complain of, each with a test. Those that a law or another part already covers:
//!
//! - a command that ends at once loses its output or its exit: `law_1_a_thousand_fast_execs_lose_nothing`
//! - much output to a slow reader is dropped or eats memory: `law_5_a_slow_reader_costs_the_agent_nothing`
//! - a missing program hangs: `law_10_spawn_errors_name_stage_and_errno`, and the one with a terminal
//! - the end of input takes the output with it: `law_7_the_end_of_stdin_is_in_band`
//! - a background child hangs the report: `law_3_a_background_child_never_hangs_the_report`
//! - the first size of a terminal is wrong: `law_9_the_first_size_is_right`
//! - a resize at the wrong moment hangs: `law_9_a_resize_after_the_exit_or_without_a_terminal_is_an_error`
//! - coming back loses or repeats output: `a_client_that_comes_back_gets_exactly_the_rest`
//! - a time-out leaves half the processes: `law_4_a_timeout_takes_the_whole_tree`

use std::fs;
use std::time::{Duration, Instant};

use airlock_proto::v1::control::Request;
use airlock_proto::v1::control_reply::Reply;
use airlock_proto::v1::to_agent::Body;
use airlock_proto::v1::{
    DisconnectPolicy, ErrorCode, ExecAttach, ExecStart, ExecWait, SpawnStage, StdinMode, Tty,
    leader_exited,
};

use crate::client::{Agent, Report, exec, is_alive, sh, wait_until};

/// What "at once" may take on a loaded machine; what these tests are about took for ever.
const AT_ONCE: Duration = Duration::from_secs(10);

#[test]
fn an_input_that_is_never_closed_does_not_keep_a_finished_command() {
    let agent = Agent::start();
    let mut client = agent.client();
    let start = Instant::now();
    let report = client.run(ExecStart {
        stdin: StdinMode::StdinStream.into(),
        ..sh("echo out; exit 4")
    });
    assert_eq!((report.code(), report.stdout()), (4, "out\n".into()));
    assert!(report.ends.iter().all(|end| !end.held_open));
    assert!(start.elapsed() < AT_ONCE);
}

#[test]
fn output_goes_on_long_after_the_input_has_ended() {
    const BYTES: usize = 4 << 20;
    let agent = Agent::start();
    let mut client = agent.client();
    client.send(Body::ExecStart(ExecStart {
        stdin: StdinMode::StdinStream.into(),
        ..sh("cat >&2; head -c 4M /dev/zero")
    }));
    client.send(Body::Stdin(airlock_proto::v1::Stdin {
        offset: 0,
        data: "all".into(),
        eof: true,
    }));
    let report = client.finish();
    assert_eq!((report.stderr(), report.code()), ("all".into(), 0));
    assert_eq!(report.output[0].len(), BYTES);
}

/// Children of the agent that nobody has reaped.
fn zombies_of(agent: &Agent) -> usize {
    let zombie = |pid: &str| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with('Z'))
    };
    let pid = agent.pid();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    children
        .unwrap()
        .split_whitespace()
        .filter(|pid| zombie(pid))
        .count()
}

#[test]
fn a_client_that_vanishes_leaves_neither_process_nor_zombie() {
    let agent = Agent::start();
    let mut pids = Vec::new();
    for _ in 0..20 {
        let mut client = agent.client();
        client.send(Body::ExecStart(sh("sleep 60 & echo $!; wait")));
        let mut report = Report::default();
        while report.output[0].is_empty() {
            client.step(&mut report);
        }
        pids.push(report.started.unwrap().pid);
        pids.push(
            String::from_utf8_lossy(&report.output[0])
                .trim()
                .parse()
                .unwrap(),
        );
    }
    wait_until("all are gone", || {
        !pids.iter().any(|pid| is_alive(*pid)) && zombies_of(&agent) == 0
    });
}

#[test]
fn a_client_that_vanishes_may_leave_its_command_running() {
    let agent = Agent::start();
    let mut client = agent.client();
    let mut request = sh("read line; exit 8");
    request.stdin = StdinMode::StdinStream.into();
    request.on_disconnect = DisconnectPolicy::DisconnectKeep.into();
    let id = request.id.clone();
    client.send(Body::ExecStart(request));
    let airlock_proto::v1::from_agent::Body::Started(started) = client.receive() else {
        panic!("it did not start");
    };
    drop(client);
    let mut client = agent.client();
    assert_eq!(client.run(exec(&["true"])).code(), 0);
    assert!(is_alive(started.pid));
    client.send(Body::ExecAttach(ExecAttach {
        id,
        ..ExecAttach::default()
    }));
    client.send(Body::Stdin(airlock_proto::v1::Stdin {
        eof: true,
        ..Default::default()
    }));
    assert_eq!(client.finish().code(), 8);
}

#[test]
fn bytes_that_are_no_text_pass_a_terminal_as_they_are() {
    let agent = Agent::start();
    let mut request = exec(&["/usr/bin/printf", r"\377\303|\303\244|\000\200"]);
    request.tty = Some(Tty::default());
    let report = agent.client().run(request);
    assert_eq!(report.output[0], b"\xff\xc3|\xc3\xa4|\x00\x80");
}

#[test]
fn when_the_streams_have_ended_the_exit_is_known_to_everybody() {
    let agent = Agent::start();
    let mut client = agent.client();
    let mut other = agent.client();
    for code in 0..100 {
        let request = sh(&format!("echo out; exit {code}"));
        let id = request.id.clone();
        let report = client.run(request);
        assert_eq!(report.code(), code);
        let reply = other.control_reply(Request::ExecWait(ExecWait { id }));
        let Some(Reply::ExecInfo(info)) = reply.reply else {
            panic!("{reply:?}")
        };
        assert!(!info.running);
        let status = info.exit.unwrap().status;
        assert_eq!(status, Some(leader_exited::Status::Code(code)));
    }
}

#[test]
fn a_malformed_start_is_refused_at_once_and_the_connection_goes_on() {
    let agent = Agent::start();
    let mut client = agent.client();
    let no_command = exec(&[]);
    let nul = exec(&["true", "a\0b"]);
    let mut bad_name = exec(&["true"]);
    bad_name.env = vec![crate::client::variable("A=B", "")];
    let mut bad_id = exec(&["true"]);
    bad_id.id = "../../etc".into();
    let start = Instant::now();
    for request in [no_command, nul, bad_name, bad_id] {
        let failed = client.run(request).failed.expect("a refusal");
        assert_eq!(failed.stage(), SpawnStage::SpawnRequest, "{failed:?}");
        assert_eq!(client.run(exec(&["true"])).code(), 0);
    }
    assert!(start.elapsed() < AT_ONCE);
}

#[test]
fn a_time_out_of_a_terminal_takes_the_whole_tree_too() {
    let agent = Agent::start();
    let mut request = sh("trap '' TERM HUP; sleep 60 & echo $!; wait; sleep 60");
    request.tty = Some(Tty::default());
    request.timeout_ms = 200;
    request.grace_ms = 100;
    let start = Instant::now();
    let report = agent.client().run(request);
    assert_eq!(report.signal(), 9);
    assert_eq!(
        report.exit.as_ref().unwrap().cause(),
        airlock_proto::v1::Cause::Timeout
    );
    let child: u32 = report.stdout().trim().parse().unwrap();
    assert!(!is_alive(child));
    assert!(start.elapsed() < AT_ONCE);
}

#[test]
fn an_attach_from_an_impossible_offset_does_not_silence_who_was_there() {
    let agent = Agent::start();
    let mut owner = agent.client();
    let mut request = sh("read line; echo got $line");
    request.stdin = StdinMode::StdinStream.into();
    request.replay_bytes = 4096;
    let id = request.id.clone();
    owner.send(Body::ExecStart(request));
    owner.receive();
    let mut other = agent.client();
    other.send(Body::ExecAttach(ExecAttach {
        id,
        stdout_offset: 1000,
        ..ExecAttach::default()
    }));
    let error = other.finish().error.expect("a refusal");
    assert_eq!(error.code(), ErrorCode::ErrorInvalid);
    owner.send(Body::Stdin(airlock_proto::v1::Stdin {
        offset: 0,
        data: "word\n".into(),
        eof: true,
    }));
    assert_eq!(owner.finish().stdout(), "got word\n");
}
