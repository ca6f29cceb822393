//! Is this host's KVM any good? A loop in ring 0 of a throw-away VM, timed.
//!
//! Some hosts, CI machines among them, offer a KVM that interprets ring 0: a hundred times slower than software
//! emulation does it. They look like any other until a guest runs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use vm_memory::{Bytes, GuestAddress};

use crate::boot::Entry;
use crate::config::MemoryMib;
use crate::kvm::{KvmError, Vm};
use crate::layout;
use crate::memory;
use crate::vcpu::Vcpus;

/// Rounds of the loop: two instructions each, some 20 microseconds on real hardware.
const ROUNDS: u32 = 20_000;
/// From here on ring 0 is taken to be interpreted; real KVM is well below a tenth of this.
const SLOW: Duration = Duration::from_millis(10);
/// A loop that was slow is timed again, so often: a busy host takes the CPU away in the middle of one, and the fastest
/// of several tells what KVM can do.
const ATTEMPTS: u32 = 8;
/// The smallest that a configuration allows; only two pages of it are touched.
const MEMORY_MIB: u32 = crate::config::MIN_MEMORY_MIB;

/// What `airlock-vmm probe` prints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The judgement.
    pub kvm: Verdict,
    /// One line for people.
    pub detail: String,
    /// How long the loop took, if it ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loop_us: Option<u64>,
}

/// Whether to use KVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Use it.
    Good,
    /// It works, but interprets.
    Slow,
    /// No /dev/kvm.
    Absent,
    /// No permission.
    Denied,
    /// It does not do what KVM does.
    Failed,
}

/// Runs the loop.
pub fn probe() -> Report {
    match timed_loop() {
        Ok(time) => {
            let (kvm, detail) = if time > SLOW {
                (
                    Verdict::Slow,
                    "this KVM interprets ring 0 and is slower than software emulation",
                )
            } else {
                (Verdict::Good, "KVM runs ring 0 at full speed")
            };
            Report {
                kvm,
                detail: detail.to_owned(),
                loop_us: u64::try_from(time.as_micros()).ok(),
            }
        }
        Err((kvm, detail)) => Report {
            kvm,
            detail,
            loop_us: None,
        },
    }
}

fn timed_loop() -> Result<Duration, (Verdict, String)> {
    let kvm_error = |error: KvmError| {
        let verdict = match error {
            KvmError::Absent => Verdict::Absent,
            KvmError::Denied => Verdict::Denied,
            _ => Verdict::Failed,
        };
        (verdict, crate::machine::with_causes(&error))
    };
    let failed = |detail: String| (Verdict::Failed, detail);
    let size = MemoryMib::new(MEMORY_MIB).map_err(|error| failed(error.to_string()))?;
    let memory = Arc::new(memory::allocate(size).map_err(|error| failed(error.to_string()))?);
    let vm = Vm::create_bare(memory.clone()).map_err(kvm_error)?;
    let address = layout::HIGH_MEMORY;
    memory
        .write_slice(&loop_code(), GuestAddress(address))
        .map_err(|error| failed(error.to_string()))?;
    let mut vcpus =
        Vcpus::create_bare(&vm, &memory, Entry::Linux64 { address }).map_err(kvm_error)?;
    // The first entry brings in the pages that the loop touches.
    vcpus.run_until_halt().map_err(failed)?;
    let mut fastest = Duration::MAX;
    for _ in 0..ATTEMPTS {
        let start = Instant::now();
        vcpus.run_until_halt().map_err(failed)?;
        fastest = fastest.min(start.elapsed());
        if fastest <= SLOW {
            break;
        }
    }
    Ok(fastest)
}

/// `hlt; start: mov ecx, ROUNDS; again: dec ecx; jnz again; hlt; jmp start`
fn loop_code() -> Vec<u8> {
    let mut code = vec![0xf4, 0xb9];
    code.extend(ROUNDS.to_le_bytes());
    code.extend([0xff, 0xc9, 0x75, 0xfc, 0xf4, 0xeb, 0xf4]);
    code
}
