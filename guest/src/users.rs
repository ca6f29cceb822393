//! Users and groups from the image's /etc/passwd and /etc/group, parsed here: libc's own look-up would load name
//! service libraries of the guest into the agent.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::time::SystemTime;

use rustix::fs::{Mode, OFlags};

/// Longest passwd or group file that is read. Ten thousand users fit.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Linux's NGROUPS_MAX (include/uapi/linux/limits.h).
const MAX_GROUPS: usize = 65536;
/// What setresuid(2) and setresgid(2) take as "leave it as it is", which would be root.
const NO_ID: u32 = u32::MAX;

/// Who an exec runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
    /// Name, home and shell as /etc/passwd has them; empty where it has no entry.
    pub(crate) name: Vec<u8>,
    pub(crate) home: Vec<u8>,
    pub(crate) shell: Vec<u8>,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum UserError {
    #[error("no user named {0:?} in /etc/passwd")]
    NoUser(String),
    #[error("no group named {0:?} in /etc/group")]
    NoGroup(String),
    #[error("{NO_ID} is no user or group id")]
    NoId,
    #[error("more than {MAX_GROUPS} supplementary groups")]
    TooManyGroups,
}

/// The two files, re-read when they have changed.
#[derive(Debug, Default)]
pub(crate) struct Users {
    passwd: Cached,
    group: Cached,
}

impl Users {
    /// Resolves `name`, `uid`, `name:group` or `uid:gid`; empty is root.
    pub(crate) fn resolve(&mut self, spec: &str, extra: &[u32]) -> Result<Identity, UserError> {
        let passwd = self.passwd.read("/etc/passwd");
        let group = self.group.read("/etc/group");
        resolve(passwd, group, spec, extra)
    }
}

#[derive(Debug, Default)]
struct Cached {
    stamp: Option<(u64, u64, i64, i64, Option<SystemTime>)>,
    text: Vec<u8>,
}

impl Cached {
    /// The file's text; empty if it is missing or not a plain file.
    fn read(&mut self, path: &str) -> &[u8] {
        let stamp = std::fs::metadata(path).ok().map(|m| {
            let modified = m.modified().ok();
            (m.ino(), m.size(), m.ctime(), m.ctime_nsec(), modified)
        });
        if stamp.is_none() || stamp != self.stamp {
            self.text = read_plain(path).unwrap_or_default();
            self.stamp = stamp;
        }
        &self.text
    }
}

/// Reads a plain file. Opened without blocking: a workload may have put a FIFO in its place.
fn read_plain(path: &str) -> Option<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty()).ok()?);
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut text = Vec::new();
    file.take(MAX_FILE_BYTES).read_to_end(&mut text).ok()?;
    Some(text)
}

fn resolve(passwd: &[u8], group: &[u8], spec: &str, extra: &[u32]) -> Result<Identity, UserError> {
    let (user, wanted_group) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (spec, None),
    };
    // A name wins over a number, as in chown and docker; no user at all is root.
    let number = if user.is_empty() {
        Some(0)
    } else {
        user.parse::<u32>().ok()
    };
    let entry = lines(passwd)
        .find(|f| !user.is_empty() && f.first() == Some(&user.as_bytes()))
        .or_else(|| lines(passwd).find(|f| number.is_some() && field_number(f, 2) == number));
    let uid = entry
        .as_ref()
        .and_then(|f| field_number(f, 2))
        .or(number)
        .ok_or_else(|| UserError::NoUser(user.to_owned()))?;
    let field = |index: usize| -> Vec<u8> {
        let value = entry.as_ref().and_then(|f| f.get(index));
        value.map(|v| v.to_vec()).unwrap_or_default()
    };
    let name = field(0);
    let gid = match wanted_group {
        Some(wanted) => lines(group)
            .find(|f| f.first() == Some(&wanted.as_bytes()))
            .and_then(|f| field_number(&f, 2))
            .or_else(|| wanted.parse().ok())
            .ok_or_else(|| UserError::NoGroup(wanted.to_owned()))?,
        None => entry.as_ref().and_then(|f| field_number(f, 3)).unwrap_or(0),
    };
    let mut groups = vec![gid];
    // Memberships come with a user, not with a user whose group was chosen (as in docker and su -g).
    if wanted_group.is_none() && !name.is_empty() {
        groups.extend(lines(group).filter_map(|f| {
            let members = f.get(3)?;
            let member = members.split(|b| *b == b',').any(|m| m == name);
            member.then(|| field_number(&f, 2)).flatten()
        }));
    }
    groups.extend_from_slice(extra);
    groups.sort_unstable();
    groups.dedup();
    if groups.len() > MAX_GROUPS {
        return Err(UserError::TooManyGroups);
    }
    if uid == NO_ID || groups.contains(&NO_ID) {
        return Err(UserError::NoId);
    }
    Ok(Identity {
        uid,
        gid,
        groups,
        name,
        home: field(5),
        shell: field(6),
    })
}

