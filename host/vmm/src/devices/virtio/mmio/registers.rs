//! The register page (VIRTIO 1.2, 4.2.2): offsets, and the memory that both the guest and this process see.
//!
//! The guest can only read the page, so what is loaded from it is what this process stored.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::{Bytes, MmapRegion, VolatileMemory};

use crate::layout::{VIRTIO_MMIO, VIRTIO_MMIO_BYTES, virtio_mmio};

/// Where configuration space begins.
pub const CONFIG_OFFSET: u64 = 0x100;
/// More than any device's configuration; beyond it reads as zero.
pub const CONFIG_BYTES: usize = 256;

const _: () = assert!(CONFIG_OFFSET + CONFIG_BYTES as u64 <= VIRTIO_MMIO_BYTES);

macro_rules! registers {
    ($($name:ident = $offset:literal,)*) => {
        /// A 32-bit register, by its name in the specification.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[expect(missing_docs, reason = "the specification's names")]
        #[repr(u32)]
        pub enum Register { $($name = $offset,)* }

        impl Register {
            /// The register at an offset.
            pub fn at(offset: u64) -> Option<Self> {
                match offset {
                    $($offset => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

registers! {
    MagicValue = 0x000,
    Version = 0x004,
    DeviceId = 0x008,
    VendorId = 0x00c,
    DeviceFeatures = 0x010,
    DeviceFeaturesSel = 0x014,
    DriverFeatures = 0x020,
    DriverFeaturesSel = 0x024,
    QueueSel = 0x030,
    QueueNumMax = 0x034,
    QueueNum = 0x038,
    QueueReady = 0x044,
    QueueNotify = 0x050,
    InterruptStatus = 0x060,
    InterruptAck = 0x064,
    Status = 0x070,
    QueueDescLow = 0x080,
    QueueDescHigh = 0x084,
    QueueDriverLow = 0x090,
    QueueDriverHigh = 0x094,
    QueueDeviceLow = 0x0a0,
    QueueDeviceHigh = 0x0a4,
    ShmLenLow = 0x0b0,
    ShmLenHigh = 0x0b4,
    ShmBaseLow = 0x0b8,
    ShmBaseHigh = 0x0bc,
    ConfigGeneration = 0x0fc,
}

impl Register {
    /// Offset in the page.
    pub fn offset(self) -> u64 {
        self as u64
    }
}

/// One device's page.
#[derive(Debug, Clone)]
pub struct RegisterPage {
    pages: Arc<MmapRegion>,
    start: usize,
}

impl RegisterPage {
    /// Memory for `devices` pages; it is shown to the guest at [`VIRTIO_MMIO`].
    pub fn allocate(devices: usize) -> std::io::Result<Arc<MmapRegion>> {
        let bytes = devices * VIRTIO_MMIO_BYTES as usize;
        MmapRegion::new(bytes)
            .map(Arc::new)
            .map_err(std::io::Error::other)
    }

    /// Page `index` of `pages`; None if there is none.
    pub fn of(pages: &Arc<MmapRegion>, index: usize) -> Option<Self> {
        let start = usize::try_from(virtio_mmio(index) - VIRTIO_MMIO).ok()?;
        (start + VIRTIO_MMIO_BYTES as usize <= pages.size()).then(|| Self {
            pages: pages.clone(),
            start,
        })
    }

    /// Reads a register.
    pub fn load(&self, register: Register) -> u32 {
        self.cell(register)
            .map_or(0, |cell| cell.load(Ordering::Acquire))
    }

    /// Sets a register.
    pub fn store(&self, register: Register, value: u32) {
        if let Some(cell) = self.cell(register) {
            cell.store(value, Ordering::Release);
        }
    }

    /// Sets bits of a register that several threads change. Quick where they are set already.
    pub fn set_bits(&self, register: Register, bits: u32) {
        if let Some(cell) = self.cell(register)
            && cell.load(Ordering::Acquire) & bits != bits
        {
            cell.fetch_or(bits, Ordering::AcqRel);
        }
    }

    /// Clears bits of a register that several threads change.
    pub fn clear_bits(&self, register: Register, bits: u32) {
        if let Some(cell) = self.cell(register) {
            cell.fetch_and(!bits, Ordering::AcqRel);
        }
    }

    /// Adds one.
    pub fn increment(&self, register: Register) {
        if let Some(cell) = self.cell(register) {
            cell.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Replaces configuration space.
    pub fn store_config(&self, config: &[u8; CONFIG_BYTES]) {
        let offset = self.start + CONFIG_OFFSET as usize;
        // In range by the assertion above.
        let _ = self.pages.as_volatile_slice().write_slice(config, offset);
    }

    /// Reads as the guest would.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let end = offset.saturating_add(data.len() as u64);
        if end <= VIRTIO_MMIO_BYTES {
            let _ = self
                .pages
                .as_volatile_slice()
                .read_slice(data, self.start + offset as usize);
        }
    }

    /// None never happens: every register lies in the page, and at a multiple of four.
    fn cell(&self, register: Register) -> Option<&AtomicU32> {
        self.pages
            .get_atomic_ref::<AtomicU32>(self.start + register as usize)
            .ok()
    }
}
