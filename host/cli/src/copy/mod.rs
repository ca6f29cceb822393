//! `airlock cp`: files and folders between here and a sandbox, file by file over the agent's file requests.
//!
//! File by file rather than as one archive: every name goes through the resolver that keeps it beneath its root, on both
//! sides, and no parser of archives runs in the agent. The price is a round trip for each file.

mod download;
mod local;
mod place;
mod upload;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use airlock_sandbox::client::proto::v1::FileAttributes;
use airlock_sandbox::client::{FileError, FileInfo, Files};
use anyhow::Context;

pub(crate) use self::place::Place;
use crate::progress::Transfer;

/// File types, of `st_mode` (inode(7)).
const TYPE: u32 = 0o170_000;
const FOLDER: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const LINK: u32 = 0o120_000;

/// Folders that wait for their turn, and files with several names that are remembered; a guest can have any number.
const MAX_REMEMBERED: usize = 1 << 20;

/// How things are copied.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    /// Owners and set-id bits too.
    pub(crate) archive: bool,
}

impl Options {
    /// Permissions as they may be on the other side.
    fn mode(self, mode: u32) -> u32 {
        // Without the owner a set-id bit would mean another one.
        mode & if self.archive { 0o7777 } else { 0o1777 }
    }
}

/// Copies one thing.
pub(crate) async fn copy(
    files: &Files,
    from: &Place,
    to: &Place,
    options: Options,
) -> anyhow::Result<()> {
    match (from, to) {
        (Place::Stream, Place::Guest(_, path)) => upload::stream(files, path).await,
        (Place::Local(local), Place::Guest(_, path)) => {
            upload::upload(files, local, path, options).await
        }
        (Place::Guest(_, path), Place::Stream) => download::stream(files, path).await,
        (Place::Guest(_, path), Place::Local(local)) => {
            download::download(files, path, local, options).await
        }
        _ => anyhow::bail!(
            "one of the two must be in a sandbox (NAME:PATH), and the other here (a path or -)"
        ),
    }
}

/// What a guest's path leads to, if anything.
async fn look(files: &Files, path: &[u8], follow: bool) -> anyhow::Result<Option<FileInfo>> {
    match files.stat(path.to_vec(), follow).await {
        Ok(info) => Ok(Some(info)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn is(info: &FileInfo, kind: u32) -> bool {
    info.mode & TYPE == kind
}

/// `folder/name`.
fn join(folder: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = folder.to_vec();
    if !path.is_empty() && !path.ends_with(b"/") {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path
}

fn shown(path: &[u8]) -> String {
    OsStr::from_bytes(path).display().to_string()
}

fn times(mtime_unix_ns: i64) -> FileAttributes {
    FileAttributes {
        mtime_unix_ns: Some(mtime_unix_ns),
        ..FileAttributes::default()
    }
}

/// The agent's refusals name the path themselves; other errors do not.
fn about<T>(result: Result<T, FileError>, path: &[u8]) -> anyhow::Result<T> {
    match result {
        Err(error @ FileError::Agent(_)) => Err(error.into()),
        other => other.with_context(|| shown(path)),
    }
}

fn left_out(transfer: &Transfer, path: &str) {
    transfer.say(&format!(
        "airlock: left out {path}: neither a file, a folder nor a link"
    ));
}
