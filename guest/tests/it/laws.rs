//! The laws of exec (DESIGN), one by one.

use std::time::{Duration, Instant};

use airlock_proto::STDIN_WINDOW_BYTES;
use airlock_proto::v1::to_agent::Body;
use airlock_proto::v1::{Cause, ExecStart, HolderPolicy, Signal, SignalTarget, Stdin, StdinMode};

use crate::client::{Agent, Report, exec, is_alive, sh, wait_until};

fn stdin(offset: u64, data: Vec<u8>, eof: bool) -> Body {
    Body::Stdin(Stdin {
        offset,
        data: data.into(),
        eof,
    })
}

#[test]
fn law_1_a_thousand_fast_execs_lose_nothing() {
    let agent = Agent::start();
    let mut client = agent.client();
    for round in 0..1000 {
        let report = client.run(exec(&["/bin/echo", &round.to_string()]));
        assert_eq!(report.stdout(), format!("{round}\n"));
        assert_eq!(report.code(), 0);
        assert_eq!(report.late_bytes, 0, "output belongs before the exit");
    }
    wait_until("every descriptor is closed again", || {
        agent.open_descriptors() < 12
    });
}

#[test]
fn law_1_what_was_written_before_the_exit_comes_before_the_report() {
    let agent = Agent::start();
    let mut client = agent.client();
    for kib in [1, 63, 64, 65, 500] {
        // A background child holds the pipes, so their end cannot be what orders the report.
        let mut request = sh(&format!(
            "head -c {kib}k /dev/zero; head -c {kib}k /dev/zero >&2; sleep 60 & exit 3"
        ));
        request.holder_grace_ms = 1;
        let report = client.run(request);
        assert_eq!(report.code(), 3);
        assert_eq!(report.output.map(|o| o.len()), [kib << 10; 2]);
        assert_eq!(report.late_bytes, 0);
    }
}

#[test]
fn law_2_an_exit_is_a_code_or_a_signal_with_its_cause() {
    let agent = Agent::start();
    let mut client = agent.client();
    let report = client.run(sh("exit 255"));
    assert_eq!(
        (report.code(), report.exit.unwrap().cause()),
        (255, Cause::Normal)
    );
    let report = client.run(sh("kill -9 $$"));
    assert_eq!(report.signal(), 9);
    assert_eq!(
        report.exit.unwrap().cause(),
        Cause::Normal,
        "it was its own doing"
    );
    let report = client.run(sh("exit 137"));
    assert_eq!(
        report.code(),
        137,
        "a code that looks like a signal is a code"
    );
}

#[test]
fn law_2_a_clients_kill_is_called_one() {
    let agent = Agent::start();
    for (target, signal) in [
        (SignalTarget::TargetLeader, 15),
        (SignalTarget::TargetGroup, 15),
        (SignalTarget::TargetTree, 9),
        (SignalTarget::TargetLeader, 34),
    ] {
        let mut client = agent.client();
        client.send(Body::ExecStart(exec(&["sleep", "60"])));
        client.send(Body::Signal(Signal {
            signal,
            target: target.into(),
        }));
        let report = client.finish();
        assert_eq!(report.signal(), signal);
        assert_eq!(report.exit.unwrap().cause(), Cause::Killed);
    }
}

fn holder(policy: HolderPolicy, grace_ms: u64, script: &str) -> ExecStart {
    ExecStart {
        holders: policy.into(),
        holder_grace_ms: grace_ms,
        ..sh(script)
    }
}

