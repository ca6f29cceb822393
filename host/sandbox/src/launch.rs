//! Launching a sandbox, as one page: find the parts, take the name, start the VMM, wait for the doorbell.
//!
//! Until the agent has answered, everything made here is removed again by whoever drops it: an error, a cancelled
//! launch (Ctrl-C) and a panic all end in the same [`Drop`].

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use airlock_client::proto::{DOORBELL_PORT, GUEST_CID};
use airlock_client::{Address, Session};
use airlock_vmm::config::{
    Cmdline, ConfigError, ConsoleLogLimit, CpuCount, DiskConfig, Disks, EngineConfig, GuestCid,
    MemoryMib, VmConfig,
};
use tokio::net::UnixListener;

use crate::boot::{self, Boot};
use crate::engine::{self, Chosen, Engine, EngineChoice, EngineError};
use crate::image::{Image, ImageError};
use crate::initramfs::{self, InitramfsError};
use crate::kernel::{Kernel, KernelError};
use crate::name::Name;
use crate::paths::Paths;
use crate::post_mortem::{Evidence, PostMortem};
use crate::process::ProcessId;
use crate::programs;
use crate::registry::{Lock, Record, Registry, RegistryError, RunDir, State};
use crate::scratch::{ScratchDisk, ScratchError, ScratchSpec};
use crate::vmm::{LIFELINE_FD, Vmm, VmmError, lock_released};

/// How long a guest may take to its agent's first word. Real KVM needs well under a second; software emulation with a
/// distribution kernel on a busy host has been seen to need half a minute.
const BOOT_TIMEOUT_KVM: Duration = Duration::from_secs(60);
const BOOT_TIMEOUT_QEMU: Duration = Duration::from_secs(180);
/// The guest can write to its console for ever; the newest megabyte is kept.
const CONSOLE_LOG_LIMIT_BYTES: u64 = 1 << 20;

/// What to launch.
#[derive(Debug, Clone)]
pub struct LaunchSpec {
    /// Its name.
    pub name: Name,
    /// Root image.
    pub image: String,
    /// Kernel; without one the tuned kernel, or Debian's.
    pub kernel: Option<String>,
    /// What runs the CPU.
    pub engine: EngineChoice,
    /// Number of vCPUs.
    pub cpus: CpuCount,
    /// Guest memory.
    pub memory_mib: MemoryMib,
    /// Where writes go.
    pub scratch: ScratchSpec,
    /// How long the agent may take to answer; without it what the engine needs at its slowest.
    pub boot_timeout: Option<Duration>,
    /// Ends with this process, and leaves nothing behind.
    pub ephemeral: bool,
}

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// No engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// No kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// No image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// No agent or no VMM.
    #[error(transparent)]
    Program(#[from] programs::NotFound),
    /// No initramfs.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// No scratch disk.
    #[error(transparent)]
    Scratch(#[from] ScratchError),
    /// No name, or no folder.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Not a machine.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// More than the host could ever give: the guest would take it page by page until the host kills something.
    #[error(
        "{asked_mib} MiB of memory asked for, and this host has {host_mib} MiB; ask for less with --memory"
    )]
    Memory {
        /// What was asked for.
        asked_mib: u32,
        /// What there is.
        host_mib: u64,
    },
    /// The VMM did not start.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// A socket or process could not be watched.
    #[error("cannot wait for the guest")]
    Wait(#[from] io::Error),
    /// It started, and the agent never answered.
    #[error("{}", boot_text(.what, .console))]
    Boot {
        /// Why.
        what: String,
        /// The console's last lines.
        console: Vec<String>,
    },
}

fn boot_text(what: &str, console: &[String]) -> String {
    let mut text = format!("the sandbox did not start: {what}");
    if !console.is_empty() {
        text.push_str("\nthe guest's console ends with:");
        for line in console {
            text.push_str("\n  ");
            text.push_str(line);
        }
    }
    text
}

