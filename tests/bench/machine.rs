//! The machines that take turns: airlock-vmm, QEMU with vhost-vsock, and the agent as an ordinary process.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use airlock_client::{Address, Session, Transport};
use airlock_proto::{DOORBELL_PORT, GUEST_CID};
use tokio::net::UnixListener;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};

use crate::Options;

/// No machine takes longer to answer, even under emulation on a loaded host.
const READY_DEADLINE: Duration = Duration::from_secs(120);

/// A running machine whose agent has answered.
#[derive(Debug)]
pub(crate) struct Machine {
    child: Child,
    folder: PathBuf,
    pub(crate) session: Session,
    pub(crate) address: Address,
    /// From the start of the process to the agent's Hello.
    pub(crate) ready: Duration,
}

impl Machine {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn folder(name: &str) -> Result<PathBuf, String> {
    let path = std::env::temp_dir().join(format!("alb-{}-{name}", std::process::id()));
    let _ = fs::remove_dir_all(&path);
    fs::create_dir(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(path)
}

/// What both machines boot with; the root image is the first disk of each.
fn cmdline() -> String {
    "console=ttyS0 quiet reboot=k panic=-1 noreplace-smp i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd \
     cryptomgr.notests random.trust_cpu=on airlock.root=/dev/vda airlock.rootfstype=erofs airlock.scratch=tmpfs"
        .to_owned()
}

/// airlock-vmm on the engine to be measured.
pub(crate) async fn ours(options: &Options) -> Result<Machine, String> {
    let folder = folder("ours")?;
    let socket = folder.join("vsock.sock");
    let engine = if options.engine == "kvm" {
        serde_json::json!({"kvm": {}})
    } else {
        serde_json::json!({"qemu": {"binary": options.qemu}})
    };
    let config = serde_json::json!({
        "engine": engine,
        "kernel": options.kernel,
        "initramfs": options.initramfs,
        "cmdline": cmdline(),
        "cpus": 1,
        "memory_mib": options.memory_mib,
        "discovery": "cmdline",
        "disks": [{"path": options.rootfs, "read_only": true}],
        "vsock_socket": socket,
        "guest_cid": GUEST_CID,
        "console_log": folder.join("console.log"),
        "console_log_limit_bytes": 1 << 20,
        "control_socket": folder.join("vmm.sock"),
        "run_dir": folder,
        "ephemeral": false,
    });
    let config_path = folder.join("vmm.json");
    fs::write(&config_path, config.to_string()).map_err(|e| e.to_string())?;
    let doorbell = UnixListener::bind(format!("{}_{DOORBELL_PORT}", socket.display()))
        .map_err(|e| e.to_string())?;
    let mut command = Command::new(&options.vmm);
    command.arg("run").arg("--config").arg(&config_path);
    let start = Instant::now();
    let child = spawn(command, &folder)?;
    let transport = async {
        doorbell
            .accept()
            .await
            .map(|(stream, _)| Transport::from(stream))
    };
    ready(child, folder, Address::hybrid(socket), start, transport).await
}

/// QEMU's microvm with the host kernel's vhost-vsock, set up as its documentation advises for a fast start.
pub(crate) async fn qemu_vhost(options: &Options) -> Result<Machine, String> {
    let folder = folder("qemu")?;
    let doorbell = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, DOORBELL_PORT))
        .map_err(|e| format!("vsock: {e}"))?;
    let mut command = qemu_command(options, &cmdline());
    command.args([
        "-device",
        &format!("vhost-vsock-device,guest-cid={GUEST_CID}"),
    ]);
    let start = Instant::now();
    let child = spawn(command, &folder)?;
    let transport = async {
        doorbell.accept().await.map(|(stream, _)| {
            let (reader, writer) = stream.into_split();
            Transport::new(reader, writer)
        })
    };
    ready(child, folder, Address::vsock(GUEST_CID), start, transport).await
}

