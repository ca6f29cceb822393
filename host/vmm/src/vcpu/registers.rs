//! The state in which vCPUs start: what the PVH and the Linux 64-bit boot protocols ask for.

use kvm_bindings::{
    Msrs, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::boot::Entry;
use crate::kvm::{KvmError, WhileDoing};
use crate::layout;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set; interrupts are off.
const RFLAGS_START: u64 = 1 << 1;
/// x87 control word after FNINIT, and SSE's after reset (SDM volume 1, 8.1.5 and 10.2.3).
const FPU_CONTROL_WORD: u16 = 0x37f;
const MXCSR_START: u32 = 0x1f80;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
/// MTRRs on (bit 11), everything write-back (6).
const MTRR_ALL_WRITE_BACK: u64 = 1 << 11 | 6;

const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const APIC_MODE_EXTINT: u32 = 7 << 8;
const APIC_MODE_NMI: u32 = 4 << 8;

/// GDT of the boot vCPU, as the boot protocols number them: null, unused, code, data.
const GDT_CODE: usize = 2;
const GDT_DATA: usize = 3;

/// State that all vCPUs start with; the application processors need no more and wait for their SIPI.
pub(super) fn set_common(vcpu: &VcpuFd) -> Result<(), KvmError> {
    for (index, data) in [
        (MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (MSR_MTRR_DEFAULT_TYPE, MTRR_ALL_WRITE_BACK),
    ] {
        // One at a time: what one KVM lacks is no reason to lose the others, and the kernel boots without them.
        if let Ok(msr) = Msrs::from_entries(&[kvm_msr_entry {
            index,
            data,
            ..Default::default()
        }]) {
            let _ = vcpu.set_msrs(&msr);
        }
    }
    let fpu = kvm_fpu {
        fcw: FPU_CONTROL_WORD,
        mxcsr: MXCSR_START,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu).while_doing("set the FPU")
}

/// Local interrupt lines as a PC's firmware leaves them (MP specification 1.4, 5.1).
pub(super) fn set_local_apic(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let mut apic = vcpu.get_lapic().while_doing("read the local APIC")?;
    set_lvt_mode(&mut apic, APIC_LVT_LINT0, APIC_MODE_EXTINT);
    set_lvt_mode(&mut apic, APIC_LVT_LINT1, APIC_MODE_NMI);
    vcpu.set_lapic(&apic).while_doing("set the local APIC")
}

fn set_lvt_mode(apic: &mut kvm_lapic_state, register: usize, mode: u32) {
    let mut bytes = [0; 4];
    for (byte, from) in bytes.iter_mut().zip(&apic.regs[register..register + 4]) {
        *byte = from.to_ne_bytes()[0];
    }
    let value = (u32::from_le_bytes(bytes) & !0x700) | mode;
    for (to, byte) in apic.regs[register..register + 4]
        .iter_mut()
        .zip(value.to_le_bytes())
    {
        *to = std::ffi::c_char::from_ne_bytes([byte]);
    }
}

/// Puts the boot vCPU at the kernel's entry, with the descriptor and page tables that the protocol wants in memory.
pub(super) fn set_entry(
    vcpu: &VcpuFd,
    memory: &GuestMemoryMmap,
    entry: Entry,
) -> Result<(), KvmError> {
    let mut sregs = vcpu.get_sregs().while_doing("read the segment registers")?;
    let regs = match entry {
        // xen/include/public/arch-x86/hvm/start_info.h: 32-bit protected mode, flat, no paging, EBX = start info.
        Entry::Pvh { address } => {
            set_segments(&mut sregs, false, memory)?;
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
            kvm_regs {
                rip: address,
                rbx: layout::PVH_START_INFO,
                rflags: RFLAGS_START,
                ..Default::default()
            }
        }
        // Documentation/arch/x86/boot.rst, 64-bit boot protocol: identity-mapped long mode, RSI = boot_params.
        Entry::Linux64 { address } => {
            set_segments(&mut sregs, true, memory)?;
            write_page_tables(memory)?;
            sregs.cr3 = layout::PML4;
            sregs.cr4 = CR4_PAE;
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.efer |= EFER_LME | EFER_LMA;
            kvm_regs {
                rip: address,
                rsi: layout::BOOT_PARAMS,
                rsp: layout::BOOT_STACK,
                rbp: layout::BOOT_STACK,
                rflags: RFLAGS_START,
                ..Default::default()
            }
        }
    };
    vcpu.set_sregs(&sregs)
        .while_doing("set the segment registers")?;
    vcpu.set_regs(&regs).while_doing("set the registers")
}

fn set_segments(
    sregs: &mut kvm_sregs,
    long_mode: bool,
    memory: &GuestMemoryMmap,
) -> Result<(), KvmError> {
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: (GDT_CODE * 8) as u16,
        type_: 0xb, // code, readable, accessed
        present: 1,
        dpl: 0,
        db: u8::from(!long_mode),
        s: 1,
        l: u8::from(long_mode),
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: (GDT_DATA * 8) as u16,
        type_: 0x3,
        db: 1,
        l: 0,
        ..code
    };
    // PVH wants a 32-bit TSS; VM entry on Intel wants a busy one.
    let tss = kvm_segment {
        limit: 0x67,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = tss;

    let mut table = [0u64; GDT_DATA + 1];
    table[GDT_CODE] = descriptor(&code);
    table[GDT_DATA] = descriptor(&data);
    for (index, entry) in table.into_iter().enumerate() {
        write(memory, entry, layout::GDT + 8 * index as u64)?;
    }
    write(memory, 0u64, layout::IDT)?;
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (size_of_val(&table) - 1) as u16;
    sregs.idt.base = layout::IDT;
    sregs.idt.limit = 7;
    Ok(())
}

/// A segment descriptor (SDM volume 3A, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let flags = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7
        | u64::from(segment.l) << 13
        | u64::from(segment.db) << 14
        | u64::from(segment.g) << 15;
    (limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | flags << 40
        | (limit >> 16 & 0xf) << 48
        | (segment.base >> 24 & 0xff) << 56
}

/// Identity for the first 4 GiB in 2 MiB pages.
fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), KvmError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE_PAGE: u64 = 1 << 7;
    write(memory, layout::PDPT | PRESENT_WRITABLE, layout::PML4)?;
    for directory in 0..layout::PAGE_DIRECTORIES {
        let address = layout::PAGE_DIRECTORY + directory * layout::PAGE_BYTES;
        write(
            memory,
            address | PRESENT_WRITABLE,
            layout::PDPT + 8 * directory,
        )?;
        for page in 0..512 {
            let target = (directory * 512 + page) << 21;
            write(
                memory,
                target | PRESENT_WRITABLE | LARGE_PAGE,
                address + 8 * page,
            )?;
        }
    }
    Ok(())
}

