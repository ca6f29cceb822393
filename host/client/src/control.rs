//! Requests about the sandbox rather than within an exec: ping, list, signal, wait, statistics, clock, shutdown.
//!
//! They share one connection, one request at a time. A request that was cancelled takes the connection with it: its
//! answer would be mistaken for the next one's.

use std::time::Duration;

use airlock_proto::v1::{self, control, control_reply, from_agent, to_agent};
use bytes::Bytes;
use tokio::time::timeout;

use crate::rpc::{Connection, RpcError, unexpected};
use crate::session::Session;

/// How long a control request may take to be answered. The agent keeps memory and a process slot of its own for them
/// (law 12 of exec), so only a guest that does not run at all takes longer.
pub const CONTROL_TIMEOUT: Duration = Duration::from_secs(15);

/// Execs in one list, of however many pages: above what an agent knows at once (4096), so that one that never stops
/// listing is an error and no growth.
const MAX_LISTED_EXECS: usize = 8192;

/// Why a control request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// No answer in [`CONTROL_TIMEOUT`].
    #[error("the agent did not answer within {} s", CONTROL_TIMEOUT.as_secs())]
    Timeout,
    /// The connection failed, or the agent refused.
    #[error(transparent)]
    Rpc(#[from] RpcError),
}

impl Session {
    /// Sends `payload` (at most 64 KiB) there and back; returns the guest's clock, in nanoseconds since 1970.
    ///
    /// # Errors
    /// When the agent does not answer, or with other bytes.
    pub async fn ping(&self, payload: Bytes) -> Result<u64, ControlError> {
        let ping = control::Request::Ping(v1::Ping {
            payload: payload.clone(),
        });
        match self.control(ping).await? {
            control_reply::Reply::Pong(pong) if pong.payload == payload => Ok(pong.guest_unix_ns),
            control_reply::Reply::Pong(_) => Err(wrong("the ping's own payload")),
            _ => Err(wrong("Pong")),
        }
    }

