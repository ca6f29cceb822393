//! A dialled connection, from the client's side.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

use super::*;
use crate::Address;
use crate::fake_agent::FakeAgent;

#[tokio::test]
async fn bytes_right_behind_the_answer_and_the_end_of_either_side_arrive() {
    let path = std::env::temp_dir().join(format!("airlock-dial-{}", std::process::id()));
    let listener = UnixListener::bind(&path).unwrap();
    let session = Session::new(Address::Unix(path.clone()));
    let guest = async {
        let mut agent = FakeAgent::new(listener.accept().await.unwrap().0);
        agent.greet().await;
        let Some(to_agent::Body::Dial(v1::Dial {
            target: Some(dial::Target::Tcp(target)),
        })) = agent.receive().await
        else {
            panic!("a dial was expected")
        };
        assert_eq!((target.host.as_str(), target.port), ("localhost", 80));
        agent.send(from_agent::Body::Dialled(v1::Dialled {})).await;
        let mut stream = agent.into_stream();
        stream.write_all(b"banner").await.unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"question");
        stream.write_all(b", answer").await.unwrap();
    };
    let host = async {
        let (mut reader, mut writer) = session
            .dial(Target::Tcp {
                host: "localhost".to_owned(),
                port: 80,
            })
            .await
            .unwrap();
        writer.write_all(b"question").await.unwrap();
        writer.shutdown().await.unwrap();
        let mut got = Vec::new();
        reader.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"banner, answer");
    };
    tokio::join!(guest, host);
    std::fs::remove_file(path).unwrap();
}
