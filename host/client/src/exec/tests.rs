//! Stories of one exec, told by a fake agent over an in-memory stream.

use std::time::Duration;

use airlock_proto::v1::{self, SignalTarget, from_agent, to_agent};
use bytes::Bytes;
use tokio::time::timeout;

use super::*;
use crate::fake_agent::{self, hello_reply, pair};
use crate::report::{Cause, Status};
use crate::{Command, Session};

/// Nothing in these tests takes time; what does not come by then does not come.
const DEADLINE: Duration = Duration::from_secs(10);

#[tokio::test]
async fn output_and_exit_arrive_as_they_were_sent() {
    let (session, mut agent) = fake_agent::session().await;
    let guest = async {
        let start = agent.start(0).await;
        assert_eq!(start.argv, ["echo", "hi"]);
        assert!(airlock_proto::is_exec_id(&start.id));
        agent.output(v1::Stream::Stdout, 0, b"hi").await;
        agent.output(v1::Stream::Stderr, 0, b"oh").await;
        agent.output(v1::Stream::Stdout, 2, b"\n").await;
        agent.end(3, 3).await;
    };
    let (output, ()) = tokio::join!(
        session.output(Command::new("echo").arg("hi"), 1 << 10),
        guest
    );
    let output = output.unwrap();
    assert_eq!(
        (&output.stdout[..], &output.stderr[..]),
        (&b"hi\n"[..], &b"oh"[..])
    );
    let ExitReport::Ended { ended, stdout, .. } = output.report else {
        panic!("{:?}", output.report);
    };
    assert_eq!(
        (ended.status, ended.cause),
        (Status::Code(3), Cause::Normal)
    );
    assert_eq!(stdout.total_bytes, 3);
    assert!(!output.report.success());
}

#[tokio::test]
async fn garbage_from_the_agent_is_not_called_a_command_line_that_is_too_long() {
    let (session, mut agent) = fake_agent::session().await;
    let guest = async {
        agent.receive().await;
        agent.send_bytes(&[0xff; 64]).await;
    };
    let (started, ()) = tokio::join!(session.exec(Command::new("true")), guest);
    let error = started.unwrap_err();
    assert!(
        matches!(error, ExecError::Rpc(RpcError::Protocol(_))),
        "{error:?}"
    );
    assert!(error.to_string().contains("the agent broke the protocol"));
}

#[tokio::test]
async fn a_finished_execs_connection_carries_the_next_one() {
    let (session, mut agent) = fake_agent::session().await;
    let guest = async {
        for _ in 0..3 {
            agent.start(0).await;
            agent.end(0, 0).await;
        }
        // The spawn failure's too.
        agent.receive().await;
        agent
            .send(from_agent::Body::SpawnFailed(v1::SpawnFailed {
                stage: v1::SpawnStage::SpawnLookup.into(),
                errno: 2,
                message: "no-such: not found".to_owned(),
            }))
            .await;
        agent.start(0).await;
        agent.end(0, 0).await;
    };
    let host = async {
        for _ in 0..3 {
            assert!(
                session
                    .output(Command::new("true"), 0)
                    .await
                    .unwrap()
                    .report
                    .success()
            );
        }
        let error = session.exec(Command::new("no-such")).await.unwrap_err();
        assert!(
            matches!(&error, ExecError::Spawn(failure) if failure.errno == 2),
            "{error:?}"
        );
        assert_eq!(error.to_string(), "no-such: not found");
        assert!(
            session
                .output(Command::new("true"), 0)
                .await
                .unwrap()
                .report
                .success()
        );
    };
    tokio::join!(host, guest);
}

#[tokio::test]
async fn a_connection_that_was_signalled_on_is_not_used_again() {
    let (session, mut agent) = fake_agent::session().await;
    let guest = async {
        agent.start(0).await;
        assert!(matches!(
            agent.receive().await,
            Some(to_agent::Body::Signal(_))
        ));
        agent.end(0, 0).await;
        assert_eq!(
            agent.receive().await,
            None,
            "a late frame could have met the next exec"
        );
    };
    let host = async {
        let mut exec = session.exec(Command::new("sleep")).await.unwrap();
        exec.control()
            .signal(15, SignalTarget::TargetTree)
            .await
            .unwrap();
        assert!(exec.wait().await.success());
    };
    tokio::join!(host, guest);
}

