//! All connections to one agent: some kept warm for the next exec, one for control requests.
//!
//! A session is cheap to clone and holds no task: connections are made when they are needed, and given back by the
//! execs that are done with them.

use std::sync::{Arc, Mutex, PoisonError};

use airlock_proto::v1;

use crate::exec::{Command, Exec, ExecError, Output};
use crate::rpc::{Connection, RpcError};
use crate::transport::{Address, Transport};

/// Most idle connections kept: more would only hold buffers in guest and host for execs that rarely come at once.
pub const MAX_IDLE: usize = 8;

/// One agent, and the connections to it.
#[derive(Debug, Clone)]
pub struct Session {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    address: Address,
    idle: Mutex<Vec<Connection>>,
    pub(crate) control: tokio::sync::Mutex<Option<Connection>>,
}

impl Session {
    /// A session without connections: the first request makes one.
    #[must_use]
    pub fn new(address: Address) -> Self {
        Self {
            inner: Arc::new(Inner {
                address,
                idle: Mutex::new(Vec::new()),
                control: tokio::sync::Mutex::new(None),
            }),
        }
    }

    /// Takes over a connection that exists already (the doorbell), after its Hello: the agent is known to answer then.
    ///
    /// # Errors
    /// When the agent does not say hello.
    pub async fn adopt(&self, transport: Transport) -> Result<v1::HelloReply, RpcError> {
        let mut connection = Connection::new(transport)?;
        let hello = connection.hello().await?.clone();
        self.put_back(connection);
        Ok(hello)
    }

    /// Opens connections until `count` (at most [`MAX_IDLE`]) are idle, so that the next execs need not.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub async fn warm(&self, count: usize) -> Result<(), RpcError> {
        while self.idle().len() < count.min(MAX_IDLE) {
            let mut connection = Connection::connect(&self.inner.address).await?;
            connection.hello().await?;
            self.put_back(connection);
        }
        Ok(())
    }

    /// Starts a command.
    ///
    /// # Errors
    /// When the guest cannot start it, refuses it, or cannot be reached; see [`ExecError`].
    pub async fn exec(&self, command: Command) -> Result<Exec, ExecError> {
        let start = command.into_start();
        let idle = self.idle().pop();
        if let Some(connection) = idle {
            match Exec::start(connection, &start, Some(self.clone())).await {
                // It had gone stale. The id makes trying again safe: the agent runs each id once.
                Err(ExecError::Rpc(RpcError::Lost(_))) => {}
                other => return other,
            }
        }
        let connection = Connection::connect(&self.inner.address).await?;
        Exec::start(connection, &start, Some(self.clone())).await
    }

    /// Runs a command to its end and keeps its output, up to `limit_bytes` of each stream.
    ///
    /// # Errors
    /// As for [`exec`](Self::exec).
    pub async fn output(&self, command: Command, limit_bytes: usize) -> Result<Output, ExecError> {
        Ok(self.exec(command).await?.output(limit_bytes).await)
    }

    /// Keeps a connection on which no request is running.
    pub(crate) fn put_back(&self, connection: Connection) {
        let mut idle = self.idle();
        if idle.len() < MAX_IDLE {
            idle.push(connection);
        }
    }

    pub(crate) fn address(&self) -> &Address {
        &self.inner.address
    }

    pub(crate) fn control_slot(&self) -> &tokio::sync::Mutex<Option<Connection>> {
        &self.inner.control
    }

    /// An idle connection, or a new one: for a request that may take long, besides the control connection.
    pub(crate) async fn any_connection(&self) -> Result<Connection, RpcError> {
        let idle = self.idle().pop();
        match idle {
            Some(connection) => Ok(connection),
            None => Connection::connect(&self.inner.address).await,
        }
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Connection>> {
        // Nothing panics while it is held, and a Vec of connections is valid after any panic.
        self.inner
            .idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
