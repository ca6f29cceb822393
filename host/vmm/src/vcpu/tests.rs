//! A few bytes of machine code on the host's KVM. Where there is none these tests say so and pass, unless
//! REQUIRE_KVM=1; `scripts/lab` gives them real KVM anywhere.

use super::*;
use crate::tell;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use crate::bus::BusDevice;
use crate::config::MemoryMib;
use crate::devices::virtio::mmio::registers::RegisterPage;
use crate::machine::Exit;
use crate::{layout, memory};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::AsFd;
use vm_memory::{Bytes, GuestAddress, VolatileMemory};
use vmm_sys_util::eventfd::EventFd;

/// Long enough for any loaded machine; a test that waits this long has failed.
const DEADLINE: Duration = Duration::from_secs(20);
const PORT: u64 = 0x80;
const MMIO: u64 = layout::VIRTIO_MMIO;

#[derive(Debug, PartialEq)]
enum Seen {
    Write(u64, Vec<u8>),
    Read(u64, usize),
}

struct Recorder(Sender<Seen>);

impl BusDevice for Recorder {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0x5a);
        let _ = self.0.send(Seen::Read(offset, data.len()));
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        let _ = self.0.send(Seen::Write(offset, data.to_vec()));
    }
}

struct Machine {
    vm: Vm,
    memory: Arc<GuestMemoryMmap>,
    vcpus: Option<Vcpus>,
    threads: Option<VcpuThreads>,
    shared: Arc<Shared>,
    ports: Receiver<Seen>,
    mmio: Receiver<Seen>,
}

/// A machine that is about to run `code` in long mode; None where there is no KVM.
fn machine(code: &[u8], cpus: u8) -> Option<Machine> {
    let memory = Arc::new(memory::allocate(MemoryMib::new(32).unwrap()).unwrap());
    let vm = match Vm::create(memory.clone()) {
        Ok(vm) => vm,
        Err(error) if std::env::var_os("REQUIRE_KVM").is_some_and(|value| value == "1") => {
            panic!("{error}")
        }
        Err(error) => {
            tell!("skipped: no KVM here: {error}");
            return None;
        }
    };
    memory
        .write_slice(code, GuestAddress(layout::HIGH_MEMORY))
        .unwrap();
    let vcpus = Vcpus::create(
        &vm,
        &memory,
        cpus,
        Entry::Linux64 {
            address: layout::HIGH_MEMORY,
        },
    )
    .unwrap();
    let ((port_sender, ports), (mmio_sender, mmio)) = (channel(), channel());
    let (mut port_bus, mut mmio_bus) = (Bus::default(), Bus::default());
    port_bus
        .insert(PORT..PORT + 8, Box::new(Recorder(port_sender)))
        .unwrap();
    mmio_bus
        .insert(MMIO..MMIO + 4096, Box::new(Recorder(mmio_sender)))
        .unwrap();
    let exit = Arc::new(ExitSlot::new().unwrap());
    let shared = Arc::new(Shared {
        ports: port_bus,
        mmio: mmio_bus,
        exit,
        exits: ExitCounts::default(),
    });
    Some(Machine {
        vm,
        memory,
        vcpus: Some(vcpus),
        threads: None,
        shared,
        ports,
        mmio,
    })
}

impl Machine {
    fn start(&mut self) {
        self.threads = Some(
            self.vcpus
                .take()
                .unwrap()
                .start(self.shared.clone())
                .unwrap(),
        );
    }

    fn exit(&self) -> Exit {
        let deadline = Timespec {
            tv_sec: DEADLINE.as_secs() as i64,
            tv_nsec: 0,
        };
        poll(
            &mut [PollFd::new(&self.shared.exit.as_fd(), PollFlags::IN)],
            Some(&deadline),
        )
        .unwrap();
        self.shared.exit.get().expect("the guest did not end")
    }

    fn counter(&self) -> u64 {
        self.memory.read_obj(GuestAddress(0x20_0000)).unwrap()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(mut threads) = self.threads.take() {
            assert!(threads.stop(), "a vCPU did not stop");
        }
    }
}

/// `mov edi, address`
fn mov_edi(address: u64) -> Vec<u8> {
    let mut code = vec![0xbf];
    code.extend((address as u32).to_le_bytes());
    code
}

