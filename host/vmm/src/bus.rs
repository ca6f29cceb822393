//! Port and memory accesses of the guest, on their way to the device that claims the address.
//!
//! Two buses, ports and MMIO, of one type. Every device has a lock of its own; it is held for one access.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// What reads of an address without device return.
const NOBODY: u8 = 0xff;

/// Registers. Called on vCPU threads: must answer without blocking.
pub trait BusDevice: Send {
    /// Fills `data` from the register at `offset`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes `data` to the register at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

type Slot = Mutex<Box<dyn BusDevice>>;

/// Which device answers at which address.
#[derive(Default)]
pub struct Bus {
    devices: Vec<(Range<u64>, Slot)>,
    unclaimed: AtomicU64,
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(self.devices.iter().map(|(range, _)| range))
            .finish()
    }
}

/// Two devices at one address: a mistake of whoever assembles the machine.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("two devices claim address {0:#x}")]
pub struct Overlap(u64);

impl Bus {
    /// Puts a device at `range`.
    pub fn insert(&mut self, range: Range<u64>, device: Box<dyn BusDevice>) -> Result<(), Overlap> {
        if let Some((other, _)) = self
            .devices
            .iter()
            .find(|(r, _)| r.start < range.end && range.start < r.end)
        {
            return Err(Overlap(other.start.max(range.start)));
        }
        self.devices.push((range, Mutex::new(device)));
        Ok(())
    }

    /// A read that lies wholly inside a device's range; anything else reads as all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((offset, device)) => lock(device).read(offset, data),
            None => data.fill(NOBODY),
        }
    }

    /// A write that lies wholly inside a device's range; anything else is dropped.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            lock(device).write(offset, data);
        }
    }

    /// Accesses that no device claimed.
    pub fn unclaimed(&self) -> u64 {
        self.unclaimed.load(Ordering::Relaxed)
    }

    fn find(&self, address: u64, length: usize) -> Option<(u64, &Slot)> {
        let end = address.saturating_add(length as u64);
        let found = self
            .devices
            .iter()
            .find(|(range, _)| range.start <= address && end <= range.end);
        if found.is_none() {
            self.unclaimed.fetch_add(1, Ordering::Relaxed);
        }
        found.map(|(range, device)| (address - range.start, device))
    }
}

fn lock(device: &Slot) -> std::sync::MutexGuard<'_, Box<dyn BusDevice>> {
    device
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u8);
    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + offset as u8);
        }
        fn write(&mut self, _offset: u64, data: &[u8]) {
            self.0 = data[0];
        }
    }

    #[test]
    fn accesses_reach_the_device_that_claims_them_and_no_other() {
        let mut bus = Bus::default();
        bus.insert(0x10..0x18, Box::new(Echo(1))).unwrap();
        bus.insert(0x18..0x20, Box::new(Echo(100))).unwrap();
        let mut data = [0; 1];
        bus.write(0x11, &[50]);
        bus.read(0x12, &mut data);
        assert_eq!(data, [52]);
        bus.read(0x18, &mut data);
        assert_eq!(data, [100]);
        bus.read(0x20, &mut data);
        assert_eq!(data, [0xff]);
        let mut across = [0; 4];
        bus.read(0x16, &mut across);
        assert_eq!(
            across, [0xff; 4],
            "an access across two devices belongs to neither"
        );
        bus.read(u64::MAX, &mut across);
        assert_eq!(bus.unclaimed(), 3);
    }

    #[test]
    fn one_address_has_one_device() {
        let mut bus = Bus::default();
        bus.insert(0x10..0x18, Box::new(Echo(1))).unwrap();
        assert_eq!(
            bus.insert(0x17..0x20, Box::new(Echo(1))),
            Err(Overlap(0x17))
        );
    }
}
