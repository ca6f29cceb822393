//! Which guest-physical addresses are RAM: what a PC's firmware answers to E820.

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::layout;

/// Usable by the kernel (ACPI 6.5, table 15.4).
pub const RAM: u32 = 1;
/// Not to be used, but there.
pub const RESERVED: u32 = 2;

/// One range of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// [`RAM`] or [`RESERVED`].
    pub kind: u32,
}

/// The map, ascending and without overlaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryMap(Vec<Entry>);

impl MemoryMap {
    /// The map of `memory`: its first MiB is base memory and firmware tables, the rest is free.
    pub fn of(memory: &GuestMemoryMmap) -> Self {
        let mut entries = vec![
            Entry {
                start: 0,
                bytes: layout::BASE_MEMORY_END,
                kind: RAM,
            },
            Entry {
                start: layout::MP_TABLE,
                bytes: layout::MP_TABLE_BYTES as u64,
                kind: RESERVED,
            },
            Entry {
                start: layout::ACPI_TABLES,
                bytes: layout::ACPI_TABLES_BYTES as u64,
                kind: RESERVED,
            },
        ];
        for region in memory.iter() {
            let start = region.start_addr().raw_value().max(layout::HIGH_MEMORY);
            let end = region.start_addr().raw_value() + region.len();
            if start < end {
                entries.push(Entry {
                    start,
                    bytes: end - start,
                    kind: RAM,
                });
            }
        }
        Self(entries)
    }

    /// The ranges.
    pub fn entries(&self) -> &[Entry] {
        &self.0
    }
}
