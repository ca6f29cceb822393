//! What a bzImage reads: `boot_params`, the "zero page" (Documentation/arch/x86/zero-page.rst).

use linux_loader::configurator::{BootConfigurator, BootParams, linux::LinuxBootConfigurator};
use linux_loader::loader::bootparam::{LOADED_HIGH, boot_e820_entry, boot_params, setup_header};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::{BootError, Initramfs, MemoryMap};
use crate::layout;

/// "Undefined": a boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;

pub(super) fn write_boot_params(
    memory: &GuestMemoryMmap,
    map: &MemoryMap,
    initramfs: Option<Initramfs>,
    rsdp: Option<u64>,
    header: &setup_header,
) -> Result<(), BootError> {
    let mut params = boot_params {
        hdr: *header,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.loadflags |= LOADED_HIGH;
    params.hdr.cmd_line_ptr = low(layout::CMDLINE);
    params.hdr.cmdline_size = layout::CMDLINE_BYTES as u32 - 1;
    params.acpi_rsdp_addr = rsdp.unwrap_or(0);
    if let Some(Initramfs { address, bytes }) = initramfs {
        // Below `initrd_addr_max`, which is a 32-bit number, so the extended fields stay zero.
        params.hdr.ramdisk_image = low(address);
        params.hdr.ramdisk_size = low(bytes);
    }
    let mut count = 0u8;
    let mut table = params.e820_table;
    for (slot, entry) in table.iter_mut().zip(map.entries()) {
        *slot = boot_e820_entry {
            addr: entry.start,
            size: entry.bytes,
            r#type: entry.kind,
        };
        count += 1;
    }
    params.e820_table = table;
    params.e820_entries = count;
    let params = BootParams::new(&params, GuestAddress(layout::BOOT_PARAMS));
    LinuxBootConfigurator::write_bootparams(&params, memory)
        .map_err(|error| BootError::Tables(error.to_string()))
}

/// Addresses and sizes that lie below 4 GiB by construction.
fn low(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
