//! File requests: what is read, written, listed and removed, and what is not, whatever links stand in the way.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use airlock_proto::MAX_DATA_BYTES;
use airlock_proto::v1::file_reply::Reply;
use airlock_proto::v1::file_request::Op;
use airlock_proto::v1::to_agent::Body;
use airlock_proto::v1::{
    Error, ErrorCode, FileAttributes, FileChmod, FileChown, FileData, FileInfo, FileLink, FileList,
    FileMkdir, FileRead, FileRemove, FileRename, FileRequest, FileSet, FileStat, FileSymlink,
    FileWrite, from_agent,
};

use crate::client::{Agent, Client, exec, is_root, wait_until};

/// An agent, and a folder that requests take as their root, with `outside` beside it.
struct Place {
    agent: Agent,
    root: PathBuf,
    outside: PathBuf,
}

impl Place {
    fn new() -> Self {
        let agent = Agent::start();
        let root = agent.folder().join("root");
        let outside = agent.folder().join("outside");
        fs::create_dir(&root).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("secret"), "secret").unwrap();
        Self {
            agent,
            root,
            outside,
        }
    }

    fn client(&self) -> Files {
        Files {
            client: self.agent.client(),
            root: bytes(&self.root),
        }
    }
}

fn bytes(path: &Path) -> bytes::Bytes {
    path.to_str().unwrap().to_owned().into()
}

struct Files {
    client: Client,
    root: bytes::Bytes,
}

impl Files {
    fn send(&mut self, op: Op) {
        self.client.send(Body::File(FileRequest {
            root: self.root.clone(),
            op: Some(op),
        }));
    }

    /// All frames of an answer.
    fn answer(&mut self) -> Result<Vec<Reply>, Error> {
        let mut replies = Vec::new();
        loop {
            match self.client.receive() {
                from_agent::Body::File(reply) => {
                    replies.push(reply.reply.unwrap());
                    if reply.last {
                        return Ok(replies);
                    }
                }
                from_agent::Body::Error(error) => return Err(error),
                other => panic!("not an answer about files: {other:?}"),
            }
        }
    }

    fn ask(&mut self, op: Op) -> Result<Vec<Reply>, Error> {
        self.send(op);
        self.answer()
    }

    fn read(&mut self, path: &str, offset: u64, length: u64) -> Result<Vec<u8>, Error> {
        let path = path.to_owned().into();
        let mut content = Vec::new();
        for reply in self.ask(Op::Read(FileRead {
            path,
            offset,
            length,
        }))? {
            let Reply::Data(data) = reply else { panic!() };
            assert_eq!(data.offset, offset + content.len() as u64);
            content.extend_from_slice(&data.data);
        }
        Ok(content)
    }

    fn write(&mut self, request: FileWrite, content: &[u8]) -> Result<(), Error> {
        let mut offset = request.offset;
        self.send(Op::Write(request));
        for chunk in content.chunks(MAX_DATA_BYTES) {
            self.data(offset, chunk, false);
            offset += chunk.len() as u64;
        }
        self.data(offset, b"", true);
        self.answer().map(|replies| assert_eq!(replies.len(), 1))
    }

    fn data(&mut self, offset: u64, data: &[u8], eof: bool) {
        self.send(Op::Data(FileData {
            offset,
            eof,
            data: data.to_vec().into(),
        }));
    }

    fn stat(&mut self, path: &str, follow: bool) -> Result<FileInfo, Error> {
        let path = path.to_owned().into();
        match &self.ask(Op::Stat(FileStat { path, follow }))?[..] {
            [Reply::Info(info)] => Ok(info.clone()),
            other => panic!("{other:?}"),
        }
    }

    fn list(&mut self, path: &str) -> Result<Vec<FileInfo>, Error> {
        let path = path.to_owned().into();
        let mut replies = self.ask(Op::List(FileList { path }))?;
        assert!(matches!(replies.pop(), Some(Reply::Done(_))));
        let infos = replies.into_iter().map(|reply| match reply {
            Reply::Info(info) => info,
            other => panic!("{other:?}"),
        });
        Ok(infos.collect())
    }

    fn remove(&mut self, path: &str, recursive: bool) -> Result<(), Error> {
        let path = path.to_owned().into();
        self.ask(Op::Remove(FileRemove { path, recursive }))
            .map(drop)
    }

    fn mkdir(&mut self, path: &str, parents: bool) -> Result<(), Error> {
        let path = path.to_owned().into();
        self.ask(Op::Mkdir(FileMkdir {
            path,
            mode: 0,
            parents,
        }))
        .map(drop)
    }
}

