//! Sessions over real unix sockets, with fake agents behind them.

use std::path::{Path, PathBuf};

use airlock_proto::v1::{self, control, control_reply, from_agent, to_agent};
use bytes::Bytes;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

use super::*;
use crate::TransportError;
use crate::fake_agent::FakeAgent;

/// A socket of its own for each test, gone with it.
struct Socket(PathBuf);

impl Socket {
    fn new(name: &str) -> Self {
        let path =
            std::env::temp_dir().join(format!("airlock-client-{}-{name}.sock", std::process::id()));
        let _ = std::fs::remove_file(&path);
        Self(path)
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

async fn accept(listener: &UnixListener) -> FakeAgent<UnixStream> {
    FakeAgent::new(listener.accept().await.unwrap().0)
}

#[tokio::test]
async fn an_idle_connection_that_died_is_replaced_and_the_exec_keeps_its_id() {
    let socket = Socket::new("stale");
    let listener = UnixListener::bind(socket.path()).unwrap();
    let session = Session::new(Address::Unix(socket.path().into()));
    let guest = async {
        let mut first = accept(&listener).await;
        first.greet().await;
        // It takes the start to its grave.
        let Some(to_agent::Body::ExecStart(lost)) = first.receive().await else {
            panic!()
        };
        drop(first);
        let mut second = accept(&listener).await;
        second.greet().await;
        let start = second.start(0).await;
        assert_eq!(start.id, lost.id);
        second.end(0, 0).await;
    };
    let host = async {
        session.warm(1).await.unwrap();
        session.output(Command::new("true"), 0).await.unwrap()
    };
    let (output, ()) = tokio::join!(host, guest);
    assert!(output.report.success());
}

#[tokio::test]
async fn control_requests_share_one_connection_and_a_refusal_leaves_it_whole() {
    let socket = Socket::new("control");
    let listener = UnixListener::bind(socket.path()).unwrap();
    let session = Session::new(Address::Unix(socket.path().into()));
    let guest = async {
        let mut agent = accept(&listener).await;
        agent.greet().await;
        for round in 0..3 {
            let Some(to_agent::Body::Control(control)) = agent.receive().await else {
                panic!()
            };
            let Some(control::Request::Ping(ping)) = control.request else {
                panic!()
            };
            let answer = if round == 1 {
                from_agent::Body::Error(v1::Error {
                    code: v1::ErrorCode::ErrorExhausted.into(),
                    message: "no memory".to_owned(),
                    errno: 12,
                })
            } else {
                from_agent::Body::Control(v1::ControlReply {
                    reply: Some(control_reply::Reply::Pong(v1::Pong {
                        payload: ping.payload,
                        guest_unix_ns: 7,
                    })),
                    more: false,
                })
            };
            agent.send(answer).await;
        }
    };
    let host = async {
        let payload = Bytes::from_static(b"ping");
        assert_eq!(session.ping(payload.clone()).await.unwrap(), 7);
        let refused = session.ping(payload.clone()).await.unwrap_err();
        assert_eq!(refused.to_string(), "no memory");
        assert_eq!(session.ping(payload).await.unwrap(), 7);
    };
    tokio::join!(host, guest);
}

#[tokio::test]
async fn a_vmms_socket_is_asked_for_the_port_first() {
    let socket = Socket::new("hybrid");
    let listener = UnixListener::bind(socket.path()).unwrap();
    let address = Address::hybrid(socket.path());
    let guest = async {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        stream.read_line(&mut line).await.unwrap();
        assert_eq!(line, "CONNECT 1024\n");
        // In two pieces, as a stream may come.
        stream.write_all(b"OK 10737").await.unwrap();
        tokio::task::yield_now().await;
        stream.write_all(b"41824\n").await.unwrap();
        let mut agent = FakeAgent::new(stream);
        agent.greet().await;
    };
    let host = async {
        let mut connection = Connection::connect(&address).await.unwrap();
        assert_eq!(connection.hello().await.unwrap().boot_id, "boot");
    };
    tokio::join!(host, guest);
}

#[tokio::test]
async fn a_vmm_that_hangs_up_and_a_stranger_on_the_socket_are_told_apart() {
    let socket = Socket::new("refused");
    let listener = UnixListener::bind(socket.path()).unwrap();
    let address = Address::hybrid(socket.path());
    let endless = "x".repeat(100);
    for (answer, refused) in [
        ("", true),
        ("HTTP/1.1 400 Bad Request\r\n", false),
        (endless.as_str(), false),
    ] {
        let guest = async {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = BufReader::new(stream);
            stream.read_line(&mut String::new()).await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
        };
        let (connected, ()) = tokio::join!(Transport::connect(&address), guest);
        match connected.unwrap_err() {
            TransportError::Refused { .. } => assert!(refused, "{answer}"),
            TransportError::NotHybrid { .. } => assert!(!refused, "{answer}"),
            other => panic!("{other}"),
        }
    }
}
