//! From here into a sandbox.

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use airlock_sandbox::client::proto::v1::{ErrorCode, FileAttributes};
use airlock_sandbox::client::{FileError, FileWriter, Files, Write};
use anyhow::{Context, bail, ensure};

use super::{FOLDER, LINK, MAX_REMEMBERED, Options, about, is, join, left_out, look, shown, times};
use crate::progress::Transfer;
use crate::stdin;

/// What is read at once: the most that one frame carries.
const READ_BYTES: usize = 128 << 10;

/// Our stdin into a file.
pub(super) async fn stream(files: &Files, path: &[u8]) -> anyhow::Result<()> {
    if let Some(info) = look(files, path, true).await? {
        ensure!(!is(&info, FOLDER), "{} is a folder", shown(path));
    }
    let mut transfer = Transfer::new(None);
    let mut writer = begin(files, path, Write::atomic(), Write::replace()).await?;
    let mut reads = stdin::read_in_thread();
    while let Some(read) = reads.recv().await {
        let data = read.context("cannot read stdin")?;
        transfer.add(data.len());
        about(writer.write(data).await, path)?;
    }
    about(writer.finish().await, path)
}

/// A file or a folder. Into a folder that is there it goes under its own name.
pub(super) async fn upload(
    files: &Files,
    local: &Path,
    path: &[u8],
    options: Options,
) -> anyhow::Result<()> {
    let meta = fs::metadata(local).with_context(|| local.display().to_string())?;
    let mut path = path.to_vec();
    match look(files, &path, true).await? {
        Some(info) if is(&info, FOLDER) => {
            // `.` and `..` have a name only once they are resolved.
            let resolved = local.canonicalize()?;
            let name = local.file_name().or_else(|| resolved.file_name());
            let name = name.context("the root folder has no name")?;
            path = join(&path, name.as_bytes());
        }
        Some(_) if meta.is_dir() => bail!("{} is not a folder", shown(&path)),
        None if path.ends_with(b"/") && !meta.is_dir() => {
            bail!("{}: no such folder", shown(&path))
        }
        _ => {}
    }
    let mut upload = Upload {
        files,
        options,
        transfer: Transfer::new(meta.is_file().then_some(meta.len())),
        names: HashMap::new(),
    };
    if meta.is_dir() {
        return upload.tree(local.to_owned(), path).await;
    }
    ensure!(
        meta.is_file(),
        "{} is not a regular file; to copy what it gives, use - and a pipe",
        local.display()
    );
    upload.file(local, &path, &meta, true).await
}

struct Upload<'a> {
    files: &'a Files,
    options: Options,
    transfer: Transfer,
    /// Files with several names, by device and inode: where their first is.
    names: HashMap<(u64, u64), Vec<u8>>,
}

enum Step {
    Enter(PathBuf, Vec<u8>),
    /// Everything in the folder is there: its time stays what is set now.
    Leave(Vec<u8>, FileAttributes),
}

