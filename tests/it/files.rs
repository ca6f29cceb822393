//! Files and ports of a sandbox, from outside: `airlock cp` and `airlock port-forward`.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use airlock_tests::{DEADLINE, Finished, Product, signal, wait, wait_until};

/// A folder of the test's own, outside the product's; gone with it.
struct Folder(PathBuf);

static SERIAL: AtomicU32 = AtomicU32::new(0);

impl Folder {
    fn new() -> Self {
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("alf-{}-{serial}", std::process::id()));
        fs::create_dir_all(&path).expect("the temp folder is writable");
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn up(product: &Product) {
    product
        .airlock(["up", "box", "--image", "busybox"])
        .expect_code(0);
}

fn down(product: &Product) {
    product.airlock(["rm", "-f", "box"]).expect_code(0);
    product.expect_nothing_left();
}

fn cp(product: &Product, from: impl AsRef<OsStr>, to: impl AsRef<OsStr>) -> Finished {
    product.airlock([OsStr::new("cp"), from.as_ref(), to.as_ref()])
}

fn guest(product: &Product, script: &str) -> String {
    product
        .airlock(["exec", "box", "--", "sh", "-c", script])
        .expect_code(0)
        .out()
}

fn noise(length: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        bytes.extend_from_slice(&(state ^ state >> 29).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Everything that is to survive a copy, by path: mode, time, names, and content or target.
fn describe(top: &Path) -> BTreeMap<OsString, (u32, i128, u64, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut folders = vec![top.to_owned()];
    while let Some(path) = folders.pop() {
        let meta = fs::symlink_metadata(&path).expect("it is there");
        let content = if meta.is_dir() {
            let entries = fs::read_dir(&path).expect("a folder is readable");
            folders.extend(entries.map(|entry| entry.expect("an entry").path()));
            Vec::new()
        } else if meta.is_symlink() {
            fs::read_link(&path)
                .expect("a link")
                .into_os_string()
                .into_vec()
        } else {
            fs::read(&path).expect("a file is readable")
        };
        let time = i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec());
        let names = if meta.is_file() { meta.nlink() } else { 0 };
        let relative = path.strip_prefix(top).expect("it is below");
        found.insert(relative.into(), (meta.mode(), time, names, content));
    }
    found
}

/// A tree with something of every kind.
fn make_tree(top: &Path) {
    fs::create_dir_all(top.join("folder/deeper/deepest")).expect("made");
    fs::create_dir(top.join("empty folder")).expect("made");
    fs::write(top.join("empty"), "").expect("written");
    fs::write(top.join("folder/text"), "text\n").expect("written");
    fs::write(top.join("folder/deeper/large"), noise(3_000_000)).expect("written");
    fs::hard_link(top.join("folder/text"), top.join("second name")).expect("linked");
    symlink("folder/text", top.join("link")).expect("linked");
    symlink("/no/such/target", top.join("folder/dangling")).expect("linked");
    symlink("..", top.join("folder/up")).expect("linked");
    for odd in [
        &b"-rf"[..],
        b"a b",
        b"line\nbreak",
        b"\xff\xfe not UTF-8",
        b"box:colon",
        b"*",
        "\u{fc}n\u{ef}".as_bytes(),
        &[b'n'; 255],
    ] {
        fs::write(top.join(OsStr::from_bytes(odd)), odd).expect("written");
    }
    for (name, mode) in [
        ("empty", 0o600),
        ("folder/text", 0o755),
        ("folder/deeper/large", 0o444),
        ("folder/deeper", 0o750),
        ("empty folder", 0o1777),
    ] {
        fs::set_permissions(top.join(name), Permissions::from_mode(mode)).expect("set");
    }
    let past = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    for name in ["folder/text", "folder", "empty folder"] {
        let file = fs::File::open(top.join(name)).expect("opened");
        file.set_modified(past).expect("set");
    }
}

#[test]
fn a_tree_goes_in_and_comes_back_as_it_was() {
    let (product, folder) = (Product::new(), Folder::new());
    up(&product);
    let tree = folder.path("tree");
    make_tree(&tree);
    guest(&product, "mkdir /srv");
    let run = cp(&product, &tree, "box:/srv/").expect_code(0);
    assert_eq!((run.out(), run.err()), (String::new(), String::new()));
    let seen = guest(
        &product,
        "cd /srv/tree; stat -c '%a %u %Y' folder/text 'empty folder'; readlink link; md5sum < folder/deeper/large; \
         [ folder/text -ef 'second name' ] && echo same",
    );
    let sum = std::process::Command::new("md5sum")
        .stdin(fs::File::open(tree.join("folder/deeper/large")).expect("opened"))
        .output()
        .expect("md5sum runs");
    let sum = String::from_utf8(sum.stdout).expect("text");
    assert_eq!(
        seen,
        format!("755 0 1000000000\n1777 0 1000000000\nfolder/text\n{sum}same\n")
    );
    // To a name that is not there, and on top of what is there.
    for _ in 0..2 {
        let back = folder.path("back");
        if back.exists() {
            cp(&product, "box:/srv/tree/.", &back).expect_failure(&["name"]);
            cp(&product, "box:/srv/tree", &folder.0).expect_code(0);
            continue;
        }
        cp(&product, "box:/srv/tree", &back).expect_code(0);
        let (got, expected) = (describe(&back), describe(&tree));
        assert_eq!(
            got.keys().collect::<Vec<_>>(),
            expected.keys().collect::<Vec<_>>()
        );
        for (path, was) in expected {
            assert!(got[&path] == was, "{} has changed", path.display());
        }
    }
    // A second copy in replaces files and links and keeps the folders.
    cp(&product, &tree, "box:/srv").expect_code(0);
    let again = guest(
        &product,
        "cd /srv/tree; find . | wc -l; [ folder/text -ef 'second name' ] && echo same",
    );
    assert_eq!(
        again,
        format!("{}\nsame\n", describe(&tree).len() + 1),
        "one name has a line break"
    );
    down(&product);
}

#[test]
fn a_file_of_64_mib_is_the_same_after_every_way_of_copying() {
    let (product, folder) = (Product::new(), Folder::new());
    up(&product);
    let content = noise(64 << 20);
    let (file, back) = (folder.path("file"), folder.path("back"));
    fs::write(&file, &content).expect("written");
    cp(&product, &file, "box:/root/file").expect_code(0);
    cp(&product, "box:/root/file", &back).expect_code(0);
    assert!(fs::read(&back).expect("read") == content, "by name");
    let run = cp(&product, "box:/root/file", "-").expect_code(0);
    assert!(run.stdout == content, "to stdout");
    product
        .airlock_with_input(&["cp", "-", "box:/root/piped"], content)
        .expect_code(0);
    let same = guest(
        &product,
        "cmp /root/file /root/piped && stat -c %s /root/piped",
    );
    assert_eq!(same.trim(), (64 << 20).to_string());
    down(&product);
}

#[test]
fn what_cannot_be_copied_is_said_in_a_line() {
    let (product, folder) = (Product::new(), Folder::new());
    up(&product);
    let file = folder.path("file");
    fs::write(&file, noise(4 << 20)).expect("written");
    let there = folder.0.as_os_str();
    cp(&product, "box:/no/such", there).expect_failure(&["/no/such"]);
    cp(&product, folder.path("nothing"), "box:/root").expect_failure(&["nothing"]);
    cp(&product, &file, "box:/no/such/folder/file").expect_failure(&["/no/such/folder/file"]);
    cp(&product, &file, "box:/root/none/").expect_failure(&["/root/none/"]);
    cp(&product, &file, there).expect_failure(&["sandbox"]);
    cp(&product, "box:/a", "box:/b").expect_failure(&["both"]);
    cp(&product, "other:/a", there).expect_failure(&["other"]);
    cp(&product, "box:/etc", "-").expect_failure(&["/etc"]);
    cp(&product, "box:/dev/null", there).expect_failure(&["/dev/null", "regular"]);
    cp(&product, "/dev/null", "box:/root").expect_failure(&["/dev/null", "regular"]);
    // A full disk leaves the old file whole.
    guest(
        &product,
        "mkdir /small; mount -t tmpfs -o size=1m small /small; echo old > /small/file",
    );
    cp(&product, &file, "box:/small/file").expect_failure(&["/small/file", "space"]);
    assert_eq!(
        guest(&product, "cat /small/file; ls -A /small"),
        "old\nfile\n"
    );
    down(&product);
}

#[test]
fn a_guest_cannot_write_outside_of_the_folder_it_is_copied_into() {
    let (product, folder) = (Product::new(), Folder::new());
    up(&product);
    let outside = folder.path("outside");
    fs::create_dir(&outside).expect("made");
    fs::write(outside.join("file"), "mine").expect("written");
    guest(
        &product,
        "mkdir -p /tree/a; echo evil > /tree/a/file; echo evil > /tree/b; chmod 6755 /tree/b",
    );
    let out = folder.path("tree");
    cp(&product, "box:/tree", &out).expect_code(0);
    let mode = fs::metadata(out.join("b")).expect("copied").mode();
    assert_eq!(
        mode & 0o7777,
        0o755,
        "no set-id program comes out of a guest unasked"
    );
    // As a guest would have it that lists first a link and then a folder, or file, of that name.
    for (name, target) in [("a", &outside), ("b", &outside.join("file"))] {
        let _ = fs::remove_dir_all(out.join("a"));
        let _ = fs::remove_file(out.join("b"));
        symlink(target, out.join(name)).expect("linked");
        let run = cp(&product, "box:/tree", &folder.0).expect_code(125);
        assert!(run.err().contains(name), "{}", run.err());
    }
    assert_eq!(fs::read(outside.join("file")).expect("read"), b"mine");
    assert_eq!(fs::read_dir(&outside).expect("read").count(), 1);
    // In the guest a link means what it means there.
    guest(
        &product,
        "ln -s /etc/../tree /link; ln -s /tree/linked /tree/to-linked; echo > /tree/linked",
    );
    let file = folder.path("new");
    fs::write(&file, "new").expect("written");
    cp(&product, &file, "box:/link/new").expect_code(0);
    cp(&product, &file, "box:/tree/to-linked").expect_code(0);
    assert_eq!(guest(&product, "cat /tree/new /tree/linked"), "newnew");
    down(&product);
}

/// A `port-forward` that has said where it listens.
struct Forwarding {
    child: std::process::Child,
    addresses: Vec<SocketAddr>,
}

impl Forwarding {
    fn start(product: &Product, ports: &[&str]) -> Self {
        let mut args = vec!["port-forward", "box"];
        args.extend_from_slice(ports);
        let mut child = product.command(args).spawn().expect("airlock starts");
        let stdout = child.stdout.take().expect("stdout is piped");
        let lines = BufReader::new(stdout).lines().take(ports.len());
        let addresses = lines.map(|line| {
            let line = line.expect("a line");
            let (address, _) = line.split_once(" -> ").expect("an address and a target");
            address.parse().expect("an address")
        });
        let addresses = addresses.collect();
        Self { child, addresses }
    }
}

/// Sends `data` and its end, and reads to the other side's.
fn exchange(address: SocketAddr, data: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    let mut writer = stream.try_clone()?;
    let sent = data.to_vec();
    let writing = thread::spawn(move || {
        writer.write_all(&sent)?;
        writer.shutdown(Shutdown::Write)
    });
    let mut got = Vec::new();
    let read = stream.read_to_end(&mut got);
    writing.join().expect("the writer does not panic")?;
    read?;
    Ok(got)
}

#[test]
fn a_forwarded_port_is_the_guests_with_its_ends() {
    let product = Product::new();
    up(&product);
    let server = "exec nc -ll -p 7777 -e sh -c 'cat; echo and the end'";
    let server = product
        .command(["exec", "box", "--", "sh", "-c", server])
        .spawn()
        .expect("airlock starts");
    let web = "mkdir /www; echo hello > /www/index.html; exec httpd -f -p 8080 -h /www";
    let web = product
        .command(["exec", "box", "--", "sh", "-c", web])
        .spawn()
        .expect("airlock starts");
    let forwarding = Forwarding::start(&product, &["0:7777", "0:8080", "0:9999"]);
    let [echo, http, nobody] = forwarding.addresses[..] else {
        panic!("{:?}", forwarding.addresses)
    };
    assert!(echo.ip().is_loopback());
    wait_until("the guest's servers answer", DEADLINE, || {
        let ask = |address, data: &[u8]| exchange(address, data).is_ok_and(|got| !got.is_empty());
        ask(echo, b"x") && ask(http, b"GET / HTTP/1.0\r\n\r\n")
    })
    .expect("they do");
    // Everything comes back behind the half-close, and what is said after it too.
    let data = noise(2 << 20);
    let got = exchange(echo, &data).expect("it is answered");
    let expected = [&data[..], b"and the end\n"].concat();
    assert!(got == expected, "{} of {} bytes", got.len(), expected.len());
    let several: Vec<_> = (0..8)
        .map(|_| thread::spawn(move || exchange(http, b"GET / HTTP/1.0\r\n\r\n")))
        .collect();
    for one in several {
        let got = one.join().expect("no panic").expect("it is answered");
        assert!(
            got.ends_with(b"hello\n"),
            "{}",
            String::from_utf8_lossy(&got)
        );
    }
    // Where nobody listens the connection ends, and the others go on.
    assert!(exchange(nobody, b"").is_ok_and(|got| got.is_empty()));
    assert_eq!(
        exchange(echo, b"still ").expect("answered"),
        b"still and the end\n"
    );

    signal(forwarding.child.id(), "TERM");
    let ended = wait(forwarding.child).expect_code(143);
    assert!(ended.err().contains("refused"), "{}", ended.err());

    let forwarding = Forwarding::start(&product, &["0:7777"]);
    down(&product);
    wait(forwarding.child).expect_failure(&["VM"]);
    drop((wait(server), wait(web)));
}