fn qemu_command(options: &Options, cmdline: &str) -> Command {
    let accel = if options.engine == "kvm" {
        "kvm"
    } else {
        "tcg"
    };
    let cpu = if options.engine == "kvm" {
        "host"
    } else {
        "max"
    };
    // KVM brings a clock of its own; without it the kernel calibrates against these, or waits for ever.
    let clocks = if options.engine == "kvm" { "off" } else { "on" };
    let mut command = Command::new(&options.qemu);
    command
        .arg("-M")
        .arg(format!("microvm,x-option-roms=off,pit={clocks},pic={clocks},rtc={clocks},isa-serial=on,acpi=off,auto-kernel-cmdline=on"))
        .args(["-accel", accel, "-cpu", cpu, "-smp", "1", "-m", &format!("{}M", options.memory_mib)])
        .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-serial", "null"])
        .arg("-kernel")
        .arg(&options.kernel)
        .arg("-initrd")
        .arg(&options.initramfs)
        .args(["-append", cmdline])
        .arg("-drive")
        .arg(format!("id=root,file={},format=raw,if=none,readonly=on", options.rootfs.display()))
        .args(["-device", "virtio-blk-device,drive=root"])
        .args(["-device", "virtio-rng-device"]);
    command
}

/// Process start to process end of QEMU alone with the same kernel, which resets because it finds no init. By a triple
/// fault: a microvm has no keyboard controller to do it.
pub(crate) fn qemu_alone(options: &Options) -> Result<Duration, String> {
    let folder = folder("alone")?;
    let command = qemu_command(
        options,
        "quiet reboot=t panic=-1 rdinit=/none init=/none root=/dev/none",
    );
    let start = Instant::now();
    let mut child = spawn(command, &folder)?;
    child.wait().map_err(|e| e.to_string())?;
    let took = start.elapsed();
    let _ = fs::remove_dir_all(folder);
    Ok(took)
}

/// The agent as an ordinary process of this host.
pub(crate) async fn process(options: &Options) -> Result<Machine, String> {
    let folder = folder("process")?;
    let socket = folder.join("agent.sock");
    let mut command = Command::new(&options.agent);
    command.arg("serve").arg("--unix").arg(&socket);
    let start = Instant::now();
    let child = spawn(command, &folder)?;
    let address = Address::Unix(socket);
    let transport = async {
        loop {
            match Transport::connect(&address).await {
                Ok(transport) => return Ok(transport),
                Err(_) if start.elapsed() < READY_DEADLINE => {
                    tokio::time::sleep(Duration::from_millis(1)).await
                }
                Err(error) => return Err(std::io::Error::other(error)),
            }
        }
    };
    ready(child, folder, address.clone(), start, transport).await
}

fn spawn(mut command: Command, folder: &Path) -> Result<Child, String> {
    let log = fs::File::create(folder.join("stderr")).map_err(|e| e.to_string())?;
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .map_err(|e| format!("{:?}: {e}", command.get_program()))
}

async fn ready(
    child: Child,
    folder: PathBuf,
    address: Address,
    start: Instant,
    transport: impl Future<Output = std::io::Result<Transport>>,
) -> Result<Machine, String> {
    let session = Session::new(address.clone());
    let mut machine = Machine {
        child,
        folder,
        session,
        address,
        ready: Duration::ZERO,
    };
    let answered = async {
        let transport = transport.await.map_err(|e| e.to_string())?;
        machine
            .session
            .adopt(transport)
            .await
            .map_err(|e| e.to_string())?;
        Ok::<_, String>(start.elapsed())
    };
    let said = || fs::read_to_string(machine.folder.join("stderr")).unwrap_or_default();
    match tokio::time::timeout(READY_DEADLINE, answered).await {
        Ok(Ok(took)) => {
            machine.ready = took;
            Ok(machine)
        }
        Ok(Err(error)) => Err(format!("{error}: {}", said())),
        Err(_) => Err(format!("no answer after {READY_DEADLINE:?}: {}", said())),
    }
}