#[tokio::test]
async fn the_hello_goes_out_with_the_first_request() {
    let (transport, mut agent) = pair();
    let connection = Connection::new(transport).unwrap();
    let start = Command::new("true").into_start();
    let guest = async {
        // Both are here before the agent has said a word.
        assert!(matches!(
            agent.receive().await,
            Some(to_agent::Body::Hello(_))
        ));
        assert!(matches!(
            agent.receive().await,
            Some(to_agent::Body::ExecStart(_))
        ));
        agent.send(from_agent::Body::Hello(hello_reply())).await;
        agent
            .send(from_agent::Body::Started(v1::Started::default()))
            .await;
        agent.end(0, 0).await;
    };
    let host = async {
        Exec::start(connection, &start, None)
            .await
            .unwrap()
            .wait()
            .await
    };
    let (report, ()) = tokio::join!(host, guest);
    assert!(report.success());
}

#[tokio::test]
async fn an_agent_of_another_version_is_refused() {
    let (transport, mut agent) = pair();
    let mut connection = Connection::new(transport).unwrap();
    let guest = async {
        agent.receive().await;
        agent
            .send(from_agent::Body::Hello(v1::HelloReply {
                protocol: 99,
                ..hello_reply()
            }))
            .await;
    };
    let (hello, ()) = tokio::join!(connection.hello(), guest);
    assert!(matches!(hello, Err(RpcError::Protocol(_))), "{hello:?}");
}

#[tokio::test]
async fn a_lost_connection_is_lost_and_never_success() {
    // Before the exit, and between the exit and the last word: output may be missing in both.
    for exited in [false, true] {
        let (session, mut agent) = fake_agent::session().await;
        let guest = async move {
            agent.start(0).await;
            if exited {
                agent.exited(0).await;
            }
        };
        let (output, ()) = tokio::join!(session.output(Command::new("true"), 0), guest);
        let report = output.unwrap().report;
        assert!(matches!(report, ExitReport::Lost(_)), "{report:?}");
        assert!(!report.success());
    }
}

#[tokio::test]
async fn an_agent_that_breaks_the_protocol_is_lost() {
    type Body = from_agent::Body;
    let output = |offset| {
        Body::Output(v1::Output {
            stream: 0,
            offset,
            data: Bytes::from_static(b"x"),
        })
    };
    for body in [
        output(7),
        output(u64::MAX),
        Body::Output(v1::Output {
            stream: 5,
            ..v1::Output::default()
        }),
        // An exit without a status must not look like code 0.
        Body::LeaderExited(v1::LeaderExited::default()),
        Body::ExecDone(v1::ExecDone {}),
        Body::Started(v1::Started::default()),
    ] {
        let (session, mut agent) = fake_agent::session().await;
        let guest = async {
            agent.start(0).await;
            agent.send(body.clone()).await;
            // The connection stays open: it is the message that ends it.
            agent
        };
        let host = async {
            session
                .exec(Command::new("true"))
                .await
                .unwrap()
                .wait()
                .await
        };
        let (report, _agent) = timeout(DEADLINE, async { tokio::join!(host, guest) })
            .await
            .unwrap();
        assert!(
            matches!(report, ExitReport::Lost(_)),
            "{body:?}: {report:?}"
        );
    }
}

#[tokio::test]
async fn output_beyond_the_limit_is_counted_and_not_kept() {
    let (session, mut agent) = fake_agent::session().await;
    let guest = async {
        agent.start(0).await;
        agent.output(v1::Stream::Stdout, 0, b"0123").await;
        agent.output(v1::Stream::Stdout, 4, b"4567").await;
        agent.end(0, 8).await;
    };
    let (output, ()) = tokio::join!(session.output(Command::new("yes"), 6), guest);
    let output = output.unwrap();
    assert_eq!(&output.stdout[..], b"012345");
    assert_eq!(output.dropped_bytes, [2, 0]);
}

#[tokio::test]
async fn stdin_goes_as_far_as_the_credit_and_no_further() {
    let (session, mut agent) = fake_agent::session().await;
    let guest = async {
        let start = agent.start(4).await;
        assert_eq!(start.stdin(), v1::StdinMode::StdinStream);
        assert_eq!(stdin_of(agent.receive().await), (0, "abcd".into(), false));
        // A signal passes stdin that waits.
        assert!(matches!(
            agent.receive().await,
            Some(to_agent::Body::Signal(_))
        ));
        agent.send(credit(6, false)).await;
        assert_eq!(stdin_of(agent.receive().await), (4, "ef".into(), false));
        agent.send(credit(100, false)).await;
        assert_eq!(stdin_of(agent.receive().await), (6, "gh".into(), false));
        assert_eq!(stdin_of(agent.receive().await), (8, "".into(), true));
        agent.end(0, 0).await;
    };
    let host = async {
        let mut exec = session.exec(Command::new("cat").stdin()).await.unwrap();
        let mut stdin = exec.take_stdin().unwrap();
        assert!(exec.take_stdin().is_none());
        let mut control = exec.control();
        let feed = async {
            let mut data = Bytes::from_static(b"abcdefgh");
            // Cancelled while it waits for credit, and repeated: nothing is lost or sent twice.
            let cancelled = async { control.signal(10, SignalTarget::TargetLeader).await };
            tokio::select! {
                biased;
                written = stdin.write(&mut data) => panic!("{written:?}"),
                sent = cancelled => sent.unwrap(),
            }
            stdin.write(&mut data).await.unwrap();
            stdin.finish().await.unwrap();
            stdin.finish().await.unwrap();
        };
        let (report, ()) = tokio::join!(exec.wait(), feed);
        assert!(report.success());
    };
    timeout(DEADLINE, async { tokio::join!(host, guest) })
        .await
        .unwrap();
}

