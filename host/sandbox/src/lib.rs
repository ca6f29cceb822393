//! Sandboxes: what they are made of, how one is launched, who is running, how it ends.
//!
//! The only place where a machine is assembled: [`launch`] reads as one page and everything else is a leaf of it. The
//! registry is the run root on disk, shared by every program that uses this crate; nothing here needs a daemon. What
//! happens inside a sandbox is `airlock-client`'s business and re-exported as [`client`].

pub mod doctor;
pub mod engine;
pub mod image;
pub mod initramfs;
pub mod kernel;
pub mod launch;
pub mod name;
pub mod paths;
pub mod process;
pub mod programs;
pub mod registry;
pub mod scratch;
pub mod stop;
pub mod vmm;

mod boot;
mod post_mortem;

#[cfg(test)]
mod test_folder;

pub use airlock_client as client;
pub use airlock_vmm::config::{CpuCount, MemoryMib};

pub use crate::engine::{Engine, EngineChoice};
pub use crate::launch::{LaunchError, LaunchSpec, Launched, launch};
pub use crate::name::Name;
pub use crate::paths::Paths;
pub use crate::registry::{Record, Registry, RunDir, State};
pub use crate::scratch::ScratchSpec;

/// 64 bits that nobody can guess: the standard library seeds every hasher from the system's random numbers.
fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new()
        .build_hasher()
        .finish()
}
