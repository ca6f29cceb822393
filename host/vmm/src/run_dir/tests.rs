use super::*;
use vmm_sys_util::tempdir::TempDir;

fn config(folder: &Path, is_ephemeral: bool) -> VmConfig {
    let path = |name: &str| folder.join(name).to_string_lossy().into_owned();
    serde_json::from_value(serde_json::json!({
        "engine": {"kvm": {}}, "kernel": "/k", "initramfs": null, "cmdline": "", "cpus": 1, "memory_mib": 64,
        "discovery": "cmdline", "disks": [], "vsock_socket": path("vsock.sock"), "guest_cid": 3,
        "console_log": path("console.log"), "console_log_limit_bytes": 65536,
        "control_socket": path("vmm.sock"), "run_dir": path(""), "ephemeral": is_ephemeral,
    }))
    .unwrap()
}

fn exit(reason: ExitReason) -> Exit {
    Exit {
        reason,
        detail: "why".to_owned(),
    }
}

#[test]
fn a_vm_that_lasts_leaves_its_exit() {
    let folder = TempDir::new().unwrap();
    leave(
        &config(folder.as_path(), false),
        Path::new("/x"),
        &exit(ExitReason::Stopped),
        false,
    );
    let text = fs::read_to_string(folder.as_path().join("exit.json")).unwrap();
    assert_eq!(text, r#"{"reason":"stopped","detail":"why"}"#);
}

#[test]
fn an_ephemeral_vm_whose_owner_is_gone_leaves_nothing() {
    let folder = TempDir::new().unwrap();
    let run_dir = folder.as_path().join("run");
    fs::create_dir(&run_dir).unwrap();
    for name in ["console.log", "vmm.json", "scratch.img"] {
        fs::write(run_dir.join(name), "").unwrap();
    }
    leave(
        &config(&run_dir, true),
        &run_dir.join("vmm.json"),
        &exit(ExitReason::Lifeline),
        true,
    );
    assert!(!run_dir.exists());
}

#[test]
fn files_that_are_not_the_vms_own_are_kept() {
    let folder = TempDir::new().unwrap();
    let run_dir = folder.as_path().join("run");
    fs::create_dir(&run_dir).unwrap();
    fs::write(run_dir.join("thesis.tex"), "").unwrap();
    let outside = folder.as_path().join("vmm.json");
    fs::write(&outside, "").unwrap();
    leave(
        &config(&run_dir, true),
        &outside,
        &exit(ExitReason::Lifeline),
        true,
    );
    assert!(run_dir.join("thesis.tex").exists() && outside.exists());
}

#[test]
fn an_owner_that_lives_can_read_why_its_vm_ended() {
    for reason in [ExitReason::GuestFault, ExitReason::GuestReset] {
        let folder = TempDir::new().unwrap();
        leave(
            &config(folder.as_path(), true),
            Path::new("/x"),
            &exit(reason),
            false,
        );
        assert!(folder.as_path().join("exit.json").exists());
    }
}

#[test]
fn a_kernel_panic_is_a_fault_and_is_quoted() {
    let folder = TempDir::new().unwrap();
    let log = folder.as_path().join("console.log");
    fs::write(
        &log,
        "[ 1.0] ok\n[ 1.1] Kernel panic - not syncing: no init\r\n[ 1.2] Rebooting\n",
    )
    .unwrap();
    let fault = with_kernel_panic(exit(ExitReason::GuestReset), &log);
    assert_eq!(fault.reason, ExitReason::GuestFault);
    assert_eq!(fault.detail, "Kernel panic - not syncing: no init");
    assert_eq!(
        with_kernel_panic(exit(ExitReason::Stopped), &log),
        exit(ExitReason::Stopped)
    );
    fs::write(&log, "[ 1.0] ok\n").unwrap();
    assert_eq!(
        with_kernel_panic(exit(ExitReason::GuestReset), &log),
        exit(ExitReason::GuestReset)
    );
}
