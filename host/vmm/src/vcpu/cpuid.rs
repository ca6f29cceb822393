//! What the guest sees in CPUID: what host and KVM offer, with topology and identity of each vCPU put in.
//!
//! Leaf numbers and bits are those of Intel's SDM volume 2A (CPUID) and AMD's APM volume 3, appendix E.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Feature flags, processor identity.
const LEAF_FEATURES: u32 = 0x1;
/// Deterministic cache parameters (Intel).
const LEAF_CACHE: u32 = 0x4;
/// Thermal and power management.
const LEAF_POWER: u32 = 0x6;
/// Architectural performance monitoring.
const LEAF_PERFORMANCE: u32 = 0xa;
/// Extended topology enumeration.
const LEAF_TOPOLOGY: u32 = 0xb;
/// Extended topology enumeration, second version.
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
/// AMD: long-mode address sizes, number of cores.
const LEAF_AMD_CORES: u32 = 0x8000_0008;
/// AMD: extended performance monitoring.
const LEAF_AMD_PERFORMANCE: u32 = 0x8000_0022;
/// AMD: cache topology.
const LEAF_AMD_CACHE: u32 = 0x8000_001d;
/// AMD: processor topology.
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

/// The local APIC's timer always runs.
const POWER_EAX_ARAT: u32 = 1 << 2;
const FEATURES_ECX_X2APIC: u32 = 1 << 21;
const FEATURES_ECX_TSC_DEADLINE: u32 = 1 << 24;
const FEATURES_ECX_HYPERVISOR: u32 = 1 << 31;
const FEATURES_EDX_HYPER_THREADING: u32 = 1 << 28;

const TOPOLOGY_LEVEL_THREAD: u32 = 1 << 8;
const TOPOLOGY_LEVEL_CORE: u32 = 2 << 8;

/// CPUID of vCPU `id` of `cpus`, which are cores of one package with one thread each.
pub(super) fn for_vcpu(supported: &CpuId, id: u8, cpus: u8) -> CpuId {
    let mut cpuid = supported.clone();
    let (id, cpus) = (u32::from(id), u32::from(cpus));
    // APIC IDs of one package are numbered with this many bits.
    let core_bits = cpus.next_power_of_two().trailing_zeros();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            LEAF_FEATURES => features(entry, id, cpus),
            LEAF_CACHE | LEAF_AMD_CACHE => cache_sharing(entry, cpus),
            // No frequency scaling: its MSRs would only cost exits. But the guest should know that its timer never
            // stops; Linux else calibrates it against a PIT, which is not there.
            LEAF_POWER => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (POWER_EAX_ARAT, 0, 0, 0),
            // No counters, for the same reason.
            LEAF_PERFORMANCE | LEAF_AMD_PERFORMANCE => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 => topology(entry, id, cpus, core_bits),
            LEAF_AMD_CORES => entry.ecx = core_bits << 12 | (cpus - 1),
            LEAF_AMD_TOPOLOGY => {
                entry.eax = id;
                entry.ebx = id; // one thread per core, core number = APIC ID
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    cpuid
}

fn features(entry: &mut kvm_cpuid_entry2, id: u32, cpus: u32) {
    entry.ebx = (entry.ebx & 0x0000_ffff) | cpus << 16 | id << 24;
    // KVM has the TSC-deadline timer (`kvm.rs` insists) but reports it apart from CPUID.
    entry.ecx |= FEATURES_ECX_HYPERVISOR | FEATURES_ECX_TSC_DEADLINE;
    if cpus > 1 {
        entry.edx |= FEATURES_EDX_HYPER_THREADING;
    } else {
        entry.edx &= !FEATURES_EDX_HYPER_THREADING;
        // x2APIC makes inter-processor interrupts cheaper, and there are none. Linux saves, masks and restores every
        // pin of the I/O APIC around switching it on.
        entry.ecx &= !FEATURES_ECX_X2APIC;
    }
}

/// Levels 1 and 2 are a core's own, level 3 is everybody's.
fn cache_sharing(entry: &mut kvm_cpuid_entry2, cpus: u32) {
    let level = entry.eax >> 5 & 7;
    let sharing = if level >= 3 { cpus } else { 1 };
    entry.eax = (entry.eax & 0x3fff) | (sharing - 1) << 14;
    if entry.function == LEAF_CACHE {
        entry.eax |= (cpus - 1) << 26;
    }
}

fn topology(entry: &mut kvm_cpuid_entry2, id: u32, cpus: u32, core_bits: u32) {
    (entry.eax, entry.ebx, entry.ecx) = match entry.index {
        0 => (0, 1, TOPOLOGY_LEVEL_THREAD),
        1 => (core_bits, cpus, TOPOLOGY_LEVEL_CORE | 1),
        other => (0, 0, other),
    };
    entry.edx = id;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: 0x163,
            ebx: 0xff,
            ecx: 0xff,
            edx: 0xff,
            ..Default::default()
        }
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid
            .as_slice()
            .iter()
            .find(|entry| (entry.function, entry.index) == (function, index))
            .unwrap()
    }

    #[test]
    fn every_vcpu_has_its_own_apic_id_in_one_package() {
        let host = CpuId::from_entries(&[
            entry(1, 0),
            entry(0xb, 0),
            entry(0xb, 1),
            entry(0x8000_001e, 0),
        ])
        .unwrap();
        for id in 0..3 {
            let cpuid = for_vcpu(&host, id, 3);
            assert_eq!(find(&cpuid, 1, 0).ebx >> 24, u32::from(id));
            assert_eq!(find(&cpuid, 1, 0).ebx >> 16 & 0xff, 3);
            assert_eq!(find(&cpuid, 0xb, 1).edx, u32::from(id));
            assert_eq!(find(&cpuid, 0xb, 1).eax, 2, "two bits number three cores");
            assert_eq!(find(&cpuid, 0x8000_001e, 0).eax, u32::from(id));
        }
    }

    #[test]
    fn the_guest_knows_that_it_is_one_and_has_its_timer() {
        let host = CpuId::from_entries(&[entry(1, 0)]).unwrap();
        let features = find(&for_vcpu(&host, 0, 1), 1, 0);
        assert_ne!(features.ecx & FEATURES_ECX_HYPERVISOR, 0);
        assert_ne!(features.ecx & FEATURES_ECX_TSC_DEADLINE, 0);
    }

    #[test]
    fn the_last_level_cache_is_shared_and_the_others_are_not() {
        let host = CpuId::from_entries(&[entry(4, 3), entry(0xa, 0)]).unwrap();
        let cpuid = for_vcpu(&host, 0, 4);
        assert_eq!(
            find(&cpuid, 4, 3).eax >> 14 & 0xfff,
            3,
            "level {}",
            0x163 >> 5 & 7
        );
        assert_eq!(find(&cpuid, 4, 3).eax >> 26, 3);
        assert_eq!(find(&cpuid, 0xa, 0).eax, 0);
    }
}
