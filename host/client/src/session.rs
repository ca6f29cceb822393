//! All connections to one agent: some kept warm for the next exec, one for control requests.
//!
//! A session is cheap to clone and holds no task: connections are made when they are needed, and given back by the
//! execs that are done with them.

use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use airlock_proto::v1;

use crate::exec::{Attach, Command, Exec, ExecError, Output, ResumingExec};
use crate::rpc::{Connection, RpcError};
use crate::transport::{Address, Transport, TransportError};

/// Most idle connections kept: more would only hold buffers in guest and host for execs that rarely come at once.
pub const MAX_IDLE: usize = 8;

/// One agent, and the connections to it.
#[derive(Debug, Clone)]
pub struct Session {
    inner: Arc<Inner>,
}

type Connecting = Pin<Box<dyn Future<Output = Result<Transport, TransportError>> + Send>>;

/// How connections are made.
enum Target {
    Address(Address),
    Connector(Box<dyn Fn() -> Connecting + Send + Sync>),
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => fmt::Debug::fmt(address, f),
            Self::Connector(_) => f.write_str("Connector"),
        }
    }
}

#[derive(Debug)]
struct Inner {
    target: Target,
    idle: Mutex<Vec<Connection>>,
    pub(crate) control: tokio::sync::Mutex<Option<Connection>>,
}

impl Session {
    /// A session without connections: the first request makes one.
    #[must_use]
    pub fn new(address: Address) -> Self {
        Self::with_target(Target::Address(address))
    }

    /// A session whose connections `connect` makes: for streams that no [`Address`] describes.
    pub fn with_connector<F>(connect: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<Transport, TransportError>> + Send + 'static,
    {
        Self::with_target(Target::Connector(Box::new(move || Box::pin(connect()))))
    }

    fn with_target(target: Target) -> Self {
        Self {
            inner: Arc::new(Inner {
                target,
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
            let mut connection = self.connect().await?;
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
        self.on_connection(async |connection, session| {
            Exec::start(connection, &start, Some(session)).await
        })
        .await
    }

    /// Starts a command that goes on by itself, and says its id and leader's pid. It should have a
    /// [`Command::keep`], or what it writes is gone.
    ///
    /// # Errors
    /// As for [`exec`](Self::exec).
    pub async fn exec_detached(&self, command: Command) -> Result<v1::Started, ExecError> {
        let mut start = command.into_start();
        start.detach = true;
        self.on_connection(async |connection, session| {
            Exec::start_detached(connection, &start, session).await
        })
        .await
    }

    /// Goes on with a command that runs, or is over and not forgotten, from given offsets on. Who was attached before
    /// is told so and gets no more, unless this only observes.
    ///
    /// # Errors
    /// [`ExecError::Agent`] when the agent knows no such exec; as for [`exec`](Self::exec) else.
    pub async fn attach(&self, attach: Attach) -> Result<Exec, ExecError> {
        self.on_connection(async |connection, _| Exec::attach(connection, &attach).await)
            .await
    }

    /// Starts a command that survives the loss of its connection: what was missed comes over the next one, every byte
    /// once. See [`ResumingExec`].
    ///
    /// # Errors
    /// As for [`exec`](Self::exec).
    pub async fn exec_resuming(&self, command: Command) -> Result<ResumingExec, ExecError> {
        ResumingExec::start(self.clone(), command).await
    }

    /// On an idle connection, or on a new one if that has gone stale. `request` may run twice, so it must be one that
    /// the agent answers twice in the same way.
    async fn on_connection<T>(
        &self,
        request: impl AsyncFn(Connection, Self) -> Result<T, ExecError>,
    ) -> Result<T, ExecError> {
        let idle = self.idle().pop();
        if let Some(connection) = idle {
            match request(connection, self.clone()).await {
                // The id makes trying again safe: the agent runs each id once.
                Err(ExecError::Rpc(RpcError::Lost(_))) => {}
                other => return other,
            }
        }
        request(self.connect().await?, self.clone()).await
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

    /// A new connection; its Hello goes out with the first request.
    pub(crate) async fn connect(&self) -> Result<Connection, RpcError> {
        match &self.inner.target {
            Target::Address(address) => Connection::connect(address).await,
            Target::Connector(connect) => Connection::new(connect().await?),
        }
    }

    pub(crate) fn control_slot(&self) -> &tokio::sync::Mutex<Option<Connection>> {
        &self.inner.control
    }

    /// An idle connection, or a new one: for a request that may take long, besides the control connection.
    pub(crate) async fn any_connection(&self) -> Result<Connection, RpcError> {
        let idle = self.idle().pop();
        match idle {
            Some(connection) => Ok(connection),
            None => self.connect().await,
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
