//! Execs with a terminal.

use airlock_proto::v1::to_agent::Body;
use airlock_proto::v1::{ExecStart, Resize, SpawnStage, Stdin, StdinMode, Tty};

use crate::client::{Agent, Client, Report, exec, sh};

fn tty(request: ExecStart) -> ExecStart {
    ExecStart {
        tty: Some(Tty {
            rows: 33,
            cols: 77,
            term: "vt220".into(),
        }),
        stdin: StdinMode::StdinStream.into(),
        ..request
    }
}

fn type_in(client: &mut Client, offset: u64, text: &str, eof: bool) {
    client.send(Body::Stdin(Stdin {
        offset,
        data: text.as_bytes().to_vec().into(),
        eof,
    }));
}

#[test]
fn law_9_the_first_size_is_right() {
    let agent = Agent::start();
    let report = agent.client().run(tty(sh(
        "stty size; tty; echo $TERM; test -t 0 -a -t 1 -a -t 2 && echo yes",
    )));
    let out = report.stdout();
    assert!(out.starts_with("33 77\r\n/dev/pts/"), "{out:?}");
    assert!(out.ends_with("vt220\r\nyes\r\n"), "{out:?}");
    assert_eq!(report.ends.len(), 1, "a terminal has one stream");
}

#[test]
fn law_9_a_terminals_last_output_is_not_lost() {
    let agent = Agent::start();
    let mut client = agent.client();
    for lines in [1, 100, 3000] {
        let report = client.run(tty(sh(&format!("seq 1 {lines}; exit 9"))));
        let expected: String = (1..=lines).map(|n| format!("{n}\r\n")).collect();
        assert!(
            report.stdout() == expected,
            "{lines} lines: {} bytes came",
            report.output[0].len()
        );
        assert_eq!(report.code(), 9);
        assert_eq!(report.late_bytes, 0);
        assert!(!report.ends[0].held_open);
    }
}

#[test]
fn law_9_two_hundred_fast_terminals_lose_nothing() {
    let agent = Agent::start();
    let mut client = agent.client();
    for round in 0..200 {
        let report = client.run(tty(exec(&["/bin/echo", &round.to_string()])));
        assert_eq!(report.stdout(), format!("{round}\r\n"));
        assert_eq!(report.code(), 0);
    }
}

#[test]
fn law_10_spawn_errors_come_at_once_with_a_terminal_too() {
    let agent = Agent::start();
    let mut client = agent.client();
    let failed = client.run(tty(exec(&["no-such-program"]))).failed.unwrap();
    assert_eq!(
        (failed.stage(), failed.errno),
        (SpawnStage::SpawnLookup, libc::ENOENT)
    );
    assert_eq!(client.run(tty(exec(&["true"]))).code(), 0);
}

#[test]
fn a_resize_reaches_the_foreground() {
    let agent = Agent::start();
    let mut client = agent.client();
    client.send(Body::ExecStart(tty(sh(
        "trap 'stty size; exit 0' WINCH; echo ready; while :; do sleep 0.01; done",
    ))));
    let mut report = Report::default();
    while !report.stdout().contains("ready") {
        client.step(&mut report);
    }
    client.send(Body::Resize(Resize {
        rows: 50,
        cols: 132,
    }));
    while client.step(&mut report) {}
    assert!(
        report.stdout().ends_with("50 132\r\n"),
        "{:?}",
        report.stdout()
    );
}

#[test]
fn typing_the_end_ends_a_reader() {
    let agent = Agent::start();
    for text in ["line\n", "unfinished"] {
        let mut client = agent.client();
        client.send(Body::ExecStart(tty(sh(
            "stty -echo; echo ready; cat; echo done",
        ))));
        let mut report = Report::default();
        while !report.stdout().contains("ready") {
            client.step(&mut report);
        }
        type_in(&mut client, 0, text, true);
        while client.step(&mut report) {}
        let out = report.stdout();
        assert!(
            out.contains(text.trim_end()) && out.ends_with("done\r\n"),
            "{out:?}"
        );
    }
}

#[test]
fn the_interrupt_character_interrupts_the_foreground() {
    let agent = Agent::start();
    let mut client = agent.client();
    client.send(Body::ExecStart(tty(sh("echo ready; exec sleep 60"))));
    let mut report = Report::default();
    while !report.stdout().contains("ready") {
        client.step(&mut report);
    }
    type_in(&mut client, 0, "\x03", false);
    while client.step(&mut report) {}
    assert_eq!(report.signal(), 2);
}

#[test]
fn job_control_works_in_a_shell() {
    let agent = Agent::start();
    let script = "set -m; sleep 60 & kill -STOP %1; sleep 0.05; jobs; kill -KILL %1; wait; exit 0";
    let report = agent.client().run(tty(exec(&["/bin/bash", "-c", script])));
    assert!(report.stdout().contains("Stopped"), "{:?}", report.stdout());
    assert!(!report.stdout().contains("no job control"));
}

#[test]
fn a_background_child_of_a_terminal_does_not_hang_the_report() {
    let agent = Agent::start();
    let mut request = tty(sh("trap '' HUP; sleep 60 & echo out; exit 3"));
    request.holder_grace_ms = 50;
    let report = agent.client().run(request);
    assert_eq!((report.code(), report.stdout()), (3, "out\r\n".into()));
}