/// Boots a sandbox and returns when its agent has answered.
///
/// # Errors
/// When a part is missing, the name is taken, or the guest does not come up; nothing is left of it then.
pub async fn launch(paths: &Paths, spec: &LaunchSpec) -> Result<Launched, LaunchError> {
    let start = Instant::now();
    check_memory(spec.memory_mib)?;
    let registry = Registry::open(paths)?;
    let engine = engine::choose(paths, spec.engine)?;
    let image = Image::find(paths, &spec.image)?;
    let kernel = Kernel::find(paths, spec.kernel.as_deref())?;
    let vmm_program = programs::vmm()?;
    let initramfs = initramfs::cached(paths, &kernel, &programs::agent()?)?;

    clear_if_dead(&registry, &spec.name)?;
    let record = new_record(spec, &engine, &kernel, &image)?;
    let (dir, lock) = registry.create(&spec.name, &record)?;
    let mut launched = Launched::new(dir, record, &engine);
    if let ScratchSpec::DiskMib(mib) = spec.scratch {
        launched.scratch = Some(ScratchDisk::create(paths, mib)?);
    }
    let config = machine(spec, &launched, &engine, &kernel, &image, initramfs)?;
    launched.dir.write_json("vmm.json", &config)?;
    let doorbell_path = launched.dir.vsock_port_socket(DOORBELL_PORT);
    let doorbell = UnixListener::bind(&doorbell_path)?;
    launched.start_vmm(&vmm_program, &lock, spec.ephemeral)?;
    drop(lock);
    let boot_timeout = spec
        .boot_timeout
        .unwrap_or_else(|| boot_timeout(engine.engine));
    launched.wait_for_agent(&doorbell, boot_timeout).await?;

    // The VM has its scratch disk open, and the doorbell has rung.
    launched.scratch = None;
    let _ = std::fs::remove_file(doorbell_path);
    launched.mark_ready(start.elapsed())?;
    Ok(launched)
}

/// A sandbox that was launched by this process. Dropping it ends the VM and removes every trace, unless it was told to
/// [`keep`](Self::keep) running.
#[derive(Debug)]
pub struct Launched {
    /// Its folder.
    pub dir: RunDir,
    /// What is known of it.
    pub record: Record,
    /// Its agent.
    pub session: Session,
    /// Why it runs on the engine it runs on.
    pub engine: Chosen,
    vmm: Option<Vmm>,
    scratch: Option<ScratchDisk>,
    evidence: Evidence,
    keep: bool,
}

impl Launched {
    fn new(dir: RunDir, record: Record, engine: &Chosen) -> Self {
        Self {
            session: Session::new(Address::hybrid(dir.vsock_socket())),
            evidence: Evidence::secure(&dir),
            dir,
            record,
            engine: engine.clone(),
            vmm: None,
            scratch: None,
            keep: false,
        }
    }

    fn start_vmm(
        &mut self,
        program: &Path,
        lock: &Lock,
        lifeline: bool,
    ) -> Result<(), LaunchError> {
        // Made here, so that it can be read even after an ephemeral VMM has removed its folder.
        std::fs::File::create(self.dir.console_log())?;
        let vmm = self
            .vmm
            .insert(Vmm::spawn(program, &self.dir, lock, lifeline)?);
        self.evidence = Evidence::secure(&self.dir);
        self.record.vmm = Some(vmm.id());
        self.dir.write_record(&self.record)?;
        Ok(())
    }

    async fn wait_for_agent(
        &mut self,
        doorbell: &UnixListener,
        limit: Duration,
    ) -> Result<(), LaunchError> {
        let Some(vmm) = &self.vmm else {
            return Ok(());
        };
        match boot::wait(doorbell, &self.session, vmm.handle(), limit).await? {
            Boot::Ready => Ok(()),
            Boot::VmmEnded => {
                let PostMortem { cause, console } = self.post_mortem();
                Err(LaunchError::Boot {
                    what: cause,
                    console,
                })
            }
            Boot::TimedOut => Err(LaunchError::Boot {
                what: format!("its agent did not answer within {}", in_words(limit)),
                console: self.evidence.console_lines(),
            }),
        }
    }

    fn mark_ready(&mut self, elapsed: Duration) -> Result<(), RegistryError> {
        self.record.ready_ms = Some(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX));
        self.dir.write_record(&self.record)
    }

    fn post_mortem(&mut self) -> PostMortem {
        let status = self.vmm.as_mut().and_then(Vmm::exit_status);
        self.evidence.examine(status)
    }

    /// Why the VM ended, if it ends within `limit`; for a connection that was lost.
    pub async fn end_within(&mut self, limit: Duration) -> Option<String> {
        let vmm = self.vmm.as_ref()?;
        let ended = vmm.handle().ended_within(limit).await.unwrap_or(false);
        ended.then(|| self.post_mortem().cause)
    }

    /// Lets it run on after this process.
    #[must_use]
    pub fn keep(mut self) -> Session {
        self.keep = true;
        self.session.clone()
    }

    /// Ends the VM and removes every trace of it.
    ///
    /// # Errors
    /// When the folder cannot be removed.
    pub fn remove(mut self) -> Result<(), RegistryError> {
        self.keep = true;
        self.destroy()
    }

    fn destroy(&mut self) -> Result<(), RegistryError> {
        if let Some(mut vmm) = self.vmm.take() {
            vmm.kill();
            // QEMU dies with its VMM, a moment later.
            lock_released(&self.dir);
        }
        self.scratch = None;
        self.dir.remove_unchecked()
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        if !self.keep {
            // Whoever drops it is on the way to report something else; `airlock doctor` finds what is left.
            let _ = self.destroy();
        }
    }
}