fn in_place(path: &str) -> FileWrite {
    FileWrite {
        path: path.to_owned().into(),
        create: true,
        ..FileWrite::default()
    }
}

fn atomic(path: &str) -> FileWrite {
    FileWrite {
        path: path.to_owned().into(),
        atomic: true,
        ..FileWrite::default()
    }
}

fn noise(length: usize) -> Vec<u8> {
    let noise = |i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8;
    (0..length as u32).map(noise).collect()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn code<T: std::fmt::Debug>(result: Result<T, Error>) -> ErrorCode {
    result.unwrap_err().code()
}

#[test]
fn a_file_is_read_whole_and_in_ranges() {
    let place = Place::new();
    let mut files = place.client();
    let content = noise(1_000_000);
    fs::write(place.root.join("f"), &content).unwrap();
    fs::write(place.root.join("empty"), "").unwrap();
    assert!(files.read("f", 0, 0).unwrap() == content);
    assert!(files.read("/f", 999_990, 0).unwrap() == content[999_990..]);
    assert!(files.read("f", 10, 300_000).unwrap() == content[10..300_010]);
    assert!(files.read("f", 2_000_000, 5).unwrap().is_empty());
    assert!(files.read("empty", 0, 0).unwrap().is_empty());
    assert_eq!(code(files.read("none", 0, 0)), ErrorCode::ErrorNotFound);
    assert_eq!(files.read(".", 0, 0).unwrap_err().errno, libc::EISDIR);
}

#[test]
fn a_file_is_written_in_place_where_it_was_said() {
    let place = Place::new();
    let mut files = place.client();
    let content = noise(9_000_000);
    files.write(in_place("f"), &content).unwrap();
    assert!(fs::read(place.root.join("f")).unwrap() == content);
    let mode = fs::metadata(place.root.join("f")).unwrap().mode();
    assert_eq!(mode & 0o7777, 0o644);
    let mut middle = in_place("f");
    middle.offset = 5;
    files.write(middle, b"XYZ").unwrap();
    assert_eq!(files.read("f", 4, 5).unwrap()[1..4], *b"XYZ");
    let mut short = in_place("f");
    short.truncate = true;
    files.write(short, b"short").unwrap();
    assert_eq!(fs::read(place.root.join("f")).unwrap(), b"short");
    let mut absent = in_place("absent");
    absent.create = false;
    assert_eq!(code(files.write(absent, b"x")), ErrorCode::ErrorNotFound);
    // The data that was under way has been passed over, and the connection goes on.
    assert_eq!(files.read("f", 0, 0).unwrap(), b"short");
}

#[test]
fn an_atomic_write_replaces_a_file_and_keeps_its_mode() {
    let place = Place::new();
    let mut files = place.client();
    let path = place.root.join("f");
    fs::write(&path, "old").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let content = noise(5_000_000);
    files.write(atomic("f"), &content).unwrap();
    assert!(fs::read(&path).unwrap() == content);
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o640);
    let mut request = atomic("new");
    request.attributes = Some(FileAttributes {
        mode: Some(0o4711),
        mtime_unix_ns: Some(1_234_567_890_123_456_789),
        ..FileAttributes::default()
    });
    files.write(request, b"").unwrap();
    let new = fs::metadata(place.root.join("new")).unwrap();
    assert_eq!((new.mode() & 0o7777, new.len()), (0o4711, 0));
    assert_eq!(
        (new.mtime(), new.mtime_nsec()),
        (1_234_567_890, 123_456_789)
    );
    assert_eq!(names(&place.root), ["f", "new"]);
}

#[test]
fn an_atomic_write_that_is_not_finished_leaves_the_old_file_and_nothing_else() {
    let place = Place::new();
    fs::write(place.root.join("f"), "old").unwrap();
    let mut files = place.client();
    files.send(Op::Write(atomic("f")));
    files.data(0, &noise(100_000), false);
    wait_until("the temporary file is there", || {
        names(&place.root).len() == 2
    });
    assert_eq!(fs::read(place.root.join("f")).unwrap(), b"old");
    drop(files);
    wait_until("the temporary file is gone", || names(&place.root) == ["f"]);
    assert_eq!(fs::read(place.root.join("f")).unwrap(), b"old");
}

