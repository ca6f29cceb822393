//! The machine as a whole: what it uses, its clock, its entropy.

#![expect(unsafe_code, reason = "RNDADDENTROPY is an ioctl that nobody wraps")]

use std::fs::{self, File};
use std::os::fd::AsRawFd;

use airlock_proto::v1::{Error, ErrorCode, SystemStatReply};
use rustix::time::{ClockId, Timespec};

/// agent.proto promises this range. 512 bytes are what random.c mixes in at once.
const ENTROPY_BYTES: std::ops::RangeInclusive<usize> = 32..=512;
/// `_IOW('R', 0x03, int[2])`, linux/random.h.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
/// x86-64's.
const PAGE_BYTES: u64 = 4096;
/// Clock ticks a second in /proc/stat: USER_HZ, fixed at 100 on x86-64.
const TICK_US: u64 = 10_000;

pub(super) fn failure(code: ErrorCode, message: &str, errno: i32) -> Error {
    Error {
        code: code.into(),
        message: message.to_owned(),
        errno,
    }
}

pub(super) fn boot_id() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id");
    id.unwrap_or_default().trim().to_owned()
}

pub(super) fn stat(execs: u32) -> SystemStatReply {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |name: &str| number_after(&meminfo, name).saturating_mul(1024);
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let vmstat = fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let statm = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let resident_pages = statm
        .split(' ')
        .nth(1)
        .and_then(|n| n.parse().ok())
        .unwrap_or(0_u64);
    let uptime = rustix::time::clock_gettime(ClockId::Boottime);
    SystemStatReply {
        uptime_ms: uptime.tv_sec as u64 * 1000 + uptime.tv_nsec as u64 / 1_000_000,
        memory_total_bytes: kib("MemTotal:"),
        memory_available_bytes: kib("MemAvailable:"),
        cpus: stat.lines().filter(|l| is_cpu(l)).count() as u32,
        cpu_us: busy_ticks(&stat).saturating_mul(TICK_US),
        execs,
        oom_kills: number_after(&vmstat, "oom_kill "),
        agent_rss_bytes: resident_pages.saturating_mul(PAGE_BYTES),
    }
}

fn is_cpu(line: &str) -> bool {
    line.strip_prefix("cpu")
        .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

fn number_after(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let first = line.and_then(|rest| rest.split_ascii_whitespace().next());
    first.and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// Ticks of the line "cpu" that were spent on something: user, nice, system, irq, softirq, steal (proc(5)); not idle
/// and iowait, and not guest time, which user includes.
fn busy_ticks(stat: &str) -> u64 {
    let fields: Vec<u64> = stat
        .lines()
        .next()
        .unwrap_or_default()
        .split_ascii_whitespace()
        .skip(1)
        .map(|n| n.parse().unwrap_or(0))
        .collect();
    [0, 1, 2, 5, 6, 7]
        .iter()
        .filter_map(|index| fields.get(*index))
        .sum()
}

pub(super) fn set_clock(unix_ns: u64) -> Result<(), Error> {
    let time = Timespec {
        tv_sec: (unix_ns / 1_000_000_000) as i64,
        tv_nsec: (unix_ns % 1_000_000_000) as i64,
    };
    rustix::time::clock_settime(ClockId::Realtime, time).map_err(|errno| {
        let message = format!("cannot set the clock: {errno}");
        failure(ErrorCode::ErrorIo, &message, errno.raw_os_error())
    })
}

/// `struct rand_pool_info` with the longest buffer that is accepted.
#[repr(C)]
struct PoolInfo {
    entropy_bits: i32,
    bytes: i32,
    data: [u8; *ENTROPY_BYTES.end()],
}

pub(super) fn add_entropy(data: &[u8]) -> Result<(), Error> {
    if !ENTROPY_BYTES.contains(&data.len()) {
        return Err(failure(
            ErrorCode::ErrorInvalid,
            "entropy is 32 to 512 bytes",
            0,
        ));
    }
    let mut info = PoolInfo {
        entropy_bits: data.len() as i32 * 8,
        bytes: data.len() as i32,
        data: [0; *ENTROPY_BYTES.end()],
    };
    info.data[..data.len()].copy_from_slice(data);
    let failed = |error: std::io::Error| {
        let message = format!("cannot add entropy: {error}");
        failure(
            ErrorCode::ErrorIo,
            &message,
            error.raw_os_error().unwrap_or(0),
        )
    };
    let random = File::options()
        .write(true)
        .open("/dev/urandom")
        .map_err(failed)?;
    // SAFETY: RNDADDENTROPY reads a rand_pool_info whose buffer holds `bytes` bytes, which `info` does.
    let result = unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) };
    if result < 0 {
        return Err(failed(std::io::Error::last_os_error()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_stat_counts_work_and_not_waiting() {
        let text = "cpu  10 2 30 4000 500 6 7 8 9 9\ncpu0 1 2 3\ncpu1 1 2 3\nintr 5\n";
        assert_eq!(busy_ticks(text), 10 + 2 + 30 + 6 + 7 + 8);
        assert_eq!(text.lines().filter(|l| is_cpu(l)).count(), 2);
    }

    #[test]
    fn stat_tells_of_this_machine() {
        let stat = stat(3);
        assert!(stat.memory_total_bytes > 0 && stat.cpus > 0 && stat.agent_rss_bytes > 0);
        assert_eq!(stat.execs, 3);
    }
}
