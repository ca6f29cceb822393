//! Log lines that a guest can cause: rate limited, so that a hostile one can fill neither the log nor the disk.

use crate::tell;
use std::fmt;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Lines that may come at once.
const BURST: u32 = 20;
/// After a burst, one line in this time.
const ONE_LINE_PER: Duration = Duration::from_secs(5);

struct Budget {
    lines: u32,
    refilled: Option<Instant>,
    suppressed: u64,
}

static BUDGET: Mutex<Budget> = Mutex::new(Budget {
    lines: BURST,
    refilled: None,
    suppressed: 0,
});

/// Writes one line to standard error, unless the guest has caused too many.
pub(crate) fn guest_warning(line: fmt::Arguments<'_>) {
    let mut budget = BUDGET
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(suppressed) = budget.take(Instant::now()) {
        if suppressed > 0 {
            tell!("airlock-vmm: {suppressed} lines about the guest were left out");
        }
        tell!("airlock-vmm: guest: {line}");
    }
}

impl Budget {
    /// Whether a line may be written now, and how many were not since the last.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let refilled = *self.refilled.get_or_insert(now);
        let earned = now.duration_since(refilled).as_nanos() / ONE_LINE_PER.as_nanos();
        if earned > 0 {
            self.lines = self
                .lines
                .saturating_add(u32::try_from(earned).unwrap_or(BURST))
                .min(BURST);
            self.refilled = Some(now);
        }
        if self.lines == 0 {
            self.suppressed += 1;
            return None;
        }
        self.lines -= 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_counted() {
        let mut budget = Budget {
            lines: BURST,
            refilled: None,
            suppressed: 0,
        };
        let start = Instant::now();
        let written = (0..1000).filter(|_| budget.take(start).is_some()).count();
        assert_eq!(written, BURST as usize);
        assert_eq!(budget.take(start + ONE_LINE_PER), Some(980));
        assert_eq!(budget.take(start + ONE_LINE_PER), None);
        assert_eq!(budget.take(start + 1000 * ONE_LINE_PER), Some(1));
    }
}
