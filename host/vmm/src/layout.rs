//! Every guest-physical address, and every interrupt line, in one place.
//!
//! Two address spaces: memory and ports. Whatever must not overlap is asserted at compile time, at the end.

use crate::config::{MAX_CPUS, MAX_DISKS};

/// 4 KiB.
pub const PAGE_BYTES: u64 = 4096;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Global descriptor table of the first vCPU.
pub const GDT: u64 = 0x500;
/// Empty interrupt descriptor table of the first vCPU; any fault before the kernel loads its own is a triple fault.
pub const IDT: u64 = 0x520;
/// `hvm_start_info` of the PVH boot protocol.
pub const PVH_START_INFO: u64 = 0x6000;
/// PVH module list: the initramfs is its only entry.
pub const PVH_MODULES: u64 = 0x6040;
/// PVH memory map.
pub const PVH_MEMORY_MAP: u64 = 0x6080;
/// Most entries that fit between [`PVH_MEMORY_MAP`] and [`BOOT_PARAMS`].
pub const PVH_MEMORY_MAP_ENTRIES: usize = 16;
/// `struct boot_params` of the Linux boot protocol.
pub const BOOT_PARAMS: u64 = 0x7000;
/// Top of the stack that the first vCPU starts with.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page tables of the 64-bit entry: one PML4, one PDPT, then [`PAGE_DIRECTORIES`] directories of 2 MiB pages.
pub const PML4: u64 = 0x9000;
/// Page directory pointer table.
pub const PDPT: u64 = 0xa000;
/// Page directories: identity for the first 4 GiB, which is where everything that a boot touches lies.
pub const PAGE_DIRECTORY: u64 = 0xb000;
/// Number of page directories.
pub const PAGE_DIRECTORIES: u64 = 4;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// COMMAND_LINE_SIZE of x86 Linux, with the final zero.
pub const CMDLINE_BYTES: usize = 2048;
/// MP table: the last KiB of base memory, one of the three places where the kernel looks (MP specification 1.4, 4).
pub const MP_TABLE: u64 = 0x9_fc00;
/// Room for it.
pub const MP_TABLE_BYTES: usize = 0x400;
/// End of base memory that is RAM to the guest; the MP table lies above.
pub const BASE_MEMORY_END: u64 = MP_TABLE;
/// ACPI tables, RSDP first: in the area that kernels search for it (ACPI 6.5, 5.2.5.1).
pub const ACPI_TABLES: u64 = 0xe_0000;
/// Room for them.
pub const ACPI_TABLES_BYTES: usize = 0x2_0000;
/// Memory above 1 MiB; kernels load here or above.
pub const HIGH_MEMORY: u64 = MIB;

/// RAM ends here and goes on at [`RAM_ABOVE_GAP`]: between them are devices.
pub const RAM_GAP: u64 = 3 * GIB;
/// RAM beyond the first 3 GiB.
pub const RAM_ABOVE_GAP: u64 = 4 * GIB;

/// virtio-mmio register pages, one per device.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Registers of one device: a page, so that all of them can be one memory slot.
pub const VIRTIO_MMIO_BYTES: u64 = PAGE_BYTES;
/// I/O APIC.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Local APIC.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// One page that KVM wants on some Intel CPUs.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM wants on some Intel CPUs.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// rng, vsock and the disks.
pub const MAX_VIRTIO_DEVICES: usize = MAX_DISKS + 2;
/// First interrupt line of virtio devices: 0 to 4 belong to timer, keyboard, cascade and serial ports on a PC.
pub const VIRTIO_FIRST_IRQ: u32 = 5;
/// Input pins of KVM's I/O APIC.
pub const IO_APIC_PINS: u32 = 24;

/// Serial port COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Registers of a 16550.
pub const SERIAL_PORTS: u16 = 8;
/// Interrupt line of COM1.
pub const SERIAL_IRQ: u32 = 4;
/// Keyboard controller: data at this port, command at +4.
pub const I8042_PORT: u16 = 0x60;
/// Ports of the keyboard controller.
pub const I8042_PORTS: u16 = 5;
/// Command port of the keyboard controller, where a PC is reset.
pub const I8042_COMMAND_PORT: u16 = I8042_PORT + 4;