fn check_memory(asked: MemoryMib) -> Result<(), LaunchError> {
    let info = rustix::system::sysinfo();
    let host_mib = info.totalram.saturating_mul(info.mem_unit.into()) >> 20;
    if u64::from(asked.get()) > host_mib {
        return Err(LaunchError::Memory {
            asked_mib: asked.get(),
            host_mib,
        });
    }
    Ok(())
}

/// Whole seconds as such, for a person.
fn in_words(time: Duration) -> String {
    match time.subsec_millis() {
        0 => format!("{} s", time.as_secs()),
        _ => format!("{} ms", time.as_millis()),
    }
}

fn boot_timeout(engine: Engine) -> Duration {
    match engine {
        Engine::Kvm => BOOT_TIMEOUT_KVM,
        Engine::Qemu => BOOT_TIMEOUT_QEMU,
    }
}

/// A name that belongs to nobody any more is free: what a killed VM left is removed.
fn clear_if_dead(registry: &Registry, name: &Name) -> Result<(), RegistryError> {
    match registry.find(name) {
        Ok(dir) if dir.state() == State::Dead => dir.remove(),
        Ok(_) | Err(RegistryError::NotFound(_)) => Ok(()),
        Err(error) => Err(error),
    }
}

fn new_record(
    spec: &LaunchSpec,
    engine: &Chosen,
    kernel: &Kernel,
    image: &Image,
) -> Result<Record, LaunchError> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Ok(Record {
        name: spec.name.to_string(),
        engine: engine.engine,
        image: image.name.clone(),
        kernel: kernel.name.clone(),
        cpus: spec.cpus.get(),
        memory_mib: spec.memory_mib.get(),
        created_unix_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
        creator: ProcessId::own()?,
        vmm: None,
        ready_ms: None,
        ephemeral: spec.ephemeral,
        defaults: image.defaults.clone(),
    })
}

/// The machine: the one place where it is put together.
fn machine(
    spec: &LaunchSpec,
    launched: &Launched,
    engine: &Chosen,
    kernel: &Kernel,
    image: &Image,
    initramfs: PathBuf,
) -> Result<VmConfig, ConfigError> {
    let mut disks = vec![DiskConfig {
        path: image.rootfs.clone(),
        read_only: true,
    }];
    if let Some(scratch) = &launched.scratch {
        disks.push(DiskConfig {
            path: scratch.path(),
            read_only: false,
        });
    }
    let dir = &launched.dir;
    Ok(VmConfig {
        engine: match &engine.qemu {
            Some(binary) => EngineConfig::Qemu {
                binary: binary.clone(),
            },
            None => EngineConfig::Kvm {},
        },
        kernel: kernel.image.clone(),
        initramfs: Some(initramfs),
        cmdline: Cmdline::new(cmdline(
            spec,
            engine.engine,
            image,
            launched.scratch.is_some(),
        ))?,
        cpus: spec.cpus,
        memory_mib: spec.memory_mib,
        discovery: kernel.discovery,
        disks: Disks::new(disks)?,
        vsock_socket: dir.vsock_socket(),
        guest_cid: GuestCid::new(GUEST_CID)?,
        console_log: dir.console_log(),
        console_log_limit_bytes: ConsoleLogLimit::new(CONSOLE_LOG_LIMIT_BYTES)?,
        control_socket: dir.control_socket(),
        run_dir: dir.path().to_owned(),
        ephemeral: spec.ephemeral,
        lifeline_fd: spec.ephemeral.then_some(LIFELINE_FD),
    })
}

/// Our part of the kernel command line; the VMM adds what names the devices.
fn cmdline(spec: &LaunchSpec, engine: Engine, image: &Image, scratch_disk: bool) -> String {
    let mut words = vec![
        // Each byte on the console is an exit of the VM: only what matters is printed.
        "console=ttyS0".to_owned(),
        "quiet".to_owned(),
        // A panic is over at once, and the VMM sees the reset.
        "panic=-1".to_owned(),
        match engine {
            // Our i8042 takes the reset; QEMU's microvm has none, and a triple fault ends it.
            Engine::Kvm => "reboot=k".to_owned(),
            Engine::Qemu => "reboot=t".to_owned(),
        },
        // There is a keyboard controller for the reset alone: do not look for what hangs on it.
        "i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd".to_owned(),
        "random.trust_cpu=on".to_owned(),
        "cryptomgr.notests".to_owned(),
    ];
    if spec.cpus.get() == 1 {
        // Leaves out patching the code for several CPUs.
        words.push("noreplace-smp".to_owned());
    }
    words.push("airlock.root=/dev/vda".to_owned());
    words.push(format!("airlock.rootfstype={}", image.fstype.as_str()));
    words.push(format!(
        "airlock.scratch={}",
        if scratch_disk { "/dev/vdb" } else { "tmpfs" }
    ));
    words.push(format!("airlock.hostname={}", spec.name));
    words.join(" ")
}

#[cfg(test)]
mod tests;
