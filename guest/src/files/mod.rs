//! Files for the host: each request resolved beneath the root it names, and done in steps short enough that execs go on
//! meanwhile. Whose turn it is, and what a connection may send when, is the server's business.

mod list;
mod make;
mod meta;
mod read;
mod remove;
mod root;
mod sync;
mod write;

use std::os::fd::BorrowedFd;

use airlock_proto::v1::file_request::Op;
use airlock_proto::v1::{
    Empty, ErrorCode, FileAttributes, FileData, FileInfo, FileReply, FileRequest, FileSet,
    file_reply, from_agent::Body,
};
use rustix::io::Errno;

use crate::out_queue::OutQueue;
use list::List;
use read::Read;
use remove::Remove;
use root::Root;
use write::Write;

/// Why a request was not done.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) code: ErrorCode,
    pub(crate) message: String,
    pub(crate) errno: i32,
}

impl Failure {
    fn invalid(message: &str) -> Self {
        Self {
            code: ErrorCode::ErrorInvalid,
            message: message.to_owned(),
            errno: Errno::INVAL.raw_os_error(),
        }
    }

    /// What the kernel said about `path`.
    fn of(path: &[u8], errno: Errno) -> Self {
        let code = match errno {
            Errno::NOENT => ErrorCode::ErrorNotFound,
            Errno::EXIST => ErrorCode::ErrorExists,
            Errno::NOSPC | Errno::DQUOT => ErrorCode::ErrorNoSpace,
            Errno::INVAL | Errno::NAMETOOLONG => ErrorCode::ErrorInvalid,
            Errno::NOMEM | Errno::MFILE | Errno::NFILE => ErrorCode::ErrorExhausted,
            _ => ErrorCode::ErrorIo,
        };
        let path = if path.is_empty() { b"/" } else { path };
        // Two PATH_MAX at most, so that the frame stays small whatever was asked for.
        let shown = String::from_utf8_lossy(&path[..path.len().min(4096)]);
        Self {
            code,
            message: format!("{shown}: {}", words(errno)),
            errno: errno.raw_os_error(),
        }
    }
}

/// The kernel's word for an error, without the number that stands beside it in the reply.
fn words(errno: Errno) -> String {
    let text = errno.to_string();
    match text.split_once(" (os error") {
        Some((words, _)) => words.to_owned(),
        None => text,
    }
}

fn at(path: &[u8]) -> impl Fn(Errno) -> Failure + '_ {
    move |errno| Failure::of(path, errno)
}

/// What became of a request at once.
#[derive(Debug)]
pub(crate) enum Begun {
    Done(FileReply),
    Work(Box<Work>),
}

/// A request that takes more than one step.
#[derive(Debug)]
pub(crate) enum Work {
    Read(Read),
    /// Goes on when the host sends data.
    Write(Write),
    List(List),
    Remove(Remove),
}

impl Work {
    /// One step: some bytes, some entries. Queues what there is to tell; true if that was the last of it.
    pub(crate) fn step(&mut self, out: &mut OutQueue) -> Result<bool, Failure> {
        match self {
            Self::Read(read) => {
                let data = read.step()?;
                let last = data.eof;
                Ok(push(out, file_reply::Reply::Data(data), last))
            }
            Self::List(list) => match list.step()? {
                Some(entries) => {
                    for info in entries {
                        push(out, file_reply::Reply::Info(info), false);
                    }
                    Ok(false)
                }
                None => Ok(push(out, file_reply::Reply::Done(Empty {}), true)),
            },
            Self::Remove(remove) => {
                let over = remove.step()?;
                Ok(over && push(out, file_reply::Reply::Done(Empty {}), true))
            }
            Self::Write(_) => Ok(false),
        }
    }

    /// Whether it goes on by itself, rather than when the host sends something.
    pub(crate) fn is_self_driven(&self) -> bool {
        !matches!(self, Self::Write(_))
    }

    /// Whether what the host sends must wait until the disk has done something.
    pub(crate) fn is_waiting(&self) -> bool {
        matches!(self, Self::Write(write) if write.is_waiting())
    }

    /// What has come up to be watched: readable once the disk has done what it is waited for.
    pub(crate) fn new_sync(&mut self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Write(write) => write.new_sync(),
            _ => None,
        }
    }

    /// The disk may have done something; true if everything is done.
    pub(crate) fn synced(&mut self) -> Result<bool, Failure> {
        match self {
            Self::Write(write) => write.go_on(),
            _ => Ok(false),
        }
    }

    /// More bytes of a write; true if everything is done.
    pub(crate) fn data(&mut self, data: &FileData) -> Result<bool, Failure> {
        match self {
            Self::Write(write) => write.data(data),
            _ => Err(Failure::invalid("data without a write")),
        }
    }
}

fn push(out: &mut OutQueue, reply: file_reply::Reply, last: bool) -> bool {
    out.push(Body::File(FileReply {
        reply: Some(reply),
        last,
    }));
    last
}

pub(crate) fn done() -> FileReply {
    FileReply {
        reply: Some(file_reply::Reply::Done(Empty {})),
        last: true,
    }
}

fn told(info: FileInfo) -> FileReply {
    FileReply {
        reply: Some(file_reply::Reply::Info(info)),
        last: true,
    }
}

/// Does what a request asks for, or begins to.
pub(crate) fn begin(request: &FileRequest) -> Result<Begun, Failure> {
    let root = Root::open(&request.root)?;
    let op = request.op.as_ref();
    let op = op.ok_or_else(|| Failure::invalid("a file request without an operation"))?;
    let work = |work| Ok(Begun::Work(Box::new(work)));
    match op {
        Op::Read(read) => return work(Work::Read(Read::begin(&root, read)?)),
        Op::Write(write) => return work(Work::Write(Write::begin(&root, write)?)),
        Op::List(list) => return work(Work::List(List::begin(&root, &list.path)?)),
        Op::Remove(remove) => {
            if let Some(tree) = Remove::begin(&root, &remove.path, remove.recursive)? {
                return work(Work::Remove(tree));
            }
        }
        Op::Stat(stat) => {
            let info = meta::stat(&root, &stat.path, stat.follow)?;
            return Ok(Begun::Done(told(info)));
        }
        Op::Mkdir(mkdir) => make::folder(&root, mkdir)?,
        Op::Rename(rename) => make::rename(&root, &rename.from, &rename.to)?,
        Op::Symlink(symlink) => make::symlink(&root, &symlink.target, &symlink.path)?,
        Op::Link(link) => make::link(&root, &link.existing, &link.path)?,
        Op::Chmod(chmod) => {
            let attributes = FileAttributes {
                mode: Some(chmod.mode),
                ..FileAttributes::default()
            };
            set(&root, &chmod.path, attributes)?;
        }
        Op::Chown(chown) => {
            let named = |id: u32| (id != u32::MAX).then_some(id);
            let attributes = FileAttributes {
                uid: named(chown.uid),
                gid: named(chown.gid),
                ..FileAttributes::default()
            };
            set(&root, &chown.path, attributes)?;
        }
        Op::Set(request) => meta::set(&root, request)?,
        Op::Data(_) => return Err(Failure::invalid("data without a write")),
    }
    Ok(Begun::Done(done()))
}

fn set(root: &Root, path: &bytes::Bytes, attributes: FileAttributes) -> Result<(), Failure> {
    let request = FileSet {
        path: path.clone(),
        attributes: Some(attributes),
        link: false,
    };
    meta::set(root, &request)
}
