//! `--limit memory=..,pids=..,cpu=..`: what a command's processes may use together.

use airlock_sandbox::client::Command;

/// Thousandths of a CPU: less than 10 is below what the kernel's CPU controller takes (1 ms in 100, cpu.max).
const LEAST_CPU: u32 = 10;

/// What one `--limit` says; what it does not mention is not limited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    memory_bytes: Option<u64>,
    pids: Option<u64>,
    cpu_thousandths: Option<u32>,
}

impl Limits {
    pub(crate) fn apply(self, mut command: Command) -> Command {
        if let Some(bytes) = self.memory_bytes {
            command = command.memory_limit(bytes);
        }
        if let Some(count) = self.pids {
            command = command.pids_limit(count);
        }
        if let Some(thousandths) = self.cpu_thousandths {
            command = command.cpu_limit(thousandths);
        }
        command
    }
}

pub(crate) fn parse(text: &str) -> Result<Limits, String> {
    let mut limits = Limits::default();
    for part in text.split(',') {
        let wrong = || {
            format!(
                "{part:?} is no limit: use memory=SIZE (with K, M or G), pids=N or cpu=CPUS, for \
                 example memory=256M,pids=64,cpu=0.5"
            )
        };
        let (key, value) = part.split_once('=').ok_or_else(wrong)?;
        match key {
            "memory" => limits.memory_bytes = Some(bytes(value).ok_or_else(wrong)?),
            "pids" => {
                let count = value.parse().ok().filter(|count| *count > 0);
                limits.pids = Some(count.ok_or_else(wrong)?);
            }
            "cpu" => limits.cpu_thousandths = Some(thousandths(value).ok_or_else(wrong)?),
            _ => return Err(wrong()),
        }
    }
    Ok(limits)
}

fn bytes(text: &str) -> Option<u64> {
    let (digits, shift) = match text.char_indices().next_back()? {
        (at, 'k' | 'K') => (&text[..at], 10),
        (at, 'm' | 'M') => (&text[..at], 20),
        (at, 'g' | 'G') => (&text[..at], 30),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().ok()?;
    number.checked_mul(1 << shift).filter(|bytes| *bytes > 0)
}

fn thousandths(text: &str) -> Option<u32> {
    let cpus: f64 = text.parse().ok()?;
    let thousandths = (cpus * 1000.0).round();
    (f64::from(LEAST_CPU)..=f64::from(u32::MAX))
        .contains(&thousandths)
        .then_some(thousandths as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_limit_alone_and_all_together() {
        let limits = parse("memory=256M,pids=64,cpu=0.5").unwrap();
        let start = limits.apply(Command::new("x"));
        let wire = start.start().limits.unwrap();
        assert_eq!(
            (wire.memory_bytes, wire.pids, wire.cpu_quota_us),
            (256 << 20, 64, 50_000)
        );
        assert_eq!(parse("memory=64k").unwrap().memory_bytes, Some(64 << 10));
        let start = parse("pids=3").unwrap().apply(Command::new("x"));
        assert_eq!(start.start().limits.unwrap().memory_bytes, 0);
    }

    #[test]
    fn what_is_no_limit_is_named() {
        for text in [
            "",
            "memory",
            "memory=",
            "memory=0",
            "memory=ä",
            "memory=99999999999G",
            "pids=0",
            "pids=-1",
            "cpu=0",
            "cpu=nan",
            "cpu=1e99",
            "disk=1G",
            "pids=1,",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
