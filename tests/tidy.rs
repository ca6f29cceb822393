//! The house rules that no compiler checks, as a test. Each rule says in its failure what to do about it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Which of our crates each crate may use. A lower layer never calls up: to change a line here is to change the
/// architecture, so README.md and this table change together.
const LAYERS: &[(&str, &[&str])] = &[
    ("airlock-proto", &[]),
    ("airlock-agent", &["airlock-proto"]),
    ("airlock-vmm", &[]),
    ("airlock-client", &["airlock-proto"]),
    ("airlock-sandbox", &["airlock-client", "airlock-vmm"]),
    ("airlock-cli", &["airlock-sandbox"]),
    ("airlock-tests", &["airlock-client", "airlock-proto"]),
];

/// Outside crates that only some of ours may use.
const ONLY_IN: &[(&str, &[&str])] = &[
    ("kvm-ioctls", &["airlock-vmm"]),
    ("anyhow", &["airlock-cli"]),
    ("clap", &["airlock-cli"]),
    ("indicatif", &["airlock-cli"]),
    ("prost", &["airlock-proto"]),
];

/// Crates that may not have these, whatever their features.
const NEVER: &[(&str, &[&str])] = &[("airlock-vmm", &["tokio", "prost", "clap"])];

/// Longest file, in lines, tests included unless they are in a sibling file.
const MAX_FILE_LINES: usize = 650;

/// Files over the limit, with the lines they may have. The numbers only go down.
const RATCHET: &[(&str, usize)] = &[];

/// Words with the one we use in their stead, in the names our Rust code gives to things.
const BANNED: &[(&str, &str)] = &[
    ("Manager", "the thing it does"),
    ("Helper", "the thing it does"),
    ("blacklist", "denylist"),
    ("whitelist", "allowlist"),
];

fn root() -> PathBuf {
    let mut path = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    path.pop();
    path
}

/// Every file git tracks or would track, relative to the root.
fn files() -> Vec<PathBuf> {
    let output = Command::new("git")
        .args([
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
            "-z",
        ])
        .current_dir(root())
        .output()
        .expect("git is needed to list the files of the project");
    assert!(output.status.success(), "git ls-files failed");
    let mut files: Vec<PathBuf> = output
        .stdout
        .split(|b| *b == 0)
        .filter(|name| !name.is_empty())
        .map(|name| PathBuf::from(String::from_utf8(name.to_vec()).expect("file names are UTF-8")))
        .filter(|path| root().join(path).is_file())
        .collect();
    files.sort();
    assert!(
        files.len() > 20,
        "this is not the whole project: {} files",
        files.len()
    );
    files
}

fn rust_files() -> Vec<(PathBuf, String)> {
    files()
        .into_iter()
        .filter(|path| path.extension().is_some_and(|e| e == "rs"))
        .map(|path| {
            let text = fs::read_to_string(root().join(&path)).expect("a tracked file is readable");
            (path, text)
        })
        .collect()
}

/// The part of a file that is the product: up to its `#[cfg(test)] mod tests`.
fn product(text: &str) -> &str {
    text.split_once("\n#[cfg(test)]\nmod tests")
        .map_or(text, |(before, _)| before)
}

/// Names of modules that some file declares under `#[cfg(test)]`.
fn test_modules(files: &[(PathBuf, String)]) -> BTreeSet<String> {
    files
        .iter()
        .flat_map(|(_, text)| text.split("#[cfg(test)]").skip(1))
        .filter_map(|after| {
            let line = after.trim_start().lines().next()?;
            let name = line.split("mod ").nth(1)?.strip_suffix(';')?;
            Some(name.to_owned())
        })
        .collect()
}

fn is_test_file(path: &Path) -> bool {
    path.starts_with("tests")
        || path.components().any(|c| c.as_os_str() == "tests")
        || path.file_name().is_some_and(|n| n == "tests.rs")
}

fn manifests() -> BTreeMap<String, toml::Table> {
    files()
        .into_iter()
        .filter(|path| {
            path.file_name().is_some_and(|n| n == "Cargo.toml") && path != Path::new("Cargo.toml")
        })
        .map(|path| {
            let text = fs::read_to_string(root().join(&path)).expect("a manifest is readable");
            let table: toml::Table = text.parse().expect("a manifest is TOML");
            let name = table["package"]["name"]
                .as_str()
                .expect("a package has a name")
                .to_owned();
            (name, table)
        })
        .collect()
}

fn dependencies(manifest: &toml::Table, kinds: &[&str]) -> BTreeSet<String> {
    kinds
        .iter()
        .filter_map(|kind| manifest.get(*kind)?.as_table())
        .flat_map(|table| table.keys().cloned())
        .collect()
}

