//! MP table: CPUs and interrupt lines for kernels without ACPI (Intel MultiProcessor Specification 1.4, chapter 4).

use crate::layout;

const SPEC_REVISION: u8 = 4;
/// Integrated APIC (4.3.1).
const LOCAL_APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;
const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IO_APIC: u8 = 2;
const ENTRY_IO_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;
const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
/// Family 6 and a CPU with APIC and FPU; kernels look at CPUID instead.
const CPU_SIGNATURE: u32 = 0x600;
const CPU_FEATURES: u32 = 0x201;
const ISA_BUS: u8 = 0;
const INTERRUPT_INT: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTINT: u8 = 3;
const ALL_LOCAL_APICS: u8 = 0xff;
const FLOATING_POINTER_BYTES: usize = 16;
const HEADER_BYTES: usize = 44;

/// The table for `cpus` vCPUs, as it lies at [`layout::MP_TABLE`]. All lines are ISA lines: edge, active high. Only lines
/// with a device are listed, because a kernel programs each that is.
pub fn build(cpus: u8, virtio_devices: usize) -> Vec<u8> {
    let io_apic_id = cpus; // the first number that no CPU has
    let mut entries = Vec::new();
    for id in 0..cpus {
        let flags = if id == 0 {
            CPU_ENABLED | CPU_BOOT
        } else {
            CPU_ENABLED
        };
        entries.extend([ENTRY_PROCESSOR, id, LOCAL_APIC_VERSION, flags]);
        entries.extend(CPU_SIGNATURE.to_le_bytes());
        entries.extend(CPU_FEATURES.to_le_bytes());
        entries.extend([0; 8]);
    }
    entries.extend([ENTRY_BUS, ISA_BUS]);
    entries.extend(b"ISA   ");
    entries.extend([ENTRY_IO_APIC, io_apic_id, IO_APIC_VERSION, 1]);
    entries.extend(layout::IO_APIC.to_le_bytes());
    let lines: Vec<u8> = [layout::SERIAL_IRQ]
        .into_iter()
        .chain((0..virtio_devices).map(layout::virtio_irq))
        .filter_map(|line| u8::try_from(line).ok())
        .collect();
    for &line in &lines {
        entries.extend([
            ENTRY_IO_INTERRUPT,
            INTERRUPT_INT,
            0,
            0,
            ISA_BUS,
            line,
            io_apic_id,
            line,
        ]);
    }
    entries.extend([
        ENTRY_LOCAL_INTERRUPT,
        INTERRUPT_EXTINT,
        0,
        0,
        ISA_BUS,
        0,
        ALL_LOCAL_APICS,
        0,
    ]);
    entries.extend([
        ENTRY_LOCAL_INTERRUPT,
        INTERRUPT_NMI,
        0,
        0,
        ISA_BUS,
        0,
        ALL_LOCAL_APICS,
        1,
    ]);
    let entry_count = u16::from(cpus) + 2 + lines.len() as u16 + 2;

    let mut table = floating_pointer();
    table.extend(header(&entries, entry_count));
    table.extend(entries);
    table
}

fn floating_pointer() -> Vec<u8> {
    let mut pointer = Vec::with_capacity(FLOATING_POINTER_BYTES);
    pointer.extend(b"_MP_");
    pointer.extend((layout::MP_TABLE as u32 + FLOATING_POINTER_BYTES as u32).to_le_bytes());
    pointer.extend([1, SPEC_REVISION, 0]); // length in paragraphs, revision, checksum
    pointer.extend([0; 5]); // no default configuration, no IMCR
    pointer[10] = checksum(&pointer);
    pointer
}

fn header(entries: &[u8], entry_count: u16) -> Vec<u8> {
    let mut header = Vec::with_capacity(HEADER_BYTES);
    header.extend(b"PCMP");
    header.extend(((HEADER_BYTES + entries.len()) as u16).to_le_bytes());
    header.extend([SPEC_REVISION, 0]); // revision, checksum
    header.extend(b"AIRLOCK ");
    header.extend(b"MICROVM     ");
    header.extend([0; 6]); // no OEM table
    header.extend(entry_count.to_le_bytes());
    header.extend(layout::LOCAL_APIC.to_le_bytes());
    header.extend([0; 4]); // no extended table
    let sum = checksum(&header).wrapping_add(checksum(entries));
    header[7] = sum;
    header
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, &byte| sum.wrapping_sub(byte))
}
