//! What is mounted where, as tables.

use std::ffi::CStr;
use std::fs;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::mount::MountFlags;

use super::BootError;

struct Mount {
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    data: Option<&'static CStr>,
    /// A kernel without it still makes a useful guest.
    optional: bool,
}

const fn mount(kind: &'static str, target: &'static str, flags: MountFlags) -> Mount {
    Mount {
        kind,
        target,
        flags,
        data: None,
        optional: false,
    }
}

const QUIET: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);

/// Needed to find and mount the root; they move along to it.
const EARLY: [Mount; 2] = [
    mount("proc", "/proc", QUIET),
    Mount {
        data: Some(c"mode=0755"),
        ..mount("devtmpfs", "/dev", MountFlags::NOSUID)
    },
];

/// The rest, in the root that stays.
const LATE: [Mount; 5] = [
    mount("sysfs", "/sys", QUIET),
    Mount {
        data: Some(c"nsdelegate,memory_recursiveprot"),
        ..mount("cgroup2", "/sys/fs/cgroup", QUIET)
    },
    Mount {
        // gid 5 is "tty" in every distribution; 0620 is what its `mesg` and `write` expect.
        data: Some(c"mode=0620,gid=5,ptmxmode=0666"),
        ..mount(
            "devpts",
            "/dev/pts",
            MountFlags::NOSUID.union(MountFlags::NOEXEC),
        )
    },
    Mount {
        data: Some(c"mode=1777"),
        ..mount(
            "tmpfs",
            "/dev/shm",
            MountFlags::NOSUID.union(MountFlags::NODEV),
        )
    },
    Mount {
        data: Some(c"mode=0755"),
        ..mount("tmpfs", "/run", MountFlags::NOSUID.union(MountFlags::NODEV))
    },
];

/// Also mounted where the kernel has them.
const OPTIONAL: [Mount; 1] = [Mount {
    optional: true,
    ..mount("mqueue", "/dev/mqueue", QUIET)
}];

pub(super) const MOVED: [&str; 2] = ["/proc", "/dev"];

pub(super) fn early() -> Result<(), BootError> {
    EARLY.iter().try_for_each(apply)
}

pub(super) fn late() -> Result<(), BootError> {
    LATE.iter().try_for_each(apply)?;
    OPTIONAL.iter().try_for_each(apply)?;
    // /tmp is the image's own; only a missing one is made.
    if rustix::fs::mkdir("/tmp", Mode::from_raw_mode(0o1777)).is_ok() {
        let _ = rustix::fs::chmod("/tmp", Mode::from_raw_mode(0o1777));
    }
    Ok(())
}

fn apply(mount: &Mount) -> Result<(), BootError> {
    let failed = |why: Errno| {
        let what = format!("{} on {}", mount.kind, mount.target);
        BootError::new("mount", what, why)
    };
    let mut result = rustix::mount::mount(
        mount.kind,
        mount.target,
        mount.kind,
        mount.flags,
        mount.data,
    );
    if result == Err(Errno::NOENT) {
        // An image need not know of this mount point; the root is writable.
        let _ = fs::create_dir_all(mount.target);
        result = rustix::mount::mount(
            mount.kind,
            mount.target,
            mount.kind,
            mount.flags,
            mount.data,
        );
    }
    match result {
        // The kernel has mounted devtmpfs itself (CONFIG_DEVTMPFS_MOUNT).
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(_) if mount.optional => Ok(()),
        Err(why) => Err(failed(why)),
    }
}
