//! cgroup v2: one group per exec beneath a folder that is the agent's, made ahead so that starting an exec does not
//! wait for it. Clause names are those of the kernel's Documentation/admin-guide/cgroup-v2.rst.

use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use airlock_proto::v1::Limits;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::{self, Errno};

/// Groups kept ready. Two cover a client that starts the next exec while the last one's group is being removed.
const SPARE_GROUPS: usize = 2;
/// Ended groups kept for later; each has a few descriptors open.
const MAX_ENDED_GROUPS: usize = 16;
/// Memory that may still be charged to a group that is used again: each CPU charges in steps of 64 pages
/// (MEMCG_CHARGE_BATCH, mm/memcontrol.c), so no figure is finer than that.
const MAX_LEFT_BYTES: u64 = 512 << 10;
/// Controllers an exec's limits and reports need.
const CONTROLLERS: [&str; 3] = ["+memory", "+pids", "+cpu"];
/// Longest cgroup.procs that is read at once; more processes are met by reading again.
const PROCS_CHUNK_BYTES: usize = 16 << 10;
/// Period of cpu.max that [`Limits::cpu_quota_us`] is counted in.
const CPU_PERIOD_US: u64 = 100_000;

/// The folder all execs' groups are in.
#[derive(Debug)]
pub(crate) struct Cgroups {
    folder: OwnedFd,
    spare: Vec<ExecCgroup>,
    /// Ended, to be removed when there is time.
    ended: Vec<ExecCgroup>,
    next: u64,
}

/// The group of one exec.
#[derive(Debug)]
pub(crate) struct ExecCgroup {
    name: String,
    folder: OwnedFd,
    events: OwnedFd,
    memory_events: Option<OwnedFd>,
    memory_peak: Option<OwnedFd>,
    memory_current: Option<OwnedFd>,
    /// Limits were set, so it is not used again.
    is_limited: bool,
    /// cgroup.kill was written, so it is not used again: a kernel has been seen (6.18.44; 6.12.117 does not do it) that
    /// kills at once whatever is forked into a group that was ever killed.
    is_killed: Cell<bool>,
    /// OOM kills of execs that used it before.
    earlier_oom_kills: u64,
}

impl Cgroups {
    /// Takes `folder` (which must be in a cgroup v2 hierarchy), with the execs' groups in `folder`/exec.
    pub(crate) fn open(folder: &Path) -> io::Result<Self> {
        make(CWD, folder)?;
        enable_controllers(folder);
        let execs = folder.join("exec");
        make(CWD, &execs)?;
        enable_controllers(&execs);
        let mut cgroups = Self {
            folder: open_folder(CWD, &execs)?,
            spare: Vec::new(),
            ended: Vec::new(),
            next: 0,
        };
        // Shows now rather than at the first exec that groups can be made here and that they are v2.
        let first = cgroups.make_group()?;
        cgroups.spare.push(first);
        Ok(cgroups)
    }

    /// A group without a past, with `limits` if there are any.
    pub(crate) fn take(&mut self, limits: Option<&Limits>) -> io::Result<ExecCgroup> {
        let mut group = match self.spare.pop() {
            Some(group) => group,
            None => match self.reuse_ended() {
                Some(group) => group,
                None => self.make_group()?,
            },
        };
        if let Some(limits) = limits {
            group.is_limited = true;
            if let Err(error) = group.limit(limits) {
                self.give_back(group);
                return Err(error);
            }
        }
        Ok(group)
    }

    /// Takes a group whose processes are gone.
    pub(crate) fn give_back(&mut self, group: ExecCgroup) {
        self.ended.push(group);
        // A client that never pauses leaves no time to tidy up in. The oldest is the one least likely to be busy.
        if self.ended.len() > MAX_ENDED_GROUPS && self.remove(&self.ended[0]) != Err(Errno::BUSY) {
            self.ended.remove(0);
        }
    }

    /// Whether [`Self::tidy`] has something to do.
    pub(crate) fn is_untidy(&self) -> bool {
        !self.ended.is_empty() || self.spare.len() < SPARE_GROUPS
    }

