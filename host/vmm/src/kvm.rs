//! The VM as KVM sees it: memory slots, interrupt controller, event file descriptors.
//!
//! With `vcpu/` the only place that imports kvm-ioctls. Nothing here knows of devices or of booting.

#![expect(
    unsafe_code,
    reason = "handing memory to KVM is the caller's promise that the mapping outlives the VM"
)]

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::layout;

/// What can be wrong with the host's KVM.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// No device node.
    #[error(
        "/dev/kvm does not exist: this machine offers no KVM; use engine qemu, or enable virtualisation"
    )]
    Absent,
    /// No permission.
    #[error(
        "/dev/kvm may not be opened by this user: add the user to the group that owns it (often `kvm`)"
    )]
    Denied,
    /// Anything else on opening.
    #[error("/dev/kvm cannot be used")]
    Open(#[source] io::Error),
    /// Not the stable API.
    #[error("/dev/kvm speaks API version {0}, expected {KVM_API_VERSION}")]
    Version(i32),
    /// A needed capability is missing.
    #[error("this host's KVM has no {0}; a newer kernel is needed")]
    Capability(&'static str),
    /// A KVM call failed.
    #[error("KVM could not {0}")]
    Call(&'static str, #[source] io::Error),
}

/// Adds what was being done to a failed call.
pub(crate) trait WhileDoing<T> {
    fn while_doing(self, what: &'static str) -> Result<T, KvmError>;
}

impl<T> WhileDoing<T> for Result<T, kvm_ioctls::Error> {
    fn while_doing(self, what: &'static str) -> Result<T, KvmError> {
        self.map_err(|error| KvmError::Call(what, error.into()))
    }
}

/// A VM with memory and an interrupt controller, and no vCPU yet.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
    cpuid: CpuId,
    /// Mappings that KVM reads and writes: dropped after `fd`, because fields drop in order.
    memory: Arc<GuestMemoryMmap>,
    registers: Option<Arc<MmapRegion>>,
}

impl Vm {
    /// A VM on `/dev/kvm` with interrupt controllers and `memory`.
    pub fn create(memory: Arc<GuestMemoryMmap>) -> Result<Self, KvmError> {
        let vm = Self::create_bare(memory)?;
        // Before the interrupt chip and the vCPUs: KVM API, 4.35 and 4.41.
        vm.fd
            .set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .while_doing("place its identity map")?;
        vm.fd
            .set_tss_address(layout::KVM_TSS as usize)
            .while_doing("place its task state segment")?;
        // PIC, I/O APIC and local APICs in the kernel. No PIT: kvmclock tells the guest all frequencies.
        vm.fd
            .create_irq_chip()
            .while_doing("create the interrupt controller")?;
        Ok(vm)
    }

    /// A VM without interrupt controllers, in which HLT comes back: for the probe and for tests.
    pub fn create_bare(memory: Arc<GuestMemoryMmap>) -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(|error| match error.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Absent,
            libc::EACCES | libc::EPERM => KvmError::Denied,
            _ => KvmError::Open(error.into()),
        })?;
        let version = kvm.get_api_version();
        if version != KVM_API_VERSION as i32 {
            return Err(KvmError::Version(version));
        }
        for (capability, name) in [
            (Cap::UserMemory, "user memory slots"),
            (Cap::Irqchip, "interrupt controller"),
            (Cap::Irqfd, "irqfd"),
            (Cap::Ioeventfd, "ioeventfd"),
            (Cap::ImmediateExit, "immediate_exit"),
            (Cap::ReadonlyMem, "read-only memory slots"),
            // Without it a guest calibrates its timer against a PIT, which there is none of.
            (Cap::TscDeadlineTimer, "TSC-deadline timer"),
        ] {
            if !kvm.check_extension(capability) {
                return Err(KvmError::Capability(name));
            }
        }
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .while_doing("list the CPU's features")?;
        let vm = Self {
            fd: create_vm(&kvm)?,
            cpuid,
            memory,
            registers: None,
        };
        vm.add_ram_slots()?;
        Ok(vm)
    }

    fn add_ram_slots(&self) -> Result<(), KvmError> {
        for (slot, region) in [layout::SLOT_RAM, layout::SLOT_RAM_ABOVE_GAP]
            .into_iter()
            .zip(self.memory.iter())
        {
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.get_mmap().as_ptr() as u64,
            };
            // SAFETY: the range is one live mapping of exactly this length, and `self.memory` keeps it mapped for as
            // long as `self.fd` lives. vCPU descriptors hold the VM open beyond that, but only `VcpuThreads` has
            // them and it is joined before the `Vm` is dropped (`vm.rs`).
            unsafe { self.fd.set_user_memory_region(slot) }
                .while_doing("map the guest's memory")?;
        }
        Ok(())
    }

    /// Shows `registers` to the guest at [`layout::VIRTIO_MMIO`]: reads do not leave the guest, writes exit as MMIO.
    pub fn map_registers(&mut self, registers: Arc<MmapRegion>) -> Result<(), KvmError> {
        let slot = kvm_userspace_memory_region {
            slot: layout::SLOT_REGISTERS,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: layout::VIRTIO_MMIO,
            memory_size: registers.size() as u64,
            userspace_addr: registers.as_ptr() as u64,
        };
        // SAFETY: as for RAM: one live mapping of this length, kept mapped by `self.registers`.
        unsafe { self.fd.set_user_memory_region(slot) }.while_doing("map the device registers")?;
        self.registers = Some(registers);
        Ok(())
    }

    /// Each write to `event` is an edge on interrupt line `line`.
    pub fn connect_irq(&self, event: &EventFd, line: u32) -> Result<(), KvmError> {
        self.fd
            .register_irqfd(event, line)
            .while_doing("connect an interrupt line")
    }

    /// A guest write of the 32-bit `value` to `address` signals `event` and does not leave KVM.
    pub fn connect_write(&self, event: &EventFd, address: u64, value: u32) -> Result<(), KvmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .while_doing("connect a doorbell register")
    }

    pub(crate) fn create_vcpu(&self, id: u8) -> Result<VcpuFd, KvmError> {
        self.fd.create_vcpu(id.into()).while_doing("create a vCPU")
    }

    /// What host CPU and KVM can offer a guest.
    pub(crate) fn supported_cpuid(&self) -> &CpuId {
        &self.cpuid
    }
}

/// KVM_CREATE_VM can be interrupted by a signal (it waits for other CPUs).
fn create_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    const ATTEMPTS: usize = 5;
    let mut result = kvm.create_vm();
    for _ in 1..ATTEMPTS {
        match result {
            Err(error) if error.errno() == libc::EINTR => result = kvm.create_vm(),
            _ => break,
        }
    }
    result.while_doing("create a VM")
}
