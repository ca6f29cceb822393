//! The guest's root: a read-only base with a writable overlay, and the switch from the initramfs to it.

use std::fs;
use std::os::linux::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount, mount_move};

use super::BootError;
use super::cmdline::{Base, Scratch};
use super::mounts::MOVED;

const BASE: &str = "/airlock/base";
const SCRATCH: &str = "/airlock/scratch";
const ROOT: &str = "/airlock/root";
/// A device behind a module may appear a moment after the module was loaded.
const DEVICE_WAIT: Duration = Duration::from_secs(2);
const DEVICE_LOOK: Duration = Duration::from_millis(2);

/// Mounts base and scratch and joins them.
pub(super) fn assemble(base: &Base, scratch: &Scratch) -> Result<(), BootError> {
    for folder in [BASE, SCRATCH, ROOT] {
        fs::create_dir_all(folder).map_err(|e| BootError::new("root", folder, e))?;
    }
    wait_for("airlock.root", &base.device)?;
    let (device, fstype) = (base.device.as_str(), base.fstype.as_str());
    mount(device, BASE, fstype, MountFlags::RDONLY, None)
        .map_err(|e| BootError::new("root (airlock.root)", format!("{device} as {fstype}"), e))?;
    match scratch {
        Scratch::Memory => mount("tmpfs", SCRATCH, "tmpfs", MountFlags::empty(), c"mode=0755")
            .map_err(|e| BootError::new("scratch", "tmpfs", e))?,
        Scratch::Device(device) => {
            wait_for("airlock.scratch", device)?;
            mount(device.as_str(), SCRATCH, "ext4", MountFlags::NOATIME, None).map_err(|e| {
                BootError::new("scratch (airlock.scratch)", format!("{device} as ext4"), e)
            })?;
        }
    }
    for folder in ["upper", "work"] {
        let path = Path::new(SCRATCH).join(folder);
        match fs::create_dir(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(BootError::new("scratch", path.display().to_string(), e));
            }
            _ => {}
        }
    }
    let options =
        c"lowerdir=/airlock/base,upperdir=/airlock/scratch/upper,workdir=/airlock/scratch/work";
    mount("overlay", ROOT, "overlay", MountFlags::empty(), options)
        .map_err(|e| BootError::new("root", "overlay of base and scratch", e))
}

fn wait_for(key: &str, device: &str) -> Result<(), BootError> {
    let deadline = Instant::now() + DEVICE_WAIT;
    while !Path::new(device).exists() {
        if Instant::now() >= deadline {
            let what = format!("{key}={device}");
            return Err(BootError::new("root", what, "no such device has appeared"));
        }
        std::thread::sleep(DEVICE_LOOK);
    }
    Ok(())
}

/// Makes the assembled root the root and frees the initramfs.
pub(super) fn switch() -> Result<(), BootError> {
    for folder in MOVED {
        let target = format!("{ROOT}{folder}");
        if !Path::new(&target).is_dir() {
            fs::create_dir_all(&target).map_err(|e| BootError::new("root switch", &target, e))?;
        }
        mount_move(folder, target.as_str())
            .map_err(|e| BootError::new("root switch", format!("{folder} to {target}"), e))?;
    }
    let failed =
        |what: &'static str| move |e: rustix::io::Errno| BootError::new("root switch", what, e);
    free_initramfs();
    rustix::process::chdir(ROOT).map_err(failed("entering the new root"))?;
    mount_move(".", "/").map_err(failed("moving the new root over /"))?;
    rustix::process::chroot(".").map_err(failed("chroot"))?;
    rustix::process::chdir("/").map_err(failed("entering /"))
}

/// Deletes what the initramfs holds (its memory is the guest's), staying on its file system. /airlock stays: the base
/// and the scratch are mounted in it.
fn free_initramfs() {
    let Ok(device) = fs::metadata("/").map(|m| m.st_dev()) else {
        return;
    };
    let Ok(entries) = fs::read_dir("/") else {
        return;
    };
    for entry in entries.filter_map(Result::ok) {
        let path = entry.path();
        let Ok(metadata) = entry.metadata() else {
            continue;
        };
        if metadata.st_dev() != device || path == Path::new("/airlock") {
            continue;
        }
        // What cannot be deleted costs memory and nothing else.
        let _ = if metadata.is_dir() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
    }
}
