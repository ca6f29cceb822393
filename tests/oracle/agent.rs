//! An agent as an ordinary process, with a cgroup of its own where this machine allows it.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use airlock_tests::{binary, wait_until};

const DEADLINE: Duration = Duration::from_secs(30);
/// Descriptors of an agent without an exec or a connection: its own, and cgroups made ahead.
const IDLE_DESCRIPTORS: usize = 64;

pub(crate) struct Agent {
    process: Child,
    folder: PathBuf,
    cgroup: Option<PathBuf>,
}

impl Agent {
    pub(crate) fn start() -> Self {
        let name = format!("airlock-oracle-{}", std::process::id());
        let folder = std::env::temp_dir().join(&name);
        fs::create_dir_all(&folder).expect("the temp folder is writable");
        let cgroup = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
            .map(PathBuf::from)
            .into_iter()
            .filter(|root| root.join("cgroup.procs").exists())
            .map(|root| root.join(&name))
            .find(|cgroup| fs::create_dir(cgroup).is_ok());
        let mut command = Command::new(binary("airlock-agent"));
        command
            .arg("serve")
            .arg("--unix")
            .arg(folder.join("agent.sock"));
        if let Some(cgroup) = &cgroup {
            command.arg("--cgroup").arg(cgroup);
        }
        let process = command
            .stdin(Stdio::null())
            .spawn()
            .expect("airlock-agent starts");
        let agent = Self {
            process,
            folder,
            cgroup,
        };
        wait_until("the agent listens", DEADLINE, || {
            UnixStream::connect(agent.socket()).is_ok()
        })
        .expect("the agent listens");
        agent
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.join("agent.sock")
    }

    /// After all those runs no descriptor is left open, and no process.
    pub(crate) fn expect_nothing_left(&self) {
        let pid = self.process.id();
        let open = || fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
        let closed = wait_until("descriptors are closed", DEADLINE, || {
            open() <= IDLE_DESCRIPTORS
        });
        assert!(closed.is_ok(), "{} descriptors are open", open());
        let children = || {
            let path = format!("/proc/{pid}/task/{pid}/children");
            fs::read_to_string(path).unwrap_or_default()
        };
        let reaped = wait_until("children are reaped", DEADLINE, || children().is_empty());
        assert!(reaped.is_ok(), "children are left: {}", children());
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(cgroup) = &self.cgroup {
            let _ = fs::write(cgroup.join("cgroup.kill"), "1");
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.folder);
        if let Some(cgroup) = &self.cgroup {
            let _ = wait_until("the cgroup is empty", DEADLINE, || {
                remove_groups(&cgroup.join("exec"));
                fs::remove_dir(cgroup).is_ok()
            });
        }
    }
}

fn remove_groups(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let _ = fs::remove_dir(entry.path());
    }
    let _ = fs::remove_dir(folder);
}

/// The user that runs the tests, as a request names it.
pub(crate) fn me() -> String {
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    format!("{}:{}", uid.as_raw(), gid.as_raw())
}
