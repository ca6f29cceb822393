//! A machine on KVM, from its configuration to running vCPUs: the whole boot, in order, on one page.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::{Value, json};
use vm_memory::GuestMemoryMmap;

use crate::boot::{self, BootError, Source};
use crate::bus::{Bus, Overlap};
use crate::config::VmConfig;
use crate::console_log::ConsoleLog;
use crate::devices::legacy::{ResetController, SerialPort};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::block::{Block, DiskError};
use crate::devices::virtio::mmio::MmioTransport;
use crate::devices::virtio::mmio::registers::RegisterPage;
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::{ListenError, VsockDevice, VsockMetrics};
use crate::event_loop::{IoThread, IoThreadError, Workers};
use crate::halt::HaltWatch;
use crate::kvm::{KvmError, Vm};
use crate::layout;
use crate::machine::{ExitSlot, Machine};
use crate::memory::{self, MemoryError};
use crate::tell;
use crate::vcpu::{ExitCounts, Shared, VcpuError, VcpuThreads, Vcpus};

/// Why a machine does not start.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each variant is what its source says")]
pub enum VmError {
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Vsock(#[from] ListenError),
    #[error(transparent)]
    IoThread(#[from] IoThreadError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error(transparent)]
    Bus(#[from] Overlap),
    #[error("cannot write the console log {0}")]
    ConsoleLog(PathBuf, #[source] io::Error),
    #[error("cannot create a device")]
    Device(#[from] io::Error),
}

/// A running machine. Fields drop in order: vCPUs, I/O, devices, and last the VM with the guest's memory.
#[derive(Debug)]
pub struct KvmMachine {
    vcpus: VcpuThreads,
    io: IoThread,
    shared: Arc<Shared>,
    vsock_metrics: Arc<VsockMetrics>,
    _vm: Vm,
}

impl KvmMachine {
    /// Boots the machine that `config` describes; its end is reported to `exit`.
    pub fn start(config: &VmConfig, exit: Arc<ExitSlot>) -> Result<Self, VmError> {
        let memory = Arc::new(memory::allocate(config.memory_mib)?);
        let mut vm = Vm::create(memory.clone())?;
        let io = IoThread::start(exit.clone())?;
        let (devices, vsock_metrics) = virtio_devices(config)?;
        let entry = boot::load(
            &memory,
            &Source {
                kernel: &config.kernel,
                initramfs: config.initramfs.as_deref(),
                cmdline: config.cmdline.as_str(),
                discovery: config.discovery,
                cpus: config.cpus.get(),
                virtio_devices: devices.len(),
            },
        )?;
        let ports = legacy_ports(config, &vm, exit.clone())?;
        let mmio = virtio_bus(&mut vm, &memory, &io.workers(), devices)?;
        let vcpus = Vcpus::create(&vm, &memory, config.cpus.get(), entry)?;
        let shared = Arc::new(Shared {
            ports,
            mmio,
            exit,
            exits: ExitCounts::default(),
        });
        let vcpus = vcpus.start(shared.clone())?;
        Ok(Self {
            vcpus,
            io,
            shared,
            vsock_metrics,
            _vm: vm,
        })
    }
}

type Devices = Vec<Box<dyn VirtioDevice>>;

/// The devices in the order in which the guest finds them: rng, disks, vsock.
fn virtio_devices(config: &VmConfig) -> Result<(Devices, Arc<VsockMetrics>), VmError> {
    let mut devices: Devices = vec![Box::new(Rng::new()?)];
    for disk in config.disks.as_slice() {
        devices.push(Box::new(Block::open(
            &disk.path,
            disk.read_only,
            !config.ephemeral,
        )?));
    }
    let vsock = VsockDevice::new(&config.vsock_socket, config.guest_cid.get())?;
    let metrics = vsock.metrics();
    devices.push(Box::new(vsock));
    Ok((devices, metrics))
}

/// Serial console and reset.
fn legacy_ports(config: &VmConfig, vm: &Vm, exit: Arc<ExitSlot>) -> Result<Bus, VmError> {
    let log = ConsoleLog::create(&config.console_log, config.console_log_limit_bytes.get())
        .map_err(|error| VmError::ConsoleLog(config.console_log.clone(), error))?;
    let serial = SerialPort::new(log.watched(HaltWatch::new(exit.clone())))?;
    vm.connect_irq(serial.interrupt_edge(), layout::SERIAL_IRQ)?;
    let range = |first: u16, count: u16| u64::from(first)..u64::from(first) + u64::from(count);
    let mut ports = Bus::default();
    ports.insert(
        range(layout::SERIAL_PORT, layout::SERIAL_PORTS),
        Box::new(serial),
    )?;
    ports.insert(
        range(layout::I8042_PORT, layout::I8042_PORTS),
        Box::new(ResetController::new(exit)),
    )?;
    Ok(ports)
}

/// Every virtio device behind its register page, interrupt line and doorbells.
fn virtio_bus(
    vm: &mut Vm,
    memory: &Arc<GuestMemoryMmap>,
    workers: &Workers,
    devices: Devices,
) -> Result<Bus, VmError> {
    let pages = RegisterPage::allocate(devices.len())?;
    let mut bus = Bus::default();
    for (index, device) in devices.into_iter().enumerate() {
        let page = RegisterPage::of(&pages, index)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let transport = MmioTransport::new(device, memory.clone(), workers.clone(), page)?;
        let address = layout::virtio_mmio(index);
        vm.connect_irq(transport.interrupt_edge(), layout::virtio_irq(index))?;
        for (offset, value, event) in transport.doorbells() {
            vm.connect_write(event, address + offset, value)?;
        }
        bus.insert(
            address..address + layout::VIRTIO_MMIO_BYTES,
            Box::new(transport),
        )?;
    }
    vm.map_registers(pages)?;
    Ok(bus)
}

impl Machine for KvmMachine {
    fn is_paused(&self) -> bool {
        self.vcpus.is_paused()
    }

    fn pause(&self) -> Result<(), String> {
        if self.vcpus.pause() {
            Ok(())
        } else {
            Err("a vCPU does not leave the guest".to_owned())
        }
    }

    fn resume(&self) -> Result<(), String> {
        if self.vcpus.resume() {
            Ok(())
        } else {
            Err("the VM is stopping".to_owned())
        }
    }

    fn metrics(&self) -> Value {
        json!({
            "engine": "kvm",
            "exits": self.shared.exits.to_json(),
            "unclaimed_accesses": self.shared.ports.unclaimed() + self.shared.mmio.unclaimed(),
            "vsock": self.vsock_metrics.to_json(),
        })
    }

    fn stop(mut self: Box<Self>) {
        if !self.vcpus.stop() {
            // The process ends next, and takes the thread with it.
            tell!("airlock-vmm: a vCPU does not stop");
            std::mem::forget(self);
            return;
        }
        self.io.stop();
    }
}
