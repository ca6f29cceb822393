//! The machine that a specification becomes, and what is left of a launch that fails.

use super::*;
use crate::image::{Defaults, FsType};
use crate::test_folder::TestFolder;

fn spec() -> LaunchSpec {
    LaunchSpec {
        name: "box".parse().unwrap(),
        image: "busybox".to_owned(),
        kernel: None,
        engine: EngineChoice::Qemu,
        cpus: CpuCount::new(1).unwrap(),
        memory_mib: MemoryMib::new(256).unwrap(),
        scratch: ScratchSpec::Memory,
        ephemeral: true,
        boot_timeout: None,
    }
}

fn image() -> Image {
    Image {
        name: "busybox".to_owned(),
        rootfs: "/i/rootfs.erofs".into(),
        fstype: FsType::Erofs,
        defaults: Defaults::default(),
    }
}

#[test]
fn the_command_line_tells_the_agent_what_to_mount_and_the_kernel_how_to_reset() {
    let kvm = cmdline(&spec(), Engine::Kvm, &image(), true);
    for word in [
        "reboot=k",
        "panic=-1",
        "noreplace-smp",
        "airlock.root=/dev/vda",
        "airlock.rootfstype=erofs",
        "airlock.scratch=/dev/vdb",
        "airlock.hostname=box",
    ] {
        assert!(kvm.split(' ').any(|w| w == word), "{word} in {kvm}");
    }
    let several = LaunchSpec {
        cpus: CpuCount::new(2).unwrap(),
        ..spec()
    };
    let qemu = cmdline(&several, Engine::Qemu, &image(), false);
    assert!(
        qemu.contains("reboot=t") && qemu.contains("airlock.scratch=tmpfs"),
        "{qemu}"
    );
    assert!(!qemu.contains("noreplace-smp"), "{qemu}");
    let longest = LaunchSpec {
        name: "n".repeat(63).parse().unwrap(),
        ..spec()
    };
    assert!(Cmdline::new(cmdline(&longest, Engine::Kvm, &image(), true)).is_ok());
}

#[tokio::test]
async fn a_launch_without_its_parts_leaves_the_name_free() {
    let folder = TestFolder::new();
    let paths = folder.paths();
    // Whatever of QEMU, kernel or image is missed first: none of it is there.
    launch(&paths, &spec()).await.unwrap_err();
    assert!(Registry::open(&paths).unwrap().list().unwrap().is_empty());
}

#[test]
fn a_dead_sandboxs_name_is_free_again_and_a_stopped_ones_is_not() {
    let folder = TestFolder::new();
    let registry = Registry::open(&folder.paths()).unwrap();
    let name: Name = "box".parse().unwrap();
    std::fs::create_dir(registry.root().join(&name)).unwrap();
    clear_if_dead(&registry, &name).unwrap();
    assert!(registry.find(&name).is_err());
    std::fs::create_dir(registry.root().join(&name)).unwrap();
    std::fs::write(
        registry.root().join("box/exit.json"),
        r#"{"reason":"stopped"}"#,
    )
    .unwrap();
    clear_if_dead(&registry, &name).unwrap();
    assert_eq!(registry.find(&name).unwrap().state(), State::Stopped);
}
