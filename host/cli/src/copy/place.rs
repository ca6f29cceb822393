//! What `cp` copies from and to, as it was typed.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use airlock_sandbox::Name;

/// One side of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// `-`: our stdin or stdout.
    Stream,
    /// A path here.
    Local(PathBuf),
    /// A path in a sandbox; a relative one begins at the root.
    Guest(Name, Vec<u8>),
}

impl Place {
    /// `NAME:PATH` is in a sandbox, unless a slash stands before the colon.
    pub(crate) fn parse(text: OsString) -> Result<Self, String> {
        let bytes = text.as_bytes();
        if bytes == b"-" {
            return Ok(Self::Stream);
        }
        let colon = bytes.iter().position(|byte| *byte == b':');
        let Some(colon) = colon.filter(|colon| !bytes[..*colon].contains(&b'/')) else {
            return Ok(Self::Local(OsString::from_vec(bytes.to_vec()).into()));
        };
        let name = OsStr::from_bytes(&bytes[..colon]).to_string_lossy();
        let name = name.parse::<Name>().map_err(|error| {
            format!("{error}; for a file here whose name has a colon, put ./ in front")
        })?;
        let path = match &bytes[colon + 1..] {
            b"" => b"/".to_vec(),
            path => path.to_vec(),
        };
        Ok(Self::Guest(name, path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_before_any_slash_makes_a_sandbox() {
        let parse = |text: &str| Place::parse(text.into());
        let guest = |path: &str| Ok(Place::Guest("box".parse().unwrap(), path.into()));
        let local = |path: &str| Ok(Place::Local(path.into()));
        assert_eq!(parse("-"), Ok(Place::Stream));
        assert_eq!(parse("box:/a:b"), guest("/a:b"));
        assert_eq!(parse("box:a"), guest("a"));
        assert_eq!(parse("box:"), guest("/"));
        assert_eq!(parse("./box:a"), local("./box:a"));
        assert_eq!(parse("/tmp/a:b"), local("/tmp/a:b"));
        assert_eq!(parse("a"), local("a"));
        assert!(parse("../b:x").is_ok());
        assert!(parse("no name:x").unwrap_err().contains("./"));
        assert!(parse(":x").is_err());
    }
}
