//! Every process of an exec: by its cgroup, or, where there is none (tests on machines without cgroup v2), by walking
//! /proc for the leader's session, process group and descendants. The walk cannot see a process that left the session
//! and whose parents are gone; a guest always has cgroup v2.

use std::collections::HashSet;
use std::fs;

use rustix::process::Pid;

use super::signals::send;
use crate::cgroup::ExecCgroup;

/// Rounds of "kill what is there" in a walk: a process may have forked between being listed and being killed.
const KILL_ROUNDS: usize = 8;

#[derive(Debug)]
pub(crate) enum Tree {
    Cgroup(ExecCgroup),
    Walk { leader: u32 },
}

impl Tree {
    /// Whether no process is left. A zombie counts as gone.
    pub(crate) fn is_empty(&self) -> bool {
        match self {
            Self::Cgroup(cgroup) => !cgroup.is_populated(),
            Self::Walk { leader } => walk(*leader).is_empty(),
        }
    }

    pub(crate) fn pids(&self) -> Vec<u32> {
        match self {
            Self::Cgroup(cgroup) => cgroup.pids(),
            Self::Walk { leader } => walk(*leader).into_iter().map(|p| p.pid).collect(),
        }
    }

    /// Sends `signal` to each process; SIGKILL reaches those that are being forked, too.
    pub(crate) fn signal(&self, signal: i32) {
        if signal == libc::SIGKILL {
            return self.kill();
        }
        for pid in self.pids() {
            send(pid, signal);
        }
    }

    pub(crate) fn kill(&self) {
        match self {
            Self::Cgroup(cgroup) => cgroup.kill(),
            Self::Walk { leader } => {
                for _ in 0..KILL_ROUNDS {
                    let left = walk(*leader);
                    if left.is_empty() {
                        break;
                    }
                    for process in left {
                        send(process.pid, libc::SIGKILL);
                    }
                }
            }
        }
    }

    /// Sends `signal` to the leader's process group.
    pub(crate) fn signal_group(&self, leader: u32, signal: i32) {
        // One by one rather than kill(-leader): once the leader has been reaped its number may name another group.
        for pid in self.pids() {
            let group = to_pid(pid).and_then(|p| rustix::process::getpgid(Some(p)).ok());
            if group.is_some_and(|g| g.as_raw_nonzero().get() as u32 == leader) {
                send(pid, signal);
            }
        }
    }
}

fn to_pid(pid: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(pid).ok()?)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Process {
    pid: u32,
    parent: u32,
    group: u32,
    session: u32,
    zombie: bool,
}

fn walk(leader: u32) -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let all = entries.filter_map(|entry| {
        let pid: u32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
        parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    });
    members(leader, &all.collect::<Vec<_>>())
}

/// Those of `all` that belong to `leader`, zombies left out.
fn members(leader: u32, all: &[Process]) -> Vec<Process> {
    let mut known: HashSet<u32> = HashSet::from([leader]);
    loop {
        let before = known.len();
        for p in all {
            if p.session == leader || p.group == leader || known.contains(&p.parent) {
                known.insert(p.pid);
            }
        }
        if known.len() == before {
            break;
        }
    }
    all.iter()
        .filter(|p| !p.zombie && known.contains(&p.pid))
        .copied()
        .collect()
}

/// proc(5): `pid (comm) state ppid pgrp session ...`; comm may hold anything, a ')' included.
fn parse_stat(text: &str) -> Option<Process> {
    let pid = text.split_once(' ')?.0.parse().ok()?;
    let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
    let zombie = matches!(fields.next()?, "Z" | "X");
    Some(Process {
        pid,
        zombie,
        parent: fields.next()?.parse().ok()?,
        group: fields.next()?.parse().ok()?,
        session: fields.next()?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_confuse_the_walk() {
        let p = parse_stat("12 (a) R (b) S 3 4 5 0 -1").unwrap();
        assert_eq!((p.pid, p.parent, p.group, p.session), (12, 3, 4, 5));
        assert!(!p.zombie);
    }

    #[test]
    fn descendants_belong_even_in_a_session_of_their_own() {
        let p = |pid, parent, session, zombie| Process {
            pid,
            parent,
            group: session,
            session,
            zombie,
        };
        let all = [
            p(1, 0, 1, false),
            p(13, 12, 13, false),
            p(12, 10, 10, true),
            p(10, 1, 10, false),
        ];
        let pids: Vec<_> = members(10, &all).iter().map(|p| p.pid).collect();
        assert_eq!(pids, [13, 10], "the zombie between them is left out");
    }
}
