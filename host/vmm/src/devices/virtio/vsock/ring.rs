//! A split virtqueue (VIRTIO 1.2, 2.7) whose three areas are located once, when the driver turns the device on.
//!
//! A packet costs a few loads and stores here; looking addresses up for each of them costs more than the rest of the
//! device. Which buffers a chain consists of is the guest's word and checked by those who use it.
#![expect(
    unsafe_code,
    reason = "the areas are shared with the guest, which writes to them at any time: raw volatile and atomic access"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// VIRTQ_DESC_F_NEXT (2.7.5).
const DESCRIPTOR_NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE (2.7.5).
const DESCRIPTOR_WRITE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT (2.7.5.3); the device does not offer it.
const DESCRIPTOR_INDIRECT: u16 = 4;
/// VIRTQ_AVAIL_F_NO_INTERRUPT (2.7.6).
const AVAIL_NO_INTERRUPT: u16 = 1;
/// VIRTQ_USED_F_NO_NOTIFY (2.7.8).
const USED_NO_NOTIFY: u16 = 1;

/// The driver's rings cannot be what VIRTIO says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RingError {
    /// The driver did not set the queue up.
    #[error("a queue is not ready, or not in guest memory")]
    NotReady,
    /// More buffers are available than exist.
    #[error(
        "the index of the available ring is {index}, {next} is next and the queue's size {size}"
    )]
    AvailableIndex {
        /// What the driver wrote.
        index: u16,
        /// The buffer to take next.
        next: u16,
        /// Queue size.
        size: u16,
    },
    /// A descriptor that does not exist.
    #[error("descriptor {0} is available and does not exist")]
    Head(u16),
}

/// `struct virtq_desc` (2.7.5).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct WireDescriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

/// `struct virtq_used_elem` (2.7.8).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct WireUsed {
    head: u32,
    length: u32,
}

/// A descriptor, copied.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Descriptor {
    pub(crate) address: GuestAddress,
    pub(crate) length: usize,
    pub(crate) is_writable: bool,
}

/// The device's end of a queue.
#[derive(Debug)]
pub(crate) struct Ring {
    /// Invariant: the pointers below point into mappings that this keeps alive, each to its whole area for `size`
    /// elements, aligned as VIRTIO 1.2, 2.7 demands.
    _memory: Arc<GuestMemoryMmap>,
    size: u16,
    event_idx: bool,
    descriptors: *const WireDescriptor,
    /// `flags`, `idx`, `ring[size]`, `used_event`.
    available: *mut u16,
    /// `flags`, `idx`, then the elements, then `avail_event`.
    used: *mut u16,
    next_available: u16,
    /// The driver's index when it was last looked at.
    seen_available: u16,
    next_used: u16,
    /// What the driver can see of `next_used`.
    published_used: u16,
    /// `next_used` when it was last decided whether the driver is told.
    decided_used: u16,
}

// SAFETY: the pointers point into mappings of the process, not of a thread, which `_memory` keeps alive.
unsafe impl Send for Ring {}

impl Ring {
    pub(crate) fn new(queue: &Queue, memory: Arc<GuestMemoryMmap>) -> Result<Self, RingError> {
        let size = queue.size();
        if !queue.ready() || size == 0 || !size.is_power_of_two() {
            return Err(RingError::NotReady);
        }
        let locate = |address: u64, length: usize, alignment: usize| {
            let slice = memory.get_slice(GuestAddress(address), length).ok()?;
            let pointer = slice.ptr_guard_mut().as_ptr();
            pointer.addr().is_multiple_of(alignment).then_some(pointer)
        };
        // Sizes and alignments are those of 2.7.
        let count = usize::from(size);
        let areas = (
            locate(queue.desc_table(), 16 * count, 16),
            locate(queue.avail_ring(), 6 + 2 * count, 2),
            locate(queue.used_ring(), 6 + 8 * count, 4),
        );
        let (Some(descriptors), Some(available), Some(used)) = areas else {
            return Err(RingError::NotReady);
        };
        Ok(Self {
            size,
            event_idx: queue.event_idx_enabled(),
            descriptors: descriptors.cast(),
            available: available.cast(),
            used: used.cast(),
            next_available: queue.next_avail(),
            seen_available: queue.next_avail(),
            next_used: queue.next_used(),
            published_used: queue.next_used(),
            decided_used: queue.next_used(),
            _memory: memory,
        })
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    /// Takes the next buffer, if there is one.
    pub(crate) fn take(&mut self) -> Result<Option<u16>, RingError> {
        if self.next_available == self.seen_available && !self.look()? {
            return Ok(None);
        }
        let head = self.load(
            self.available,
            2 + usize::from(self.next_available & (self.size - 1)),
            Ordering::Relaxed,
        );
        if head >= self.size {
            return Err(RingError::Head(head));
        }
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(head))
    }

    /// Puts the last `count` buffers that were taken back.
    pub(crate) fn give_back(&mut self, count: u16) {
        self.next_available = self.next_available.wrapping_sub(count);
    }

