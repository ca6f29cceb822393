//! Where things are on the host: the cache (made once, safe to delete) and the run root (what runs now).

use std::env;
use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Longest path of a unix socket: `sun_path` is 108 bytes with its end (unix(7)).
pub const MAX_SOCKET_PATH_BYTES: usize = 107;

/// The two folders everything lies in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// `$AIRLOCK_CACHE`, else `airlock` in `$XDG_CACHE_HOME` or `~/.cache`.
    pub cache: PathBuf,
    /// `$AIRLOCK_RUN`, else `airlock` in `$XDG_RUNTIME_DIR` or `/tmp/airlock-$UID`.
    pub run: PathBuf,
}

/// Why a folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PathsError {
    /// No way to know where the cache is.
    #[error(
        "neither AIRLOCK_CACHE, XDG_CACHE_HOME nor HOME is set: set AIRLOCK_CACHE to the cache folder"
    )]
    NoHome,
    /// A relative path would mean another folder in the next working directory.
    #[error("{name}={value:?} is not an absolute path")]
    Relative {
        /// The variable.
        name: &'static str,
        /// Its value.
        value: OsString,
    },
    /// The system refused.
    #[error("cannot use {}", path.display())]
    Io {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Others could put their own files into it.
    #[error("{} belongs to another user or is open to others: set AIRLOCK_RUN to a folder of your own", path.display())]
    NotOurs {
        /// The folder.
        path: PathBuf,
    },
}

impl Paths {
    /// From the environment.
    ///
    /// # Errors
    /// When a variable is relative, or none says where the cache is.
    pub fn from_env() -> Result<Self, PathsError> {
        Self::from_lookup(|name| env::var_os(name).filter(|value| !value.is_empty()))
    }

    fn from_lookup(get: impl Fn(&str) -> Option<OsString>) -> Result<Self, PathsError> {
        let absolute = |name: &'static str| match get(name) {
            Some(value) if Path::new(&value).is_absolute() => Ok(Some(PathBuf::from(value))),
            Some(value) => Err(PathsError::Relative { name, value }),
            None => Ok(None),
        };
        let cache = match (
            absolute("AIRLOCK_CACHE")?,
            absolute("XDG_CACHE_HOME")?,
            absolute("HOME")?,
        ) {
            (Some(cache), _, _) => cache,
            (None, Some(xdg), _) => xdg.join("airlock"),
            (None, None, Some(home)) => home.join(".cache/airlock"),
            (None, None, None) => return Err(PathsError::NoHome),
        };
        let run = match (absolute("AIRLOCK_RUN")?, absolute("XDG_RUNTIME_DIR")?) {
            (Some(run), _) => run,
            (None, Some(xdg)) => xdg.join("airlock"),
            (None, None) => {
                let uid = rustix::process::getuid().as_raw();
                PathBuf::from(format!("/tmp/airlock-{uid}")).join("airlock")
            }
        };
        Ok(Self { cache, run })
    }

    /// Makes the run root, and makes sure that nobody else can write to it: sockets in it are as good as a shell.
    ///
    /// # Errors
    /// When it cannot be made, or is not ours alone.
    pub fn ensure_run(&self) -> Result<(), PathsError> {
        let failed = |source| PathsError::Io {
            path: self.run.clone(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.run)
            .map_err(failed)?;
        // /tmp/airlock-$UID is made by the call above too, if it is not there; someone else may have been quicker.
        for path in [Some(self.run.as_path()), self.run.parent()]
            .into_iter()
            .flatten()
        {
            let meta = fs::symlink_metadata(path).map_err(failed)?;
            let ours = meta.uid() == rustix::process::getuid().as_raw();
            let ours_or_roots = ours || meta.uid() == 0;
            let closed = meta.mode() & 0o022 == 0;
            let sticky = meta.mode() & 0o1000 != 0;
            let fine = if path == self.run {
                meta.is_dir() && ours && closed
            } else {
                ours_or_roots && (closed || sticky)
            };
            if !fine {
                return Err(PathsError::NotOurs {
                    path: path.to_owned(),
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(set: &[(&str, &str)]) -> Result<Paths, PathsError> {
        Paths::from_lookup(|name| {
            set.iter()
                .find(|(set, _)| *set == name)
                .map(|(_, value)| OsString::from(value))
        })
    }

    #[test]
    fn the_variables_win_in_the_documented_order() {
        let all = paths(&[
            ("AIRLOCK_CACHE", "/c"),
            ("XDG_CACHE_HOME", "/x"),
            ("HOME", "/h"),
            ("AIRLOCK_RUN", "/r"),
        ])
        .unwrap();
        assert_eq!(
            all,
            Paths {
                cache: "/c".into(),
                run: "/r".into()
            }
        );
        let xdg = paths(&[
            ("XDG_CACHE_HOME", "/x"),
            ("HOME", "/h"),
            ("XDG_RUNTIME_DIR", "/run/user/7"),
        ])
        .unwrap();
        assert_eq!(
            xdg,
            Paths {
                cache: "/x/airlock".into(),
                run: "/run/user/7/airlock".into()
            }
        );
        let home = paths(&[("HOME", "/h")]).unwrap();
        assert_eq!(home.cache, Path::new("/h/.cache/airlock"));
        assert!(home.run.starts_with("/tmp") && home.run.ends_with("airlock"));
        assert!(matches!(paths(&[]), Err(PathsError::NoHome)));
        assert!(matches!(
            paths(&[("AIRLOCK_RUN", "here"), ("HOME", "/h")]),
            Err(PathsError::Relative { .. })
        ));
    }
}
