//! A folder of its own for each test, gone with it. Tests only.

use std::fs;
use std::path::{Path, PathBuf};

use crate::paths::Paths;

pub(crate) struct TestFolder(PathBuf);

impl TestFolder {
    pub(crate) fn new() -> Self {
        // Short, because sockets are made in it.
        let path = std::env::temp_dir().join(format!("airlock-{:016x}", crate::random()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn paths(&self) -> Paths {
        Paths {
            cache: self.0.join("cache"),
            run: self.0.join("run"),
        }
    }

    /// Writes a file below the folder, with the folders above it.
    pub(crate) fn write(&self, file: &str, contents: &[u8]) -> PathBuf {
        let path = self.0.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, contents).unwrap();
        path
    }
}

impl Drop for TestFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
