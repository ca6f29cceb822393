use super::*;
use std::io::Write;
use vmm_sys_util::tempfile::TempFile;

fn memory(mib: usize) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), mib << 20)]).unwrap()
}

fn file(bytes: &[u8]) -> TempFile {
    let file = TempFile::new().unwrap();
    file.as_file().write_all(bytes).unwrap();
    file
}

fn source(kernel: &Path) -> Source<'_> {
    Source {
        kernel,
        initramfs: None,
        cmdline: "quiet",
        discovery: Discovery::Cmdline,
        cpus: 2,
        virtio_devices: 2,
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

#[test]
fn the_mp_table_sums_to_zero_and_fits_for_every_number_of_cpus() {
    for cpus in 1..=crate::config::MAX_CPUS {
        let table = mp_table::build(cpus, layout::MAX_VIRTIO_DEVICES);
        assert!(table.len() <= layout::MP_TABLE_BYTES);
        assert_eq!(&table[..4], b"_MP_");
        assert_eq!(sum(&table[..16]), 0, "floating pointer");
        assert_eq!(u64::from(u32_at(&table, 4)), layout::MP_TABLE + 16);
        assert_eq!(&table[16..20], b"PCMP");
        let length = usize::from(u16::from_le_bytes([table[20], table[21]]));
        assert_eq!(length, table.len() - 16);
        assert_eq!(sum(&table[16..]), 0, "configuration table");
    }
}

/// Follows the pointers as a kernel does, and returns the tables by signature.
fn acpi_tables(bytes: &[u8]) -> Vec<(&[u8], &[u8])> {
    let table_at = |address: u64| {
        let start = (address - layout::ACPI_TABLES) as usize;
        let length = u32_at(bytes, start + 4) as usize;
        let table = &bytes[start..start + length];
        assert_eq!(sum(table), 0, "checksum of {:?}", &table[..4]);
        table
    };
    let pointer = |table: &[u8], offset: usize| {
        u64::from_le_bytes(table[offset..offset + 8].try_into().unwrap())
    };
    assert_eq!(&bytes[..8], b"RSD PTR ");
    assert_eq!(sum(&bytes[..20]), 0);
    assert_eq!(sum(&bytes[..36]), 0);
    let xsdt = table_at(pointer(bytes, 24));
    let mut tables = vec![(&xsdt[..4], xsdt)];
    for offset in (36..xsdt.len()).step_by(8) {
        let table = table_at(pointer(xsdt, offset));
        tables.push((&table[..4], table));
        if &table[..4] == b"FACP" {
            let dsdt = table_at(pointer(table, 140)); // X_DSDT
            tables.push((&dsdt[..4], dsdt));
        }
    }
    tables
}

#[test]
fn acpi_tables_are_linked_summed_and_name_every_device() {
    let bytes = acpi::build(crate::config::MAX_CPUS, layout::MAX_VIRTIO_DEVICES);
    assert!(bytes.len() <= layout::ACPI_TABLES_BYTES);
    let tables = acpi_tables(&bytes);
    let names: Vec<_> = tables
        .iter()
        .map(|(name, _)| String::from_utf8_lossy(name).into_owned())
        .collect();
    assert_eq!(names, ["XSDT", "FACP", "DSDT", "APIC"]);
    let dsdt = tables[2].1;
    let count = |needle: &[u8]| {
        dsdt.windows(needle.len())
            .filter(|window| *window == needle)
            .count()
    };
    assert_eq!(count(b"LNRO0005"), layout::MAX_VIRTIO_DEVICES);
    assert_eq!(count(b"VR17"), 1);
    let last = layout::virtio_mmio(layout::MAX_VIRTIO_DEVICES - 1) as u32;
    assert_eq!(count(&last.to_le_bytes()), 1);
    let madt = tables[3].1;
    assert_eq!(
        madt.len(),
        44 + 8 * usize::from(crate::config::MAX_CPUS) + 12
    );
}

#[test]
fn the_memory_map_ascends_and_holds_all_memory_above_one_mib() {
    let map = MemoryMap::of(&memory(64));
    let entries = map.entries();
    for pair in entries.windows(2) {
        assert!(pair[0].start + pair[0].bytes <= pair[1].start, "{pair:?}");
    }
    let last = entries.last().unwrap();
    assert_eq!(
        (last.start, last.bytes, last.kind),
        (1 << 20, 63 << 20, memory_map::RAM)
    );
    assert!(entries.len() <= layout::PVH_MEMORY_MAP_ENTRIES);
}

#[test]
fn devices_are_named_on_the_command_line_and_only_there_where_it_is_used() {
    let kernel = Path::new("k");
    let text = full_cmdline(&source(kernel));
    assert_eq!(
        text,
        "quiet virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6"
    );
    assert_eq!(
        full_cmdline(&Source {
            discovery: Discovery::Acpi,
            ..source(kernel)
        }),
        "quiet"
    );
}

#[test]
fn every_command_line_that_a_configuration_allows_fits() {
    let text = "x".repeat(crate::config::MAX_CMDLINE_BYTES);
    let full = Source {
        cmdline: &text,
        virtio_devices: layout::MAX_VIRTIO_DEVICES,
        ..source(Path::new("k"))
    };
    write_cmdline(&memory(1), &full).unwrap();
}

#[test]
fn a_missing_kernel_is_named() {
    let error = load(&memory(32), &source(Path::new("/nowhere/vmlinux"))).unwrap_err();
    assert_eq!(error.to_string(), "cannot read the kernel /nowhere/vmlinux");
}

#[test]
fn damaged_kernels_are_refused_in_words() {
    let mut cut_elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    cut_elf.resize(40, 0);
    let mut cut_bzimage = vec![0; 0x260];
    cut_bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    cut_bzimage[0x206] = 0xf;
    cut_bzimage[0x207] = 2;
    for (bytes, expected) in [
        (Vec::new(), "is no kernel"),
        (b"#!/bin/sh\n".to_vec(), "is no kernel"),
        (vec![0; 100_000], "is no kernel"),
        (cut_elf, "is damaged"),
        (cut_bzimage, "is no kernel"),
    ] {
        let kernel = file(&bytes);
        let error = load(&memory(32), &source(kernel.as_path()))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(expected),
            "{error} should contain {expected}"
        );
    }
}

