//! Bad input and faults: each is one clear line, a status from the table, and nothing is left behind.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::time::Duration;

use airlock_tests::{Product, cache, finish, on_kvm, signal, wait, wait_until};

/// A cache folder that is the real one but for what the test changes.
struct OtherCache(std::path::PathBuf);

impl OtherCache {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("alc-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        for kind in ["kernels", "images"] {
            fs::create_dir_all(dir.join(kind)).expect("the temp folder is writable");
            for entry in fs::read_dir(cache().join(kind))
                .expect("scripts/test filled the cache")
                .flatten()
            {
                let target =
                    fs::canonicalize(entry.path()).expect("the cache has no dangling links");
                std::os::unix::fs::symlink(target, dir.join(kind).join(entry.file_name()))
                    .expect("links can be made");
            }
        }
        Self(dir)
    }

    /// Makes a private copy of `kernels/NAME` or `images/NAME` that can be damaged.
    fn own_copy(&self, of: &str) -> std::path::PathBuf {
        let path = self.0.join(of);
        let target = fs::read_link(&path).expect("a link of this cache");
        fs::remove_file(&path).expect("it is ours");
        fs::create_dir(&path).expect("it is gone");
        for entry in fs::read_dir(&target).expect("the real folder").flatten() {
            let to = path.join(entry.file_name());
            if entry.path().is_dir() {
                std::os::unix::fs::symlink(entry.path(), to).expect("links can be made");
            } else {
                fs::copy(entry.path(), to).expect("files can be copied");
            }
        }
        path
    }

    fn path(&self) -> String {
        self.0.to_string_lossy().into_owned()
    }
}

