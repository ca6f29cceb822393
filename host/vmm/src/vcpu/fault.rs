//! Where a vCPU stood when it could not go on, in one line for `exit.json`.

#![expect(unsafe_code, reason = "kvm_run is a union")]

use std::fmt::Write;

use kvm_bindings::KVM_EXIT_INTERNAL_ERROR;
use kvm_ioctls::VcpuFd;

/// Words of data that KVM adds to an internal error.
const INTERNAL_DATA_WORDS: usize = 16;

/// Registers and, after an internal error, what KVM says about it.
pub(super) fn describe(vcpu: &mut VcpuFd) -> String {
    let mut text = String::new();
    if let Some((suberror, data)) = internal_error(vcpu) {
        let name = match suberror {
            1 => "emulation failed",
            2 => "simultaneous exceptions",
            3 => "event delivery failed",
            4 => "unexpected exit reason",
            _ => "unknown suberror",
        };
        let _ = write!(text, "suberror {suberror} ({name}), data {data:x?}; ");
    }
    match (vcpu.get_regs(), vcpu.get_sregs()) {
        (Ok(regs), Ok(sregs)) => {
            let _ = write!(
                text,
                "rip {:#x} cs {:#x} rsp {:#x} rflags {:#x} cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x}",
                regs.rip,
                sregs.cs.base,
                regs.rsp,
                regs.rflags,
                sregs.cr0,
                sregs.cr2,
                sregs.cr3,
                sregs.cr4,
                sregs.efer,
            );
        }
        _ => text.push_str("registers cannot be read"),
    }
    text
}

fn internal_error(vcpu: &mut VcpuFd) -> Option<(u32, Vec<u64>)> {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_INTERNAL_ERROR {
        return None;
    }
    // SAFETY: the exit reason, which only KVM writes, says that `internal` is the member that is filled in; all of
    // its fields are plain integers, for which any bytes are a value.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let words = (internal.ndata as usize).min(INTERNAL_DATA_WORDS);
    Some((internal.suberror, internal.data[..words].to_vec()))
}
