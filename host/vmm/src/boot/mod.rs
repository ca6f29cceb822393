//! From files to a guest whose first instruction is the kernel's entry.
//!
//! What is written into guest memory here is what firmware and boot loader leave on a PC. No KVM, no devices: devices
//! are only counted, because their places follow from `layout`.

pub mod acpi;
mod kernel;
mod linux64;
pub mod memory_map;
pub mod mp_table;
mod pvh;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::config::Discovery;
use crate::layout;
use kernel::Protocol;
use memory_map::MemoryMap;

/// Where the boot vCPU starts, and in which state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// PVH: 32-bit protected mode.
    Pvh {
        /// Guest-physical address of the entry.
        address: u64,
    },
    /// Linux 64-bit boot protocol.
    Linux64 {
        /// Guest-physical address of the entry.
        address: u64,
    },
}

/// What is booted.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// ELF or bzImage.
    pub kernel: &'a Path,
    /// Initial root file system.
    pub initramfs: Option<&'a Path>,
    /// Kernel command line without the devices.
    pub cmdline: &'a str,
    /// How the kernel learns about CPUs and devices.
    pub discovery: Discovery,
    /// Number of vCPUs.
    pub cpus: u8,
    /// Number of virtio devices.
    pub virtio_devices: usize,
}

/// Why there is nothing to boot.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("cannot read the {what} {path}")]
    Read {
        /// Kernel or initramfs.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not a kernel.
    #[error("{0} is no kernel: neither an ELF vmlinux nor a bzImage")]
    NotAKernel(PathBuf),
    /// A kernel that offers no entry we can use.
    #[error("the kernel {0} has no {1}")]
    NoEntry(PathBuf, &'static str),
    /// The loader gave up.
    #[error("the kernel {path} is damaged, or does not fit into the guest's memory: {detail}")]
    Kernel {
        /// Its path.
        path: PathBuf,
        /// The loader's words.
        detail: String,
    },
    /// No room.
    #[error(
        "the initramfs {path} of {bytes} bytes does not fit into the guest's memory beside the kernel"
    )]
    InitramfsTooLarge {
        /// Its path.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// No room.
    #[error("the kernel command line is {0} bytes long with the devices in it, {max} fit", max = layout::CMDLINE_BYTES - 1)]
    CmdlineTooLong(usize),
    /// Cannot happen with memory laid out by `layout`.
    #[error("boot tables do not fit into the guest's memory: {0}")]
    Tables(String),
}

/// Where the initramfs lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Initramfs {
    address: u64,
    bytes: u64,
}

/// Fills guest memory with everything that a kernel needs to start.
pub fn load(memory: &GuestMemoryMmap, source: &Source<'_>) -> Result<Entry, BootError> {
    let kernel = kernel::load(memory, source.kernel)?;
    let initramfs = match source.initramfs {
        Some(path) => Some(load_initramfs(memory, path, &kernel)?),
        None => None,
    };
    write_cmdline(memory, source)?;
    let tables = match source.discovery {
        Discovery::Cmdline => {
            write(
                memory,
                &mp_table::build(source.cpus, source.virtio_devices),
                layout::MP_TABLE,
            )?;
            None
        }
        Discovery::Acpi => {
            write(
                memory,
                &acpi::build(source.cpus, source.virtio_devices),
                layout::ACPI_TABLES,
            )?;
            Some(layout::ACPI_TABLES)
        }
    };
    let map = MemoryMap::of(memory);
    match kernel.protocol {
        Protocol::Pvh { address } => {
            pvh::write_start_info(memory, &map, initramfs, tables)?;
            Ok(Entry::Pvh { address })
        }
        Protocol::Linux64 { address, header } => {
            linux64::write_boot_params(memory, &map, initramfs, tables, &header)?;
            Ok(Entry::Linux64 { address })
        }
    }
}

/// As high as the kernel allows, so that it is far from the kernel, which grows upwards while it starts.
fn load_initramfs(
    memory: &GuestMemoryMmap,
    path: &Path,
    kernel: &kernel::Kernel,
) -> Result<Initramfs, BootError> {
    let read_error = |source| BootError::Read {
        what: "initramfs",
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(read_error)?;
    let bytes = file.metadata().map_err(read_error)?.len();
    let top = low_memory_end(memory).min(kernel.initramfs_limit);
    let address = top
        .checked_sub(bytes)
        .map(|address| address & !(layout::PAGE_BYTES - 1));
    match address {
        Some(address) if address >= kernel.end => {
            let length =
                usize::try_from(bytes).map_err(|error| read_error(io::Error::other(error)))?;
            memory
                .read_exact_volatile_from(GuestAddress(address), &mut file, length)
                .map_err(|error| read_error(io::Error::other(error)))?;
            Ok(Initramfs { address, bytes })
        }
        _ => Err(BootError::InitramfsTooLarge {
            path: path.to_owned(),
            bytes,
        }),
    }
}

fn low_memory_end(memory: &GuestMemoryMmap) -> u64 {
    memory.iter().next().map_or(0, |region| region.len())
}

fn write_cmdline(memory: &GuestMemoryMmap, source: &Source<'_>) -> Result<(), BootError> {
    let text = full_cmdline(source);
    if text.len() >= layout::CMDLINE_BYTES {
        return Err(BootError::CmdlineTooLong(text.len()));
    }
    let mut bytes = text.into_bytes();
    bytes.push(0);
    write(memory, &bytes, layout::CMDLINE)
}

/// Documentation/admin-guide/kernel-parameters.txt: `virtio_mmio.device=<size>@<baseaddr>:<irq>`.
fn full_cmdline(source: &Source<'_>) -> String {
    use std::fmt::Write;
    let mut text = source.cmdline.to_owned();
    if source.discovery == Discovery::Cmdline {
        for index in 0..source.virtio_devices {
            let (address, line) = (layout::virtio_mmio(index), layout::virtio_irq(index));
            let _ = write!(
                text,
                " virtio_mmio.device={}K@{address:#x}:{line}",
                layout::VIRTIO_MMIO_BYTES / 1024
            );
        }
    }
    text
}

fn write(memory: &GuestMemoryMmap, bytes: &[u8], address: u64) -> Result<(), BootError> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|error| BootError::Tables(error.to_string()))
}

#[cfg(test)]
mod tests;
