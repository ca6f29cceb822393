//! Kernel modules of a distribution kernel: the initramfs has them in /modules, named so that their order is the order
//! to load them in.

use std::fs::{self, File};

use rustix::io::Errno;

use super::BootError;

const FOLDER: &str = "/modules";

pub(super) fn load() -> Result<(), BootError> {
    let Ok(entries) = fs::read_dir(FOLDER) else {
        // A kernel that has everything built in comes without.
        return Ok(());
    };
    let mut paths: Vec<_> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    paths.sort();
    for path in paths {
        let failed =
            |why: std::io::Error| BootError::new("kernel modules", path.display().to_string(), why);
        let file = File::open(&path).map_err(failed)?;
        match rustix::system::finit_module(&file, c"", 0) {
            // Built in, or loaded as what another needs.
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
    }
    Ok(())
}
