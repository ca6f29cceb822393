//! The client side of the agent's RPC: run commands in a sandbox and learn truthfully how they ended.
//!
//! Layers, lowest first, each ignorant of those above: [`transport`] (byte streams), [`rpc`] (frames and the Hello),
//! [`session`] (connections kept warm), [`exec`], [`files`], [`ports`] and [`control`] (what they are for). No KVM, no
//! process of the host and no unsafe code lives here.
//!
//! Nothing is queued without a bound: output is read from its connection when the caller asks for the next event, so a
//! slow caller slows the command and not this process.
//!
//! ```no_run
//! use airlock_client::{Address, Command, Session};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let session = Session::new(Address::hybrid("/run/airlock/box/vsock.sock"));
//! let output = session.output(Command::new("uname").arg("-r"), 64 << 10).await?;
//! assert!(output.report.success());
//! println!("{}", String::from_utf8_lossy(&output.stdout));
//! # Ok(())
//! # }
//! ```

pub mod control;
pub mod exec;
pub mod files;
pub mod ports;
pub mod report;
pub mod rpc;
pub mod session;
pub mod transport;

#[cfg(test)]
mod fake_agent;

pub use airlock_proto as proto;
pub use bytes::Bytes;

pub use crate::control::ControlError;
pub use crate::exec::{
    Attach, Command, Event, Exec, ExecControl, ExecError, Output, ResumingExec, SendError,
    SpawnFailure, SpawnStage, StdinWriter, Stream,
};
pub use crate::files::{
    FileAttributes, FileError, FileInfo, FileListing, FileReader, FileWriter, Files, Write,
};
pub use crate::ports::{DialError, DialReader, DialWriter, Target};
pub use crate::report::{Cause, Ended, ExitReport, Lost, Status, StreamTotals, Usage};
pub use crate::rpc::{AgentError, RpcError};
pub use crate::session::Session;
pub use crate::transport::{Address, Transport, TransportError};