#[test]
fn crates_only_use_the_layers_below_them() {
    let layers: BTreeMap<_, BTreeSet<&str>> = LAYERS
        .iter()
        .map(|(name, below)| (*name, below.iter().copied().collect()))
        .collect();
    for (name, manifest) in manifests() {
        let allowed = layers.get(name.as_str()).unwrap_or_else(|| {
            panic!("{name} has no row in LAYERS of tests/tidy.rs: decide where it belongs")
        });
        let used = dependencies(&manifest, &["dependencies", "build-dependencies"]);
        for dependency in used.iter().filter(|d| d.starts_with("airlock-")) {
            assert!(
                allowed.contains(dependency.as_str()),
                "{name} depends on {dependency}, which is not below it (LAYERS in tests/tidy.rs)"
            );
        }
        for (outside, only) in ONLY_IN {
            assert!(
                !used.contains(*outside) || only.contains(&name.as_str()),
                "{name} depends on {outside}, which only {only:?} may use"
            );
        }
        for (_, never) in NEVER.iter().filter(|(n, _)| *n == name) {
            for outside in *never {
                assert!(
                    !used.contains(*outside),
                    "{name} must not depend on {outside}"
                );
            }
        }
    }
}

#[test]
fn every_dependency_is_declared_once_with_its_version_in_the_workspace() {
    for (name, manifest) in manifests() {
        for kind in ["dependencies", "build-dependencies"] {
            let Some(table) = manifest.get(kind).and_then(|t| t.as_table()) else {
                continue;
            };
            for (dependency, spec) in table {
                let shared = spec.get("workspace").and_then(toml::Value::as_bool) == Some(true);
                assert!(
                    shared,
                    "{name}: write {dependency}.workspace = true, and its version in Cargo.toml"
                );
            }
        }
        assert!(
            manifest.contains_key("lints"),
            "{name} does not take the workspace's lints"
        );
    }
}

#[test]
fn every_dependency_is_used() {
    let manifests = manifests();
    let root_manifest: toml::Table = fs::read_to_string(root().join("Cargo.toml"))
        .expect("the workspace has a manifest")
        .parse()
        .expect("a manifest is TOML");
    let declared = root_manifest["workspace"]["dependencies"]
        .as_table()
        .expect("dependencies are a table");
    for dependency in declared.keys() {
        let used = manifests.values().any(|manifest| {
            dependencies(
                manifest,
                &["dependencies", "dev-dependencies", "build-dependencies"],
            )
            .contains(dependency)
        });
        assert!(
            used,
            "no crate uses {dependency}: take it out of Cargo.toml"
        );
    }
}

#[test]
fn files_stay_short_enough_to_read() {
    for (path, text) in rust_files() {
        let lines = text.lines().count();
        let name = path.to_string_lossy();
        let limit = RATCHET
            .iter()
            .find(|(n, _)| *n == name)
            .map_or(MAX_FILE_LINES, |(_, limit)| *limit);
        assert!(
            lines <= limit,
            "{name} has {lines} lines, the limit is {limit}: split it by concern"
        );
    }
}

#[test]
fn only_two_places_talk_to_kvm() {
    for (path, text) in rust_files() {
        let allowed =
            path == Path::new("host/vmm/src/kvm.rs") || path.starts_with("host/vmm/src/vcpu");
        if path.starts_with("host/vmm/src") && !allowed {
            assert!(
                !text.contains("kvm_ioctls"),
                "{}: kvm_ioctls belongs in kvm.rs and vcpu/",
                path.display()
            );
        }
    }
}

#[test]
fn guest_addresses_have_one_home() {
    for (path, text) in rust_files() {
        if !path.starts_with("host/vmm/src") || path.ends_with("layout.rs") || is_test_file(&path) {
            continue;
        }
        for (number, line) in product(&text).lines().enumerate() {
            assert!(
                !line.contains("GuestAddress(0x"),
                "{}:{}: a guest address belongs in layout.rs",
                path.display(),
                number + 1
            );
        }
    }
}

#[test]
fn no_panic_is_an_answer_to_input() {
    let files = rust_files();
    let test_modules = test_modules(&files);
    for (path, text) in files {
        let stem = path
            .file_stem()
            .and_then(|s| s.to_str())
            .unwrap_or_default();
        if test_modules.contains(stem) {
            continue;
        }
        let guarded = ["host/vmm/src", "host/client/src", "guest/src", "proto/src"];
        if !guarded.iter().any(|dir| path.starts_with(dir)) || is_test_file(&path) {
            continue;
        }
        for (number, line) in product(&text).lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            for call in [".unwrap()", ".expect(", "panic!(", "unreachable!("] {
                assert!(
                    !code.contains(call),
                    "{}:{}: {call} can end the process; return an error",
                    path.display(),
                    number + 1
                );
            }
        }
    }
}

#[test]
fn names_say_what_a_thing_does() {
    for (path, text) in rust_files() {
        if path == Path::new("tests/tidy.rs") {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            for (word, instead) in BANNED {
                let names = [
                    "struct ", "enum ", "trait ", "fn ", "mod ", "type ", "const ",
                ]
                .iter()
                .any(|keyword| line.contains(keyword));
                assert!(
                    !(names && line.contains(word)),
                    "{}:{}: {word} is banned, use {instead}",
                    path.display(),
                    number + 1
                );
            }
        }
        let stem = path
            .file_stem()
            .and_then(|s| s.to_str())
            .unwrap_or_default();
        for bad in ["util", "utils", "common", "core", "misc", "helpers"] {
            assert!(
                stem != bad,
                "{}: a file named {bad} says nothing",
                path.display()
            );
        }
    }
}