    /// Looks whether the driver has made more available.
    fn look(&mut self) -> Result<bool, RingError> {
        // Acquire: what the driver wrote before the index is seen after it (2.7.13.3).
        let index = self.load(self.available, 1, Ordering::Acquire);
        if index.wrapping_sub(self.next_available) > self.size {
            return Err(RingError::AvailableIndex {
                index,
                next: self.next_available,
                size: self.size,
            });
        }
        self.seen_available = index;
        Ok(index != self.next_available)
    }

    /// The descriptors of a chain; ends early where the guest has written nonsense.
    pub(crate) fn chain(&self, head: u16) -> Chain<'_> {
        Chain {
            ring: self,
            next: Some(head),
            left: self.size,
        }
    }

    /// Fills the next element of the used ring; [`Self::publish`] shows it to the driver.
    pub(crate) fn put_used(&mut self, head: u16, length: u32) {
        let element = WireUsed {
            head: u32::from(head).to_le(),
            length: length.to_le(),
        };
        // SAFETY: by the invariant the used area holds `size` elements of 8 bytes behind its first 4, aligned to 4.
        unsafe {
            let elements = self.used.add(2).cast::<WireUsed>();
            elements
                .add(usize::from(self.next_used & (self.size - 1)))
                .write_volatile(element);
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the driver all used buffers.
    pub(crate) fn publish(&mut self) {
        if self.published_used != self.next_used {
            // Release: the elements, and what is in the buffers, are seen before the index (2.7.14).
            self.store(self.used, 1, self.next_used, Ordering::Release);
            self.published_used = self.next_used;
        }
    }

    /// Whether the driver wants to be told of the buffers that were used since this was last asked (2.7.7 and 2.7.10).
    pub(crate) fn driver_wants_interrupt(&mut self) -> bool {
        self.publish();
        let (old, new) = (self.decided_used, self.next_used);
        if old == new {
            return false;
        }
        self.decided_used = new;
        // The index must be visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            return self.load(self.available, 0, Ordering::Relaxed) & AVAIL_NO_INTERRUPT == 0;
        }
        let event = self.load(
            self.available,
            2 + usize::from(self.size),
            Ordering::Relaxed,
        );
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }

    /// Asks the driver to kick for the next buffer; `true` if there is one already (2.7.13.4.1).
    pub(crate) fn want_kicks(&mut self) -> Result<bool, RingError> {
        if self.event_idx {
            // `avail_event` stands behind the elements.
            self.store(
                self.used,
                2 + 4 * usize::from(self.size),
                self.next_available,
                Ordering::Relaxed,
            );
        } else {
            self.store(self.used, 0, 0, Ordering::Relaxed);
        }
        // The wish must be visible before the index is read.
        fence(Ordering::SeqCst);
        self.look()
    }

    /// Kicks are of no use now. With VIRTIO_F_EVENT_IDX they stop by themselves after one.
    pub(crate) fn want_no_kicks(&mut self) {
        if !self.event_idx {
            self.store(self.used, 0, USED_NO_NOTIFY, Ordering::Relaxed);
        }
    }

    fn load(&self, area: *mut u16, index: usize, ordering: Ordering) -> u16 {
        // SAFETY: all callers pass an area with an index inside it; by the invariant it is mapped and aligned. The guest
        // accesses it too, which atomic access allows for.
        u16::from_le(unsafe { AtomicU16::from_ptr(area.add(index)) }.load(ordering))
    }

    fn store(&self, area: *mut u16, index: usize, value: u16, ordering: Ordering) {
        // SAFETY: as in `load`.
        unsafe { AtomicU16::from_ptr(area.add(index)) }.store(value.to_le(), ordering);
    }
}

/// Walks a descriptor chain.
#[derive(Debug)]
pub(crate) struct Chain<'a> {
    ring: &'a Ring,
    next: Option<u16>,
    /// A chain has at most as many descriptors as the queue (2.7.5.2), so loops end.
    left: u16,
}

impl Iterator for Chain<'_> {
    type Item = Descriptor;

    fn next(&mut self) -> Option<Descriptor> {
        let index = self
            .next
            .take()
            .filter(|&index| index < self.ring.size && self.left > 0)?;
        self.left -= 1;
        // SAFETY: by the invariant the area holds `size` descriptors, aligned to 16, and the index is below it. The copy
        // is made once, whatever the guest writes meanwhile.
        let wire = unsafe {
            self.ring
                .descriptors
                .add(usize::from(index))
                .read_volatile()
        };
        let flags = u16::from_le(wire.flags);
        if flags & DESCRIPTOR_INDIRECT != 0 {
            return None;
        }
        if flags & DESCRIPTOR_NEXT != 0 {
            self.next = Some(u16::from_le(wire.next));
        }
        Some(Descriptor {
            address: GuestAddress(u64::from_le(wire.address)),
            length: u32::from_le(wire.length) as usize,
            is_writable: flags & DESCRIPTOR_WRITE != 0,
        })
    }
}
