//! The registers half of the device.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::host_sockets::{HostSockets, ListenError};
use super::spec::{DEVICE_TYPE, FEATURE_EVENT_IDX, FEATURE_VERSION_1};
use super::worker::VsockWorker;
use super::{QUEUE_SIZES, VsockMetrics};
use crate::devices::virtio::{Activation, QueueWorker, VirtioDevice};

/// A virtio socket device whose host side is a unix socket.
#[derive(Debug)]
pub struct VsockDevice {
    guest_cid: u32,
    sockets: Arc<HostSockets>,
    metrics: Arc<VsockMetrics>,
}

impl VsockDevice {
    /// Listens on `socket_path`; host processes that connect before the guest is up wait in the backlog.
    pub fn new(socket_path: &Path, guest_cid: u32) -> Result<Self, ListenError> {
        let sockets = Arc::new(HostSockets::listen(socket_path)?);
        Ok(Self {
            guest_cid,
            sockets,
            metrics: Arc::default(),
        })
    }

    /// Counters that live as long as anyone looks.
    pub fn metrics(&self) -> Arc<VsockMetrics> {
        self.metrics.clone()
    }
}

impl VirtioDevice for VsockDevice {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// Stream sockets are what a device without VIRTIO_VSOCK_F_* bits offers (VIRTIO 1.2, 5.10.3).
    fn features(&self) -> u64 {
        FEATURE_VERSION_1 | FEATURE_EVENT_IDX
    }

    /// The guest's CID, 64 bits (VIRTIO 1.2, 5.10.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = u64::from(self.guest_cid).to_le_bytes();
        for (index, byte) in data.iter_mut().enumerate() {
            let position = usize::try_from(offset)
                .ok()
                .and_then(|offset| offset.checked_add(index));
            *byte = position
                .and_then(|position| config.get(position))
                .copied()
                .unwrap_or(0);
        }
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Box<dyn QueueWorker>> {
        let worker = VsockWorker::new(
            activation,
            self.guest_cid,
            self.sockets.clone(),
            self.metrics.clone(),
        )?;
        Ok(Box::new(worker))
    }
}