#[tokio::test]
async fn a_process_that_reads_no_more_is_told_to_the_writer() {
    let (session, mut agent) = fake_agent::session().await;
    let guest = async {
        agent.start(0).await;
        agent.send(credit(0, true)).await;
        agent
    };
    let host = async {
        let mut exec = session.exec(Command::new("head").stdin()).await.unwrap();
        let mut stdin = exec.take_stdin().unwrap();
        let mut data = Bytes::from_static(b"x");
        tokio::select! {
            written = stdin.write(&mut data) => assert!(matches!(written, Err(SendError::Closed)), "{written:?}"),
            report = exec.wait() => panic!("{report:?}"),
        }
    };
    timeout(DEADLINE, async { tokio::join!(host, guest) })
        .await
        .unwrap();
}

#[tokio::test]
async fn dropping_an_exec_ends_its_connection_although_its_stdin_is_still_held() {
    let (session, mut agent) = fake_agent::session().await;
    let guest = async {
        agent.start(0).await;
        assert_eq!(agent.receive().await, None);
    };
    let host = async {
        let mut exec = session.exec(Command::new("cat").stdin()).await.unwrap();
        let mut stdin = exec.take_stdin().unwrap();
        drop(exec);
        let written = stdin.write(&mut Bytes::from_static(b"x")).await;
        assert!(matches!(written, Err(SendError::Ended)), "{written:?}");
        stdin
    };
    timeout(DEADLINE, async { tokio::join!(host, guest) })
        .await
        .unwrap();
}

#[tokio::test]
async fn signals_and_sizes_after_the_end_are_errors_and_reach_nobody() {
    let (session, mut agent) = fake_agent::session().await;
    let guest = async {
        agent.start(0).await;
        agent.end(0, 0).await;
        agent.start(0).await;
        agent.end(0, 0).await;
    };
    let host = async {
        let mut exec = session.exec(Command::new("true")).await.unwrap();
        let mut control = exec.control();
        assert!(exec.wait().await.success());
        assert!(matches!(
            control.resize(10, 10).await,
            Err(SendError::Ended)
        ));
        // The connection is as it was.
        assert!(
            session
                .output(Command::new("true"), 0)
                .await
                .unwrap()
                .report
                .success()
        );
    };
    timeout(DEADLINE, async { tokio::join!(host, guest) })
        .await
        .unwrap();
}

#[test]
fn a_timeout_is_rounded_up_so_that_it_never_means_none() {
    let command = Command::new("x").timeout(Duration::from_micros(1));
    assert_eq!(command.start().timeout_ms, 1);
    let command = Command::new("x").timeout(Duration::from_micros(1001));
    assert_eq!(command.start().timeout_ms, 2);
}

#[test]
fn the_last_value_of_a_variable_wins() {
    let command = Command::new("x").env("A", "1").env("B", "2").env("A", "3");
    let env: Vec<_> = command
        .start()
        .env
        .iter()
        .map(|v| (&v.name[..], &v.value[..]))
        .collect();
    assert_eq!(env, [(&b"B"[..], &b"2"[..]), (b"A", b"3")]);
}

fn credit(up_to: u64, closed: bool) -> from_agent::Body {
    from_agent::Body::StdinCredit(v1::StdinCredit { up_to, closed })
}

fn stdin_of(body: Option<to_agent::Body>) -> (u64, Bytes, bool) {
    match body {
        Some(to_agent::Body::Stdin(stdin)) => (stdin.offset, stdin.data, stdin.eof),
        other => panic!("stdin was expected, {other:?} came"),
    }
}

fn _sendable(exec: Exec, session: Session) -> impl Send {
    (exec, session)
}
