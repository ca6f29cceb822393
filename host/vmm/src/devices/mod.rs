//! Devices, none of which knows how the guest reaches it.

pub mod legacy;
pub mod virtio;
