//! Images and kernels as files, whole and damaged.

use super::*;
use crate::kernel::{Kernel, KernelError};
use crate::test_folder::TestFolder;

/// An EROFS superblock that states `blocks` blocks of 4 KiB, in a file of `length` bytes.
fn erofs(blocks: u32, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    bytes[1024..1028].copy_from_slice(&0xe0f5_e1e2_u32.to_le_bytes());
    bytes[1024 + 12] = 12;
    bytes[1024 + 36..1024 + 40].copy_from_slice(&blocks.to_le_bytes());
    bytes
}

const MANIFEST: &str = r#"{"name": "box", "rootfs": "rootfs.erofs", "fstype": "erofs", "env": {"PATH": "/bin"},
    "cwd": "/", "user": "root", "shell": "/bin/sh"}"#;

#[test]
fn a_whole_image_is_found_with_its_defaults() {
    let folder = TestFolder::new();
    folder.write("cache/images/box/image.json", MANIFEST.as_bytes());
    folder.write("cache/images/box/rootfs.erofs", &erofs(2, 8192));
    let image = Image::find(&folder.paths(), "box").unwrap();
    assert_eq!(image.fstype, FsType::Erofs);
    assert_eq!(image.defaults.env["PATH"], "/bin");
    assert_eq!(names(&folder.paths()), ["box"]);
}

#[test]
fn a_damaged_image_is_named_before_anything_boots() {
    let damages: [(&str, &[u8]); 4] = [
        ("are there", &erofs(3, 8192)),
        ("too few", b"short"),
        ("it is no erofs file system", &[0; 8192]),
        ("it is no erofs file system", &[0xff; 8192]),
    ];
    for (expected, rootfs) in damages {
        let folder = TestFolder::new();
        folder.write("cache/images/box/image.json", MANIFEST.as_bytes());
        folder.write("cache/images/box/rootfs.erofs", rootfs);
        let error = Image::find(&folder.paths(), "box").unwrap_err();
        assert!(matches!(error, ImageError::Broken { .. }), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }
    let folder = TestFolder::new();
    folder.write("cache/images/box/image.json", b"{");
    assert!(matches!(
        Image::find(&folder.paths(), "box"),
        Err(ImageError::Broken { .. })
    ));
}

#[test]
fn an_image_that_is_not_there_is_answered_with_those_that_are() {
    let folder = TestFolder::new();
    folder.write("cache/images/box/image.json", MANIFEST.as_bytes());
    for name in ["nope", "", ".", "..", "../images/box", "a/b"] {
        let error = Image::find(&folder.paths(), name).unwrap_err();
        assert!(
            matches!(error, ImageError::NotFound { .. }),
            "{name}: {error}"
        );
        assert!(error.to_string().contains("there is box;"), "{error}");
    }
}

#[test]
fn folders_named_by_contents_are_no_names_for_users() {
    assert!(is_named_by_contents("debian-39cc5e58d2da3204"));
    assert!(is_named_by_contents("debian-39cc5e58d2da3204.new"));
    assert!(!is_named_by_contents("debian-12"));
    assert!(!is_named_by_contents("busybox"));
}

#[test]
fn the_tuned_kernel_is_taken_if_it_is_there_and_debians_otherwise() {
    let folder = TestFolder::new();
    let paths = folder.paths();
    assert!(matches!(
        Kernel::find(&paths, None),
        Err(KernelError::NotFound { .. })
    ));
    let mut elf = vec![0; 1024];
    elf[..4].copy_from_slice(b"\x7fELF");
    for (name, discovery) in [("debian", "acpi"), ("tuned", "cmdline")] {
        let json = format!(
            r#"{{"name": "{name}", "release": "6", "image": "k", "discovery": "{discovery}", "modules": []}}"#
        );
        folder.write(
            &format!("cache/kernels/{name}/kernel.json"),
            json.as_bytes(),
        );
        folder.write(&format!("cache/kernels/{name}/k"), &elf);
        assert_eq!(Kernel::find(&paths, None).unwrap().name, name);
    }
    assert_eq!(Kernel::find(&paths, Some("debian")).unwrap().name, "debian");
    // A broken tuned kernel is said, not silently replaced.
    folder.write("cache/kernels/tuned/k", b"junk");
    assert!(matches!(
        Kernel::find(&paths, None),
        Err(KernelError::Broken { .. })
    ));
}
