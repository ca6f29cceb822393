//! Files in a sandbox: read, written, listed, changed, beneath a folder that the caller names.
//!
//! A path is taken beneath [`Files`]' root by the guest's kernel: no link and no `..` in it leads out. Reading and
//! writing go a piece at a time on a connection of their own, so a slow caller slows the file and nothing else.
//!
//! ```no_run
//! # use airlock_client::{Session, Write};
//! # async fn example(session: Session) -> Result<(), Box<dyn std::error::Error>> {
//! let files = session.files("/srv");
//! let mut writer = files.write("config", Write::atomic().mode(0o600)).await?;
//! writer.write("key = value\n").await?;
//! writer.finish().await?;
//! let mut reader = files.read("config").await?;
//! while let Some(piece) = reader.next().await? {
//!     println!("{} bytes", piece.len());
//! }
//! # Ok(())
//! # }
//! ```

use std::fmt;
use std::future::Future;
use std::time::Duration;

use airlock_proto::MAX_DATA_BYTES;
use airlock_proto::v1::file_request::Op;
use airlock_proto::v1::{self, file_reply, from_agent, to_agent};
use bytes::Bytes;
use tokio::time::timeout;

pub use v1::{FileAttributes, FileInfo};

use crate::rpc::{AgentError, Connection, RpcError, unexpected};
use crate::session::Session;

/// How long the agent may take for a step of a file request: a piece read, or written to a slow disk.
pub const FILE_TIMEOUT: Duration = Duration::from_secs(60);

/// Why a file request was not done.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The agent refused; the code says whether it was not found, was there already, or the disk is full.
    #[error(transparent)]
    Agent(AgentError),
    /// Nothing came for [`FILE_TIMEOUT`].
    #[error("the agent did not answer within {} s", FILE_TIMEOUT.as_secs())]
    Timeout,
    /// The connection failed; whether the request was done is not known.
    #[error(transparent)]
    Rpc(RpcError),
}

impl FileError {
    /// What kind of refusal it was, if it was one.
    #[must_use]
    pub fn code(&self) -> Option<v1::ErrorCode> {
        match self {
            Self::Agent(error) => Some(error.code),
            _ => None,
        }
    }

    /// Whether there is no such file.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.code() == Some(v1::ErrorCode::ErrorNotFound)
    }
}

impl From<RpcError> for FileError {
    fn from(error: RpcError) -> Self {
        match error {
            RpcError::Agent(error) => Self::Agent(error),
            error => Self::Rpc(error),
        }
    }
}

impl Session {
    /// The files beneath `root`, an absolute path in the guest.
    pub fn files(&self, root: impl Into<Bytes>) -> Files {
        Files {
            session: self.clone(),
            root: root.into(),
        }
    }
}

/// How a file is written.
#[derive(Debug, Clone, Default)]
pub struct Write {
    request: v1::FileWrite,
}

impl Write {
    /// Beside the old file, synced to disk, then put in its stead: whatever happens, either the old or the new is there.
    /// A link is replaced rather than followed.
    #[must_use]
    pub fn atomic() -> Self {
        Self::of(v1::FileWrite {
            atomic: true,
            ..v1::FileWrite::default()
        })
    }

    /// Into the file, through a link; what it held is dropped. A file that is not there is made.
    #[must_use]
    pub fn replace() -> Self {
        Self::of(v1::FileWrite {
            create: true,
            truncate: true,
            ..v1::FileWrite::default()
        })
    }

    /// Into a file that is there, from byte `offset` on; the rest stays.
    #[must_use]
    pub fn at(offset: u64) -> Self {
        Self::of(v1::FileWrite {
            offset,
            ..v1::FileWrite::default()
        })
    }

    fn of(request: v1::FileWrite) -> Self {
        Self { request }
    }

    /// Permissions of a file that is made, or replaced atomically.
    #[must_use]
    pub fn mode(mut self, mode: u32) -> Self {
        self.request.mode = mode;
        self
    }

    /// Set once everything is written.
    #[must_use]
    pub fn attributes(mut self, attributes: FileAttributes) -> Self {
        self.request.attributes = Some(attributes);
        self
    }
}

/// Files beneath a folder.
#[derive(Debug, Clone)]
pub struct Files {
    session: Session,
    root: Bytes,
}