fn lines(text: &[u8]) -> impl Iterator<Item = Vec<&[u8]>> {
    text.split(|b| *b == b'\n')
        .filter(|line| !line.is_empty() && line[0] != b'#')
        .map(|line| line.split(|b| *b == b':').collect())
}

fn field_number(fields: &[&[u8]], index: usize) -> Option<u32> {
    std::str::from_utf8(fields.get(index)?).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] =
        b"root:x:0:0:root:/root:/bin/bash\nann:x:1000:100::/home/ann:/bin/sh\n42:x:7:7::/:/bin/false\nbroken\n";
    const GROUP: &[u8] =
        b"root:x:0:\nusers:x:100:\nwheel:x:10:ann,bob\nadm:x:4:bob\naudio:x:29:ann\n";

    fn of(spec: &str) -> Result<Identity, UserError> {
        resolve(PASSWD, GROUP, spec, &[])
    }

    #[test]
    fn a_name_brings_its_groups() {
        let ann = of("ann").unwrap();
        assert_eq!((ann.uid, ann.gid), (1000, 100));
        assert_eq!(ann.groups, [10, 29, 100]);
        assert_eq!(ann.home, b"/home/ann");
        assert_eq!(
            resolve(PASSWD, GROUP, "ann", &[5, 10]).unwrap().groups,
            [5, 10, 29, 100]
        );
    }

    #[test]
    fn a_number_needs_no_entry() {
        let nobody = of("1234:99").unwrap();
        assert_eq!((nobody.uid, nobody.gid), (1234, 99));
        assert_eq!(nobody.groups, [99]);
        assert!(nobody.name.is_empty());
        assert_eq!(of("1000").unwrap().name, b"ann");
        assert_eq!(of("42").unwrap().uid, 7, "a name wins over a number");
    }

    #[test]
    fn a_chosen_group_replaces_the_memberships() {
        let ann = of("ann:wheel").unwrap();
        assert_eq!((ann.gid, ann.groups), (10, vec![10]));
    }

    #[test]
    fn nobody_is_root_even_without_files() {
        let root = resolve(b"", b"", "", &[]).unwrap();
        assert_eq!((root.uid, root.gid), (0, 0));
    }

    #[test]
    fn unknown_names_are_errors() {
        assert_eq!(of("eve"), Err(UserError::NoUser("eve".into())));
        assert_eq!(of("ann:eves"), Err(UserError::NoGroup("eves".into())));
        assert_eq!(of("-1"), Err(UserError::NoUser("-1".into())));
    }

    #[test]
    fn user_4294967295_is_refused_and_does_not_run_as_root() {
        for spec in [
            "4294967295",
            "4294967295:0",
            "ann:4294967295",
            ":4294967295",
            "trick",
            "mate",
        ] {
            let passwd = b"trick:x:4294967295:0::/:/bin/sh\nmate:x:7:4294967295::/:/bin/sh\nann:x:1000:100::/:/bin/sh\n";
            assert_eq!(
                resolve(passwd, GROUP, spec, &[]),
                Err(UserError::NoId),
                "{spec}"
            );
        }
        assert_eq!(
            resolve(PASSWD, GROUP, "ann", &[NO_ID]),
            Err(UserError::NoId)
        );
    }
}