#[test]
fn law_3_a_background_child_never_hangs_the_report() {
    let agent = Agent::start();
    let mut client = agent.client();
    let start = Instant::now();
    let report = client.run(holder(HolderPolicy::HoldersGrace, 50, "sleep 60 & echo $!"));
    assert!(start.elapsed() < Duration::from_secs(10));
    assert_eq!(report.code(), 0);
    assert!(
        report.ends.iter().all(|end| end.held_open),
        "{:?}",
        report.ends
    );
    assert!(
        report.tree.is_none(),
        "the tree is not empty, and nobody says so"
    );
    let child: u32 = report.stdout().trim().parse().unwrap();
    assert!(is_alive(child), "grace ends the streams, not the child");
    let list = client.control_reply(airlock_proto::v1::control::Request::ExecList(
        Default::default(),
    ));
    let Some(airlock_proto::v1::control_reply::Reply::ExecList(list)) = list.reply else {
        panic!()
    };
    let info = list.execs.last().unwrap();
    assert!(!info.running && !info.tree_empty);
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(child as i32).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
}

#[test]
fn law_3_a_holder_that_is_waited_for_is_heard_to_its_end() {
    let agent = Agent::start();
    let script = "(sleep 0.2; echo late) & exit 4";
    let report = agent
        .client()
        .run(holder(HolderPolicy::HoldersWait, 0, script));
    assert_eq!((report.code(), report.stdout()), (4, "late\n".into()));
    assert_eq!(report.late_bytes, 5, "the exit was reported before");
    assert!(report.ends.iter().all(|end| !end.held_open));
}

#[test]
fn law_3_a_holder_that_must_go_is_gone() {
    let agent = Agent::start();
    let script = "sleep 60 & echo $!";
    let report = agent
        .client()
        .run(holder(HolderPolicy::HoldersKill, 0, script));
    let child: u32 = report.stdout().trim().parse().unwrap();
    assert!(!is_alive(child));
    assert!(report.tree.unwrap().killed);
}

fn timeout(script: &str, timeout_ms: u64, grace_ms: u64) -> ExecStart {
    ExecStart {
        timeout_ms,
        grace_ms,
        ..sh(script)
    }
}

fn a_timeout_takes_the_whole_tree(agent: &Agent) {
    // The children ignore SIGTERM; one is in a session of its own.
    let script = "trap '' TERM; sleep 60 & setsid sleep 60 & echo $! ; wait; sleep 60";
    let start = Instant::now();
    let report = agent.client().run(timeout(script, 200, 100));
    assert!(start.elapsed() < Duration::from_secs(10));
    assert_eq!(report.signal(), 9);
    assert_eq!(report.exit.as_ref().unwrap().cause(), Cause::Timeout);
    let tree = report.tree.as_ref().expect("the tree is proven empty");
    assert!(tree.killed);
    let child: u32 = report.stdout().trim().parse().unwrap();
    assert!(!is_alive(child));
}

#[test]
fn law_4_a_timeout_takes_the_whole_tree() {
    a_timeout_takes_the_whole_tree(&Agent::start());
}

/// Says why a test did not run; where everything must run, that is a failure.
fn skipped(why: &str) {
    assert!(
        std::env::var_os("REQUIRE_KVM").is_none() && std::env::var_os("CI").is_none(),
        "skipped: {why}"
    );
    // Past the test runner, which keeps to itself what a test that passes prints.
    let _ = std::io::Write::write_all(
        &mut std::io::stderr(),
        format!("skipped: {why}\n").as_bytes(),
    );
}

#[test]
fn law_4_a_timeout_takes_the_whole_cgroup() {
    match Agent::start_with_cgroup() {
        Some(agent) => a_timeout_takes_the_whole_tree(&agent),
        None => skipped("no cgroup v2 folder can be made here"),
    }
}

#[test]
fn law_4_an_orphan_in_its_own_session_does_not_escape_its_cgroup() {
    let Some(agent) = Agent::start_with_cgroup() else {
        return skipped("no cgroup v2 folder can be made here");
    };
    let script = "setsid sh -c 'sleep 60 & echo $!' & wait; exit 0";
    let report = agent
        .client()
        .run(holder(HolderPolicy::HoldersKill, 0, script));
    let orphan: u32 = report.stdout().trim().parse().unwrap();
    assert!(report.tree.unwrap().killed);
    assert!(!is_alive(orphan));
}

