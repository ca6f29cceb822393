//! Sees on the console that the guest has halted or powered off.
//!
//! These machines have no ACPI and so no power button: Linux prints one line and parks its CPUs for ever, which no exit
//! tells (the in-kernel interrupt controller keeps a halted vCPU to itself). The line is the kernel's last word
//! (kernel/reboot.c, `kernel_power_off` and `kernel_halt`). A guest that prints it without halting ends only itself.

use std::sync::Arc;

use crate::machine::{ExitReason, ExitSlot};

/// Longer lines are no word of these.
const MAX_LINE_BYTES: usize = 128;

/// What the kernel prints, and what it means.
const LAST_WORDS: [(&[u8], &str); 3] = [
    (b"reboot: Power down", "the guest powered off"),
    (
        b"reboot: Power off not available: System halted instead",
        "the guest powered off",
    ),
    (b"reboot: System halted", "the guest halted"),
];

/// Reads the console's bytes along with the log.
#[derive(Debug)]
pub struct HaltWatch {
    exit: Arc<ExitSlot>,
    line: Vec<u8>,
}

impl HaltWatch {
    /// Reports to `exit`.
    pub fn new(exit: Arc<ExitSlot>) -> Self {
        Self {
            exit,
            line: Vec::with_capacity(MAX_LINE_BYTES),
        }
    }

    /// Looks at the next bytes of the console.
    pub fn see(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte == b'\n' {
                if let Some(meaning) = last_word(&self.line) {
                    self.exit.report(ExitReason::GuestReset, meaning);
                }
                self.line.clear();
            } else if self.line.len() < MAX_LINE_BYTES {
                self.line.push(byte);
            }
        }
    }
}

/// The kernel's own lines begin with its clock in brackets.
fn last_word(line: &[u8]) -> Option<&'static str> {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    LAST_WORDS
        .iter()
        .find(|(words, _)| line.starts_with(b"[") && line.ends_with(words))
        .map(|(_, meaning)| *meaning)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(chunks: &[&[u8]]) -> Option<String> {
        let exit = Arc::new(ExitSlot::new().unwrap());
        let mut watch = HaltWatch::new(exit.clone());
        for chunk in chunks {
            watch.see(chunk);
        }
        exit.get().map(|exit| exit.detail)
    }

    #[test]
    fn the_kernels_last_word_is_the_end_however_it_arrives() {
        let whole: &[u8] = b"[    3.1] x\r\n[    3.2] reboot: Power down\r\n";
        assert_eq!(seen(&[whole]).as_deref(), Some("the guest powered off"));
        let bytes: Vec<&[u8]> = whole.chunks(1).collect();
        assert_eq!(seen(&bytes).as_deref(), Some("the guest powered off"));
        let without: &[u8] =
            b"[    3.1] reboot: Power off not available: System halted instead\r\n";
        assert_eq!(seen(&[without]).as_deref(), Some("the guest powered off"));
        let halted: &[u8] = b"[    3.2] reboot: System halted\n";
        assert_eq!(seen(&[halted]).as_deref(), Some("the guest halted"));
    }

    #[test]
    fn other_lines_are_not() {
        assert_eq!(seen(&[b"he said reboot: Power down\n"]), None);
        assert_eq!(seen(&[b"[    1.0] reboot: Power down, soon\n"]), None);
        assert_eq!(seen(&[b"[    1.0] reboot: Power down"]), None);
        assert_eq!(seen(&[&[b'x'; 100_000], b"\n"]), None);
    }
}