impl Upload<'_> {
    async fn tree(&mut self, local: PathBuf, path: Vec<u8>) -> anyhow::Result<()> {
        let mut steps = vec![Step::Enter(local, path)];
        while let Some(step) = steps.pop() {
            match step {
                Step::Enter(local, path) => self.enter(&local, path, &mut steps).await?,
                Step::Leave(path, attributes) => {
                    about(self.files.set(path.clone(), attributes, false).await, &path)?;
                }
            }
        }
        Ok(())
    }

    async fn enter(
        &mut self,
        local: &Path,
        path: Vec<u8>,
        steps: &mut Vec<Step>,
    ) -> anyhow::Result<()> {
        let context = || local.display().to_string();
        let meta = fs::metadata(local).with_context(context)?;
        // Until everything is in it, its owner must be able to write; the guest's agent can anyway.
        let mode = self.options.mode(meta.mode()) | 0o700;
        match self.files.make_folder(path.clone(), mode, false).await {
            Err(error) if is_there(&error) => {
                let there = look(self.files, &path, true).await?;
                ensure!(
                    there.is_some_and(|info| is(&info, FOLDER)),
                    "{} is there and not a folder",
                    shown(&path)
                );
            }
            other => about(other, &path)?,
        }
        steps.push(Step::Leave(path.clone(), self.attributes(&meta)));
        for entry in fs::read_dir(local).with_context(context)? {
            let entry = entry.with_context(context)?;
            let local = entry.path();
            let to = join(&path, entry.file_name().as_bytes());
            let meta = entry
                .metadata()
                .with_context(|| local.display().to_string())?;
            if meta.is_dir() {
                steps.push(Step::Enter(local, to));
            } else if meta.is_symlink() {
                self.link(&local, to, &meta).await?;
            } else if meta.is_file() {
                self.file_or_name(&local, to, &meta).await?;
            } else {
                left_out(&self.transfer, &local.display().to_string());
            }
        }
        Ok(())
    }

    async fn link(&self, local: &Path, path: Vec<u8>, meta: &Metadata) -> anyhow::Result<()> {
        let target = fs::read_link(local).with_context(|| local.display().to_string())?;
        let target = target.as_os_str().as_bytes().to_vec();
        let made = self.files.symlink(target.clone(), path.clone()).await;
        if made.as_ref().err().is_some_and(is_there) {
            about(self.files.remove(path.clone(), false).await, &path)?;
            about(self.files.symlink(target, path.clone()).await, &path)?;
        } else {
            about(made, &path)?;
        }
        let attributes = FileAttributes {
            mode: None,
            ..self.attributes(meta)
        };
        about(self.files.set(path.clone(), attributes, true).await, &path)
    }

    async fn file_or_name(
        &mut self,
        local: &Path,
        path: Vec<u8>,
        meta: &Metadata,
    ) -> anyhow::Result<()> {
        if meta.nlink() > 1 {
            let id = (meta.dev(), meta.ino());
            if let Some(first) = self.names.get(&id) {
                let made = self.files.hard_link(first.clone(), path.clone()).await;
                if made.as_ref().err().is_some_and(is_there) {
                    about(self.files.remove(path.clone(), false).await, &path)?;
                    return about(
                        self.files.hard_link(first.clone(), path.clone()).await,
                        &path,
                    );
                }
                return about(made, &path);
            }
            if self.names.len() < MAX_REMEMBERED {
                self.names.insert(id, path.clone());
            }
        }
        self.file(local, &path, meta, false).await
    }

    /// Alone it is replaced atomically, which waits for the disk; in a tree that would be a wait for each file.
    async fn file(
        &mut self,
        local: &Path,
        path: &[u8],
        meta: &Metadata,
        alone: bool,
    ) -> anyhow::Result<()> {
        let context = || local.display().to_string();
        let mut file = File::open(local).with_context(context)?;
        let with = |write: Write| {
            write
                .mode(self.options.mode(meta.mode()))
                .attributes(self.attributes(meta))
        };
        let replace = with(Write::replace());
        let mut writer = if alone {
            begin(self.files, path, with(Write::atomic()), replace).await?
        } else {
            about(self.files.write(path.to_vec(), replace).await, path)?
        };
        loop {
            let mut data = vec![0; READ_BYTES];
            let length = file.read(&mut data).with_context(context)?;
            if length == 0 {
                break;
            }
            data.truncate(length);
            about(writer.write(data).await, path)?;
            self.transfer.add(length);
        }
        about(writer.finish().await, path)
    }

    fn attributes(&self, meta: &Metadata) -> FileAttributes {
        let ns = meta.mtime().saturating_mul(1_000_000_000);
        FileAttributes {
            mode: Some(self.options.mode(meta.mode())),
            uid: self.options.archive.then(|| meta.uid()),
            gid: self.options.archive.then(|| meta.gid()),
            ..times(ns.saturating_add(meta.mtime_nsec()))
        }
    }
}

/// Atomically, unless the path ends in a link: what that leads to is meant, and an atomic write would replace the link.
async fn begin(
    files: &Files,
    path: &[u8],
    atomic: Write,
    replace: Write,
) -> anyhow::Result<FileWriter> {
    let write = match look(files, path, false).await? {
        Some(info) if is(&info, LINK) => replace,
        _ => atomic,
    };
    about(files.write(path.to_vec(), write).await, path)
}

fn is_there(error: &FileError) -> bool {
    error.code() == Some(ErrorCode::ErrorExists)
}
