//! Out of a sandbox to here.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use airlock_sandbox::client::{FileAttributes, FileInfo, Files};
use anyhow::{Context, bail, ensure};

use super::local::{self, Tree};
use super::{
    FOLDER, LINK, MAX_REMEMBERED, Options, REGULAR, about, is, join, left_out, look, shown, times,
};
use crate::output::{Piece, Sink};
use crate::progress::Transfer;

/// A file to our stdout.
pub(super) async fn stream(files: &Files, path: &[u8]) -> anyhow::Result<()> {
    let mut reader = about(files.read(path.to_vec()).await, path)?;
    let sink = Sink::stdout();
    while let Some(data) = about(reader.next().await, path)? {
        match sink.place().await {
            Some(place) => place.send(Piece::plain(data)),
            None => break,
        }
    }
    Ok(sink.finish().await?)
}

/// A file or a folder. Into a folder that is there it goes under its own name.
pub(super) async fn download(
    files: &Files,
    path: &[u8],
    local: &Path,
    options: Options,
) -> anyhow::Result<()> {
    let info = look(files, path, true).await?;
    let info = info.with_context(|| format!("{}: no such file or folder", shown(path)))?;
    let mut local = local.to_owned();
    if local.is_dir() {
        let name = path.split(|byte| *byte == b'/').rfind(|p| !p.is_empty());
        match name {
            Some(name) if is_name(name) => local.push(OsStr::from_bytes(name)),
            _ => bail!(
                "{} has no name to go under: give one behind {}/",
                shown(path),
                local.display()
            ),
        }
    } else if is(&info, FOLDER) && local.exists() {
        bail!("{} is not a folder", local.display());
    }
    let mut download = Download {
        files,
        options,
        transfer: Transfer::new(is(&info, REGULAR).then_some(info.size)),
        names: HashMap::new(),
    };
    let context = || local.display().to_string();
    if is(&info, FOLDER) {
        match fs::create_dir(&local) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            other => other.with_context(context)?,
        }
        let tree = Tree::open(&local).with_context(context)?;
        return download.tree(&tree, path, &info).await;
    }
    ensure!(is(&info, REGULAR), "{} is not a regular file", shown(path));
    // A path of the caller's own: links in it are meant.
    let mut open = OpenOptions::new();
    let file = open.write(true).create(true).truncate(true).open(&local);
    let mut file = file.with_context(context)?;
    download.content(path, &mut file, &local).await?;
    if file.metadata().with_context(context)?.is_file() {
        local::set(&file, &download.attributes(&info)).with_context(context)?;
    }
    Ok(())
}

/// Whether it names an entry of a folder and nothing else.
fn is_name(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..") && !name.contains(&b'/') && !name.contains(&0)
}

struct Download<'a> {
    files: &'a Files,
    options: Options,
    transfer: Transfer,
    /// Files with several names, by device and inode: where their first is.
    names: HashMap<(u64, u64), Vec<u8>>,
}

/// With paths beneath the top of the tree.
enum Step {
    Enter(Vec<u8>, FileAttributes),
    /// Everything in the folder is there: its mode and time stay what is set now.
    Leave(Vec<u8>, FileAttributes),
}

impl Download<'_> {
    async fn tree(&mut self, tree: &Tree, top: &[u8], info: &FileInfo) -> anyhow::Result<()> {
        let mut steps = vec![Step::Enter(Vec::new(), self.attributes(info))];
        while let Some(step) = steps.pop() {
            match step {
                Step::Enter(path, attributes) => {
                    if !path.is_empty() {
                        tree.folder(&path).with_context(|| shown(&path))?;
                    }
                    steps.push(Step::Leave(path.clone(), attributes));
                    self.enter(tree, top, &path, &mut steps).await?;
                }
                Step::Leave(path, attributes) => {
                    tree.set_folder(&path, &attributes)
                        .with_context(|| shown(&path))?;
                }
            }
        }
        Ok(())
    }

    async fn enter(
        &mut self,
        tree: &Tree,
        top: &[u8],
        path: &[u8],
        steps: &mut Vec<Step>,
    ) -> anyhow::Result<()> {
        let from = join(top, path);
        let mut listing = about(self.files.list(from.clone()).await, &from)?;
        while let Some(info) = about(listing.next().await, &from)? {
            ensure!(
                is_name(&info.path),
                "the guest lists {:?}, which is no name",
                shown(&info.path)
            );
            let to = join(path, &info.path);
            let from = join(&from, &info.path);
            if is(&info, FOLDER) {
                ensure!(
                    steps.len() < MAX_REMEMBERED,
                    "more than {MAX_REMEMBERED} folders"
                );
                steps.push(Step::Enter(to, self.attributes(&info)));
            } else if is(&info, LINK) {
                let made = tree
                    .link(&info.link_target, &to)
                    .and_then(|()| tree.set_link(&to, &self.attributes(&info)));
                made.with_context(|| shown(&to))?;
            } else if is(&info, REGULAR) {
                self.file_or_name(tree, &from, to, &info).await?;
            } else {
                left_out(&self.transfer, &shown(&from));
            }
        }
        Ok(())
    }

    async fn file_or_name(
        &mut self,
        tree: &Tree,
        from: &[u8],
        to: Vec<u8>,
        info: &FileInfo,
    ) -> anyhow::Result<()> {
        if info.links > 1 {
            let id = (info.device, info.inode);
            if let Some(first) = self.names.get(&id) {
                let made = tree.second_name(first, &to);
                return made.with_context(|| shown(&to));
            }
            if self.names.len() < MAX_REMEMBERED {
                self.names.insert(id, to.clone());
            }
        }
        let mut file = tree.file(&to).with_context(|| shown(&to))?;
        let name = Path::new(OsStr::from_bytes(&to));
        self.content(from, &mut file, name).await?;
        local::set(&file, &self.attributes(info)).with_context(|| shown(&to))
    }

    async fn content(&mut self, from: &[u8], file: &mut File, to: &Path) -> anyhow::Result<()> {
        let mut reader = about(self.files.read(from.to_vec()).await, from)?;
        while let Some(data) = about(reader.next().await, from)? {
            file.write_all(&data)
                .with_context(|| to.display().to_string())?;
            self.transfer.add(data.len());
        }
        Ok(())
    }

    fn attributes(&self, info: &FileInfo) -> FileAttributes {
        FileAttributes {
            mode: Some(self.options.mode(info.mode)),
            uid: self.options.archive.then_some(info.uid),
            gid: self.options.archive.then_some(info.gid),
            ..times(info.mtime_unix_ns)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_lists_must_be_a_name() {
        for name in [&b""[..], b".", b"..", b"a/b", b"/etc", b"a\0b"] {
            assert!(!is_name(name), "{name:?}");
        }
        for name in [&b"a"[..], b"...", b"\xff\n", b"-rf"] {
            assert!(is_name(name), "{name:?}");
        }
    }
}