impl Files {
    /// Reads a file from its beginning to its end.
    ///
    /// # Errors
    /// When there is no such file, it is not a regular one, or the agent does not answer.
    pub async fn read(&self, path: impl Into<Bytes>) -> Result<FileReader, FileError> {
        self.read_range(path, 0, None).await
    }

    /// Reads up to `length` bytes from `offset` on; `None`: to the end.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub async fn read_range(
        &self,
        path: impl Into<Bytes>,
        offset: u64,
        length: Option<u64>,
    ) -> Result<FileReader, FileError> {
        let answer = self
            .ask(Op::Read(v1::FileRead {
                path: path.into(),
                offset,
                // 0 stands for all in the protocol: for none of it, one byte is asked for and not given.
                length: length.map_or(0, |length| length.max(1)),
            }))
            .await?;
        Ok(FileReader {
            answer,
            offset,
            left: length.unwrap_or(u64::MAX),
        })
    }

    /// Begins to write a file.
    ///
    /// # Errors
    /// When the request cannot be sent. What the guest has to say comes with [`FileWriter::write`] or
    /// [`FileWriter::finish`].
    pub async fn write(
        &self,
        path: impl Into<Bytes>,
        write: Write,
    ) -> Result<FileWriter, FileError> {
        let mut request = write.request;
        request.path = path.into();
        let offset = request.offset;
        let mut connection = self.connection().await?;
        let body = self.body(Op::Write(request));
        limited(async { Ok(connection.send(body).await?) }).await?;
        Ok(FileWriter {
            session: self.session.clone(),
            connection,
            offset,
            failed: false,
        })
    }

    /// What a path leads to; with `follow`, through a link at its end.
    ///
    /// # Errors
    /// When there is nothing, or the agent does not answer.
    pub async fn stat(&self, path: impl Into<Bytes>, follow: bool) -> Result<FileInfo, FileError> {
        let path = path.into();
        let mut answer = self.ask(Op::Stat(v1::FileStat { path, follow })).await?;
        match answer.next().await? {
            Some(file_reply::Reply::Info(info)) => Ok(info),
            _ => Err(wrong("FileInfo")),
        }
    }

    /// The entries of a folder, in no order. Names are as the guest gives them: check them before using them as paths.
    ///
    /// # Errors
    /// When there is no such folder, or the agent does not answer.
    pub async fn list(&self, path: impl Into<Bytes>) -> Result<FileListing, FileError> {
        let path = path.into();
        let answer = self.ask(Op::List(v1::FileList { path })).await?;
        Ok(FileListing { answer })
    }

    /// Makes a folder; with `parents` those above it too, and it may be there already.
    ///
    /// # Errors
    /// When that is not possible, or the agent does not answer.
    pub async fn make_folder(
        &self,
        path: impl Into<Bytes>,
        mode: u32,
        parents: bool,
    ) -> Result<(), FileError> {
        let path = path.into();
        self.done(Op::Mkdir(v1::FileMkdir {
            path,
            mode,
            parents,
        }))
        .await
    }

    /// Gives a file another name; replaces what has it.
    ///
    /// # Errors
    /// When that is not possible, or the agent does not answer.
    pub async fn rename(
        &self,
        from: impl Into<Bytes>,
        to: impl Into<Bytes>,
    ) -> Result<(), FileError> {
        let (from, to) = (from.into(), to.into());
        self.done(Op::Rename(v1::FileRename { from, to })).await
    }

    /// Removes a file, a link or an empty folder; with `recursive` a folder with all that is in it, however long it
    /// takes. A cancelled removal stops where it is.
    ///
    /// # Errors
    /// When that is not possible, or the connection fails.
    pub async fn remove(&self, path: impl Into<Bytes>, recursive: bool) -> Result<(), FileError> {
        let path = path.into();
        let mut connection = self.connection().await?;
        let body = self.body(Op::Remove(v1::FileRemove { path, recursive }));
        let first = connection.request(body).await;
        // No limit but the caller's: a tree may be of any size.
        self.end(connection, first)
    }

    /// Sets what `attributes` names; of a link at the path's end with `link`, else of what it leads to.
    ///
    /// # Errors
    /// When that is not possible, or the agent does not answer.
    pub async fn set(
        &self,
        path: impl Into<Bytes>,
        attributes: FileAttributes,
        link: bool,
    ) -> Result<(), FileError> {
        self.done(Op::Set(v1::FileSet {
            path: path.into(),
            attributes: Some(attributes),
            link,
        }))
        .await
    }

    /// Makes a symbolic link to `target`, which is stored as it is.
    ///
    /// # Errors
    /// When that is not possible, or the agent does not answer.
    pub async fn symlink(
        &self,
        target: impl Into<Bytes>,
        path: impl Into<Bytes>,
    ) -> Result<(), FileError> {
        let (target, path) = (target.into(), path.into());
        self.done(Op::Symlink(v1::FileSymlink { target, path }))
            .await
    }

    /// Gives a file a second name.
    ///
    /// # Errors
    /// When that is not possible, or the agent does not answer.
    pub async fn hard_link(
        &self,
        existing: impl Into<Bytes>,
        path: impl Into<Bytes>,
    ) -> Result<(), FileError> {
        let (existing, path) = (existing.into(), path.into());
        self.done(Op::Link(v1::FileLink { existing, path })).await
    }

    async fn done(&self, op: Op) -> Result<(), FileError> {
        let mut connection = self.connection().await?;
        let body = self.body(op);
        let first = limited(async { Ok(connection.request(body).await) }).await?;
        self.end(connection, first)
    }

    /// The only reply to a request, which has nothing to tell.
    fn end(
        &self,
        connection: Connection,
        reply: Result<from_agent::Body, RpcError>,
    ) -> Result<(), FileError> {
        let result = reply.and_then(|body| match body {
            from_agent::Body::File(v1::FileReply {
                reply: Some(file_reply::Reply::Done(_)),
                last: true,
            }) => Ok(()),
            other => Err(unexpected("the end of a file request", &other)),
        });
        if matches!(result, Ok(()) | Err(RpcError::Agent(_))) {
            self.session.put_back(connection);
        }
        Ok(result?)
    }

    /// Begins a request that may be repeated.
    async fn ask(&self, op: Op) -> Result<Answer, FileError> {
        let mut connection = self.connection().await?;
        let body = self.body(op);
        let mut first = limited(async { Ok(connection.request(body.clone()).await) }).await?;
        if matches!(first, Err(RpcError::Lost(_))) {
            // It had gone stale.
            connection = self.session.connect().await?;
            first = limited(async { Ok(connection.request(body).await) }).await?;
        }
        match first {
            Ok(first) => Ok(Answer {
                first: Some(first),
                session: self.session.clone(),
                connection: Some(connection),
            }),
            Err(error) => {
                if matches!(error, RpcError::Agent(_)) {
                    self.session.put_back(connection);
                }
                Err(error.into())
            }
        }
    }

    fn body(&self, op: Op) -> to_agent::Body {
        to_agent::Body::File(v1::FileRequest {
            root: self.root.clone(),
            op: Some(op),
        })
    }

    async fn connection(&self) -> Result<Connection, FileError> {
        let mut connection = self.session.any_connection().await?;
        // A write reads while it sends, so the hello must be over by then.
        connection.hello().await?;
        Ok(connection)
    }
}