    /// Makes one spare group, of an ended one if that will do, or removes one ended group. False: that failed, and is
    /// better tried again later.
    pub(crate) fn tidy(&mut self) -> bool {
        if self.spare.len() < SPARE_GROUPS {
            let group = match self.reuse_ended() {
                Some(group) => Ok(group),
                None => self.make_group(),
            };
            return group.map(|group| self.spare.push(group)).is_ok();
        }
        let Some(group) = self.ended.pop() else {
            return true;
        };
        // Busy: a process that was just reaped may hold it for a moment.
        let busy = self.remove(&group) == Err(Errno::BUSY);
        if busy {
            self.ended.insert(0, group);
        }
        !busy
    }

    /// An ended group that is as good as a new one. Making and removing groups is the dearest part of a short exec, the
    /// kernel's work of burying one included.
    fn reuse_ended(&mut self) -> Option<ExecCgroup> {
        let at = self.ended.iter().rposition(|group| !group.is_spent())?;
        let mut group = self.ended.remove(at);
        if group.renew() {
            return Some(group);
        }
        self.ended.insert(at, group);
        None
    }

    /// Takes back a group in which a probe has run.
    pub(crate) fn put_back(&mut self, group: ExecCgroup) {
        self.spare.push(group);
    }

    /// Stops (or lets go on) every exec.
    pub(crate) fn freeze(&self, frozen: bool) -> io::Result<()> {
        write(
            &self.folder,
            "cgroup.freeze",
            if frozen { "1" } else { "0" },
        )
    }

    /// Kills every exec, whether or not the agent knows of it.
    pub(crate) fn kill_all(&self) {
        let _ = write(&self.folder, "cgroup.kill", "1");
    }

    pub(crate) fn is_populated(&self) -> bool {
        let Ok(events) = open_file(&self.folder, "cgroup.events") else {
            return false;
        };
        read_key(&events, b"populated ") != Some(0)
    }

    fn make_group(&mut self) -> io::Result<ExecCgroup> {
        let name = loop {
            let name = self.next.to_string();
            self.next += 1;
            match rustix::fs::mkdirat(&self.folder, &name, Mode::from_raw_mode(0o755)) {
                // Left by an agent before this one: remove it if it is empty, and take the next number.
                Err(Errno::EXIST) => {
                    let _ = rustix::fs::unlinkat(&self.folder, &name, AtFlags::REMOVEDIR);
                }
                other => break other.map(|()| name)?,
            }
        };
        let folder = open_folder(&self.folder, &name)?;
        Ok(ExecCgroup {
            events: open_file(&folder, "cgroup.events")?,
            memory_events: open_file(&folder, "memory.events").ok(),
            // "reset" written to it makes this descriptor start anew (since Linux 6.12).
            memory_peak: open_with(&folder, "memory.peak", OFlags::RDWR)
                .or_else(|_| open_file(&folder, "memory.peak"))
                .ok(),
            memory_current: open_file(&folder, "memory.current").ok(),
            is_limited: false,
            is_killed: Cell::new(false),
            earlier_oom_kills: 0,
            name,
            folder,
        })
    }

    fn remove(&self, group: &ExecCgroup) -> io::Result<()> {
        rustix::fs::unlinkat(&self.folder, &group.name, AtFlags::REMOVEDIR)
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        for group in self.ended.iter().chain(&self.spare) {
            let _ = self.remove(group);
        }
    }
}

impl ExecCgroup {
    /// For CLONE_INTO_CGROUP.
    pub(crate) fn folder(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }

