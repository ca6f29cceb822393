//! vCPU threads: enter the guest, carry its accesses to the buses, tell why it ended.
//!
//! With `kvm.rs` the only place that imports kvm-ioctls. A vCPU knows no device.

mod cpuid;
mod fault;
mod gate;
mod registers;

use std::ffi::{c_int, c_void};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::boot::Entry;
use crate::bus::Bus;
use crate::kvm::{KvmError, Vm};
use crate::machine::{ExitReason, ExitSlot};
use crate::seccomp;
use gate::{Gate, Passed, Wish};

/// What every vCPU of a VM works with.
#[derive(Debug)]
pub struct Shared {
    /// I/O ports.
    pub ports: Bus,
    /// Device memory.
    pub mmio: Bus,
    /// Where the VM's end is reported.
    pub exit: Arc<ExitSlot>,
    /// Exits to this process.
    pub exits: ExitCounts,
}

/// How often vCPUs came back to this process, and what for.
#[derive(Debug, Default)]
pub struct ExitCounts {
    /// Port reads.
    pub port_reads: AtomicU64,
    /// Port writes.
    pub port_writes: AtomicU64,
    /// Device memory reads.
    pub mmio_reads: AtomicU64,
    /// Device memory writes.
    pub mmio_writes: AtomicU64,
    /// Signals and whatever else.
    pub others: AtomicU64,
}

impl ExitCounts {
    /// As a JSON object.
    pub fn to_json(&self) -> serde_json::Value {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        serde_json::json!({
            "port_reads": get(&self.port_reads),
            "port_writes": get(&self.port_writes),
            "mmio_reads": get(&self.mmio_reads),
            "mmio_writes": get(&self.mmio_writes),
            "others": get(&self.others),
        })
    }
}

/// A failure to bring vCPUs up.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// From KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// From the host.
    #[error("could not start a vCPU thread")]
    Thread(#[source] io::Error),
}

/// vCPUs that are set up and have not run yet.
#[derive(Debug)]
pub struct Vcpus(Vec<VcpuFd>);

impl Vcpus {
    /// Creates `cpus` vCPUs; the first one stands at the kernel's entry.
    pub fn create(
        vm: &Vm,
        memory: &GuestMemoryMmap,
        cpus: u8,
        entry: Entry,
    ) -> Result<Self, KvmError> {
        let mut vcpus = Vec::with_capacity(cpus.into());
        for id in 0..cpus {
            let vcpu = vm.create_vcpu(id)?;
            let cpuid = cpuid::for_vcpu(vm.supported_cpuid(), id, cpus);
            vcpu.set_cpuid2(&cpuid)
                .map_err(|error| KvmError::Call("set CPUID", error.into()))?;
            registers::set_common(&vcpu)?;
            registers::set_local_apic(&vcpu)?;
            vcpus.push(vcpu);
        }
        if let Some(boot_vcpu) = vcpus.first() {
            registers::set_entry(boot_vcpu, memory, entry)?;
        }
        Ok(Self(vcpus))
    }

    /// One vCPU without local APIC, for the probe and for tests of a few instructions.
    pub fn create_bare(vm: &Vm, memory: &GuestMemoryMmap, entry: Entry) -> Result<Self, KvmError> {
        let vcpu = vm.create_vcpu(0)?;
        let cpuid = cpuid::for_vcpu(vm.supported_cpuid(), 0, 1);
        vcpu.set_cpuid2(&cpuid)
            .map_err(|error| KvmError::Call("set CPUID", error.into()))?;
        registers::set_common(&vcpu)?;
        registers::set_entry(&vcpu, memory, entry)?;
        Ok(Self(vec![vcpu]))
    }

    /// Runs the first vCPU here, until it halts; again, from there. An error says what it did instead.
    pub fn run_until_halt(&mut self) -> Result<(), String> {
        let Some(vcpu) = self.0.first_mut() else {
            return Ok(());
        };
        let instead = match vcpu.run() {
            Ok(VcpuExit::Hlt) => return Ok(()),
            Ok(other) => format!("{other:?}"),
            Err(error) => error.to_string(),
        };
        Err(format!("{instead}; {}", fault::describe(vcpu)))
    }