/// `lgdt`-less triple fault: an empty interrupt table and `ud2`.
const UD2: [u8; 2] = [0x0f, 0x0b];
/// `inc qword [0x200000]; jmp back to it`
const COUNT_FOR_EVER: [u8; 10] = [0x48, 0xff, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00, 0xeb, 0xf6];

#[test]
fn port_accesses_reach_the_bus_and_a_triple_fault_is_a_reset() {
    // mov al, 0x42; out 0x80, al; in al, 0x81; out 0x82, al; ud2
    let mut code = vec![0xb0, 0x42, 0xe6, 0x80, 0xe4, 0x81, 0xe6, 0x82];
    code.extend(UD2);
    let Some(mut machine) = machine(&code, 1) else {
        return;
    };
    machine.start();
    for expected in [
        Seen::Write(0, vec![0x42]),
        Seen::Read(1, 1),
        Seen::Write(2, vec![0x5a]),
    ] {
        assert_eq!(machine.ports.recv_timeout(DEADLINE).unwrap(), expected);
    }
    let exit = machine.exit();
    assert_eq!(
        (exit.reason, exit.detail.as_str()),
        (ExitReason::GuestReset, "triple fault")
    );
}

#[test]
fn device_memory_accesses_reach_the_bus() {
    let mut code = mov_edi(MMIO + 0x10);
    code.extend([0xc7, 0x07, 0x78, 0x56, 0x34, 0x12]); // mov dword [rdi], 0x12345678
    code.extend([0x8b, 0x47, 0x04]); // mov eax, [rdi + 4]
    code.extend([0xe6, 0x80]); // out 0x80, al
    code.extend(UD2);
    let Some(mut machine) = machine(&code, 1) else {
        return;
    };
    machine.start();
    let written = Seen::Write(0x10, 0x1234_5678u32.to_le_bytes().to_vec());
    assert_eq!(machine.mmio.recv_timeout(DEADLINE).unwrap(), written);
    assert_eq!(
        machine.mmio.recv_timeout(DEADLINE).unwrap(),
        Seen::Read(0x14, 4)
    );
    assert_eq!(
        machine.ports.recv_timeout(DEADLINE).unwrap(),
        Seen::Write(0, vec![0x5a])
    );
}

#[test]
fn register_pages_are_read_without_leaving_the_guest_and_doorbells_do_not_either() {
    let mut code = mov_edi(MMIO);
    code.extend([0x8a, 0x07, 0xe6, 0x80]); // mov al, [rdi]; out 0x80, al
    code.extend([0xc7, 0x47, 0x50, 1, 0, 0, 0]); // mov dword [rdi + 0x50], 1: an ioeventfd
    code.extend([0xc7, 0x47, 0x50, 2, 0, 0, 0]); // another value: none
    code.extend(UD2);
    let Some(mut machine) = machine(&code, 1) else {
        return;
    };
    let pages = RegisterPage::allocate(1).unwrap();
    pages.as_volatile_slice().write_obj(0x77u8, 0).unwrap();
    machine.vm.map_registers(pages).unwrap();
    let doorbell = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    machine.vm.connect_write(&doorbell, MMIO + 0x50, 1).unwrap();
    machine.start();
    assert_eq!(
        machine.ports.recv_timeout(DEADLINE).unwrap(),
        Seen::Write(0, vec![0x77])
    );
    assert_eq!(machine.exit().reason, ExitReason::GuestReset);
    assert_eq!(doorbell.read().unwrap(), 1);
    let mmio: Vec<Seen> = machine.mmio.try_iter().collect();
    assert_eq!(mmio, [Seen::Write(0x50, vec![2, 0, 0, 0])]);
}

#[test]
fn a_guest_that_never_exits_can_be_paused_resumed_and_stopped() {
    let Some(mut machine) = machine(&COUNT_FOR_EVER, 2) else {
        return;
    };
    machine.start();
    let threads = machine.threads.as_ref().unwrap();
    while machine.counter() == 0 {
        std::thread::yield_now();
    }
    assert!(threads.pause());
    assert!(threads.is_paused());
    let at_pause = machine.counter();
    std::thread::yield_now();
    assert_eq!(machine.counter(), at_pause);
    assert!(threads.resume());
    while machine.counter() == at_pause {
        std::thread::yield_now();
    }
}

#[test]
fn a_halted_guest_can_be_stopped() {
    let Some(mut machine) = machine(&[0xfa, 0xf4], 1) else {
        return;
    }; // cli; hlt
    machine.start();
}
