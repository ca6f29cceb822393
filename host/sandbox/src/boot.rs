//! Waiting for a booting guest: the doorbell, the VMM's end or the deadline, whichever is first.

use std::time::Duration;

use airlock_client::{Session, Transport};
use tokio::net::UnixListener;
use tokio::time::timeout;

use crate::process::ProcessHandle;

/// How a boot ended.
#[derive(Debug)]
pub(crate) enum Boot {
    /// The agent has answered; its connection is in the session.
    Ready,
    /// The VMM ended first.
    VmmEnded,
    /// Neither in time.
    TimedOut,
}

/// Waits until the agent has dialled `doorbell` and said hello there.
pub(crate) async fn wait(
    doorbell: &UnixListener,
    session: &Session,
    vmm: &ProcessHandle,
    limit: Duration,
) -> std::io::Result<Boot> {
    let ready = async {
        loop {
            let (stream, _) = doorbell.accept().await?;
            // Anyone in the guest can dial this port; only an agent says hello. Another may follow.
            if session.adopt(Transport::from(stream)).await.is_ok() {
                return Ok(Boot::Ready);
            }
        }
    };
    let first = async {
        tokio::select! {
            ready = ready => ready,
            ended = vmm.ended() => ended.map(|()| Boot::VmmEnded),
        }
    };
    timeout(limit, first).await.unwrap_or(Ok(Boot::TimedOut))
}
