//! What the client makes of an agent's answers about files. The real agent's are tested in its own crate.

use airlock_proto::v1::{Empty, ErrorCode, FileData, FileReply, FileWrite};

use super::*;
use crate::fake_agent::{FakeAgent, session};

async fn request(agent: &mut FakeAgent) -> Op {
    match agent.receive().await {
        Some(to_agent::Body::File(request)) => request.op.unwrap(),
        other => panic!("not a file request: {other:?}"),
    }
}

async fn reply(agent: &mut FakeAgent, reply: file_reply::Reply, last: bool) {
    let reply = Some(reply);
    agent
        .send(from_agent::Body::File(FileReply { reply, last }))
        .await;
}

fn data(offset: u64, data: &'static [u8], eof: bool) -> file_reply::Reply {
    file_reply::Reply::Data(FileData {
        offset,
        eof,
        data: data.into(),
    })
}

async fn refuse(agent: &mut FakeAgent, code: ErrorCode) {
    agent
        .send(from_agent::Body::Error(v1::Error {
            code: code.into(),
            message: "f: it went wrong".to_owned(),
            errno: 1,
        }))
        .await;
}

#[tokio::test]
async fn a_file_comes_in_pieces_and_its_connection_goes_back() {
    let (session, mut agent) = session().await;
    let files = session.files("/srv");
    for _ in 0..2 {
        let guest = async {
            let Op::Read(read) = request(&mut agent).await else {
                panic!()
            };
            assert_eq!(
                (&read.path[..], read.offset, read.length),
                (&b"f"[..], 3, 5)
            );
            reply(&mut agent, data(3, b"abc", false), false).await;
            reply(&mut agent, data(6, b"de", true), true).await;
        };
        let host = async {
            let mut reader = files.read_range("f", 3, Some(5)).await.unwrap();
            assert_eq!(reader.next().await.unwrap().unwrap(), "abc");
            assert_eq!(reader.next().await.unwrap().unwrap(), "de");
            assert_eq!(reader.next().await.unwrap(), None);
        };
        tokio::join!(guest, host);
    }
}

#[tokio::test]
async fn a_guest_that_gives_too_much_or_from_elsewhere_is_not_believed() {
    let (session, mut agent) = session().await;
    let guest = async {
        request(&mut agent).await;
        reply(&mut agent, data(0, b"abcdef", false), false).await;
        reply(&mut agent, data(6, b"more", false), false).await;
    };
    let host = async {
        let mut reader = session.files("").read_range("f", 0, Some(4)).await.unwrap();
        assert_eq!(reader.next().await.unwrap().unwrap(), "abcd");
        assert_eq!(reader.next().await.unwrap(), None);
        assert_eq!(reader.next().await.unwrap(), None);
    };
    tokio::join!(guest, host);

    let (session, mut agent) = crate::fake_agent::session().await;
    let guest = async {
        request(&mut agent).await;
        reply(&mut agent, data(9, b"abc", false), false).await;
    };
    let host = async {
        let mut reader = session.files("").read("f").await.unwrap();
        assert!(matches!(reader.next().await, Err(FileError::Rpc(_))));
    };
    tokio::join!(guest, host);
}

#[tokio::test]
async fn a_write_that_fails_early_says_so_and_is_over() {
    let (session, mut agent) = session().await;
    let files = session.files("/");
    let guest = async {
        assert!(matches!(
            request(&mut agent).await,
            Op::Write(FileWrite { atomic: true, .. })
        ));
        refuse(&mut agent, ErrorCode::ErrorNoSpace).await;
    };
    let host = async {
        let mut writer = files.write("f", Write::atomic()).await.unwrap();
        let error = loop {
            if let Err(error) = writer.write(vec![0; 1000]).await {
                break error;
            }
            tokio::task::yield_now().await;
        };
        assert_eq!(error.code(), Some(ErrorCode::ErrorNoSpace));
        assert!(writer.finish().await.is_err());
    };
    tokio::join!(guest, host);
}

#[tokio::test]
async fn a_refusal_is_an_error_with_its_code_and_the_connection_goes_on() {
    let (session, mut agent) = session().await;
    let files = session.files("/");
    let guest = async {
        request(&mut agent).await;
        refuse(&mut agent, ErrorCode::ErrorNotFound).await;
        request(&mut agent).await;
        reply(&mut agent, file_reply::Reply::Done(Empty {}), true).await;
    };
    let host = async {
        let error = files.stat("f", true).await.unwrap_err();
        assert!(error.is_not_found());
        assert_eq!(error.to_string(), "f: it went wrong");
        files.rename("a", "b").await.unwrap();
    };
    tokio::join!(guest, host);
}
