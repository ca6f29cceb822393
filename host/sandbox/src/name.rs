//! Names of sandboxes: they become folder names, host names and part of socket paths.

use std::fmt;
use std::str::FromStr;

/// Longest name: a host name's label (RFC 1123), which every guest accepts.
pub const MAX_NAME_BYTES: usize = 63;

/// A valid name: 1 to [`MAX_NAME_BYTES`] of `a-z 0-9 -`, beginning with a letter or digit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

/// Why a text is no name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no sandbox name: use 1 to {MAX_NAME_BYTES} of a-z, 0-9 and -, beginning with a letter or digit"
)]
pub struct NameError(String);

impl Name {
    /// A name that nobody has chosen: `run-` and 48 random bits.
    #[must_use]
    pub fn random() -> Self {
        Self(format!("run-{:012x}", crate::random() >> 16))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let first_fits = text
            .bytes()
            .next()
            .is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let all_fit = text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if first_fits && all_fit && text.len() <= MAX_NAME_BYTES {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError(text.chars().take(2 * MAX_NAME_BYTES).collect()))
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<std::path::Path> for Name {
    fn as_ref(&self) -> &std::path::Path {
        self.0.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_the_run_root_or_hide_in_it_are_refused() {
        for text in [
            "",
            ".",
            "..",
            ".new",
            "a/b",
            "A",
            "a_b",
            "-a",
            "ä",
            "a b",
            "a\0",
            &"a".repeat(64),
        ] {
            assert!(text.parse::<Name>().is_err(), "{text:?}");
        }
        for text in ["a", "0", "web-1", &"a".repeat(63), Name::random().as_str()] {
            assert!(text.parse::<Name>().is_ok(), "{text:?}");
        }
    }
}