#[test]
fn law_4_a_process_that_acts_on_sigterm_has_its_grace() {
    let agent = Agent::start();
    let report = agent.client().run(timeout(
        "trap 'echo bye; exit 5' TERM; while :; do sleep 0.01; done",
        150,
        10_000,
    ));
    assert_eq!((report.code(), report.stdout()), (5, "bye\n".into()));
    assert_eq!(report.exit.unwrap().cause(), Cause::Timeout);
}

#[test]
fn law_5_a_slow_reader_costs_the_agent_nothing() {
    const MIB: usize = 100;
    let agent = Agent::start();
    let before = agent.resident_bytes();
    let mut client = agent.client();
    // Bytes that differ everywhere, so that a lost or doubled piece shows.
    client.send(Body::ExecStart(sh(&format!(
        "i=0; while [ $i -lt {MIB} ]; do head -c 1048576 {0}; i=$((i+1)); done",
        pattern_file(&agent)
    ))));
    let mut report = Report::default();
    let mut most = 0;
    let mut seen = 0;
    while client.step(&mut report) {
        if report.output[0].len() / (1 << 20) > seen {
            seen += 1;
            most = most.max(agent.resident_bytes());
            // A reader that takes its time, so that everything before it fills up.
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    assert_eq!(report.output[0].len(), MIB << 20);
    let pattern = pattern();
    assert!(
        report.output[0]
            .chunks(1 << 20)
            .all(|chunk| chunk == pattern)
    );
    assert!(
        most - before < 4 << 20,
        "the agent grew by {} KiB",
        (most - before) >> 10
    );
}

fn pattern() -> Vec<u8> {
    let mut state = 1_u32;
    (0..1 << 20)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect()
}

fn pattern_file(agent: &Agent) -> String {
    let path = agent.folder().join("pattern");
    std::fs::write(&path, pattern()).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn law_6_one_stuck_reader_delays_no_other() {
    let agent = Agent::start();
    let mut stuck = agent.client();
    stuck.send(Body::ExecStart(sh("cat /dev/zero")));
    let mut client = agent.client();
    let start = Instant::now();
    for _ in 0..100 {
        assert_eq!(client.run(exec(&["/bin/echo", "x"])).stdout(), "x\n");
    }
    assert!(start.elapsed() < Duration::from_secs(10));
    assert!(agent.resident_bytes() < 32 << 20);
}

#[test]
fn law_6_a_process_that_reads_no_stdin_still_gets_signals() {
    let agent = Agent::start();
    let mut client = agent.client();
    let request = ExecStart {
        stdin: StdinMode::StdinStream.into(),
        ..exec(&["sleep", "60"])
    };
    client.send(Body::ExecStart(request));
    let mut offset = 0;
    while offset < STDIN_WINDOW_BYTES {
        client.send(stdin(offset, vec![0; 64 << 10], false));
        offset += 64 << 10;
    }
    client.send(Body::Signal(Signal {
        signal: 15,
        target: SignalTarget::TargetLeader.into(),
    }));
    assert_eq!(client.finish().signal(), 15);
}

#[test]
fn law_7_the_end_of_stdin_is_in_band() {
    let agent = Agent::start();
    let mut client = agent.client();
    let request = ExecStart {
        stdin: StdinMode::StdinStream.into(),
        ..exec(&["sh", "-c", "cat; echo end"])
    };
    client.send(Body::ExecStart(request));
    client.send(stdin(0, b"one ".to_vec(), false));
    client.send(stdin(4, b"two\n".to_vec(), true));
    client.send(stdin(8, Vec::new(), true));
    let report = client.finish();
    assert_eq!(report.stdout(), "one two\nend\n");
    // Late frames of the exec that has ended are nobody's, and the connection goes on.
    client.send(stdin(8, b"late".to_vec(), true));
    assert_eq!(client.run(exec(&["true"])).code(), 0);
}

#[test]
fn law_7_without_stdin_a_reader_sees_the_end_at_once() {
    let agent = Agent::start();
    assert_eq!(agent.client().run(exec(&["cat"])).code(), 0);
}

#[test]
fn law_7_much_stdin_arrives_whole_within_its_window() {
    const CHUNK: usize = 100_000;
    let agent = Agent::start();
    let mut client = agent.client();
    let request = ExecStart {
        stdin: StdinMode::StdinStream.into(),
        ..exec(&["sh", "-c", "sleep 0.1; cksum"])
    };
    client.send(Body::ExecStart(request));
    let data = pattern().repeat(8);
    let mut credit = STDIN_WINDOW_BYTES as usize;
    let mut sent = 0;
    while sent < data.len() {
        while credit - sent < CHUNK.min(data.len() - sent) {
            if let airlock_proto::v1::from_agent::Body::StdinCredit(c) = client.receive() {
                assert!(!c.closed);
                credit = c.up_to as usize;
            }
        }
        let piece = &data[sent..(sent + CHUNK).min(data.len())];
        let last = sent + piece.len() == data.len();
        client.send(stdin(sent as u64, piece.to_vec(), last));
        sent += piece.len();
    }
    let report = client.finish();
    let path = agent.folder().join("same");
    std::fs::write(&path, &data).unwrap();
    let expected = std::process::Command::new("sh")
        .arg("-c")
        .arg(format!("cksum < {}", path.display()))
        .output();
    assert_eq!(
        report.stdout(),
        String::from_utf8(expected.unwrap().stdout).unwrap()
    );
}

#[test]
fn law_8_a_lost_client_takes_its_exec_along() {
    let agent = Agent::start();
    let mut client = agent.client();
    client.send(Body::ExecStart(sh("sleep 60 & echo $!; wait")));
    let mut report = Report::default();
    while report.output[0].is_empty() {
        client.step(&mut report);
    }
    let child: u32 = report.stdout().trim().parse().unwrap();
    let leader = report.started.unwrap().pid;
    drop(client);
    wait_until("leader and child are gone", || {
        !is_alive(leader) && !is_alive(child)
    });
}

#[test]
fn a_process_that_closes_stdout_early_goes_on() {
    let agent = Agent::start();
    let report = agent.client().run(sh("exec >&- 2>&-; sleep 0.05; exit 6"));
    assert_eq!(report.code(), 6);
}

#[test]
fn a_stopped_exec_is_still_killed_by_its_timeout() {
    let agent = Agent::start();
    let report = agent
        .client()
        .run(timeout("kill -STOP $$; exit 1", 100, 5000));
    assert_eq!(report.signal(), 15);
}

#[test]
fn a_kill_does_not_reach_the_execs_that_come_after_it() {
    let Some(agent) = Agent::start_with_cgroup() else {
        return skipped("no cgroup v2 folder can be made here");
    };
    let mut client = agent.client();
    for _ in 0..20 {
        // Without a pause, so that a group that was killed is not tidied away before it could be used again.
        let killed = client.run(holder(HolderPolicy::HoldersKill, 0, "sleep 60 &"));
        assert!(killed.tree.unwrap().killed);
        for _ in 0..4 {
            assert_eq!(client.run(exec(&["true"])).code(), 0);
        }
    }
}

#[test]
fn a_slow_reader_is_not_mistaken_for_a_process_that_holds_the_stream() {
    let agent = Agent::start();
    let mut client = agent.client();
    // More than the connection takes at once, so that the grace passes while the reader is still asleep.
    let mut request = sh("head -c 2M /dev/zero");
    request.holder_grace_ms = 1;
    client.send(Body::ExecStart(request));
    let mut report = Report::default();
    while client.step(&mut report) {
        std::thread::sleep(Duration::from_millis(3));
    }
    assert_eq!(report.output[0].len(), 2 << 20);
    assert!(report.ends.iter().all(|end| !end.held_open));
}
