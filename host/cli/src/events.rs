//! `--json`: what happens to a command, one JSON object a line on stdout, and the same facts for `--report`.
//!
//! Output is base64: it is bytes, and a piece may end within a character.

use std::time::Duration;

use airlock_sandbox::client::{
    Cause, Ended, Event, Lost, SpawnFailure, Status, Stream, StreamTotals,
};
use serde_json::{Value, json};

use crate::exit;

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

pub(crate) fn started(id: &str, pid: u32) -> Value {
    json!({"event": "started", "id": id, "pid": pid})
}

/// `None` for what is no news.
pub(crate) fn event(event: &Event) -> Option<Value> {
    Some(match event {
        Event::Output {
            stream,
            offset,
            data,
        } => json!({
            "event": "output", "stream": stream_name(*stream), "offset": offset, "base64": base64(data),
        }),
        Event::LeaderExited(ended) => {
            let mut value = ended_json(ended);
            value["event"] = json!("exited");
            value["status"] = json!(exit::of_ended(ended));
            value
        }
        Event::StreamEnd { stream, totals } => {
            let mut value = totals_json(totals);
            value["event"] = json!("stream_end");
            value["stream"] = json!(stream_name(*stream));
            value
        }
        Event::TreeEmpty { killed } => json!({"event": "tree_empty", "killed": killed}),
        Event::Done => return None,
    })
}

pub(crate) fn lost(lost: &Lost) -> Value {
    json!({"event": "lost", "detail": lost.detail})
}

pub(crate) fn not_started(failure: &SpawnFailure) -> Value {
    let mut value = failure_json(failure);
    value["event"] = json!("not_started");
    value["status"] = json!(exit::of_spawn_failure(failure));
    value
}

pub(crate) fn failure_json(failure: &SpawnFailure) -> Value {
    json!({
        "stage": failure.stage.as_str_name(), "errno": failure.errno, "message": failure.message,
    })
}

pub(crate) fn ended_json(ended: &Ended) -> Value {
    let (code, signal, core) = match ended.status {
        Status::Code(code) => (Some(code), None, false),
        Status::Signal { number, core } => (None, Some(number), core),
    };
    json!({
        "cause": cause(ended.cause), "code": code, "signal": signal, "core": core,
        "wall_us": micros(ended.usage.wall), "user_us": micros(ended.usage.user),
        "system_us": micros(ended.usage.system), "max_rss_kib": ended.usage.max_rss_kib,
        "peak_memory_bytes": ended.usage.peak_memory_bytes,
    })
}

pub(crate) fn totals_json(totals: &StreamTotals) -> Value {
    json!({"bytes": totals.total_bytes, "cut_bytes": totals.cut_bytes, "held_open": totals.held_open})
}

pub(crate) fn cause(cause: Cause) -> &'static str {
    match cause {
        Cause::Normal => "normal",
        Cause::Timeout => "timeout",
        Cause::Oom => "oom",
        Cause::Killed => "killed",
    }
}

fn stream_name(stream: Stream) -> &'static str {
    match stream {
        Stream::Stdout => "stdout",
        Stream::Stderr => "stderr",
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let byte = |index: usize| u32::from(group.get(index).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for place in 0..4 {
            if place <= group.len() {
                let index = bits >> (18 - 6 * place) & 0x3f;
                text.push(ALPHABET[index as usize].into());
            } else {
                text.push('=');
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_as_the_rfc_has_it() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!(base64(&[0xff, 0xfe, 0xfd]), "//79");
    }
}
