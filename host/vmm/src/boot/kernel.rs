//! Kernel images: ELF with a 64-bit or a PVH entry, or bzImage with a 64-bit entry.
//!
//! Linux's vmlinux has both entries. The 64-bit one is taken: the code behind the PVH entry looks for Xen in 256 CPUID
//! leaves, each an exit, and leads to the other entry.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use linux_loader::loader::bootparam::{self, setup_header};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::BootError;
use crate::layout;

/// Offset of the 64-bit entry in the loaded part of a bzImage (Documentation/arch/x86/boot.rst).
const LINUX64_ENTRY: u64 = 0x200;
/// Owner of notes that only Linux has.
const LINUX_NOTE_OWNER: &[u8] = b"Linux\0";
/// A real note segment has some hundred bytes.
const MAX_NOTES_BYTES: u64 = 64 * 1024;
const ELF64_HEADER_BYTES: usize = 64;
const ELF64_PROGRAM_HEADER_BYTES: usize = 56;
const PT_NOTE: u32 = 4;
/// "HdrS" and the boot sector's mark, for a kernel that brings no header of its own.
const SETUP_HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
/// Anywhere in RAM that can be addressed with 32 bits.
const ELF_INITRAMFS_LIMIT: u64 = layout::RAM_GAP;

/// A kernel in guest memory.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) protocol: Protocol,
    /// First address that the kernel will not use while it starts.
    pub(super) end: u64,
    /// The initramfs must end at or below this address.
    pub(super) initramfs_limit: u64,
}

/// How the kernel wants to be entered.
pub(super) enum Protocol {
    Pvh {
        address: u64,
    },
    Linux64 {
        address: u64,
        header: Box<setup_header>,
    },
}

impl std::fmt::Debug for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pvh { address } => write!(f, "Pvh({address:#x})"),
            Self::Linux64 { address, .. } => write!(f, "Linux64({address:#x})"),
        }
    }
}

/// Loads the image at `path` where it wants to be.
pub(super) fn load(memory: &GuestMemoryMmap, path: &Path) -> Result<Kernel, BootError> {
    let read_error = |source| BootError::Read {
        what: "kernel",
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(read_error)?;
    if is_elf(&mut file).map_err(read_error)? {
        load_elf(memory, path, &mut file)
    } else {
        load_bzimage(memory, path, &mut file)
    }
}

fn is_elf(file: &mut File) -> io::Result<bool> {
    let mut magic = Vec::new();
    file.take(4).read_to_end(&mut magic)?;
    file.rewind()?;
    Ok(magic == b"\x7fELF")
}

fn load_elf(memory: &GuestMemoryMmap, path: &Path, file: &mut File) -> Result<Kernel, BootError> {
    let loaded = Elf::load(memory, None, file, Some(GuestAddress(layout::HIGH_MEMORY)))
        .map_err(|error| damaged(path, &error))?;
    let protocol = match loaded.pvh_boot_cap {
        _ if is_linux(file).unwrap_or(false) => {
            let header = setup_header {
                boot_flag: BOOT_FLAG,
                header: SETUP_HEADER_MAGIC,
                ..Default::default()
            };
            Protocol::Linux64 {
                address: loaded.kernel_load.0,
                header: Box::new(header),
            }
        }
        PvhBootCapability::PvhEntryPresent(entry) => Protocol::Pvh { address: entry.0 },
        _ => {
            return Err(BootError::NoEntry(
                path.to_owned(),
                "PVH entry (CONFIG_PVH=y)",
            ));
        }
    };
    Ok(Kernel {
        protocol,
        end: loaded.kernel_end,
        initramfs_limit: ELF_INITRAMFS_LIMIT,
    })
}

/// Whether an ELF file, which the loader has found to be sound, has one of Linux's notes.
fn is_linux(file: &mut File) -> io::Result<bool> {
    let mut header = [0; ELF64_HEADER_BYTES];
    file.rewind()?;
    file.read_exact(&mut header)?;
    let headers_at = u64_at(&header, 32);
    let count = u16::from_le_bytes([header[56], header[57]]);
    for index in 0..u64::from(count) {
        let mut program_header = [0; ELF64_PROGRAM_HEADER_BYTES];
        let offset = index * ELF64_PROGRAM_HEADER_BYTES as u64;
        file.seek(SeekFrom::Start(headers_at.saturating_add(offset)))?;
        file.read_exact(&mut program_header)?;
        if u64_at(&program_header, 0) as u32 == PT_NOTE {
            let mut notes = Vec::new();
            file.seek(SeekFrom::Start(u64_at(&program_header, 8)))?;
            let bytes = u64_at(&program_header, 32).min(MAX_NOTES_BYTES);
            (&*file).take(bytes).read_to_end(&mut notes)?;
            if notes
                .windows(LINUX_NOTE_OWNER.len())
                .any(|window| window == LINUX_NOTE_OWNER)
            {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    bytes[offset..]
        .first_chunk()
        .map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

fn load_bzimage(
    memory: &GuestMemoryMmap,
    path: &Path,
    file: &mut File,
) -> Result<Kernel, BootError> {
    use linux_loader::loader::Error;
    use linux_loader::loader::bzimage::Error as BzError;
    let loaded = BzImage::load(memory, None, file, Some(GuestAddress(layout::HIGH_MEMORY)))
        .map_err(|error| match error {
            Error::Bzimage(BzError::InvalidBzImage | BzError::ReadBzImageHeader) => {
                BootError::NotAKernel(path.to_owned())
            }
            other => damaged(path, &other),
        })?;
    let header = loaded
        .setup_header
        .ok_or_else(|| BootError::NotAKernel(path.to_owned()))?;
    if header.xloadflags & bootparam::XLF_KERNEL_64 == 0 {
        return Err(BootError::NoEntry(
            path.to_owned(),
            "64-bit entry (a 32-bit kernel?)",
        ));
    }
    // The decompressor moves itself: it needs `init_size` bytes from the place where the kernel will run.
    let start = loaded.kernel_load.0.max(header.pref_address);
    let end = start
        .saturating_add(header.init_size.into())
        .max(loaded.kernel_end);
    Ok(Kernel {
        protocol: Protocol::Linux64 {
            address: loaded.kernel_load.0 + LINUX64_ENTRY,
            header: Box::new(header),
        },
        end,
        initramfs_limit: u64::from(header.initrd_addr_max) + 1,
    })
}

fn damaged(path: &Path, error: &linux_loader::loader::Error) -> BootError {
    BootError::Kernel {
        path: path.to_owned(),
        detail: error.to_string(),
    }
}
