//! Sizes as typed, and disks made by the real mke2fs.

use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};

use super::*;
use crate::test_folder::TestFolder;

#[test]
fn sizes_are_read_as_users_write_them() {
    for (text, mib) in [
        ("512", 512),
        ("512M", 512),
        ("2g", 2048),
        ("8G", 8192),
        ("1T", 1 << 20),
    ] {
        assert_eq!(parse_mib(text), Ok(mib), "{text}");
    }
    for text in [
        "",
        "M",
        "-1",
        "+1",
        "1.5G",
        "1K",
        "99999999999999999999",
        "18446744073709551615T",
    ] {
        assert!(parse_mib(text).is_err(), "{text}");
    }
    assert_eq!("memory".parse(), Ok(ScratchSpec::Memory));
    assert_eq!("8G".parse(), Ok(ScratchSpec::default()));
    assert!("1M".parse::<ScratchSpec>().is_err());
    assert!("99T".parse::<ScratchSpec>().is_err());
}

#[test]
fn a_disk_is_an_ext4_file_system_that_takes_next_to_no_room_and_has_no_name() {
    let folder = TestFolder::new();
    let disk = ScratchDisk::create(&folder.paths(), 1024).unwrap();
    let meta = disk.file.metadata().unwrap();
    assert_eq!(meta.len(), 1024 << 20);
    assert!(meta.blocks() * 512 < 4 << 20, "{} blocks", meta.blocks());
    assert_eq!(meta.nlink(), 0);
    let mut magic = [0; 2];
    File::open(disk.path())
        .unwrap()
        .read_exact_at(&mut magic, 1024 + 56)
        .unwrap();
    assert_eq!(magic, [0x53, 0xef]);
    let left: Vec<_> = fs::read_dir(folder.paths().cache.join("scratch"))
        .unwrap()
        .flatten()
        .collect();
    assert_eq!(left.len(), 1, "only the template: {left:?}");
}

#[test]
fn a_sparse_copy_has_the_same_bytes_and_the_same_holes() {
    let folder = TestFolder::new();
    let from = folder.path().join("from");
    let mut source = File::create(&from).unwrap();
    source.write_all(b"head").unwrap();
    source.write_all_at(b"middle", 10 << 20).unwrap();
    source.set_len((20 << 20) + 1).unwrap();
    let target = create_private(&folder.path().join("to")).unwrap();
    copy_sparse(&from, &target).unwrap();
    assert_eq!(
        fs::read(&from).unwrap(),
        fs::read(folder.path().join("to")).unwrap()
    );
    assert!(target.metadata().unwrap().blocks() * 512 < 1 << 20);
}
