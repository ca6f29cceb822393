//! What a VM is made of, as `airlock-vmm run --config FILE` reads it.
//!
//! The types carry the rules: a value that exists is valid, so nothing after this file checks again. No device type and
//! no KVM lives here; `host/sandbox` builds a [`VmConfig`] and writes it as JSON.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The guest's CID (VIRTIO 1.2, 5.10.4). Each VM has a vsock device of its own, so every guest can have the same one.
pub const GUEST_CID: u32 = 3;
/// Most vCPUs: what the tuned kernel is built for (CONFIG_NR_CPUS), and what the MP table's 1 KiB holds.
pub const MAX_CPUS: u8 = 32;
/// The smallest memory a kernel with an initramfs has been seen to boot in.
pub const MIN_MEMORY_MIB: u32 = 32;
/// Far above any sandbox, far below what page tables and the memory map could not describe.
pub const MAX_MEMORY_MIB: u32 = 1 << 20;
/// Disks and the two other virtio devices share the interrupt lines 5 to 22.
pub const MAX_DISKS: usize = 16;
/// COMMAND_LINE_SIZE of x86 Linux is 2048; the rest is for what the VMM appends (one item per device).
pub const MAX_CMDLINE_BYTES: usize = 1024;
/// A console log below this would not hold one kernel panic.
pub const MIN_CONSOLE_LOG_BYTES: u64 = 16 * 1024;

/// One virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// What runs the guest's CPU.
    pub engine: EngineConfig,
    /// ELF `vmlinux` with a PVH entry, or bzImage.
    pub kernel: PathBuf,
    /// newc archive, compressed or not.
    pub initramfs: Option<PathBuf>,
    /// The sandbox's part of the kernel command line; the VMM appends what tells the kernel about devices.
    pub cmdline: Cmdline,
    /// Number of vCPUs.
    pub cpus: CpuCount,
    /// Guest memory.
    pub memory_mib: MemoryMib,
    /// How the kernel learns about CPUs and devices.
    pub discovery: Discovery,
    /// `/dev/vda`, `/dev/vdb`, ... in this order.
    pub disks: Disks,
    /// Unix socket of the vsock multiplexer; guest-initiated connections go to `<this>_<port>`.
    pub vsock_socket: PathBuf,
    /// The guest's CID.
    pub guest_cid: GuestCid,
    /// Where the serial console is written.
    pub console_log: PathBuf,
    /// The console log keeps its newest bytes and never grows beyond this.
    pub console_log_limit_bytes: ConsoleLogLimit,
    /// Unix socket that takes control commands, one JSON object per line.
    pub control_socket: PathBuf,
    /// Folder of this VM; `exit.json` is written here.
    pub run_dir: PathBuf,
    /// Remove the run folder's known files, and the folder, when the VM is gone.
    pub ephemeral: bool,
    /// An inherited file descriptor; its end-of-file stops the VM, so that a killed owner leaves nothing behind.
    #[serde(default)]
    pub lifeline_fd: Option<i32>,
}

/// What runs the guest's CPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum EngineConfig {
    /// Our VMM on `/dev/kvm`.
    Kvm {},
    /// QEMU's software CPU, with our vsock device over vhost-user.
    Qemu {
        /// `qemu-system-x86_64`, looked up in PATH if it has no slash.
        binary: PathBuf,
    },
}

/// How the kernel learns about CPUs and devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Discovery {
    /// MP table and `virtio_mmio.device=` on the command line: kernels built with those, quickest.
    Cmdline,
    /// ACPI tables with LNRO0005 devices: distribution kernels.
    Acpi,
}

/// A raw disk image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Regular file or block device.
    pub path: PathBuf,
    /// The guest cannot write to it, whatever it tries.
    pub read_only: bool,
}

/// A configuration value that describes no possible machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Number of vCPUs out of range.
    #[error("{0} CPUs asked for, possible are 1 to {MAX_CPUS}")]
    Cpus(u8),
    /// Memory out of range.
    #[error("{0} MiB of memory asked for, possible are {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB}")]
    Memory(u32),
    /// Too many disks.
    #[error("{0} disks asked for, possible are {MAX_DISKS}")]
    Disks(usize),
    /// Command line too long.
    #[error("the kernel command line is {0} bytes long, possible are {MAX_CMDLINE_BYTES}")]
    CmdlineLength(usize),
    /// A byte that would end or garble the command line.
    #[error(
        "the kernel command line holds the character {0:?}, possible are printable ASCII characters"
    )]
    CmdlineCharacter(char),
    /// A CID that is reserved (VIRTIO 1.2, 5.10.4).
    #[error("guest CID {0} is reserved, possible are 3 to 4294967294")]
    Cid(u32),
    /// Console log too small.
    #[error("a console log of {0} bytes asked for, the least is {MIN_CONSOLE_LOG_BYTES}")]
    ConsoleLog(u64),
}

