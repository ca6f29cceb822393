//! What a kernel entered through PVH reads: `hvm_start_info` (xen/include/public/arch-x86/hvm/start_info.h).

use linux_loader::configurator::{BootConfigurator, BootParams, pvh::PvhBootConfigurator};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::{BootError, Initramfs, MemoryMap};
use crate::layout;

const MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const VERSION: u32 = 1;

pub(super) fn write_start_info(
    memory: &GuestMemoryMmap,
    map: &MemoryMap,
    initramfs: Option<Initramfs>,
    rsdp: Option<u64>,
) -> Result<(), BootError> {
    let entries: Vec<_> = map
        .entries()
        .iter()
        .take(layout::PVH_MEMORY_MAP_ENTRIES)
        .map(|entry| hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.bytes,
            type_: entry.kind,
            reserved: 0,
        })
        .collect();
    let start_info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        nr_modules: u32::from(initramfs.is_some()),
        modlist_paddr: if initramfs.is_some() {
            layout::PVH_MODULES
        } else {
            0
        },
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: rsdp.unwrap_or(0),
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: entries.len() as u32,
        ..Default::default()
    };
    let mut params = BootParams::new(&start_info, GuestAddress(layout::PVH_START_INFO));
    params.set_sections(&entries, GuestAddress(layout::PVH_MEMORY_MAP));
    if let Some(Initramfs { address, bytes }) = initramfs {
        let module = hvm_modlist_entry {
            paddr: address,
            size: bytes,
            ..Default::default()
        };
        params.set_modules(&[module], GuestAddress(layout::PVH_MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, memory)
        .map_err(|error| BootError::Tables(error.to_string()))
}
