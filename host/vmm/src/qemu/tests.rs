//! The command line, the monitor, and children that are not QEMU.

use super::*;

fn config() -> VmConfig {
    serde_json::from_str(
            r#"{"engine": {"qemu": {"binary": "qemu-system-x86_64"}}, "kernel": "/k/vmlinux", "initramfs": "/k/i.cpio",
            "cmdline": "quiet x=1,2", "cpus": 2, "memory_mib": 256, "discovery": "acpi",
            "disks": [{"path": "/i/a,b.erofs", "read_only": true}, {"path": "/r/scratch.img", "read_only": false}],
            "vsock_socket": "/r/v", "guest_cid": 3, "console_log": "/r/c", "console_log_limit_bytes": 1048576,
            "control_socket": "/r/s", "run_dir": "/r", "ephemeral": true}"#,
        )
        .unwrap()
}

fn value_of<'a>(arguments: &'a [String], option: &str, part: &str) -> &'a str {
    let pairs = arguments.iter().zip(&arguments[1..]);
    let mut found = pairs.filter(|(name, value)| *name == option && value.contains(part));
    found
        .next()
        .unwrap_or_else(|| panic!("{option} ...{part}... in {arguments:?}"))
        .1
}

#[test]
fn the_command_line_says_what_the_configuration_says() {
    let arguments = arguments(&config(), 2_500_000, 10, 11);
    assert!(value_of(&arguments, "-M", "microvm").contains("acpi=on"));
    assert_eq!(value_of(&arguments, "-smp", ""), "2");
    assert_eq!(value_of(&arguments, "-m", "256"), "256M");
    assert_eq!(
        value_of(&arguments, "-append", ""),
        "quiet x=1,2 tsc_early_khz=2500000 tsc=reliable no_timer_check"
    );
    assert!(value_of(&arguments, "-drive", "disk0").ends_with("file=/i/a,,b.erofs,read-only=on"));
    assert!(value_of(&arguments, "-drive", "disk1").ends_with("file=/r/scratch.img,read-only=off"));
    assert_eq!(
        value_of(&arguments, "-chardev", "vsock"),
        "socket,id=vsock,fd=10"
    );
    assert_eq!(
        value_of(&arguments, "-chardev", "monitor"),
        "socket,id=monitor,fd=11"
    );
}

#[test]
fn disks_come_in_order_between_rng_and_vsock() {
    let arguments = arguments(&config(), 1, 10, 11);
    let devices = arguments
        .iter()
        .map(String::as_str)
        .filter(|word| word.contains("-device") && *word != "-device");
    let devices: Vec<_> = devices.collect();
    assert_eq!(
        devices,
        [
            "virtio-rng-device",
            "virtio-blk-device,drive=disk0",
            "virtio-blk-device,drive=disk1",
            "vhost-user-vsock-device,chardev=vsock"
        ]
    );
}

#[test]
fn the_monitor_takes_the_answer_to_its_own_command() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let answers = r#"{"QMP": {"version": {}}}
{"return": {}, "id": 1}
{"event": "STOP"}
{"return": {"status": "running"}, "id": 2}
{"return": {"late": true}, "id": 2}
{"error": {"class": "GenericError", "desc": "no"}, "id": 3}
"#;
    (&theirs).write_all(answers.as_bytes()).unwrap();
    let mut monitor = Monitor::new(ours).unwrap();
    assert_eq!(
        monitor.command("query-status").unwrap()["status"],
        "running"
    );
    assert_eq!(monitor.command("cont").unwrap_err().to_string(), "no");
    drop(theirs);
    assert!(monitor.command("cont").is_err());
}

fn run(script: &str) -> (String, Option<crate::machine::Exit>) {
    let exit = Arc::new(ExitSlot::new().unwrap());
    let file = vmm_sys_util::tempfile::TempFile::new().unwrap();
    let log = ConsoleLog::create(file.as_path(), 16384).unwrap();
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (_, waiter) = spawn(command, [ours.into(), theirs.into()], log, exit.clone()).unwrap();
    waiter.join().unwrap();
    (std::fs::read_to_string(file.as_path()).unwrap(), exit.get())
}

#[test]
fn the_end_of_the_child_is_reported_with_its_first_complaint() {
    let (console, exit) = run("echo hello; exit 0");
    assert_eq!(console, "hello\n");
    assert_eq!(exit.unwrap().reason, ExitReason::GuestReset);
    let (_, exit) =
        run("echo 'qemu: warning: x' >&2; echo 'qemu: no such kernel' >&2; echo more >&2; exit 1");
    let exit = exit.unwrap();
    assert_eq!(exit.reason, ExitReason::Error);
    assert_eq!(
        exit.detail,
        "QEMU ended with status 1: qemu: no such kernel"
    );
    let (_, exit) = run("kill -9 $$");
    assert_eq!(exit.unwrap().detail, "QEMU was ended by signal 9");
}

#[test]
fn a_missing_binary_is_said_so() {
    let exit = Arc::new(ExitSlot::new().unwrap());
    let file = vmm_sys_util::tempfile::TempFile::new().unwrap();
    let log = ConsoleLog::create(file.as_path(), 16384).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let command = Command::new("/nonexistent/qemu");
    let error = spawn(command, [ours.into(), theirs.into()], log, exit).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
}
