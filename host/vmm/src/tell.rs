//! Words for `vmm.log`, which is this process's standard error.

/// `eprintln!` for words that may get lost: it panics when the log's disk is full, and with it the VM would end.
#[macro_export]
macro_rules! tell {
    ($($words:tt)*) => {
        $crate::tell::write_to_stderr(format_args!($($words)*))
    };
}

/// One line, or as much of it as standard error takes.
pub fn write_to_stderr(words: std::fmt::Arguments<'_>) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr().lock(), "{words}");
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    const VICTIM: &str = "AIRLOCK_TEST_TELL";

    /// Runs in a process of its own, started by the test below; by itself it does nothing.
    #[test]
    fn victim() {
        if std::env::var_os(VICTIM).is_some() {
            tell!("nobody takes this");
            std::process::exit(7);
        }
    }

    #[test]
    fn a_full_log_does_not_end_the_vm() {
        let full = std::fs::OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .unwrap();
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tell::tests::victim", "--nocapture"])
            .env(VICTIM, "1")
            .stderr(full)
            .stdout(std::process::Stdio::null())
            .status()
            .unwrap();
        assert_eq!(status.code(), Some(7));
    }
}
