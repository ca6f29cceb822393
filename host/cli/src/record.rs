//! `--record`: what a command writes, with its times, as asciicast v2
//! (docs.asciinema.org/manual/asciicast/v2): a header, then one JSON array a line.

use std::env;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use airlock_sandbox::client::Stream;
use anyhow::Context;
use serde_json::json;

use crate::output::tell;
use crate::terminal;

/// Longest UTF-8 sequence.
const MAX_CHAR_BYTES: usize = 4;

/// A recording that is being written.
#[derive(Debug)]
pub(crate) struct Recording {
    /// None after it failed: that was said, and the command goes on.
    file: Option<BufWriter<File>>,
    path: PathBuf,
    start: Instant,
    tty: bool,
    /// Per stream: the beginning of a character whose end has not come yet.
    partial: [Vec<u8>; 2],
}

impl Recording {
    pub(crate) fn create(path: &Path, tty: bool) -> anyhow::Result<Self> {
        let start_unix = SystemTime::now().duration_since(UNIX_EPOCH);
        let (rows, cols) = terminal::size();
        let header = json!({
            "version": 2, "width": cols, "height": rows,
            "timestamp": start_unix.map_or(0, |time| time.as_secs()),
            "env": {"TERM": env::var("TERM").unwrap_or_default()},
        });
        let failed = || format!("cannot write the recording {}", path.display());
        let mut file = BufWriter::new(File::create(path).with_context(failed)?);
        writeln!(file, "{header}").with_context(failed)?;
        Ok(Self {
            file: Some(file),
            path: path.to_owned(),
            start: Instant::now(),
            tty,
            partial: [Vec::new(), Vec::new()],
        })
    }

    pub(crate) fn output(&mut self, stream: Stream, data: &[u8]) {
        let partial = &mut self.partial[stream as usize];
        partial.extend_from_slice(data);
        let whole = whole_chars(partial);
        let text = String::from_utf8_lossy(&partial[..whole]).into_owned();
        partial.drain(..whole);
        self.text(&text);
    }

    pub(crate) fn resized(&mut self, rows: u16, cols: u16) {
        self.event("r", &format!("{cols}x{rows}"));
    }

    /// The last of it reaches the file.
    pub(crate) fn finish(&mut self) {
        for partial in std::mem::take(&mut self.partial) {
            self.text(&String::from_utf8_lossy(&partial));
        }
        let flushed = self.file.as_mut().map_or(Ok(()), BufWriter::flush);
        self.note(flushed);
    }

    fn text(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        if self.tty {
            self.event("o", text);
        } else {
            // Nobody turned the ends of lines into what a terminal needs.
            self.event("o", &text.replace('\n', "\r\n"));
        }
    }

    fn event(&mut self, kind: &str, data: &str) {
        let seconds = self.start.elapsed().as_micros() as f64 / 1e6;
        let event = json!([seconds, kind, data]);
        let written = match &mut self.file {
            Some(file) => writeln!(file, "{event}"),
            None => Ok(()),
        };
        self.note(written);
    }

    fn note(&mut self, written: io::Result<()>) {
        if let Err(error) = written {
            let path = self.path.display();
            tell!("airlock: the recording {path} ends here: {error}");
            self.file = None;
        }
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.finish();
    }
}

/// How many bytes end with a whole character, or with what can never become one.
fn whole_chars(bytes: &[u8]) -> usize {
    let tail = bytes.len().saturating_sub(MAX_CHAR_BYTES - 1);
    for at in (tail..bytes.len()).rev() {
        let wanted = match bytes[at] {
            0x80..=0xbf => continue,
            0xc2..=0xdf => 2,
            0xe0..=0xef => 3,
            0xf0..=0xf4 => 4,
            _ => 1,
        };
        return if bytes.len() - at < wanted {
            at
        } else {
            bytes.len()
        };
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn recorded(tty: bool, act: impl FnOnce(&mut Recording)) -> Vec<Value> {
        let name = format!("airlock-record-{}-{tty}.cast", std::process::id());
        let path = env::temp_dir().join(name);
        act(&mut Recording::create(&path, tty).unwrap());
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    #[test]
    fn a_recording_is_a_header_and_events_whose_characters_are_whole() {
        let lines = recorded(true, |recording| {
            recording.output(Stream::Stdout, b"a\xc3");
            recording.output(Stream::Stdout, b"\xa4\n\xff");
            recording.resized(30, 100);
            recording.output(Stream::Stdout, b"\xe2\x82");
        });
        assert_eq!(lines[0]["version"], 2);
        assert!(lines[0]["width"].as_u64().unwrap() > 0);
        let events: Vec<_> = lines[1..]
            .iter()
            .map(|event| (event[1].as_str().unwrap(), event[2].as_str().unwrap()))
            .collect();
        assert_eq!(
            events,
            [
                ("o", "a"),
                ("o", "ä\n\u{fffd}"),
                ("r", "100x30"),
                ("o", "\u{fffd}")
            ]
        );
        let times: Vec<f64> = lines[1..].iter().map(|e| e[0].as_f64().unwrap()).collect();
        assert!(times.is_sorted());
    }

    #[test]
    fn without_a_terminal_lines_begin_at_the_left() {
        let lines = recorded(false, |recording| {
            recording.output(Stream::Stdout, b"a\n");
            recording.output(Stream::Stderr, b"b\n");
        });
        assert_eq!(
            (&lines[1][2], &lines[2][2]),
            (&json!("a\r\n"), &json!("b\r\n"))
        );
    }

    #[test]
    fn bytes_of_the_streams_do_not_make_a_character_together() {
        assert_eq!(whole_chars(b""), 0);
        assert_eq!(whole_chars(b"abc"), 3);
        assert_eq!(whole_chars(b"abc\xf0\x9f\x98"), 3);
        assert_eq!(whole_chars(b"\xf0\x9f\x98\x80"), 4);
        assert_eq!(whole_chars(b"\x80\x80\x80\x80"), 4);
    }
}
