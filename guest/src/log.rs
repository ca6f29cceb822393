//! The agent's log: one line per event, to the kernel's log in a guest (so that it lands on the console) or to stderr.
//! Rate limited, because a guest's workload can cause lines.

use std::fmt::Arguments;
use std::fs::File;
use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

/// Lines per period that are let through; enough for a boot's and a failure's story.
const BURST_LINES: u64 = 40;
/// Length of that period.
const PERIOD_SECONDS: u64 = 5;

static STDERR: AtomicBool = AtomicBool::new(false);
static KMSG: OnceLock<Option<File>> = OnceLock::new();
static START: OnceLock<Instant> = OnceLock::new();
static PERIOD: AtomicU64 = AtomicU64::new(0);
static LINES: AtomicU64 = AtomicU64::new(0);

/// Sends lines to stderr instead of /dev/kmsg from now on.
pub fn to_stderr() {
    STDERR.store(true, Ordering::Relaxed);
}

/// An event worth a line.
pub fn info(what: Arguments<'_>) {
    write(6, what);
}

/// Something went wrong; reaches the console even with `quiet` on the kernel's command line.
pub fn error(what: Arguments<'_>) {
    write(3, what);
}

fn write(level: u8, what: Arguments<'_>) {
    let now = START.get_or_init(Instant::now).elapsed().as_secs() / PERIOD_SECONDS;
    if PERIOD.swap(now, Ordering::Relaxed) != now {
        LINES.store(0, Ordering::Relaxed);
    }
    if LINES.fetch_add(1, Ordering::Relaxed) >= BURST_LINES {
        return;
    }
    // A log that cannot be written has nowhere to say so.
    if STDERR.load(Ordering::Relaxed) {
        let _ = writeln!(std::io::stderr(), "airlock: {what}");
    } else if let Some(kmsg) =
        KMSG.get_or_init(|| File::options().write(true).open("/dev/kmsg").ok())
    {
        // One write is one record (Documentation/ABI/testing/dev-kmsg), so the line is put together first.
        let _ = (&*kmsg).write_all(format!("<{level}>airlock: {what}\n").as_bytes());
    }
}