macro_rules! checked_number {
    ($(#[$doc:meta])* $name:ident, $int:ty, $int_name:literal, $error:ident, $valid:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(try_from = $int_name, into = $int_name)]
        pub struct $name($int);

        impl $name {
            /// Checks the range.
            pub fn new(value: $int) -> Result<Self, ConfigError> {
                let valid: fn($int) -> bool = $valid;
                if valid(value) { Ok(Self(value)) } else { Err(ConfigError::$error(value)) }
            }

            /// The number.
            pub fn get(self) -> $int {
                self.0
            }
        }

        impl TryFrom<$int> for $name {
            type Error = ConfigError;

            fn try_from(value: $int) -> Result<Self, ConfigError> {
                Self::new(value)
            }
        }

        impl From<$name> for $int {
            fn from(value: $name) -> $int {
                value.0
            }
        }
    };
}

checked_number!(
    /// 1 to [`MAX_CPUS`].
    CpuCount, u8, "u8", Cpus, |n| (1..=MAX_CPUS).contains(&n)
);
checked_number!(
    /// [`MIN_MEMORY_MIB`] to [`MAX_MEMORY_MIB`].
    MemoryMib, u32, "u32", Memory, |n| (MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&n)
);
checked_number!(
    /// 3 to 2^32 - 2.
    GuestCid, u32, "u32", Cid, |n| (3..u32::MAX).contains(&n)
);
checked_number!(
    /// At least [`MIN_CONSOLE_LOG_BYTES`].
    ConsoleLogLimit, u64, "u64", ConsoleLog, |n| n >= MIN_CONSOLE_LOG_BYTES
);

/// The sandbox's part of the kernel command line: printable ASCII, at most [`MAX_CMDLINE_BYTES`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cmdline(String);

impl Cmdline {
    /// Checks length and characters.
    pub fn new(text: impl Into<String>) -> Result<Self, ConfigError> {
        let text = text.into();
        if text.len() > MAX_CMDLINE_BYTES {
            return Err(ConfigError::CmdlineLength(text.len()));
        }
        match text.chars().find(|c| !matches!(c, ' '..='~')) {
            Some(c) => Err(ConfigError::CmdlineCharacter(c)),
            None => Ok(Self(text)),
        }
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Cmdline {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        Self::new(text)
    }
}

impl From<Cmdline> for String {
    fn from(cmdline: Cmdline) -> String {
        cmdline.0
    }
}

impl fmt::Display for Cmdline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// At most [`MAX_DISKS`] disks.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "Vec<DiskConfig>", into = "Vec<DiskConfig>")]
pub struct Disks(Vec<DiskConfig>);

impl Disks {
    /// Checks the number.
    pub fn new(disks: Vec<DiskConfig>) -> Result<Self, ConfigError> {
        if disks.len() > MAX_DISKS {
            Err(ConfigError::Disks(disks.len()))
        } else {
            Ok(Self(disks))
        }
    }

    /// The disks in the order in which the guest sees them.
    pub fn as_slice(&self) -> &[DiskConfig] {
        &self.0
    }
}

impl TryFrom<Vec<DiskConfig>> for Disks {
    type Error = ConfigError;

    fn try_from(disks: Vec<DiskConfig>) -> Result<Self, ConfigError> {
        Self::new(disks)
    }
}

impl From<Disks> for Vec<DiskConfig> {
    fn from(disks: Disks) -> Self {
        disks.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = r#"{
        "engine": {"kvm": {}}, "kernel": "/k/vmlinux", "initramfs": null, "cmdline": "quiet", "cpus": 2,
        "memory_mib": 256, "discovery": "cmdline", "disks": [{"path": "/i/rootfs.erofs", "read_only": true}],
        "vsock_socket": "/r/vsock.sock", "guest_cid": 3, "console_log": "/r/console.log",
        "console_log_limit_bytes": 1048576, "control_socket": "/r/vmm.sock", "run_dir": "/r", "ephemeral": true
    }"#;

    #[test]
    fn the_documented_form_is_read_and_written_back() {
        let config: VmConfig = serde_json::from_str(EXAMPLE).unwrap();
        assert_eq!(config.cpus.get(), 2);
        assert_eq!(config.engine, EngineConfig::Kvm {});
        assert_eq!(config.lifeline_fd, None);
        let again: VmConfig =
            serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
        let qemu: EngineConfig =
            serde_json::from_str(r#"{"qemu": {"binary": "qemu-system-x86_64"}}"#).unwrap();
        assert_eq!(
            qemu,
            EngineConfig::Qemu {
                binary: "qemu-system-x86_64".into()
            }
        );
    }

    #[test]
    fn impossible_machines_cannot_be_described() {
        for (from, to, message) in [
            ("\"cpus\": 2", "\"cpus\": 0", "0 CPUs asked for"),
            ("\"cpus\": 2", "\"cpus\": 33", "33 CPUs asked for"),
            (
                "\"memory_mib\": 256",
                "\"memory_mib\": 8",
                "8 MiB of memory asked for",
            ),
            (
                "\"guest_cid\": 3",
                "\"guest_cid\": 2",
                "guest CID 2 is reserved",
            ),
            ("1048576", "100", "a console log of 100 bytes"),
            ("\"quiet\"", "\"quiet\\n\"", "the character '\\n'"),
            (
                "\"ephemeral\": true",
                "\"ephemeral\": true, \"colour\": 1",
                "unknown field `colour`",
            ),
        ] {
            assert!(EXAMPLE.contains(from));
            let error = serde_json::from_str::<VmConfig>(&EXAMPLE.replace(from, to))
                .unwrap_err()
                .to_string();
            assert!(error.contains(message), "{error} should contain {message}");
        }
        assert_eq!(
            Cmdline::new("x".repeat(1025)),
            Err(ConfigError::CmdlineLength(1025))
        );
        let disk = DiskConfig {
            path: "d".into(),
            read_only: true,
        };
        assert_eq!(Disks::new(vec![disk; 17]), Err(ConfigError::Disks(17)));
    }
}
