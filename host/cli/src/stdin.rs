//! Our stdin, read by a thread of its own into a channel that holds little: whoever feeds us waits for the guest.

use std::io::{self, Read};
use std::thread;

use airlock_sandbox::client::{Bytes, SendError, StdinWriter};
use tokio::sync::mpsc;

/// One read: what a pipe holds.
const READ_BYTES: usize = 64 << 10;
/// Reads on their way to the guest, besides the one in its hands.
const READS_WAITING: usize = 2;

/// Passes stdin on until its end, or until the command reads no more.
pub(crate) async fn pass_on(mut writer: StdinWriter) -> Result<(), SendError> {
    let mut reads = read_in_thread();
    // EIO is what a terminal that hung up gives; to the command it is the end either way.
    while let Some(Ok(mut data)) = reads.recv().await {
        match writer.write(&mut data).await {
            Ok(()) => {}
            // As with a pipe to a program that has closed its stdin; only there is no SIGPIPE to send.
            Err(SendError::Closed | SendError::Ended) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    match writer.finish().await {
        Err(SendError::Ended) => Ok(()),
        other => other,
    }
}

/// Pieces of stdin up to its end, or up to an error. The thread may be in a read for ever; it ends with the process.
pub(crate) fn read_in_thread() -> mpsc::Receiver<io::Result<Bytes>> {
    let (sender, receiver) = mpsc::channel(READS_WAITING);
    thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        let mut buffer = vec![0; READ_BYTES];
        loop {
            match stdin.read(&mut buffer) {
                Ok(0) => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // Nobody may want to know any more.
                    let _ = sender.blocking_send(Err(error));
                    return;
                }
                Ok(length) => {
                    let data = Bytes::copy_from_slice(&buffer[..length]);
                    if sender.blocking_send(Ok(data)).is_err() {
                        return;
                    }
                }
            }
        }
    });
    receiver
}