/// Memory slots of KVM: RAM below the gap, RAM above it, register pages.
pub const SLOT_RAM: u32 = 0;
/// See [`SLOT_RAM`].
pub const SLOT_RAM_ABOVE_GAP: u32 = 1;
/// See [`SLOT_RAM`].
pub const SLOT_REGISTERS: u32 = 2;

/// Register page of the virtio device `index`.
pub const fn virtio_mmio(index: usize) -> u64 {
    VIRTIO_MMIO + index as u64 * VIRTIO_MMIO_BYTES
}

/// Interrupt line of the virtio device `index`.
pub const fn virtio_irq(index: usize) -> u32 {
    VIRTIO_FIRST_IRQ + index as u32
}

/// RAM as (start, length in bytes): one range, or two around the gap.
pub fn ram_ranges(memory_mib: u32) -> Vec<(u64, u64)> {
    let bytes = u64::from(memory_mib) * MIB;
    if bytes <= RAM_GAP {
        vec![(0, bytes)]
    } else {
        vec![(0, RAM_GAP), (RAM_ABOVE_GAP, bytes - RAM_GAP)]
    }
}

const _: () = {
    assert!(IDT >= GDT + 4 * 8);
    assert!(PVH_START_INFO >= IDT + 16);
    assert!(
        PVH_MODULES >= PVH_START_INFO + 56,
        "hvm_start_info is 56 bytes long"
    );
    assert!(
        PVH_MEMORY_MAP >= PVH_MODULES + 32,
        "hvm_modlist_entry is 32 bytes long"
    );
    assert!(PVH_MEMORY_MAP + 24 * PVH_MEMORY_MAP_ENTRIES as u64 <= BOOT_PARAMS);
    assert!(
        BOOT_PARAMS + PAGE_BYTES <= BOOT_STACK,
        "boot_params is a page long"
    );
    assert!(BOOT_STACK <= PML4);
    assert!(PML4 + PAGE_BYTES == PDPT && PDPT + PAGE_BYTES == PAGE_DIRECTORY);
    assert!(PAGE_DIRECTORY + PAGE_DIRECTORIES * PAGE_BYTES <= CMDLINE);
    assert!(CMDLINE + CMDLINE_BYTES as u64 <= MP_TABLE);
    // Floating pointer, header, CPUs, bus, I/O APIC, lines, two local lines.
    assert!(
        16 + 44 + 20 * MAX_CPUS as usize + 8 + 8 + 8 * IO_APIC_PINS as usize + 16 <= MP_TABLE_BYTES
    );
    assert!(MP_TABLE + MP_TABLE_BYTES as u64 <= ACPI_TABLES);
    assert!(ACPI_TABLES + ACPI_TABLES_BYTES as u64 <= HIGH_MEMORY);
    assert!(HIGH_MEMORY < RAM_GAP && RAM_GAP <= VIRTIO_MMIO);
    assert!(virtio_mmio(MAX_VIRTIO_DEVICES) <= IO_APIC as u64);
    assert!(IO_APIC < LOCAL_APIC && (LOCAL_APIC as u64) < KVM_IDENTITY_MAP);
    assert!(KVM_IDENTITY_MAP + PAGE_BYTES <= KVM_TSS && KVM_TSS + 3 * PAGE_BYTES <= RAM_ABOVE_GAP);
    assert!(VIRTIO_FIRST_IRQ > SERIAL_IRQ);
    assert!(virtio_irq(MAX_VIRTIO_DEVICES) <= IO_APIC_PINS);
    assert!(I8042_PORT + I8042_PORTS <= SERIAL_PORT);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_gap_free_and_loses_no_byte() {
        for memory_mib in [32, 3071, 3072, 3073, 4096, 1 << 20] {
            let ranges = ram_ranges(memory_mib);
            let sum: u64 = ranges.iter().map(|&(_, length)| length).sum();
            assert_eq!(sum, u64::from(memory_mib) * MIB);
            assert!(
                ranges
                    .iter()
                    .all(|&(start, length)| start + length <= RAM_GAP || start >= RAM_ABOVE_GAP)
            );
        }
    }
}
