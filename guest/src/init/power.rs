//! The end of the machine. A guest ends by reset: the VMM sees the write to the keyboard controller (`reboot=k`).

use rustix::fs::sync;
use rustix::mount::{MountFlags, mount_remount};
use rustix::system::{RebootCommand, reboot};

use crate::log;

/// Writes everything back, makes the root read-only so that its file system is clean, and resets.
pub fn reset() -> ! {
    sync();
    // Fails where a process still has a file open for writing; what it had written is on disk all the same.
    let _ = mount_remount("/", MountFlags::RDONLY, c"");
    loop {
        if let Err(errno) = reboot(RebootCommand::Restart) {
            log::error(format_args!("cannot reset: {errno}"));
        }
        std::thread::park();
    }
}