    /// cgroup.events, which polls as EPOLLPRI when "populated" changes.
    pub(crate) fn events(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    pub(crate) fn is_populated(&self) -> bool {
        read_key(&self.events, b"populated ") != Some(0)
    }

    /// Kills every process in the group and those being forked into it.
    pub(crate) fn kill(&self) {
        // cgroup.kill is of Linux 5.14, and the group exists: what could fail is being out of memory, and then the
        // caller's proof (populated 0) does not come and it tries again.
        self.is_killed.set(true);
        let _ = write(&self.folder, "cgroup.kill", "1");
    }

    pub(crate) fn pids(&self) -> Vec<u32> {
        let Ok(file) = open_file(&self.folder, "cgroup.procs") else {
            return Vec::new();
        };
        let mut text = Vec::with_capacity(PROCS_CHUNK_BYTES);
        loop {
            text.reserve(PROCS_CHUNK_BYTES);
            match io::read(&file, rustix::buffer::spare_capacity(&mut text)) {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
        String::from_utf8_lossy(&text)
            .lines()
            .filter_map(|line| line.parse().ok())
            .collect()
    }

    /// Processes of the group that the kernel's OOM killer has killed.
    pub(crate) fn oom_kills(&self) -> u64 {
        let file = self.memory_events.as_ref();
        let all = file.and_then(|f| read_key(f, b"oom_kill ")).unwrap_or(0);
        all.saturating_sub(self.earlier_oom_kills)
    }

    /// Whether no other exec may have it.
    fn is_spent(&self) -> bool {
        self.is_limited || self.is_killed.get()
    }

    /// Makes the group as good as new; false if it cannot be. What a privileged exec wrote into its own group's files
    /// is the one thing that is not looked for: it holds for that sandbox's later execs, whose root it was.
    fn renew(&mut self) -> bool {
        if self.is_spent() || self.is_populated() {
            return false;
        }
        // Groups that the exec made inside its own (kernfs counts folders as links).
        if rustix::fs::fstat(&self.folder).is_ok_and(|stat| stat.st_nlink > 2) {
            return false;
        }
        // Page cache that stays charged here would count as the next exec's memory.
        let left = self.memory_current.as_ref().and_then(|f| read_key(f, b""));
        if left.is_some_and(|left| left > MAX_LEFT_BYTES) {
            return false;
        }
        if let Some(peak) = &self.memory_peak
            && io::write(peak, b"reset\n").is_err()
        {
            return false;
        }
        self.earlier_oom_kills += self.oom_kills();
        true
    }

    /// Most memory the group has used, in bytes; 0 if the kernel does not tell.
    pub(crate) fn memory_peak(&self) -> u64 {
        let file = self.memory_peak.as_ref();
        file.and_then(|f| read_key(f, b"")).unwrap_or(0)
    }

    fn limit(&self, limits: &Limits) -> io::Result<()> {
        let set = |file: &str, value: u64| {
            if value == 0 {
                return Ok(());
            }
            write(&self.folder, file, &value.to_string())
        };
        set("memory.max", limits.memory_bytes)?;
        if limits.memory_bytes != 0 {
            // Without this the limit would be on what is not swapped. Absent without swap.
            let _ = write(&self.folder, "memory.swap.max", "0");
        }
        set("pids.max", limits.pids)?;
        if limits.cpu_quota_us != 0 {
            let value = format!("{} {CPU_PERIOD_US}", limits.cpu_quota_us);
            write(&self.folder, "cpu.max", &value)?;
        }
        Ok(())
    }
}

/// Makes a folder; one that exists is as good.
fn make(at: impl AsFd, path: &Path) -> io::Result<()> {
    match rustix::fs::mkdirat(at, path, Mode::from_raw_mode(0o755)) {
        Err(Errno::EXIST) => Ok(()),
        other => other,
    }
}

/// Hands the controllers down, each on its own: one that the kernel lacks must not keep the others away.
pub(crate) fn enable_controllers(folder: &Path) {
    let Ok(folder) = open_folder(CWD, folder) else {
        return;
    };
    if write(&folder, "cgroup.subtree_control", &CONTROLLERS.join(" ")).is_ok() {
        return;
    }
    for controller in CONTROLLERS {
        let _ = write(&folder, "cgroup.subtree_control", controller);
    }
}

/// Writes one value into a file of the cgroup folder at `path`.
pub(crate) fn set(path: &Path, file: &str, value: &str) -> io::Result<()> {
    write(&open_folder(CWD, path)?, file, value)
}

fn open_folder(at: impl AsFd, path: impl rustix::path::Arg) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(at, path, flags, Mode::empty())
}

fn open_file(folder: impl AsFd, name: &str) -> io::Result<OwnedFd> {
    open_with(folder, name, OFlags::RDONLY)
}

fn open_with(folder: impl AsFd, name: &str, flags: OFlags) -> io::Result<OwnedFd> {
    rustix::fs::openat(folder, name, flags | OFlags::CLOEXEC, Mode::empty())
}

fn write(folder: impl AsFd, name: &str, value: &str) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(folder, name, flags, Mode::empty())?;
    io::write(&file, value.as_bytes()).map(|_| ())
}

/// The number behind `key` at the start of a line.
fn read_key(file: impl AsFd, key: &[u8]) -> Option<u64> {
    // The files read here have a handful of short lines.
    let mut text = [0; 512];
    let length = io::pread(file, &mut text[..], 0).ok()?;
    let line = text
        .get(..length)?
        .split(|b| *b == b'\n')
        .find_map(|line| line.strip_prefix(key))?;
    std::str::from_utf8(line).ok()?.trim().parse().ok()
}