#[test]
fn a_full_disk_is_an_error_of_its_own_and_leaves_the_old_file_whole() {
    let place = Place::new();
    let Some(_mounted) = Mounted::small(&place.root) else {
        let why = "only root can mount a small filesystem (tests/it has it in a VM)";
        let _ = std::io::Write::write_all(
            &mut std::io::stderr(),
            format!("skipped: {why}\n").as_bytes(),
        );
        return;
    };
    let mut files = place.client();
    files.write(atomic("f"), b"old").unwrap();
    let result = files.write(atomic("f"), &noise(2 << 20));
    assert_eq!(
        result.as_ref().unwrap_err().errno,
        libc::ENOSPC,
        "{result:?}"
    );
    assert_eq!(code(result), ErrorCode::ErrorNoSpace);
    assert_eq!(files.read("f", 0, 0).unwrap(), b"old");
    assert_eq!(names(&place.root), ["f"]);
}

/// A filesystem of 1 MiB, as long as this lives.
struct Mounted(PathBuf);

impl Mounted {
    fn small(folder: &Path) -> Option<Self> {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]);
        let mounted = is_root() && mount.arg(folder).status().is_ok_and(|s| s.success());
        mounted.then(|| Self(folder.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: the agent may have a file in it open.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn no_link_and_no_dots_lead_out_of_the_root() {
    let place = Place::new();
    let mut files = place.client();
    let outside = place.outside.to_str().unwrap();
    symlink(outside, place.root.join("absolute")).unwrap();
    symlink("../outside", place.root.join("relative")).unwrap();
    symlink("../outside/secret", place.root.join("file")).unwrap();
    symlink("/proc/self/root", place.root.join("magic")).unwrap();
    let secret = place.outside.join("secret");
    for path in [
        "../outside/secret",
        "/../../outside/secret",
        "absolute/secret",
        "relative/secret",
        "file",
        &format!("magic{}", secret.display()),
        secret.to_str().unwrap(),
    ] {
        assert!(files.read(path, 0, 0).is_err(), "{path}");
        assert!(files.stat(path, true).is_err(), "{path}");
        let mut request = in_place(path);
        request.create = false;
        assert!(files.write(request, b"overwritten").is_err(), "{path}");
        let chmod = Op::Chmod(FileChmod {
            path: path.to_owned().into(),
            mode: 0o777,
        });
        assert!(files.ask(chmod).is_err(), "{path}");
    }
    for path in ["absolute/new", "relative/new", "../outside/new"] {
        assert!(files.write(in_place(path), b"x").is_err(), "{path}");
        assert!(files.write(atomic(path), b"x").is_err(), "{path}");
        assert!(files.mkdir(path, false).is_err(), "{path}");
    }
    assert!(
        files
            .ask(Op::Rename(FileRename {
                from: "relative/secret".into(),
                to: "stolen".into()
            }))
            .is_err()
    );
    assert!(
        files
            .ask(Op::Link(FileLink {
                existing: "absolute/secret".into(),
                path: "stolen".into()
            }))
            .is_err()
    );
    assert!(files.remove("relative/secret", false).is_err());
    assert_eq!(fs::read(&secret).unwrap(), b"secret");
    assert_eq!(names(&place.outside), ["secret"]);
    // A link's place is within the root: what it leads to there is used.
    fs::create_dir_all(place.root.join("outside")).unwrap();
    fs::write(place.root.join("outside/secret"), "own").unwrap();
    assert_eq!(files.read("relative/secret", 0, 0).unwrap(), b"own");
    assert_eq!(
        files.read("../../outside/secret", 0, 0).unwrap(),
        b"own",
        "the root is its own parent"
    );
}

#[test]
fn removing_a_tree_does_not_follow_its_links() {
    let place = Place::new();
    let mut files = place.client();
    let tree = place.root.join("tree");
    fs::create_dir_all(tree.join("a/b")).unwrap();
    symlink(&place.outside, tree.join("a/b/link")).unwrap();
    symlink(&place.outside, place.root.join("top")).unwrap();
    assert_eq!(
        files.remove("tree", false).unwrap_err().errno,
        libc::ENOTEMPTY
    );
    files.remove("tree", true).unwrap();
    files.remove("top", true).unwrap();
    assert!(names(&place.root).is_empty());
    assert_eq!(names(&place.outside), ["secret"]);
    assert_eq!(code(files.remove("tree", true)), ErrorCode::ErrorNotFound);
    assert!(files.remove("/", true).is_err(), "the root itself stays");
}

#[test]
fn a_tree_deeper_than_any_path_is_removed() {
    let place = Place::new();
    // 600 folders with names of 20 bytes: 12,000 bytes of path, which no path of 4,096 reaches.
    let script = "i=0; while [ $i -lt 600 ]; do mkdir dddddddddddddddddddd && cd -P dddddddddddddddddddd || exit 1; \
         echo x > file; i=$((i+1)); done";
    let tree = place.root.join("tree");
    fs::create_dir(&tree).unwrap();
    let made = Command::new("sh")
        .args(["-c", script])
        .current_dir(&tree)
        .status()
        .unwrap();
    assert!(made.success());
    place.client().remove("tree", true).unwrap();
    assert!(names(&place.root).is_empty());
    wait_until("its folders are closed", || {
        place.agent.open_descriptors() < 12
    });
}

#[test]
fn a_large_folder_is_listed_entry_by_entry() {
    let place = Place::new();
    let mut files = place.client();
    for n in 0..3000 {
        fs::write(place.root.join(format!("{n:0200}")), "x").unwrap();
    }
    symlink("somewhere/else", place.root.join("link")).unwrap();
    fs::create_dir(place.root.join("folder")).unwrap();
    let infos = files.list("/").unwrap();
    assert_eq!(infos.len(), 3002);
    let link = infos.iter().find(|info| info.path == "link").unwrap();
    assert_eq!(link.link_target, "somewhere/else");
    assert_eq!(link.mode & libc::S_IFMT, libc::S_IFLNK);
    let folder = infos.iter().find(|info| info.path == "folder").unwrap();
    assert_eq!(folder.mode & libc::S_IFMT, libc::S_IFDIR);
    let mut got: Vec<String> = infos
        .iter()
        .map(|info| String::from_utf8(info.path.to_vec()).unwrap())
        .collect();
    got.sort();
    assert_eq!(got, names(&place.root));
    assert!(files.list("folder").unwrap().is_empty());
    assert_eq!(files.list("link").unwrap_err().errno, libc::ENOENT);
    files.remove("folder", false).unwrap();
}

#[test]
fn names_are_made_changed_and_described() {
    let place = Place::new();
    let mut files = place.client();
    files.mkdir("a/b/../c/d", true).unwrap();
    files.mkdir("a/b/../c/d", true).unwrap();
    assert_eq!(code(files.mkdir("a", false)), ErrorCode::ErrorExists);
    assert_eq!(names(&place.root.join("a")), ["b", "c"]);
    let folder = files.stat("a/c/d", false).unwrap();
    assert_eq!(folder.mode, libc::S_IFDIR | 0o755);

    files.write(in_place("a/f"), b"12345").unwrap();
    files
        .ask(Op::Rename(FileRename {
            from: "a/f".into(),
            to: "g".into(),
        }))
        .unwrap();
    files
        .ask(Op::Link(FileLink {
            existing: "g".into(),
            path: "h".into(),
        }))
        .unwrap();
    files
        .ask(Op::Symlink(FileSymlink {
            target: "/g".into(),
            path: "s".into(),
        }))
        .unwrap();
    files
        .ask(Op::Chmod(FileChmod {
            path: "s".into(),
            mode: 0o600,
        }))
        .unwrap();
    let own = fs::metadata(place.root.join("g")).unwrap();
    let chown = FileChown {
        path: "s".into(),
        uid: own.uid(),
        gid: u32::MAX,
    };
    files.ask(Op::Chown(chown)).unwrap();
    let set = |mtime, link| {
        Op::Set(FileSet {
            path: "s".into(),
            attributes: Some(FileAttributes {
                mtime_unix_ns: Some(mtime),
                ..FileAttributes::default()
            }),
            link,
        })
    };
    files.ask(set(-1_500_000_000, false)).unwrap();
    files.ask(set(7_000_000_000, true)).unwrap();

    let file = files.stat("s", true).unwrap();
    assert_eq!((file.mode, file.size), (libc::S_IFREG | 0o600, 5));
    assert_eq!((file.links, file.mtime_unix_ns), (2, -1_500_000_000));
    assert_eq!(
        (file.uid, file.gid, file.inode),
        (own.uid(), own.gid(), own.ino())
    );
    let link = files.stat("s", false).unwrap();
    assert_eq!(
        (&link.link_target[..], link.mtime_unix_ns),
        (&b"/g"[..], 7_000_000_000)
    );
}

#[test]
fn only_regular_files_are_read_and_written() {
    let place = Place::new();
    let mut files = place.client();
    let fifo = place.root.join("fifo");
    assert!(
        Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(code(files.read("fifo", 0, 0)), ErrorCode::ErrorInvalid);
    assert_eq!(
        code(files.write(in_place("fifo"), b"x")),
        ErrorCode::ErrorInvalid
    );
    assert_eq!(
        code(files.write(atomic("fifo"), b"x")),
        ErrorCode::ErrorInvalid
    );
    files.root = "/".into();
    assert_eq!(code(files.read("dev/zero", 0, 0)), ErrorCode::ErrorInvalid);
    assert!(
        !files.read("proc/self/status", 0, 0).unwrap().is_empty(),
        "a file whose size says nothing is read to its end"
    );
    files.root = "relative".into();
    assert_eq!(code(files.stat("x", true)), ErrorCode::ErrorInvalid);
    files.root = "/".into();
    assert!(code(files.read("a\0b", 0, 0)) == ErrorCode::ErrorInvalid);
}

#[test]
fn law_5_a_file_that_nobody_takes_costs_a_window() {
    let place = Place::new();
    let file = fs::File::create(place.root.join("large")).unwrap();
    file.set_len(1 << 30).unwrap();
    let before = place.agent.resident_bytes();
    let mut waiting: Vec<Files> = (0..8).map(|_| place.client()).collect();
    for files in &mut waiting {
        files.send(Op::Read(FileRead {
            path: "large".into(),
            ..FileRead::default()
        }));
    }
    let mut client = place.agent.client();
    for _ in 0..200 {
        assert_eq!(client.run(exec(&["true"])).code(), 0);
    }
    let grown = place.agent.resident_bytes().saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes for 8 unread files");
}

#[test]
fn law_6_execs_go_on_beside_large_files() {
    let place = Place::new();
    let file = fs::File::create(place.root.join("large")).unwrap();
    file.set_len(256 << 20).unwrap();
    let mut reading = place.client();
    let mut writing = place.client();
    let root = place.root.clone();
    let reader = std::thread::spawn(move || reading.read("large", 0, 0).unwrap().len());
    let writer = std::thread::spawn(move || writing.write(in_place("other"), &noise(32 << 20)));
    let mut client = place.agent.client();
    let mut during = 0;
    while !reader.is_finished() || !writer.is_finished() {
        let start = std::time::Instant::now();
        assert_eq!(client.run(exec(&["true"])).code(), 0);
        let took = start.elapsed();
        assert!(took.as_secs() < 2, "an exec took {took:?} beside files");
        during += 1;
    }
    assert!(during > 3, "{during} execs while the files went");
    assert_eq!(reader.join().unwrap(), 256 << 20);
    writer.join().unwrap().unwrap();
    assert!(fs::read(root.join("other")).unwrap() == noise(32 << 20));
}

#[test]
fn law_6_a_slow_disk_holds_up_only_who_waits_for_it() {
    let place = Place::new();
    let mut slow = place.client();
    // Many files that each wait for the disk, and a large one that does so time and again.
    let mut many: Vec<Files> = (0..16).map(|_| place.client()).collect();
    for (n, files) in many.iter_mut().enumerate() {
        files.send(Op::Write(atomic(&format!("f{n}"))));
        files.data(0, &noise(100_000), true);
    }
    let writer = std::thread::spawn(move || slow.write(atomic("large"), &noise(40 << 20)));
    assert_eq!(place.agent.client().run(exec(&["true"])).code(), 0);
    for files in &mut many {
        files.answer().unwrap();
    }
    writer.join().unwrap().unwrap();
    assert!(fs::read(place.root.join("large")).unwrap() == noise(40 << 20));
    assert_eq!(names(&place.root).len(), 17);
    wait_until("nothing of it is left open", || {
        place.agent.open_descriptors() < 30
    });
}

#[test]
fn data_that_does_not_fit_ends_the_write_and_not_the_connection() {
    let place = Place::new();
    let mut files = place.client();
    files.send(Op::Write(in_place("f")));
    files.data(7, b"gap", false);
    files.data(10, b"more", true);
    assert_eq!(code(files.answer()), ErrorCode::ErrorInvalid);
    files.send(Op::Write(in_place("f")));
    files.data(0, &noise(MAX_DATA_BYTES + 1), true);
    assert_eq!(code(files.answer()), ErrorCode::ErrorInvalid);
    assert_eq!(files.client.run(exec(&["true"])).code(), 0);
    files.send(Op::Write(in_place("f")));
    files.send(Op::Stat(FileStat::default()));
    assert_eq!(
        code(files.answer()),
        ErrorCode::ErrorProtocol,
        "one request at a time"
    );
}