/// The frames of an answer.
struct Answer {
    first: Option<from_agent::Body>,
    session: Session,
    /// Until the last frame.
    connection: Option<Connection>,
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answer")
            .field("connection", &self.connection)
            .finish_non_exhaustive()
    }
}

impl Answer {
    async fn next(&mut self) -> Result<Option<file_reply::Reply>, FileError> {
        let Some(connection) = &mut self.connection else {
            return Ok(None);
        };
        let body = match self.first.take() {
            Some(body) => Ok(body),
            None => limited(async { Ok(connection.receive().await) }).await?,
        };
        match body {
            Ok(from_agent::Body::File(v1::FileReply {
                reply: Some(reply),
                last,
            })) => {
                if last {
                    self.put_back();
                }
                Ok(Some(reply))
            }
            Ok(other) => {
                self.connection = None;
                Err(unexpected("FileReply", &other).into())
            }
            Err(error @ RpcError::Agent(_)) => {
                self.put_back();
                Err(error.into())
            }
            Err(error) => {
                self.connection = None;
                Err(error.into())
            }
        }
    }

    fn put_back(&mut self) {
        if let Some(connection) = self.connection.take() {
            self.session.put_back(connection);
        }
    }
}

/// A file that is being read.
#[derive(Debug)]
pub struct FileReader {
    answer: Answer,
    offset: u64,
    left: u64,
}

