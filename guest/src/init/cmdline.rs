//! The airlock keys of the kernel's command line.

use super::BootError;

const PATH: &str = "/proc/cmdline";

/// The read-only file system that the guest's root is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Base {
    pub(super) device: String,
    pub(super) fstype: String,
}

/// Where the guest's changes go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Scratch {
    Memory,
    /// An ext4 file system on this device.
    Device(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cmdline {
    pub(super) root: Option<Base>,
    pub(super) scratch: Scratch,
    pub(super) hostname: Option<String>,
}

pub(super) fn read() -> Result<Cmdline, BootError> {
    let text = std::fs::read_to_string(PATH)
        .map_err(|error| BootError::new("command line", PATH, error))?;
    parse(&text)
}

fn parse(text: &str) -> Result<Cmdline, BootError> {
    let value = |key: &str| {
        let words = text.split_ascii_whitespace();
        // The last one counts, as in the kernel.
        let mut pairs = words.filter_map(|word| word.split_once('='));
        let found = pairs.rfind(|(k, v)| *k == key && !v.is_empty());
        found.map(|(_, v)| v.to_owned())
    };
    let fstype = value("airlock.rootfstype").unwrap_or_else(|| "erofs".to_owned());
    if !matches!(fstype.as_str(), "erofs" | "ext4") {
        let why = "must be erofs or ext4";
        return Err(BootError::new(
            "command line",
            format!("airlock.rootfstype={fstype}"),
            why,
        ));
    }
    Ok(Cmdline {
        root: value("airlock.root").map(|device| Base { device, fstype }),
        scratch: match value("airlock.scratch").as_deref() {
            None | Some("tmpfs") => Scratch::Memory,
            Some(device) => Scratch::Device(device.to_owned()),
        },
        hostname: value("airlock.hostname"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_among_the_kernels_own() {
        let c = parse("quiet airlock.root=/dev/vda airlock.rootfstype=ext4 airlock.scratch=/dev/vdb airlock.hostname=box panic=-1\n").unwrap();
        let root = c.root.unwrap();
        assert_eq!(
            (root.device.as_str(), root.fstype.as_str()),
            ("/dev/vda", "ext4")
        );
        assert_eq!(c.scratch, Scratch::Device("/dev/vdb".into()));
        assert_eq!(c.hostname.as_deref(), Some("box"));
    }

    #[test]
    fn nothing_given_is_a_guest_without_an_image() {
        let c = parse("console=ttyS0").unwrap();
        assert_eq!(
            (c.root, c.scratch, c.hostname),
            (None, Scratch::Memory, None)
        );
    }

    #[test]
    fn an_unknown_file_system_is_refused() {
        assert!(parse("airlock.root=/dev/vda airlock.rootfstype=btrfs").is_err());
    }
}