impl Drop for OtherCache {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_missing_image_or_kernel_is_named_with_what_to_do() {
    let product = Product::new();
    product
        .airlock(["run", "--image", "nope", "--", "true"])
        .expect_failure(&["nope", "images/"]);
    product
        .airlock(["run", "--kernel", "nope", "--", "true"])
        .expect_failure(&["nope", "images/kernel"]);
    let empty = OtherCache::new("empty");
    fs::remove_dir_all(&empty.0).expect("it is ours");
    fs::create_dir(&empty.0).expect("it is gone");
    let product = Product::new().env("AIRLOCK_CACHE", empty.path());
    product
        .airlock(["run", "--", "true"])
        .expect_failure(&["busybox", "images/busybox/build"]);
    product.expect_nothing_left();
}

#[test]
fn a_corrupt_kernel_is_refused() {
    let other = OtherCache::new("kernel");
    let kernel = other.own_copy("kernels/tuned");
    fs::write(kernel.join("vmlinux"), b"this is no kernel").expect("it is ours");
    let product = Product::new().env("AIRLOCK_CACHE", other.path());
    product
        .airlock(["run", "--kernel", "tuned", "--", "true"])
        .expect_failure(&["vmlinux"]);
    product.expect_nothing_left();
}

#[test]
fn a_corrupt_image_is_an_error_with_the_guests_own_words() {
    let other = OtherCache::new("image");
    let image = other.own_copy("images/busybox");
    let rootfs = image.join("rootfs.erofs");
    let mut bytes = fs::read(&rootfs).expect("a root image");
    // The superblock (1024 to 1152) stays, so that only the guest can find out.
    for byte in bytes[1152..].iter_mut() {
        *byte = 0x5a;
    }
    fs::write(&rootfs, &bytes).expect("it is ours");
    let product = Product::new().env("AIRLOCK_CACHE", other.path());
    product
        .airlock(["run", "--image", "busybox", "--", "true"])
        .expect_failure(&["/dev/vda"]);
    // What can be seen from outside is refused before anything starts.
    fs::write(&rootfs, b"no file system at all").expect("it is ours");
    product
        .airlock(["run", "--image", "busybox", "--", "true"])
        .expect_failure(&["rootfs.erofs", "images/busybox/build"]);
    product.expect_nothing_left();
}

#[test]
fn a_corrupt_kernel_description_is_an_error() {
    let other = OtherCache::new("json");
    let kernel = other.own_copy("kernels/tuned");
    fs::write(kernel.join("kernel.json"), b"{").expect("it is ours");
    let product = Product::new().env("AIRLOCK_CACHE", other.path());
    product
        .airlock(["run", "--kernel", "tuned", "--", "true"])
        .expect_failure(&["kernel.json"]);
}

#[test]
fn memory_that_cannot_be_had_or_is_too_little_is_an_error() {
    let product = Product::new();
    product
        .airlock(["run", "--memory", "8T", "--", "true"])
        .expect_failure(&["memory"]);
    // Within the VMM's limits, and more than any machine these tests run on has.
    product
        .airlock(["run", "--memory", "1000G", "--", "true"])
        .expect_failure(&["memory", "this host has"]);
    product
        .airlock(["run", "--memory", "1M", "--", "true"])
        .expect_failure(&["memory"]);
    product
        .airlock(["run", "--memory", "lots", "--", "true"])
        .expect_failure(&["lots"]);
    product
        .airlock(["run", "--cpus", "0", "--", "true"])
        .expect_failure(&["cpus"]);
    product.expect_nothing_left();
}

/// A started `airlock run` whose command has printed `ready`.
fn start_and_wait_ready(product: &Product, script: &str) -> std::process::Child {
    let mut child = product
        .command(["run", "--image", "busybox", "--", "sh", "-c", script])
        .spawn()
        .expect("airlock starts");
    let mut first = String::new();
    let stdout = child.stdout.as_mut().expect("stdout is piped");
    let mut byte = [0];
    while !first.ends_with('\n') {
        if stdout.read(&mut byte).expect("stdout can be read") == 0 {
            break;
        }
        first.push(char::from(byte[0]));
    }
    if first != "ready\n" {
        let mut text = String::new();
        let _ =
            BufReader::new(child.stderr.take().expect("stderr is piped")).read_to_string(&mut text);
        panic!("the command did not start: {first:?} {text}");
    }
    child
}

/// The process that is the VM: airlock-vmm.
pub(crate) fn vmm_pid(product: &Product) -> u32 {
    product
        .processes()
        .iter()
        .find(|(_, cmdline)| cmdline.contains("airlock-vmm"))
        .unwrap_or_else(|| panic!("no airlock-vmm among {:?}", product.processes()))
        .0
}

#[test]
fn killing_the_vmm_during_a_command_is_lost_and_never_exit_0() {
    let product = Product::new();
    let child = start_and_wait_ready(&product, "echo ready; sleep 1000");
    signal(vmm_pid(&product), "KILL");
    wait(child).expect_failure(&["ended"]);
    product.expect_nothing_left();
}

#[test]
fn killing_the_client_leaves_no_vm() {
    let product = Product::new();
    let mut child = start_and_wait_ready(&product, "echo ready; sleep 1000");
    child.kill().expect("it runs");
    child.wait().expect("it was ours");
    product.expect_nothing_left();
}

#[test]
fn an_interrupt_during_boot_leaves_nothing() {
    let product = Product::new();
    let child = product
        .command(["run", "--image", "busybox", "--", "sleep", "1000"])
        .spawn()
        .expect("airlock starts");
    wait_until("the VM process is there", Duration::from_secs(60), || {
        product
            .processes()
            .iter()
            .any(|(_, cmdline)| cmdline.contains("airlock-vmm"))
    })
    .unwrap();
    signal(child.id(), "INT");
    let run = wait(child);
    assert_ne!(run.status.code(), Some(0));
    product.expect_nothing_left();
}

#[test]
fn an_interrupt_during_a_command_reaches_it_and_leaves_nothing() {
    let product = Product::new();
    let child = start_and_wait_ready(
        &product,
        "trap 'echo got-int; exit 9' INT; echo ready; while :; do sleep 0.05; done",
    );
    signal(child.id(), "INT");
    let run = wait(child).expect_code(9);
    assert!(run.out().contains("got-int"), "{}", run.out());
    product.expect_nothing_left();
}

#[test]
fn a_guest_that_panics_is_an_error_with_the_panic_line() {
    let product = Product::new();
    let child = start_and_wait_ready(
        &product,
        "echo ready; sleep 0.2; echo c > /proc/sysrq-trigger; sleep 1000",
    );
    wait(child).expect_failure(&["panic"]);
    product.expect_nothing_left();
}

#[test]
fn a_guest_that_powers_off_during_a_command_is_lost() {
    let product = Product::new();
    let child = start_and_wait_ready(&product, "echo ready; reboot -f; sleep 1000");
    wait(child).expect_failure(&["ended"]);
    product.expect_nothing_left();
}

#[test]
fn a_guest_that_halts_or_powers_off_is_seen_to_have_ended() {
    let product = Product::new();
    for command in ["poweroff -f", "halt -f"] {
        let script = format!("echo ready; {command}; sleep 1000");
        let child = start_and_wait_ready(&product, &script);
        wait(child).expect_failure(&["ended"]);
    }
    product.expect_nothing_left();
}

/// A kernel that does nothing for ever: an ELF file with a PVH entry note (Xen, type 18) and a two-byte loop.
fn spinning_kernel() -> Vec<u8> {
    const LOAD_AT: u64 = 0x10_0000;
    let mut elf = Vec::new();
    elf.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend_from_slice(&2_u16.to_le_bytes()); // ET_EXEC
    elf.extend_from_slice(&62_u16.to_le_bytes()); // EM_X86_64
    elf.extend_from_slice(&1_u32.to_le_bytes());
    elf.extend_from_slice(&LOAD_AT.to_le_bytes()); // e_entry
    elf.extend_from_slice(&64_u64.to_le_bytes()); // e_phoff
    elf.extend_from_slice(&0_u64.to_le_bytes()); // e_shoff
    elf.extend_from_slice(&0_u32.to_le_bytes());
    for half in [64_u16, 56, 2, 64, 0, 0] {
        elf.extend_from_slice(&half.to_le_bytes());
    }
    let note_at = 64 + 2 * 56_u64;
    let code_at = note_at + 32;
    let mut header = |kind: u32, flags: u32, offset: u64, address: u64, size: u64, align: u64| {
        elf.extend_from_slice(&kind.to_le_bytes());
        elf.extend_from_slice(&flags.to_le_bytes());
        for word in [offset, address, address, size, size, align] {
            elf.extend_from_slice(&word.to_le_bytes());
        }
    };
    header(1, 5, code_at, LOAD_AT, 4096, 1); // PT_LOAD
    header(4, 4, note_at, 0, 24, 4); // PT_NOTE
    for word in [4_u32, 8, 18] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    elf.extend_from_slice(b"Xen\0");
    elf.extend_from_slice(&LOAD_AT.to_le_bytes());
    elf.resize(usize::try_from(code_at).expect("small"), 0);
    elf.extend_from_slice(&[0xeb, 0xfe]); // jmp to itself
    elf.resize(64 << 10, 0x90); // as long as a kernel might be
    elf
}

#[test]
fn a_guest_that_hangs_at_boot_is_given_up_with_a_clear_line() {
    let other = OtherCache::new("hang");
    let kernel = other.own_copy("kernels/tuned");
    fs::write(kernel.join("vmlinux"), spinning_kernel()).expect("it is ours");
    let product = Product::new().env("AIRLOCK_CACHE", other.path());
    product
        .airlock([
            "run",
            "--kernel",
            "tuned",
            "--boot-timeout",
            "3s",
            "--",
            "true",
        ])
        .expect_failure(&["3 s", "did not start"]);
    product.expect_nothing_left();
}

#[test]
fn a_run_folder_left_by_killed_processes_is_seen_and_cleared() {
    let product = Product::new();
    product
        .airlock(["up", "dead", "--image", "busybox"])
        .expect_code(0);
    signal(vmm_pid(&product), "KILL");
    wait_until("ps says dead", Duration::from_secs(20), || {
        product.airlock(["ps", "--json"]).out().contains("\"dead\"")
            && product
                .airlock(["ps"])
                .out()
                .lines()
                .any(|l| l.starts_with("dead") && l.matches("dead").count() >= 2)
    })
    .unwrap();
    product
        .airlock(["exec", "dead", "--", "true"])
        .expect_failure(&["dead"]);
    product.airlock(["doctor", "--fix"]);
    product.expect_nothing_left();
    product
        .airlock(["up", "dead", "--image", "busybox"])
        .expect_code(0);
    product.airlock(["rm", "-f", "dead"]).expect_code(0);
    product.expect_nothing_left();
}

#[test]
fn no_kvm_is_said_plainly_when_it_was_asked_for() {
    if on_kvm() {
        airlock_tests::skipped("this machine has a good KVM; engine qemu runs this test");
        return;
    }
    let product = Product::new();
    // Here KVM is absent, or it interprets the kernel: either way it must be refused with the reason.
    product
        .airlock(["run", "--engine", "kvm", "--", "true"])
        .expect_failure(&["KVM", "--engine"]);
    let run = product.airlock(["doctor"]);
    assert!(run.out().contains("qemu"), "{}", run.out());
    let run = product
        .airlock([
            "run", "--engine", "auto", "--image", "busybox", "--", "echo", "fine",
        ])
        .expect_code(0);
    assert_eq!(run.out(), "fine\n");
    product.expect_nothing_left();
}

#[test]
fn a_reader_that_goes_away_ends_the_command_quietly() {
    let product = Product::new();
    let mut child = product
        .command([
            "run",
            "--image",
            "busybox",
            "--",
            "sh",
            "-c",
            "while :; do echo yes; done",
        ])
        .spawn()
        .expect("airlock starts");
    let mut lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
    assert_eq!(
        lines.next().expect("a line").expect("it can be read"),
        "yes"
    );
    drop(lines);
    let run = wait(child);
    assert!(!run.err().contains("thread '"), "{}", run.err());
    product.expect_nothing_left();
}

#[test]
fn a_reader_of_stderr_that_goes_away_ends_the_command_quietly() {
    let product = Product::new();
    let mut child = product
        .command([
            "run",
            "--image",
            "busybox",
            "--",
            "sh",
            "-c",
            "while :; do echo yes >&2; done",
        ])
        .spawn()
        .expect("airlock starts");
    let mut lines = BufReader::new(child.stderr.take().expect("stderr is piped")).lines();
    assert_eq!(
        lines.next().expect("a line").expect("it can be read"),
        "yes"
    );
    drop(lines);
    wait(child).expect_code(141);
    product.expect_nothing_left();
}

#[test]
fn a_sandbox_whose_up_was_killed_during_boot_is_dead_and_cleared() {
    let product = Product::new();
    let mut up = product
        .command(["up", "orphan", "--image", "busybox"])
        .spawn()
        .expect("airlock starts");
    wait_until("its VM is known", Duration::from_secs(60), || {
        product
            .airlock(["ps", "--json"])
            .out()
            .contains("\"start_ticks\"")
            && product
                .processes()
                .iter()
                .any(|(_, cmdline)| cmdline.contains("airlock-vmm"))
    })
    .unwrap();
    up.kill().expect("it is ours");
    up.wait().expect("it was ours");
    if product.airlock(["ps"]).out().contains("running") {
        eprintln!("the boot was quicker than the kill: nothing to see");
        product.airlock(["rm", "-f", "orphan"]).expect_code(0);
        return;
    }
    assert!(product.airlock(["ps"]).out().contains("dead"));
    product
        .airlock(["exec", "orphan", "--", "true"])
        .expect_failure(&["dead", "airlock rm orphan"]);
    let fixed = product.airlock(["doctor", "--fix"]);
    assert!(fixed.out().contains("orphan"), "{}", fixed.out());
    product.expect_nothing_left();
}

#[test]
fn removing_a_sandbox_under_a_command_is_named_as_the_cause() {
    let product = Product::new();
    product
        .airlock(["up", "gone", "--image", "busybox"])
        .expect_code(0);
    let mut child = product
        .command(["exec", "gone", "--", "sh", "-c", "echo ready; sleep 1000"])
        .spawn()
        .expect("airlock starts");
    let mut ready = [0; 6];
    child
        .stdout
        .as_mut()
        .expect("stdout is piped")
        .read_exact(&mut ready)
        .expect("it says that it is ready");
    product.airlock(["rm", "-f", "gone"]).expect_code(0);
    wait(child).expect_failure(&["the sandbox was removed"]);
    product.expect_nothing_left();
}

#[test]
fn a_report_that_cannot_be_written_is_known_before_the_command_runs() {
    let product = Product::new();
    let run = product
        .airlock(["run", "--report", "/nowhere/report", "--", "echo", "ran"])
        .expect_failure(&["/nowhere/report"]);
    assert_eq!(run.out(), "");
}

#[test]
fn an_error_that_stderr_does_not_take_is_still_125() {
    let product = Product::new();
    for args in [&["frobnicate"][..], &["exec", "nobody", "--", "true"]] {
        let full = fs::File::options()
            .write(true)
            .open("/dev/full")
            .expect("Linux has it");
        let mut command = product.command(args);
        command.stderr(full);
        finish(command, None).expect_code(125);
    }
}

#[test]
fn usage_errors_are_125_and_say_what_to_do() {
    let product = Product::new();
    product
        .airlock(["run"])
        .expect_failure(&["no command", "-it"]);
    product
        .airlock(["frobnicate"])
        .expect_failure(&["frobnicate"]);
    // A mistyped option is not taken for a command.
    product
        .airlock(["run", "--no-such-option", "--", "true"])
        .expect_failure(&["--no-such-option"]);
}