fn write(memory: &GuestMemoryMmap, value: u64, address: u64) -> Result<(), KvmError> {
    // The layout's low tables lie in RAM of every size that a configuration can have.
    memory
        .write_obj(value, GuestAddress(address))
        .map_err(|error| KvmError::Call("write boot tables", std::io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_boot_protocol() {
        let code = kvm_segment {
            limit: 0xffff_ffff,
            type_: 0xb,
            present: 1,
            s: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        assert_eq!(descriptor(&code), 0x00af_9b00_0000_ffff);
        assert_eq!(
            descriptor(&kvm_segment {
                l: 0,
                db: 1,
                type_: 3,
                ..code
            }),
            0x00cf_9300_0000_ffff
        );
    }

    #[test]
    fn page_tables_map_each_address_to_itself() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_page_tables(&memory).unwrap();
        let read = |address: u64| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
        for address in [0u64, 0x20_0000, 0xd000_0000, 0xffff_ffff] {
            let pdpt = read(layout::PML4) & !0xfff;
            let directory = read(pdpt + 8 * (address >> 30)) & !0xfff;
            let page = read(directory + 8 * (address >> 21 & 511));
            assert_eq!(page & !0x1f_ffff, address & !0x1f_ffff);
            assert_eq!(page & 0x83, 0x83);
        }
    }

    #[test]
    fn local_interrupt_lines_keep_their_other_bits() {
        let mut apic = kvm_lapic_state::default();
        apic.regs[APIC_LVT_LINT0 + 2] = 1; // mask bit
        set_lvt_mode(&mut apic, APIC_LVT_LINT0, APIC_MODE_EXTINT);
        assert_eq!(apic.regs[APIC_LVT_LINT0 + 1], 7);
        assert_eq!(apic.regs[APIC_LVT_LINT0 + 2], 1);
    }
}
