//! The registry on a real folder, with owners that end.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use super::*;
use crate::test_folder::TestFolder;

fn record(name: &Name, ready_ms: Option<u64>) -> Record {
    Record {
        name: name.to_string(),
        engine: Engine::Qemu,
        image: "busybox".to_owned(),
        kernel: "tuned".to_owned(),
        cpus: 1,
        memory_mib: 512,
        created_unix_ms: 0,
        creator: ProcessId::own().unwrap(),
        vmm: None,
        ready_ms,
        ephemeral: false,
        defaults: Defaults::default(),
    }
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

#[test]
fn a_sandbox_is_creating_then_running_then_stopped_or_dead() {
    let folder = TestFolder::new();
    let registry = Registry::open(&folder.paths()).unwrap();
    let box_ = name("box");
    let (dir, lock) = registry.create(&box_, &record(&box_, None)).unwrap();
    assert_eq!(dir.state(), State::Creating);
    dir.write_record(&record(&box_, Some(5))).unwrap();
    assert_eq!(dir.state(), State::Running);
    assert!(matches!(dir.remove(), Err(RegistryError::Running(_))));
    drop(lock);
    assert_eq!(dir.state(), State::Dead);
    fs::write(dir.path().join("exit.json"), r#"{"reason":"guest_reset"}"#).unwrap();
    assert_eq!(dir.state(), State::Stopped);
    assert_eq!(registry.list().unwrap(), std::slice::from_ref(&dir));
    dir.remove().unwrap();
    assert!(matches!(
        registry.find(&box_),
        Err(RegistryError::NotFound(_))
    ));
    assert!(fs::read_dir(registry.root()).unwrap().next().is_none());
}

#[test]
fn a_sandbox_whose_maker_was_killed_is_dead_and_not_creating_for_ever() {
    let folder = TestFolder::new();
    let registry = Registry::open(&folder.paths()).unwrap();
    let box_ = name("box");
    let mut orphan = record(&box_, None);
    // No process that runs.
    orphan.creator.start_ticks += 1;
    let (dir, lock) = registry.create(&box_, &orphan).unwrap();
    assert_eq!(dir.state(), State::Dead);
    // One that was ready before its maker went is what `airlock up` leaves.
    orphan.ready_ms = Some(1);
    dir.write_record(&orphan).unwrap();
    assert_eq!(dir.state(), State::Running);
    drop(lock);
}

#[test]
fn a_name_has_one_owner_and_the_loser_leaves_nothing() {
    let folder = TestFolder::new();
    let registry = Registry::open(&folder.paths()).unwrap();
    let box_ = name("box");
    let (_dir, _lock) = registry.create(&box_, &record(&box_, Some(1))).unwrap();
    let error = registry.create(&box_, &record(&box_, None)).unwrap_err();
    assert!(
        matches!(
            &error,
            RegistryError::InUse {
                state: State::Running,
                ..
            }
        ),
        "{error}"
    );
    assert!(error.to_string().ends_with("airlock rm -f box"), "{error}");
    assert_eq!(fs::read_dir(registry.root()).unwrap().count(), 1);
}

#[test]
fn a_child_that_inherited_the_lock_holds_it_until_it_is_killed() {
    let folder = TestFolder::new();
    let registry = Registry::open(&folder.paths()).unwrap();
    let box_ = name("box");
    let (dir, lock) = registry.create(&box_, &record(&box_, Some(1))).unwrap();
    // As the VMM has it: its standard output. It waits for a stdin that never comes.
    let mut child = Command::new("cat")
        .arg0("vmm")
        .stdin(Stdio::piped())
        .stdout(lock.share().unwrap())
        .spawn()
        .unwrap();
    drop(lock);
    assert_eq!(dir.state(), State::Running);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(dir.state(), State::Dead);
}

#[test]
fn what_is_no_sandbox_is_not_listed_and_young_unfinished_folders_are_left_alone() {
    let folder = TestFolder::new();
    let registry = Registry::open(&folder.paths()).unwrap();
    for entry in [".new-1", ".rm-1", "Not-A-Name"] {
        fs::create_dir(registry.root().join(entry)).unwrap();
    }
    // A file of the user's that happens to have a sandbox's name.
    fs::write(registry.root().join("notes"), "keep").unwrap();
    assert_eq!(registry.list().unwrap(), []);
    assert_eq!(registry.abandoned().unwrap(), Vec::<PathBuf>::new());
}

#[test]
fn a_folder_without_a_record_is_dead_and_can_be_removed() {
    let folder = TestFolder::new();
    let registry = Registry::open(&folder.paths()).unwrap();
    fs::create_dir(registry.root().join("odd")).unwrap();
    let dir = registry.find(&name("odd")).unwrap();
    assert_eq!((dir.state(), dir.record()), (State::Dead, None));
    dir.remove().unwrap();
}

#[test]
fn a_run_root_too_deep_for_sockets_is_refused_with_the_lengths() {
    let folder = TestFolder::new();
    let mut paths = folder.paths();
    paths.run = folder.path().join("r".repeat(60));
    let registry = Registry::open(&paths).unwrap();
    let long = name(&"n".repeat(40));
    let error = registry.create(&long, &record(&long, None)).unwrap_err();
    assert!(
        matches!(error, RegistryError::TooLong { length, .. } if length > 107),
        "{error}"
    );
    assert!(fs::read_dir(registry.root()).unwrap().next().is_none());
}

#[test]
fn a_run_root_open_to_others_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let folder = TestFolder::new();
    let paths = folder.paths();
    fs::create_dir(&paths.run).unwrap();
    fs::set_permissions(&paths.run, fs::Permissions::from_mode(0o777)).unwrap();
    let error = Registry::open(&paths).unwrap_err();
    assert!(
        matches!(error, RegistryError::Paths(PathsError::NotOurs { .. })),
        "{error}"
    );
}
