//! The archive, read back.

use std::collections::BTreeMap;

use airlock_vmm::config::Discovery;
use cpio::newc::Reader;

use super::*;
use crate::test_folder::TestFolder;

/// Mode, device number and contents by name.
/// Mode, device numbers, content.
type Entry = (u32, (u32, u32), Vec<u8>);

fn entries(archive: &Path) -> BTreeMap<String, Entry> {
    let mut found = BTreeMap::new();
    let mut rest = fs::read(archive).unwrap();
    loop {
        let mut reader = Reader::new(&rest[..]).unwrap();
        if reader.entry().is_trailer() {
            return found;
        }
        let entry = reader.entry();
        let (name, mode) = (entry.name().to_owned(), entry.mode());
        let device = (entry.rdev_major(), entry.rdev_minor());
        let mut contents = Vec::new();
        io::Read::read_to_end(&mut reader, &mut contents).unwrap();
        found.insert(name, (mode, device, contents));
        rest = reader.finish().unwrap().to_vec();
    }
}

#[test]
fn the_archive_holds_what_pid_1_needs_and_modules_in_loading_order() {
    let folder = TestFolder::new();
    let agent = folder.write("agent", b"agent");
    let modules = ["z_first.ko", "a_second.ko"];
    let kernel = Kernel {
        name: "debian".to_owned(),
        image: "/k".into(),
        discovery: Discovery::Acpi,
        modules: modules
            .map(|module| folder.write(module, module.as_bytes()))
            .to_vec(),
    };
    let archive = cached(&folder.paths(), &kernel, &agent).unwrap();
    let entries = entries(&archive);
    assert_eq!(entries["init"], (0o100_755, (0, 0), b"agent".to_vec()));
    assert_eq!(entries["dev/console"].0, 0o020_600);
    assert_eq!(entries["dev/console"].1, (5, 1));
    assert_eq!(entries["dev/null"].1, (1, 3));
    let names: Vec<_> = entries
        .keys()
        .filter(|name| name.starts_with("modules/"))
        .collect();
    assert_eq!(names, ["modules/00-z_first.ko", "modules/01-a_second.ko"]);
}

#[test]
fn a_new_agent_makes_a_new_archive_and_the_same_agent_does_not() {
    let folder = TestFolder::new();
    let agent = folder.write("agent", b"one");
    let kernel = Kernel {
        name: "tuned".to_owned(),
        image: "/k".into(),
        discovery: Discovery::Cmdline,
        modules: Vec::new(),
    };
    let first = cached(&folder.paths(), &kernel, &agent).unwrap();
    assert_eq!(cached(&folder.paths(), &kernel, &agent).unwrap(), first);
    folder.write("agent", b"another");
    let second = cached(&folder.paths(), &kernel, &agent).unwrap();
    assert_ne!(first, second);
    assert_eq!(entries(&second)["init"].2, b"another");
}

#[test]
fn a_missing_agent_is_named() {
    let folder = TestFolder::new();
    let kernel = Kernel {
        name: "tuned".to_owned(),
        image: "/k".into(),
        discovery: Discovery::Cmdline,
        modules: Vec::new(),
    };
    let error = cached(&folder.paths(), &kernel, Path::new("/nowhere/agent")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot make the initramfs: /nowhere/agent"
    );
}
