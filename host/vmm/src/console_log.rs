//! The guest's console on disk, bounded: the newest bytes are kept, and the file never exceeds its limit.
//!
//! Whole lines go out at once; a line that never ends goes out every [`BUFFER_BYTES`].

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::halt::HaltWatch;

/// Longest part of a line that waits for its end.
const BUFFER_BYTES: usize = 256;

/// An append-only file that forgets its oldest half when full.
#[derive(Debug)]
pub struct ConsoleLog {
    file: File,
    limit_bytes: u64,
    written_bytes: u64,
    line: Vec<u8>,
    halt: Option<HaltWatch>,
}

impl ConsoleLog {
    /// Starts an empty log.
    pub fn create(path: &Path, limit_bytes: u64) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)?;
        Ok(Self {
            file,
            limit_bytes,
            written_bytes: 0,
            line: Vec::with_capacity(BUFFER_BYTES),
            halt: None,
        })
    }

    /// Shows everything that is written to `halt` as well.
    #[must_use]
    pub fn watched(mut self, halt: HaltWatch) -> Self {
        self.halt = Some(halt);
        self
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        // Bytes that would be forgotten at once are not written.
        let keep = usize::try_from(self.limit_bytes / 2).unwrap_or(usize::MAX);
        let bytes = &bytes[bytes.len().saturating_sub(keep)..];
        if self.written_bytes + bytes.len() as u64 > self.limit_bytes {
            self.forget_oldest_half()?;
        }
        self.file.write_all(bytes)?;
        self.written_bytes += bytes.len() as u64;
        Ok(())
    }

    /// Keeps the last `limit / 2` bytes, from a line's beginning if there is one.
    fn forget_oldest_half(&mut self) -> io::Result<()> {
        let keep = self.written_bytes.min(self.limit_bytes / 2);
        self.file.seek(SeekFrom::Start(self.written_bytes - keep))?;
        let mut tail = Vec::new();
        (&self.file).take(keep).read_to_end(&mut tail)?;
        let line_start = tail
            .iter()
            .position(|&byte| byte == b'\n')
            .map_or(0, |newline| newline + 1);
        self.file.set_len(0)?;
        self.file.rewind()?;
        self.file.write_all(&tail[line_start..])?;
        self.written_bytes = (tail.len() - line_start) as u64;
        Ok(())
    }
}

impl Write for ConsoleLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(halt) = &mut self.halt {
            halt.see(bytes);
        }
        self.line.extend_from_slice(bytes);
        if self.line.len() >= BUFFER_BYTES || bytes.contains(&b'\n') {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let line = std::mem::take(&mut self.line);
        let result = self.append(&line);
        self.line = line;
        self.line.clear();
        result
    }
}

impl Drop for ConsoleLog {
    fn drop(&mut self) {
        // Nobody is left to be told.
        let _ = self.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::tempfile::TempFile;

    #[test]
    fn the_newest_lines_stay_and_the_limit_holds() {
        let file = TempFile::new().unwrap();
        let mut log = ConsoleLog::create(file.as_path(), 1000).unwrap();
        for n in 0..500 {
            writeln!(log, "line {n}").unwrap();
            assert!(file.as_file().metadata().unwrap().len() <= 1000);
        }
        let text = std::fs::read_to_string(file.as_path()).unwrap();
        assert!(text.len() > 400);
        assert!(
            text.starts_with("line ") && text.ends_with("line 499\n"),
            "{text}"
        );
    }

    #[test]
    fn a_line_that_never_ends_is_bounded_too() {
        let file = TempFile::new().unwrap();
        let mut log = ConsoleLog::create(file.as_path(), 1000).unwrap();
        for _ in 0..100_000 {
            log.write_all(b"x").unwrap();
        }
        log.write_all(&[b'y'; 5000]).unwrap();
        drop(log);
        let text = std::fs::read(file.as_path()).unwrap();
        assert!(text.len() <= 1000 && text.ends_with(&[b'y'; 500]));
    }
}