    /// Every exec the agent knows.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub async fn list(&self) -> Result<Vec<v1::ExecInfo>, ControlError> {
        match self
            .control(control::Request::ExecList(v1::ExecList {}))
            .await?
        {
            control_reply::Reply::ExecList(list) => Ok(list.execs),
            _ => Err(wrong("ExecListReply")),
        }
    }

    /// Signals an exec by id, from wherever it was started.
    ///
    /// # Errors
    /// When the agent does not answer, or knows no such exec.
    pub async fn signal(
        &self,
        id: &str,
        number: u32,
        target: v1::SignalTarget,
    ) -> Result<(), ControlError> {
        self.done(control::Request::ExecSignal(v1::ExecSignal {
            id: id.to_owned(),
            signal: Some(v1::Signal {
                signal: number,
                target: target.into(),
            }),
        }))
        .await
    }

    /// Tells a terminal exec its new size, from wherever it was started.
    ///
    /// # Errors
    /// When the agent does not answer, knows no such exec, or it has no terminal or has ended.
    pub async fn resize(&self, id: &str, rows: u16, cols: u16) -> Result<(), ControlError> {
        self.done(control::Request::ExecResize(v1::ExecResize {
            id: id.to_owned(),
            size: Some(v1::Resize {
                rows: rows.into(),
                cols: cols.into(),
            }),
        }))
        .await
    }

    /// Waits, as long as it takes, until an exec's leader has ended.
    ///
    /// # Errors
    /// When the connection fails, or the agent knows no such exec.
    pub async fn wait(&self, id: &str) -> Result<v1::ExecInfo, ControlError> {
        let mut connection = self.any_connection().await?;
        let request = control::Request::ExecWait(v1::ExecWait { id: id.to_owned() });
        match exchange(&mut connection, request).await? {
            control_reply::Reply::ExecInfo(info) => {
                self.put_back(connection);
                Ok(info)
            }
            _ => Err(wrong("ExecInfo")),
        }
    }

    /// Memory, CPU and execs of the guest.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub async fn stat(&self) -> Result<v1::SystemStatReply, ControlError> {
        match self
            .control(control::Request::SystemStat(v1::SystemStat {}))
            .await?
        {
            control_reply::Reply::SystemStat(stat) => Ok(stat),
            _ => Err(wrong("SystemStatReply")),
        }
    }

    /// Sets the guest's clock, in nanoseconds since 1970.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub async fn set_clock(&self, unix_ns: u64) -> Result<(), ControlError> {
        self.done(control::Request::ClockSet(v1::ClockSet { unix_ns }))
            .await
    }

    /// Asks the guest to end: SIGTERM to the workload, SIGKILL after `deadline`, sync, reset. Returns when the agent
    /// has accepted; the end itself shows in the VMM's.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub async fn shutdown(&self, deadline: Duration) -> Result<(), ControlError> {
        self.done(control::Request::Shutdown(v1::Shutdown {
            deadline_ms: u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX),
        }))
        .await
    }

    /// Spawns `program` (an absolute path; empty for a no-op of the agent's own) `count` times in the guest, the agent's
    /// own way and one after the other; nanoseconds each.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub async fn spawn_probe(
        &self,
        program: impl Into<Bytes>,
        count: u32,
    ) -> Result<Vec<u64>, ControlError> {
        let program = program.into();
        match self
            .control(control::Request::SpawnProbe(v1::SpawnProbe {
                count,
                program,
            }))
            .await?
        {
            control_reply::Reply::SpawnProbe(reply) => Ok(reply.spawn_ns),
            _ => Err(wrong("SpawnProbeReply")),
        }
    }

    async fn done(&self, request: control::Request) -> Result<(), ControlError> {
        match self.control(request).await? {
            control_reply::Reply::Done(_) => Ok(()),
            _ => Err(wrong("Empty")),
        }
    }

    /// One request on the control connection, within [`CONTROL_TIMEOUT`].
    async fn control(
        &self,
        request: control::Request,
    ) -> Result<control_reply::Reply, ControlError> {
        let exchange = async {
            let mut slot = self.control_slot().lock().await;
            if let Some(mut connection) = slot.take() {
                match exchange(&mut connection, request.clone()).await {
                    // It had gone stale. All these requests may be repeated.
                    Err(RpcError::Lost(_)) => {}
                    result => {
                        keep(&mut slot, connection, &result);
                        return Ok(result?);
                    }
                }
            }
            let mut connection = self.connect().await?;
            let result = exchange(&mut connection, request).await;
            keep(&mut slot, connection, &result);
            Ok(result?)
        };
        match timeout(CONTROL_TIMEOUT, exchange).await {
            Ok(result) => result,
            Err(_) => Err(ControlError::Timeout),
        }
    }
}

/// A refusal leaves the connection as good as an answer does.
fn keep<T>(slot: &mut Option<Connection>, connection: Connection, result: &Result<T, RpcError>) {
    if matches!(result, Ok(_) | Err(RpcError::Agent(_))) {
        *slot = Some(connection);
    }
}

async fn exchange(
    connection: &mut Connection,
    request: control::Request,
) -> Result<control_reply::Reply, RpcError> {
    let body = to_agent::Body::Control(v1::Control {
        request: Some(request),
    });
    let mut body = connection.request(body).await?;
    let mut execs = Vec::new();
    loop {
        match body {
            from_agent::Body::Control(v1::ControlReply {
                reply: Some(control_reply::Reply::ExecList(page)),
                more,
            }) if execs.len() + page.execs.len() <= MAX_LISTED_EXECS => {
                execs.extend(page.execs);
                if !more {
                    return Ok(control_reply::Reply::ExecList(v1::ExecListReply { execs }));
                }
                body = connection.receive().await?;
            }
            from_agent::Body::Control(v1::ControlReply {
                reply: Some(reply),
                more: false,
            }) if execs.is_empty() => return Ok(reply),
            other => return Err(unexpected("a whole ControlReply", &other)),
        }
    }
}

fn wrong(expected: &str) -> ControlError {
    RpcError::Protocol(format!("another reply than {expected} came")).into()
}