#[test]
fn every_module_says_what_lives_in_it() {
    for (path, text) in rust_files() {
        if path.components().any(|c| c.as_os_str() == "tests") || path.ends_with("tests.rs") {
            continue; // their parent says what they test
        }
        assert!(
            text.trim_start().starts_with("//!") || text.trim_start().starts_with("#!/"),
            "{}: begin with a //! doc that says what lives here and what must not",
            path.display()
        );
    }
}

#[test]
fn every_rust_file_is_compiled() {
    let files = rust_files();
    let texts: BTreeMap<&Path, &str> = files
        .iter()
        .map(|(p, t)| (p.as_path(), t.as_str()))
        .collect();
    let declared = |by: &Path, module: &str| {
        texts.get(by).is_some_and(|text| {
            text.lines().any(|line| {
                let line = line.trim();
                line.ends_with(&format!("mod {module};")) && !line.starts_with("//")
            })
        })
    };
    for (path, _) in &files {
        let stem = path
            .file_stem()
            .and_then(|s| s.to_str())
            .unwrap_or_default();
        let dir = path.parent().unwrap_or_else(|| Path::new(""));
        let root_file = ["lib", "main", "build", "tidy"].contains(&stem)
            || dir.ends_with("src/bin")
            || dir.ends_with("examples")
            || dir.ends_with("benches")
            || dir.ends_with("fuzz_targets")
            || (dir.ends_with("tests")
                && dir != Path::new("tests")
                && !dir.starts_with("tests")
                && {
                    // An integration test file of a crate, or a folder of unit tests beside `foo.rs`.
                    dir.parent().is_some_and(|p| {
                        p.join("Cargo.toml").exists() || root().join(p).join("Cargo.toml").exists()
                    })
                });
        if root_file {
            continue;
        }
        let (module, home) = if stem == "mod" {
            (
                dir.file_name().and_then(|s| s.to_str()).unwrap_or_default(),
                dir.parent().unwrap_or_else(|| Path::new("")),
            )
        } else {
            (stem, dir)
        };
        let parents = ["mod.rs", "lib.rs", "main.rs"].map(|name| home.join(name));
        let sibling = home.with_extension("rs");
        assert!(
            parents.iter().any(|p| declared(p, module)) || declared(&sibling, module),
            "{}: no `mod {module};` names it, so it is never compiled",
            path.display()
        );
    }
}

/// FNV-1a, 64 bits: enough to notice a change, and no dependency.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[test]
fn the_protocol_only_changes_on_purpose() {
    // When this fails: did an older peer's understanding change? Then raise PROTOCOL_VERSION. If only fields or
    // messages were added, it stays. Then write the new hash here.
    const PROTOCOL: (u32, u64) = (1, 0xef58_4f64_0887_7da5);
    let text = fs::read(root().join("proto/agent.proto")).expect("proto/agent.proto exists");
    assert_eq!(
        (airlock_proto::PROTOCOL_VERSION, fnv1a(&text)),
        PROTOCOL,
        "proto/agent.proto changed: (version, hash) is now ({}, {:#018x})",
        airlock_proto::PROTOCOL_VERSION,
        fnv1a(&text)
    );
}

#[test]
fn nothing_large_is_in_the_tree() {
    for path in files() {
        let size = fs::metadata(root().join(&path)).map_or(0, |m| m.len());
        assert!(
            size <= 1 << 20,
            "{} has {size} bytes; the limit is 1 MiB",
            path.display()
        );
    }
}

#[test]
fn the_top_level_is_fixed() {
    let allowed = [
        "Cargo.toml",
        "Cargo.lock",
        "host",
        "guest",
        "proto",
        "images",
        "scripts",
        "tests",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "LICENSE-MIT",
        "LICENSE-APACHE",
        "clippy.toml",
        "rustfmt.toml",
    ];
    for path in files() {
        let first = path
            .components()
            .next()
            .expect("a path has a part")
            .as_os_str()
            .to_string_lossy()
            .into_owned();
        assert!(
            first.starts_with('.') || allowed.contains(&first.as_str()),
            "{first} is new at the top level, which is fixed"
        );
    }
}

#[test]
fn scripts_can_be_run() {
    use std::os::unix::fs::PermissionsExt;
    for path in files() {
        let text = fs::read(root().join(&path)).unwrap_or_default();
        if text.starts_with(b"#!") && path.extension().is_none() {
            let mode = fs::metadata(root().join(&path))
                .expect("a tracked file has metadata")
                .permissions()
                .mode();
            assert!(
                mode & 0o111 != 0,
                "{} starts with #! and is not executable",
                path.display()
            );
        }
    }
}
