//! A fake agent with rings, over in-memory streams that break at bytes a seed chooses, in both directions.

use std::sync::{Arc, Mutex};

use airlock_proto::codec::{self, Decoder};
use airlock_proto::v1::{from_agent, to_agent};
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::*;
use crate::Transport;
use crate::fake_agent::hello_reply;
use crate::report::{Cause, Status};

/// Nothing in these tests takes long; what does not come by then does not come.
const DEADLINE: Duration = Duration::from_secs(60);
/// In flight in each direction.
const PIPE_BYTES: usize = 4096;

/// xorshift64*, so that a failure's seed tells the whole story.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % limit
    }
}

/// The byte that belongs at a place of a stream.
fn byte_at(stream: usize, offset: u64) -> u8 {
    (offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8 ^ (stream as u8)
}

/// An exec in the guest: what it will have written, what it may forget, what it has been told.
struct Guest {
    random: Random,
    ring_bytes: u64,
    totals: [u64; 2],
    acknowledged: [u64; 2],
    started: bool,
    connections: u64,
    /// Connections after these are not cut, so that every story ends.
    cuts_left: u64,
    /// It is over and forgotten.
    forgotten: bool,
}

fn session_with(guest: &Arc<Mutex<Guest>>) -> Session {
    let guest = Arc::clone(guest);
    Session::with_connector(move || {
        let (host, agent) = tokio::io::duplex(PIPE_BYTES);
        tokio::spawn(serve(Arc::clone(&guest), agent));
        let (reader, writer) = tokio::io::split(host);
        async { Ok(Transport::new(reader, writer)) }
    })
}

/// One connection, until its time comes.
async fn serve(guest: Arc<Mutex<Guest>>, stream: DuplexStream) {
    let limits = {
        let mut guest = guest.lock().unwrap();
        guest.connections += 1;
        let cut = guest.cuts_left > 0;
        guest.cuts_left = guest.cuts_left.saturating_sub(1);
        [20_000, 400].map(|most| match cut {
            true => guest.random.below(most) as usize,
            false => usize::MAX,
        })
    };
    let mut agent = Cut {
        stream,
        may_send: limits[0],
        may_receive: limits[1],
        buffer: BytesMut::new(),
        decoder: Decoder::default(),
    };
    // Broken off at any point is how most of these end.
    let _ = conversation(&guest, &mut agent).await;
}

/// The agent's end of a stream that breaks.
struct Cut {
    stream: DuplexStream,
    may_send: usize,
    may_receive: usize,
    buffer: BytesMut,
    decoder: Decoder<v1::ToAgent>,
}

impl Cut {
    async fn send(&mut self, body: from_agent::Body) -> Option<()> {
        let mut out = BytesMut::new();
        codec::encode(&v1::FromAgent { body: Some(body) }, &mut out).unwrap();
        let length = out.len().min(self.may_send);
        self.may_send -= length;
        self.stream.write_all(&out[..length]).await.ok()?;
        (length == out.len()).then_some(())
    }

    async fn receive(&mut self) -> Option<to_agent::Body> {
        loop {
            if let Some(message) = self.decoder.next(&mut self.buffer).unwrap() {
                return message.body;
            }
            let mut chunk = vec![0; self.may_receive.min(1024)];
            let length = self.stream.read(&mut chunk).await.ok()?;
            self.may_receive -= length;
            self.buffer.extend_from_slice(&chunk[..length]);
            if length == 0 {
                return None;
            }
        }
    }
}

async fn conversation(guest: &Mutex<Guest>, agent: &mut Cut) -> Option<()> {
    let Some(to_agent::Body::Hello(_)) = agent.receive().await else {
        return None;
    };
    agent.send(from_agent::Body::Hello(hello_reply())).await?;
    let (id, mut cursor) = match agent.receive().await? {
        to_agent::Body::ExecStart(start) => {
            assert!(start.hold_output);
            assert_eq!(start.on_disconnect(), v1::DisconnectPolicy::DisconnectKeep);
            guest.lock().unwrap().started = true;
            (start.id, [0, 0])
        }
        to_agent::Body::ExecAttach(attach) => {
            (attach.id, [attach.stdout_offset, attach.stderr_offset])
        }
        other => panic!("{other:?}"),
    };
    let known = {
        let guest = guest.lock().unwrap();
        guest.started && !guest.forgotten
    };
    if !known {
        let error = v1::Error {
            code: v1::ErrorCode::ErrorNotFound.into(),
            message: format!("no exec {id:?}"),
            errno: 0,
        };
        return agent.send(from_agent::Body::Error(error)).await;
    }
    {
        let guest = guest.lock().unwrap();
        let mut both = cursor.iter().zip(guest.acknowledged);
        assert!(
            both.all(|(wanted, acknowledged)| *wanted >= acknowledged),
            "it comes back before what it has acknowledged"
        );
    }
    let started = v1::Started {
        id,
        pid: 42,
        ..v1::Started::default()
    };
    agent.send(from_agent::Body::Started(started)).await?;
    loop {
        let (totals, room) = {
            let mut guest = guest.lock().unwrap();
            let most = guest.random.below(2000) + 1;
            let room = [0, 1].map(|stream| {
                let held = guest.acknowledged[stream] + guest.ring_bytes;
                held.min(guest.totals[stream])
                    .saturating_sub(cursor[stream])
                    .min(most)
            });
            (guest.totals, room)
        };
        if cursor == totals {
            break;
        }
        let mut moved = false;
        for (stream, wire) in [(0, v1::Stream::Stdout), (1, v1::Stream::Stderr)] {
            if room[stream] > 0 {
                let end = cursor[stream] + room[stream];
                let data: Bytes = (cursor[stream]..end)
                    .map(|at| byte_at(stream, at))
                    .collect();
                let output = v1::Output {
                    stream: wire.into(),
                    offset: cursor[stream],
                    data,
                };
                agent.send(from_agent::Body::Output(output)).await?;
                cursor[stream] = end;
                moved = true;
            }
        }
        if !moved {
            // The ring is full: only the client can help.
            let Some(to_agent::Body::Ack(ack)) = agent.receive().await else {
                return None;
            };
            let mut guest = guest.lock().unwrap();
            for (stream, offset) in [ack.stdout_offset, ack.stderr_offset]
                .into_iter()
                .enumerate()
            {
                assert!(
                    offset <= cursor[stream],
                    "it acknowledges what it cannot have"
                );
                guest.acknowledged[stream] = guest.acknowledged[stream].max(offset);
            }
        }
    }
    let exited = v1::LeaderExited {
        status: Some(v1::leader_exited::Status::Code(7)),
        ..v1::LeaderExited::default()
    };
    agent.send(from_agent::Body::LeaderExited(exited)).await?;
    for (stream, wire) in [(0, v1::Stream::Stdout), (1, v1::Stream::Stderr)] {
        let end = v1::StreamEnd {
            stream: wire.into(),
            total_bytes: cursor[stream],
            ..v1::StreamEnd::default()
        };
        agent.send(from_agent::Body::StreamEnd(end)).await?;
    }
    agent
        .send(from_agent::Body::TreeEmpty(v1::TreeEmpty::default()))
        .await?;
    agent
        .send(from_agent::Body::ExecDone(v1::ExecDone {}))
        .await
}

fn guest(seed: u64, cuts_left: u64) -> Arc<Mutex<Guest>> {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let totals = [random.below(100_000), random.below(30_000)];
    let ring_bytes = 1 + random.below(8000);
    Arc::new(Mutex::new(Guest {
        random,
        ring_bytes,
        totals,
        acknowledged: [0; 2],
        started: false,
        connections: 0,
        cuts_left,
        forgotten: false,
    }))
}

/// One whole story. How often the exec was found again.
async fn story(seed: u64) -> u64 {
    let guest = guest(seed, seed % 40);
    let session = session_with(&guest);
    let mut exec = loop {
        // A start that is lost twice in a row is an error, and here the caller's to repeat.
        match session.exec_resuming(Command::new("x").id("one")).await {
            Ok(exec) => break exec,
            Err(ExecError::Rpc(_)) => {}
            Err(error) => panic!("seed {seed}: {error}"),
        }
    };
    let mut seen = [0, 0];
    let mut facts = Vec::new();
    while let Some(event) = exec
        .next()
        .await
        .unwrap_or_else(|e| panic!("seed {seed}: {e}"))
    {
        match event {
            Event::Output {
                stream,
                offset,
                data,
            } => {
                let index = stream as usize;
                assert_eq!(offset, seen[index], "seed {seed}: no gap and nothing twice");
                for byte in data {
                    assert_eq!(byte, byte_at(index, seen[index]), "seed {seed}");
                    seen[index] += 1;
                }
            }
            Event::LeaderExited(_) => facts.push("exit"),
            Event::StreamEnd { stream, totals } => {
                assert_eq!(totals.cut_bytes, 0, "seed {seed}");
                facts.push(match stream {
                    Stream::Stdout => "stdout",
                    Stream::Stderr => "stderr",
                });
            }
            Event::TreeEmpty { .. } => facts.push("tree"),
            Event::Done => facts.push("done"),
        }
    }
    assert_eq!(seen, guest.lock().unwrap().totals, "seed {seed}");
    assert_eq!(
        facts,
        ["exit", "stdout", "stderr", "tree", "done"],
        "seed {seed}: each fact once"
    );
    let ExitReport::Ended { ended, .. } = exec.report() else {
        panic!("seed {seed}: {:?}", exec.report());
    };
    assert_eq!(
        (ended.status, ended.cause),
        (Status::Code(7), Cause::Normal)
    );
    exec.reconnects()
}

#[tokio::test(start_paused = true)]
async fn every_byte_and_every_fact_comes_once_however_often_the_connection_is_cut() {
    let mut reconnects = 0;
    for seed in 0..400 {
        let story = tokio::time::timeout(DEADLINE, story(seed));
        reconnects += story.await.unwrap_or_else(|_| panic!("seed {seed} hangs"));
    }
    assert!(reconnects > 2000, "only {reconnects} cuts were survived");
}

#[tokio::test(start_paused = true)]
async fn an_exec_the_guest_has_forgotten_is_lost_and_says_so() {
    let guest = guest(1, 1);
    {
        let mut guest = guest.lock().unwrap();
        // Enough for the start to succeed, whatever the seed cuts off after it.
        guest.cuts_left = 0;
        guest.ring_bytes = 10;
    }
    let session = session_with(&guest);
    let mut exec = session
        .exec_resuming(Command::new("x").id("one"))
        .await
        .unwrap();
    guest.lock().unwrap().forgotten = true;
    exec.leave("cut".to_owned());
    let lost = exec.next().await.unwrap_err();
    assert_eq!(lost.detail, "no exec \"one\"");
    assert_eq!(exec.next().await.unwrap_err(), lost);
    assert_eq!(exec.report(), ExitReport::Lost(lost));
}

#[tokio::test(start_paused = true)]
async fn patience_ends_where_nothing_answers() {
    let guest = guest(2, 0);
    let session = session_with(&guest);
    let exec = session
        .exec_resuming(Command::new("x").id("one"))
        .await
        .unwrap();
    let mut exec = exec.patience(Duration::from_secs(3));
    {
        let mut guest = guest.lock().unwrap();
        guest.cuts_left = u64::MAX;
        guest.random = Random(1);
    }
    exec.session = Session::with_connector(|| async {
        Err(crate::TransportError::Refused {
            address: "the guest".to_owned(),
        })
    });
    exec.leave("cut".to_owned());
    let started = Instant::now();
    let lost = exec.next().await.unwrap_err();
    assert!(lost.detail.contains("within 3 s"), "{}", lost.detail);
    assert!(lost.detail.contains("the guest"), "{}", lost.detail);
    assert!(started.elapsed() < Duration::from_secs(5));
}
