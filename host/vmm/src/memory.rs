//! Guest memory: private anonymous mappings, backed by the host only where the guest touches them.

#![expect(unsafe_code, reason = "madvise takes the address of a mapping")]

use std::io;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::config::MemoryMib;
use crate::layout;

/// Why there is no memory for the guest.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// More than the host has.
    #[error("the guest is to have {asked_mib} MiB of memory but this host has {host_mib} MiB")]
    HostTooSmall {
        /// What was asked for.
        asked_mib: u32,
        /// The host's whole memory.
        host_mib: u64,
    },
    /// The host refused.
    #[error("the host does not give the guest's {0} MiB of memory")]
    Map(u32, #[source] io::Error),
}

/// Maps the guest's RAM as `layout` places it.
pub fn allocate(memory: MemoryMib) -> Result<GuestMemoryMmap, MemoryError> {
    let asked_mib = memory.get();
    // Mappings are not reserved, so asking too much would fail only later, and then kill this process or another.
    match host_memory_mib() {
        Some(host_mib) if u64::from(asked_mib) > host_mib => {
            return Err(MemoryError::HostTooSmall {
                asked_mib,
                host_mib,
            });
        }
        _ => {}
    }
    let ranges: Vec<_> = layout::ram_ranges(asked_mib)
        .into_iter()
        .map(|(start, length)| (GuestAddress(start), length as usize))
        .collect();
    let memory = GuestMemoryMmap::from_ranges(&ranges).map_err(|error| {
        let cause = io::Error::last_os_error();
        let cause = if cause.raw_os_error() == Some(0) {
            io::Error::other(error)
        } else {
            cause
        };
        MemoryError::Map(asked_mib, cause)
    })?;
    for region in memory.iter() {
        advise(region.get_mmap().as_ptr(), region.len() as usize);
    }
    Ok(memory)
}

/// Large pages make a boot's page faults a few dozen instead of thousands; and nobody wants a guest in a core dump.
fn advise(start: *mut u8, length: usize) {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_DONTDUMP] {
        // SAFETY: start and length are those of one live mapping of ours, and neither advice changes a byte of it.
        // A host that does not take it only loses what it is good for.
        unsafe { libc::madvise(start.cast(), length, advice) };
    }
}

/// MemTotal of /proc/meminfo; None where that cannot be read.
fn host_memory_mib() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_lies_where_the_layout_says() {
        let memory = allocate(MemoryMib::new(64).unwrap()).unwrap();
        assert_eq!(memory.num_regions(), 1);
        assert_eq!(memory.last_addr(), GuestAddress((64 << 20) - 1));
    }

    #[test]
    fn more_than_the_host_has_is_refused_in_words() {
        let error = allocate(MemoryMib::new(1 << 20).unwrap())
            .unwrap_err()
            .to_string();
        assert!(error.contains("1048576 MiB"), "{error}");
    }
}