/// An ELF file with one segment at 16 MiB and a PVH note, and maybe one of Linux.
fn tiny_elf(segment_bytes: u64, is_linux: bool) -> Vec<u8> {
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]); // executable, x86-64, version
    elf.extend(0x100_0000u64.to_le_bytes()); // entry
    elf.extend(64u64.to_le_bytes()); // program headers
    elf.extend(0u64.to_le_bytes());
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    let data = 64 + 2 * 56;
    let mut header = |kind: u32, offset: u64, file_bytes: u64, memory_bytes: u64| {
        elf.extend(kind.to_le_bytes());
        elf.extend(7u32.to_le_bytes());
        elf.extend(offset.to_le_bytes());
        elf.extend(0x100_0000u64.to_le_bytes());
        elf.extend(0x100_0000u64.to_le_bytes());
        elf.extend(file_bytes.to_le_bytes());
        elf.extend(memory_bytes.to_le_bytes());
        elf.extend(4u64.to_le_bytes());
    };
    header(4, data, if is_linux { 44 } else { 20 }, 0);
    header(1, data, 20, segment_bytes);
    elf.extend(4u32.to_le_bytes()); // note: name length, description length, XEN_ELFNOTE_PHYS32_ENTRY
    elf.extend(4u32.to_le_bytes());
    elf.extend(18u32.to_le_bytes());
    elf.extend(b"Xen\0");
    elf.extend(0x100_0040u32.to_le_bytes());
    elf.extend([6, 0, 0, 0, 4, 0, 0, 0, 1, 0, 0, 0]);
    elf.extend(b"Linux\0\0\0\0\0\0\0");
    elf
}

#[test]
fn a_pvh_kernel_is_entered_where_its_note_says_with_the_initramfs_at_the_top() {
    let memory = memory(32);
    let kernel = file(&tiny_elf(4096, false));
    let initramfs = file(&[7; 5000]);
    let source = Source {
        initramfs: Some(initramfs.as_path()),
        ..source(kernel.as_path())
    };
    assert_eq!(
        load(&memory, &source).unwrap(),
        Entry::Pvh {
            address: 0x100_0040
        }
    );
    let word = |address: u64| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
    assert_eq!(word(layout::PVH_START_INFO) as u32, 0x336e_c578);
    let (start, bytes) = (word(layout::PVH_MODULES), word(layout::PVH_MODULES + 8));
    assert_eq!((start, bytes), ((32 << 20) - 8192, 5000));
    assert_eq!(
        memory.read_obj::<u8>(GuestAddress(start + 4999)).unwrap(),
        7
    );
    assert_eq!(word(layout::CMDLINE) as u32, u32::from_le_bytes(*b"quie"));
}

#[test]
fn linux_is_entered_at_its_64_bit_entry() {
    let memory = memory(32);
    let kernel = file(&tiny_elf(4096, true));
    let entry = load(&memory, &source(kernel.as_path())).unwrap();
    assert_eq!(
        entry,
        Entry::Linux64 {
            address: 0x100_0000
        }
    );
    let header: u32 = memory
        .read_obj(GuestAddress(layout::BOOT_PARAMS + 0x202))
        .unwrap();
    assert_eq!(header, u32::from_le_bytes(*b"HdrS"));
}

#[test]
fn an_initramfs_that_would_overlap_the_kernel_is_refused() {
    let kernel = file(&tiny_elf(15 << 20, false));
    let initramfs = file(&vec![7; 2 << 20]);
    let source = Source {
        initramfs: Some(initramfs.as_path()),
        ..source(kernel.as_path())
    };
    let error = load(&memory(32), &source).unwrap_err().to_string();
    assert!(error.contains("2097152 bytes does not fit"), "{error}");
}
