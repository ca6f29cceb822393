use super::*;
use std::io::{BufRead, BufReader};
use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use vmm_sys_util::tempdir::TempDir;

#[derive(Debug, Default)]
struct TestMachine(AtomicBool);

impl Machine for TestMachine {
    fn is_paused(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
    fn pause(&self) -> Result<(), String> {
        self.0.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn resume(&self) -> Result<(), String> {
        Err("will not".to_owned())
    }
    fn metrics(&self) -> Value {
        json!({"exits": 3})
    }
    fn stop(self: Box<Self>) {}
}

struct Rig {
    path: PathBuf,
    exit: Arc<ExitSlot>,
    server: Option<JoinHandle<Exit>>,
    owner: Mutex<Option<OwnedFd>>,
    _folder: TempDir,
}

fn rig() -> Rig {
    let folder = TempDir::new().unwrap();
    let path = folder.as_path().join("vmm.sock");
    let exit = Arc::new(ExitSlot::new().unwrap());
    let (reader, writer) = io::pipe().unwrap();
    let mut control = Control::listen(&path).unwrap();
    let slot = exit.clone();
    let server = thread::spawn(move || {
        let lifeline = Lifeline::inherit(reader.into_raw_fd()).unwrap();
        control.serve(&TestMachine::default(), &slot, Some(&lifeline))
    });
    Rig {
        path,
        exit,
        server: Some(server),
        owner: Mutex::new(Some(writer.into())),
        _folder: folder,
    }
}

impl Rig {
    fn connect(&self) -> BufReader<UnixStream> {
        BufReader::new(UnixStream::connect(&self.path).unwrap())
    }

    fn ending(&mut self) -> Exit {
        self.server.take().unwrap().join().unwrap()
    }
}

fn ask(client: &mut BufReader<UnixStream>, line: &str) -> Value {
    client.get_mut().write_all(line.as_bytes()).unwrap();
    let mut answer = String::new();
    client.read_line(&mut answer).unwrap();
    serde_json::from_str(&answer).unwrap()
}

#[test]
fn commands_are_answered_to_several_clients_at_once() {
    let mut rig = rig();
    let (mut one, mut two) = (rig.connect(), rig.connect());
    assert_eq!(ask(&mut one, "{\"cmd\":\"status\"}\n")["state"], "running");
    assert_eq!(ask(&mut two, "{\"cmd\":\"pause\"}\n"), json!({"ok": true}));
    assert_eq!(ask(&mut one, "{\"cmd\":\"status\"}\n")["state"], "paused");
    assert_eq!(
        ask(&mut one, "{\"cmd\":\"resume\"}\n"),
        json!({"ok": false, "error": "will not"})
    );
    assert_eq!(
        ask(&mut two, "{\"cmd\":\"metrics\"}\n")["metrics"]["exits"],
        3
    );
    assert_eq!(ask(&mut two, "{\"cmd\":\"stop\"}\n"), json!({"ok": true}));
    assert_eq!(rig.ending().reason, ExitReason::Stopped);
    assert!(!rig.path.exists(), "the socket is removed");
}

#[test]
fn nonsense_is_answered_and_endless_lines_are_cut() {
    let mut rig = rig();
    let mut client = rig.connect();
    for (line, expected) in [
        ("hello\n", "not a JSON object"),
        ("{}\n", "missing"),
        ("{\"cmd\":\"fly\"}\n", "\"fly\""),
    ] {
        let answer = ask(&mut client, line);
        assert_eq!(answer["ok"], false);
        assert!(
            answer["error"].as_str().unwrap().contains(expected),
            "{answer}"
        );
    }
    let mut endless = rig.connect();
    let _ = endless.get_mut().write_all(&[b'x'; 10 * MAX_LINE_BYTES]);
    let mut rest = Vec::new();
    let _ = endless.read_to_end(&mut rest);
    assert!(rest.is_empty());
    assert_eq!(ask(&mut client, "{\"cmd\":\"status\"}\n")["ok"], true);
    rig.exit.report(ExitReason::Error, "test");
    assert_eq!(rig.ending().detail, "test");
}

#[test]
fn too_many_clients_are_turned_away() {
    let mut rig = rig();
    let mut clients: Vec<_> = (0..MAX_CLIENTS).map(|_| rig.connect()).collect();
    for client in &mut clients {
        assert_eq!(ask(client, "{\"cmd\":\"status\"}\n")["ok"], true);
    }
    let mut rest = Vec::new();
    let _ = rig.connect().read_to_end(&mut rest);
    assert!(rest.is_empty());
    assert_eq!(ask(&mut clients[0], "{\"cmd\":\"stop\"}\n")["ok"], true);
    rig.ending();
}

#[test]
fn the_vm_ends_when_its_owner_does() {
    let mut rig = rig();
    *rig.owner.lock().unwrap() = None;
    assert_eq!(rig.ending().reason, ExitReason::Lifeline);
}

#[test]
fn a_stale_socket_is_replaced_and_a_living_one_is_not() {
    let mut rig = rig();
    let error = Control::listen(&rig.path).unwrap_err().to_string();
    assert!(error.contains("another VM already runs"), "{error}");
    rig.exit.report(ExitReason::Stopped, "");
    rig.ending();
    drop(UnixListener::bind(&rig.path).unwrap()); // leaves its file behind, as a killed process does
    assert!(rig.path.exists());
    Control::listen(&rig.path).unwrap();
}
