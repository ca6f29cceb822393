//! Many sandboxes, one after the other: nothing may add up.

use std::fs;

use airlock_tests::{Product, on_kvm};

fn process_count() -> usize {
    fs::read_dir("/proc")
        .expect("/proc is mounted")
        .flatten()
        .filter(|entry| {
            entry
                .file_name()
                .to_str()
                .is_some_and(|name| name.bytes().all(|b| b.is_ascii_digit()))
                && fs::read_to_string(entry.path().join("cmdline"))
                    .is_ok_and(|cmdline| cmdline.contains("airlock"))
        })
        .count()
}

/// Open files of the whole system (the first number of file-nr).
fn open_files() -> i64 {
    let text = fs::read_to_string("/proc/sys/fs/file-nr").expect("file-nr can be read");
    text.split_whitespace()
        .next()
        .and_then(|n| n.parse().ok())
        .expect("it is a number")
}

fn temp_entries() -> usize {
    fs::read_dir(std::env::temp_dir())
        .expect("the temp folder can be read")
        .count()
}

#[test]
fn sandboxes_come_and_go_and_nothing_is_left() {
    // The lab is where the engine is KVM and nothing else runs, so system-wide counts mean something there.
    let count = std::env::var("AIRLOCK_TEST_SANDBOXES")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or_else(|| if on_kvm() { 200 } else { 10 });
    let product = Product::new();
    product.busybox(&["true"]).expect_code(0); // makes what is cached
    product.expect_nothing_left();
    let before = (process_count(), temp_entries(), open_files());
    for i in 0..count {
        let run = product.busybox(&["echo", &i.to_string()]).expect_code(0);
        assert_eq!(run.out(), format!("{i}\n"));
    }
    product.expect_nothing_left();
    let after = (process_count(), temp_entries(), open_files());
    println!(
        "{count} sandboxes: (processes, temp entries, open files) before {before:?}, after {after:?}"
    );
    if on_kvm() {
        assert_eq!(
            (before.0, before.1),
            (after.0, after.1),
            "processes or temp files were left"
        );
        assert!(
            after.2 <= before.2 + 16,
            "open files grew from {} to {}",
            before.2,
            after.2
        );
    }
}
