//! What the figures were measured on.

use std::fs;

/// (name, value) pairs of the host.
pub(crate) fn host() -> Vec<(&'static str, String)> {
    let read = |path: &str| {
        fs::read_to_string(path)
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    let cpu = read("/proc/cpuinfo")
        .lines()
        .find_map(|line| {
            line.strip_prefix("model name")?
                .split_once(": ")
                .map(|(_, name)| name.to_owned())
        })
        .unwrap_or_default();
    vec![
        ("CPU", cpu),
        (
            "CPUs",
            std::thread::available_parallelism().map_or_else(|_| "?".to_owned(), |n| n.to_string()),
        ),
        ("kernel", read("/proc/sys/kernel/osrelease")),
        ("load before", read("/proc/loadavg")),
        ("KVM modules", kvm_modules()),
    ]
}

fn kvm_modules() -> String {
    let mut names: Vec<String> = fs::read_dir("/sys/module")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("kvm") || name == "vhost_vsock")
        .collect();
    names.sort();
    names.join(", ")
}

/// KVM exits of all VMs so far, where debugfs tells.
pub(crate) fn kvm_exits() -> Option<u64> {
    fs::read_to_string("/sys/kernel/debug/kvm/exits")
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// Resident memory of a process in KiB, but for mappings of at least `guest_mib` / 2: those are the guest's.
pub(crate) fn own_memory_kib(pid: u32, guest_mib: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    let number = |line: &str| {
        line.split_whitespace()
            .nth(1)
            .and_then(|n| n.parse::<u64>().ok())
    };
    let mut total = 0;
    let mut size = 0;
    for line in text.lines() {
        if line.starts_with("Size:") {
            size = number(line)?;
        } else if line.starts_with("Rss:") && size < u64::from(guest_mib) * 1024 / 2 {
            total += number(line)?;
        }
    }
    Some(total)
}
