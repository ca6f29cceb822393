//! Our stdout and stderr: each written by a thread of its own, so that a reader who stops delays neither the other stream
//! nor a signal.

use std::io::{self, Write};
use std::thread;

use airlock_sandbox::client::Bytes;
use tokio::sync::{mpsc, oneshot};

/// Pieces on their way to a slow reader; beyond these the guest waits.
const PIECES_WAITING: usize = 4;

/// One of the two streams.
#[derive(Debug)]
pub(crate) struct Sink {
    pieces: mpsc::Sender<Bytes>,
    result: oneshot::Receiver<io::Result<()>>,
}

impl Sink {
    pub(crate) fn stdout() -> Self {
        // Unbuffered: the pieces are as large as they come, and must not wait for a line's end.
        Self::start(|bytes| rustix_write(rustix::stdio::stdout(), bytes))
    }

    pub(crate) fn stderr() -> Self {
        Self::start(|bytes| rustix_write(rustix::stdio::stderr(), bytes))
    }

    fn start(write: impl Fn(&[u8]) -> io::Result<()> + Send + 'static) -> Self {
        let (pieces, mut receiver) = mpsc::channel::<Bytes>(PIECES_WAITING);
        let (report, result) = oneshot::channel();
        thread::spawn(move || {
            let mut written = Ok(());
            while let Some(piece) = receiver.blocking_recv() {
                written = write(&piece);
                if written.is_err() {
                    break;
                }
            }
            // The receiver may have given up on us.
            let _ = report.send(written);
        });
        Self { pieces, result }
    }

    /// Waits for a place for one piece; `None` when the stream takes no more. Safe to cancel.
    pub(crate) async fn place(&self) -> Option<mpsc::Permit<'_, Bytes>> {
        self.pieces.reserve().await.ok()
    }

    /// Whether the stream takes no more because its reader has gone. To be asked after [`place`](Self::place) gave
    /// none; the error is not told a second time.
    pub(crate) fn reader_has_gone(&mut self) -> bool {
        // Sent before the channel was closed.
        matches!(self.result.try_recv(), Ok(Err(error)) if error.kind() == io::ErrorKind::BrokenPipe)
    }

    /// Waits until everything is written. The stream's error, if it had one.
    pub(crate) async fn finish(self) -> io::Result<()> {
        drop(self.pieces);
        self.result.await.unwrap_or(Ok(()))
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
