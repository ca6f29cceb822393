//! Our stdout and stderr: each written by a thread of its own, so that a reader who stops delays neither the other stream
//! nor a signal.

use std::io::{self, Write};
use std::thread;

use airlock_sandbox::client::{Bytes, Stream};
use tokio::sync::{mpsc, oneshot, watch};

/// Pieces on their way to a slow reader; beyond these the guest waits.
const PIECES_WAITING: usize = 4;

/// Bytes for one of our streams.
#[derive(Debug)]
pub(crate) struct Piece {
    pub(crate) data: Bytes,
    /// What of the command's output has been taken care of once these are written: which stream, up to where.
    pub(crate) takes: Option<(Stream, u64)>,
}

impl Piece {
    pub(crate) fn plain(data: impl Into<Bytes>) -> Self {
        Self {
            data: data.into(),
            takes: None,
        }
    }
}

/// Both streams.
#[derive(Debug)]
pub(crate) struct Sinks {
    stdout: Sink,
    stderr: Sink,
    taken: watch::Sender<[u64; 2]>,
}

impl Sinks {
    /// `from`: how much of the command's output somebody else has taken care of.
    pub(crate) fn new(from: [u64; 2]) -> Self {
        let taken = watch::Sender::new(from);
        // Unbuffered: the pieces are as large as they come, and must not wait for a line's end.
        Self {
            stdout: Sink::start(taken.clone(), |bytes| {
                rustix_write(rustix::stdio::stdout(), bytes)
            }),
            stderr: Sink::start(taken.clone(), |bytes| {
                rustix_write(rustix::stdio::stderr(), bytes)
            }),
            taken,
        }
    }

    /// How much of the command's output has been taken care of, of each of its streams.
    pub(crate) fn taken(&self) -> watch::Receiver<[u64; 2]> {
        self.taken.subscribe()
    }

    /// A piece that nobody will read is taken care of, too.
    pub(crate) fn give_up(&self, piece: &Piece) {
        note(&self.taken, piece.takes);
    }

    /// Waits for a place for one piece; `None` when the stream takes no more. Safe to cancel.
    pub(crate) async fn place(&self, stream: Stream) -> Option<mpsc::Permit<'_, Piece>> {
        let sink = match stream {
            Stream::Stdout => &self.stdout,
            Stream::Stderr => &self.stderr,
        };
        sink.place().await
    }

    /// Whether stderr takes no more because its reader has gone. To be asked after [`place`](Self::place) gave none; the
    /// error is not told a second time.
    pub(crate) fn stderr_reader_has_gone(&mut self) -> bool {
        self.stderr.reader_has_gone()
    }

    /// Waits until everything is written. The streams' errors, if they had any.
    pub(crate) async fn finish(self) -> [io::Result<()>; 2] {
        // The order matters to nobody; both are awaited.
        let stderr = self.stderr.finish().await;
        [self.stdout.finish().await, stderr]
    }
}

fn note(taken: &watch::Sender<[u64; 2]>, takes: Option<(Stream, u64)>) {
    if let Some((stream, offset)) = takes {
        taken.send_modify(|taken| taken[stream as usize] = offset);
    }
}

/// One of the two streams.
#[derive(Debug)]
pub(crate) struct Sink {
    pieces: mpsc::Sender<Piece>,
    /// None once it was taken.
    result: Option<oneshot::Receiver<io::Result<()>>>,
}

impl Sink {
    /// Our stdout alone.
    pub(crate) fn stdout() -> Self {
        Self::start(watch::Sender::default(), |bytes| {
            rustix_write(rustix::stdio::stdout(), bytes)
        })
    }

    /// Waits for a place for one piece; `None` when the stream takes no more. Safe to cancel.
    pub(crate) async fn place(&self) -> Option<mpsc::Permit<'_, Piece>> {
        self.pieces.reserve().await.ok()
    }

    fn start(
        taken: watch::Sender<[u64; 2]>,
        write: impl Fn(&[u8]) -> io::Result<()> + Send + 'static,
    ) -> Self {
        let (pieces, mut receiver) = mpsc::channel::<Piece>(PIECES_WAITING);
        let (report, result) = oneshot::channel();
        thread::spawn(move || {
            let mut written = Ok(());
            while let Some(piece) = receiver.blocking_recv() {
                written = write(&piece.data);
                if written.is_err() {
                    break;
                }
                note(&taken, piece.takes);
            }
            // The receiver may have given up on us.
            let _ = report.send(written);
        });
        Self {
            pieces,
            result: Some(result),
        }
    }

    /// Whether the stream takes no more because its reader has gone. To be asked after [`place`](Self::place) gave
    /// none; the error is not told a second time.
    fn reader_has_gone(&mut self) -> bool {
        // Sent before the channel was closed.
        let error = self.result.take().and_then(|mut r| r.try_recv().ok());
        matches!(error, Some(Err(error)) if error.kind() == io::ErrorKind::BrokenPipe)
    }

    /// Waits until everything is written. The stream's error, if it had one.
    pub(crate) async fn finish(self) -> io::Result<()> {
        drop(self.pieces);
        match self.result {
            Some(result) => result.await.unwrap_or(Ok(())),
            None => Ok(()),
        }
    }
}

fn rustix_write(fd: impl std::os::fd::AsFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(&fd, bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(rustix::io::Errno::INTR) => {}
            // A terminal or pipe that someone else set to non-blocking: wait until it takes more.
            Err(rustix::io::Errno::AGAIN) => {
                let mut poll = [rustix::event::PollFd::new(
                    &fd,
                    rustix::event::PollFlags::OUT,
                )];
                rustix::event::poll(&mut poll, None)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// `eprintln!` for words of our own that may get lost: it panics when stderr is closed, full, or a pipe that nobody reads
/// any more, and what happened is still to be told by the exit status.
macro_rules! tell {
    ($($words:tt)*) => {
        $crate::output::write_to_stderr(format_args!($($words)*))
    };
}
pub(crate) use tell;

/// One line, or as much of it as stderr takes.
pub(crate) fn write_to_stderr(words: std::fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr().lock(), "{words}");
}

/// Prints text of our own. `| head` is no error.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}

/// Whether an error is that of a reader who stopped.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