    /// Lets them run, each in a thread of its own.
    pub fn start(self, shared: Arc<Shared>) -> Result<VcpuThreads, VcpuError> {
        register_signal_handler(kick_signal(), ignore_signal)
            .map_err(|error| VcpuError::Thread(error.into()))?;
        let gate = Arc::new(Gate::new(self.0.len()));
        let mut threads = VcpuThreads {
            gate: gate.clone(),
            threads: Vec::new(),
        };
        for (id, fd) in self.0.into_iter().enumerate() {
            let vcpu = Vcpu {
                fd,
                gate: gate.clone(),
                shared: shared.clone(),
            };
            let thread = thread::Builder::new()
                .name(format!("vcpu{id}"))
                .spawn(move || vcpu.run());
            match thread {
                Ok(thread) => threads.threads.push(thread),
                Err(error) => {
                    // The threads that do run must not go on without the others.
                    threads.stop();
                    return Err(VcpuError::Thread(error));
                }
            }
        }
        Ok(threads)
    }
}

/// Running vCPUs.
#[derive(Debug)]
pub struct VcpuThreads {
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
}

impl VcpuThreads {
    /// Holds all vCPUs outside the guest. False: one did not come.
    pub fn pause(&self) -> bool {
        self.gate.set(Wish::Pause, || self.kick())
    }

    /// Lets them run again.
    pub fn resume(&self) -> bool {
        self.gate.set(Wish::Run, || {})
    }

    /// Whether they are held.
    pub fn is_paused(&self) -> bool {
        self.gate.wish() == Wish::Pause
    }

    /// Ends all vCPUs. False: one did not end, and the process must.
    pub fn stop(&mut self) -> bool {
        if !self.gate.set(Wish::Stop, || self.kick()) {
            return false;
        }
        self.threads.drain(..).all(|thread| thread.join().is_ok())
    }

    fn kick(&self) {
        for thread in &self.threads {
            // A thread that is gone needs no signal.
            let _ = thread.kill(kick_signal());
        }
    }
}

fn kick_signal() -> c_int {
    SIGRTMIN()
}

/// The signal's arrival is all that counts: it ends KVM_RUN with EINTR.
extern "C" fn ignore_signal(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {}

struct Vcpu {
    fd: VcpuFd,
    gate: Arc<Gate>,
    shared: Arc<Shared>,
}

enum Step {
    GoOn,
    End(ExitReason, String),
}

impl Vcpu {
    fn run(mut self) {
        if let Err(error) = seccomp::install(seccomp::Thread::Vcpu) {
            self.shared.exit.report(
                ExitReason::Error,
                format!("a vCPU's system call filter: {error}"),
            );
            return;
        }
        loop {
            match self.gate.pass() {
                Passed::Run => {}
                // Tells the guest's watchdogs that it was not them who slept; a guest without kvmclock has none.
                Passed::RunAfterPause => drop(self.fd.kvmclock_ctrl()),
                Passed::Stop => return,
            }
            if let Step::End(reason, detail) = self.step() {
                self.shared.exit.report(reason, detail);
                return;
            }
        }
    }

    /// Enters the guest once.
    fn step(&mut self) -> Step {
        let exits = &self.shared.exits;
        let count = |counter: &AtomicU64| {
            counter.fetch_add(1, Ordering::Relaxed);
        };
        let ending = match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                count(&exits.port_reads);
                // More than one byte is a string instruction on one port far more often than a wide register.
                data.chunks_mut(1)
                    .for_each(|byte| self.shared.ports.read(port.into(), byte));
                return Step::GoOn;
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                count(&exits.port_writes);
                data.chunks(1)
                    .for_each(|byte| self.shared.ports.write(port.into(), byte));
                return Step::GoOn;
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                count(&exits.mmio_reads);
                self.shared.mmio.read(address, data);
                return Step::GoOn;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                count(&exits.mmio_writes);
                self.shared.mmio.write(address, data);
                return Step::GoOn;
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                count(&exits.others);
                return Step::GoOn;
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => {
                count(&exits.others);
                return Step::GoOn;
            }
            Ok(VcpuExit::Shutdown) => {
                return Step::End(ExitReason::GuestReset, "triple fault".into());
            }
            Ok(VcpuExit::SystemEvent(kind, _)) => {
                return Step::End(ExitReason::GuestReset, format!("system event {kind}"));
            }
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                format!(
                    "the CPU refuses to enter the guest: hardware reason {reason:#x} on host CPU {cpu}"
                )
            }
            Ok(VcpuExit::InternalError) => "KVM internal error".to_owned(),
            Ok(other) => format!("unexpected exit {other:?}"),
            Err(error) => {
                return Step::End(ExitReason::Error, format!("KVM_RUN failed: {error}"));
            }
        };
        Step::End(
            ExitReason::GuestFault,
            format!("{ending}; {}", fault::describe(&mut self.fd)),
        )
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        // Counts only if nothing was reported before: a vCPU must not disappear unnoticed.
        self.shared
            .exit
            .report(ExitReason::Error, "a vCPU thread ended");
        self.gate.leave();
    }
}

#[cfg(test)]
mod tests;