impl FileReader {
    /// The next piece; `None` at the end. The guest waits while nobody asks. Safe to cancel.
    ///
    /// # Errors
    /// When it cannot be read further; the pieces before were right.
    pub async fn next(&mut self) -> Result<Option<Bytes>, FileError> {
        let Some(reply) = self.answer.next().await? else {
            return Ok(None);
        };
        let file_reply::Reply::Data(mut data) = reply else {
            return Err(wrong("FileData"));
        };
        data.data
            .truncate(usize::try_from(self.left).unwrap_or(usize::MAX));
        if data.data.is_empty() {
            // The last; or, from a guest that gives more than was asked for, what nobody wants.
            self.answer.connection = None;
            return Ok(None);
        }
        if data.offset != self.offset {
            self.answer.connection = None;
            return Err(wrong("the next piece of the file"));
        }
        let length = data.data.len() as u64;
        self.offset += length;
        self.left -= length;
        Ok(Some(data.data))
    }
}

/// A folder that is being listed.
#[derive(Debug)]
pub struct FileListing {
    answer: Answer,
}

impl FileListing {
    /// The next entry; `None` behind the last.
    ///
    /// # Errors
    /// When the folder cannot be read further.
    pub async fn next(&mut self) -> Result<Option<FileInfo>, FileError> {
        match self.answer.next().await? {
            Some(file_reply::Reply::Info(info)) => Ok(Some(info)),
            Some(file_reply::Reply::Done(_)) | None => Ok(None),
            Some(_) => Err(wrong("FileInfo")),
        }
    }
}

/// A file that is being written. Dropped without [`finish`](Self::finish), an atomic write leaves no trace.
#[derive(Debug)]
pub struct FileWriter {
    session: Session,
    connection: Connection,
    offset: u64,
    /// It has been given up.
    failed: bool,
}

impl FileWriter {
    /// Adds bytes. Waits while the guest takes no more.
    ///
    /// # Errors
    /// When the guest cannot write them, or those before; the file is given up then.
    pub async fn write(&mut self, data: impl Into<Bytes>) -> Result<(), FileError> {
        let mut data = data.into();
        while !data.is_empty() {
            let piece = data.split_to(data.len().min(MAX_DATA_BYTES));
            let length = piece.len() as u64;
            self.send(piece, false).await?;
            self.offset += length;
        }
        Ok(())
    }

    /// Ends the file and waits until the guest has it.
    ///
    /// # Errors
    /// When the guest could not write it all; an atomic write has left the old file then.
    pub async fn finish(mut self) -> Result<(), FileError> {
        self.send(Bytes::new(), true).await?;
        let reply = limited(async { Ok(self.connection.receive().await) }).await?;
        let files = self.session.files(Bytes::new());
        files.end(self.connection, reply)
    }

    async fn send(&mut self, data: Bytes, eof: bool) -> Result<(), FileError> {
        let body = to_agent::Body::File(v1::FileRequest {
            root: Bytes::new(),
            op: Some(Op::Data(v1::FileData {
                offset: self.offset,
                eof,
                data,
            })),
        });
        if self.failed {
            return Err(RpcError::Lost("the file was given up".to_owned()).into());
        }
        // Until it is sent: a write that was cancelled has lost its place.
        self.failed = true;
        let Connection { reader, writer, .. } = &mut self.connection;
        writer.queue(body).map_err(RpcError::from)?;
        let sent = async {
            tokio::select! {
                biased;
                // Before its end a write is only ever answered by what went wrong.
                early = reader.receive(), if !eof => match early? {
                    from_agent::Body::Error(error) => Err(AgentError::from(error).into()),
                    other => Err(unexpected("an error", &other)),
                },
                sent = writer.flush() => sent,
            }
        };
        limited(async { Ok(sent.await?) }).await?;
        self.failed = false;
        Ok(())
    }
}

async fn limited<T>(step: impl Future<Output = Result<T, FileError>>) -> Result<T, FileError> {
    timeout(FILE_TIMEOUT, step)
        .await
        .unwrap_or(Err(FileError::Timeout))
}

fn wrong(expected: &str) -> FileError {
    RpcError::Protocol(format!("another reply than {expected} came")).into()
}

#[cfg(test)]
mod tests;
