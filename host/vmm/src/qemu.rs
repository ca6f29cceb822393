//! Engine `qemu`: QEMU's software CPU runs the guest, and its sockets are served by our own device over vhost-user.
//!
//! QEMU is a child that cannot outlive this process. It has no network, no monitor but ours, and no configuration files.

#![expect(
    unsafe_code,
    reason = "pre_exec ties the child's life to ours and hands it two descriptors; the time stamp counter"
)]

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};

use crate::config::{Discovery, VmConfig};
use crate::console_log::ConsoleLog;
use crate::devices::virtio::vsock::{VsockDevice, VsockMetrics};
use crate::halt::HaltWatch;
use crate::machine::{ExitReason, ExitSlot, Machine, with_causes};
use crate::tell;
use crate::vhost_user::VhostUserServer;

/// Queues of the vsock device that QEMU hands to a vhost-user backend: receive and transmit. It keeps the event queue.
const VHOST_QUEUES: usize = 2;
/// How long QEMU may take to answer on its monitor.
const MONITOR_TIMEOUT: Duration = Duration::from_secs(5);
/// The guest's clock is wrong by as much as this is measured wrong: some 100 ns in 10 ms, or a second a day.
const TSC_MEASUREMENT: Duration = Duration::from_millis(10);
/// What is kept of QEMU's complaints.
const STDERR_BYTES: u64 = 4096;

/// A running QEMU.
#[derive(Debug)]
pub struct QemuMachine {
    monitor: Mutex<Monitor>,
    pidfd: OwnedFd,
    waiter: Option<JoinHandle<()>>,
    vsock: Option<VhostUserServer>,
    metrics: Arc<VsockMetrics>,
}

/// Starts QEMU; how it ends is reported to `exit`.
pub fn start(config: &VmConfig, binary: &Path, exit: Arc<ExitSlot>) -> Result<QemuMachine, String> {
    let device = VsockDevice::new(&config.vsock_socket, config.guest_cid.get())
        .map_err(|error| with_causes(&error))?;
    let metrics = device.metrics();
    let log = ConsoleLog::create(&config.console_log, config.console_log_limit_bytes.get())
        .map_err(|error| {
            format!(
                "cannot create the console log {}: {error}",
                config.console_log.display()
            )
        })?
        .watched(HaltWatch::new(exit.clone()));
    let host = |error: io::Error| format!("cannot start engine qemu: {error}");
    let tsc_khz = measure_tsc_khz();
    let (vhost_ours, vhost_theirs) = UnixStream::pair().map_err(host)?;
    let (monitor_ours, monitor_theirs) = UnixStream::pair().map_err(host)?;

    let exit_of_device = exit.clone();
    let on_end = move |result: io::Result<()>| {
        // Without an error QEMU is gone, and its waiter knows why.
        if let Err(error) = result {
            exit_of_device.report(
                ExitReason::Error,
                format!("the vsock device failed: {error}"),
            );
        }
    };
    let vsock =
        VhostUserServer::start(Box::new(device), VHOST_QUEUES, vhost_ours, on_end).map_err(host)?;

    let mut command = Command::new(binary);
    command.args(arguments(
        config,
        tsc_khz,
        vhost_theirs.as_raw_fd(),
        monitor_theirs.as_raw_fd(),
    ));
    let (pidfd, waiter) = spawn(
        command,
        [vhost_theirs.into(), monitor_theirs.into()],
        log,
        exit,
    )
    .map_err(|error| {
        format!(
            "cannot start {}: {error}; is QEMU installed?",
            binary.display()
        )
    })?;
    let monitor = Mutex::new(Monitor::new(monitor_ours).map_err(host)?);
    Ok(QemuMachine {
        monitor,
        pidfd,
        waiter: Some(waiter),
        vsock: Some(vsock),
        metrics,
    })
}

/// QEMU's command line.
fn arguments(config: &VmConfig, tsc_khz: u64, vhost_fd: RawFd, monitor_fd: RawFd) -> Vec<String> {
    let mut arguments = Vec::new();
    let mut add = |words: &[&str]| arguments.extend(words.iter().map(|&word| word.to_owned()));
    let memory = config.memory_mib.get();
    let acpi = match config.discovery {
        Discovery::Cmdline => "off",
        Discovery::Acpi => "on",
    };
    add(&["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"]);
    // Without a real-time clock the kernel waits a second for one.
    add(&[
        "-M",
        &format!(
            "microvm,acpi={acpi},pit=on,pic=on,rtc=on,isa-serial=on,pcie=off,x-option-roms=off,memory-backend=memory"
        ),
    ]);
    // VIRTIO 1.x registers and rings; QEMU's virtio-mmio is a legacy device otherwise.
    add(&["-global", "virtio-mmio.force-legacy=false"]);
    add(&["-accel", "tcg,thread=multi", "-cpu", "max"]);
    add(&[
        "-smp",
        &config.cpus.get().to_string(),
        "-m",
        &format!("{memory}M"),
    ]);
    // Shared, so that the vsock device sees it.
    add(&[
        "-object",
        &format!("memory-backend-memfd,id=memory,size={memory}M,share=on"),
    ]);
    add(&["-kernel", &config.kernel.display().to_string()]);
    if let Some(initramfs) = &config.initramfs {
        add(&["-initrd", &initramfs.display().to_string()]);
    }
    // There is no kvmclock under software emulation, and nothing in a microvm that clocks could be calibrated against:
    // without these the guest has a clock of 4 ms steps, and with ACPI none at all. Nor may the kernel check whether the
    // timer ticks: on a busy host it does so late, and the kernel would panic.
    add(&[
        "-append",
        &format!(
            "{} tsc_early_khz={tsc_khz} tsc=reliable no_timer_check",
            config.cmdline
        ),
    ]);
    add(&[
        "-chardev",
        "stdio,id=console,signal=off",
        "-serial",
        "chardev:console",
    ]);
    add(&["-chardev", &format!("socket,id=monitor,fd={monitor_fd}")]);
    add(&["-mon", "chardev=monitor,mode=control"]);
    // Takes the kernel's reset (0xfe to port 0x64); microvm has none by itself.
    add(&["-device", "i8042"]);
    // The guest names disks in this order, and finds them between the two others as on engine kvm.
    add(&["-device", "virtio-rng-device"]);
    for (index, disk) in config.disks.as_slice().iter().enumerate() {
        let read_only = if disk.read_only { "on" } else { "off" };
        let path = escape(&disk.path.display().to_string());
        add(&[
            "-drive",
            &format!("if=none,id=disk{index},format=raw,file={path},read-only={read_only}"),
        ]);
        add(&["-device", &format!("virtio-blk-device,drive=disk{index}")]);
    }
    add(&["-chardev", &format!("socket,id=vsock,fd={vhost_fd}")]);
    add(&["-device", "vhost-user-vsock-device,chardev=vsock"]);
    arguments
}

/// The speed of this host's time stamp counter, which QEMU's software CPU hands through.
fn measure_tsc_khz() -> u64 {
    let (start, start_tsc) = (Instant::now(), read_tsc());
    thread::sleep(TSC_MEASUREMENT);
    let (cycles, elapsed) = (read_tsc().wrapping_sub(start_tsc), start.elapsed());
    u64::try_from(u128::from(cycles) * 1_000_000 / elapsed.as_nanos().max(1)).unwrap_or(0)
}

fn read_tsc() -> u64 {
    // SAFETY: every x86-64 CPU has the instruction, and Linux lets processes use it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// QEMU's option parser ends a value at a comma, unless it is doubled.
fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

impl QemuMachine {
    fn command(&self, name: &str) -> Result<Value, String> {
        lock(&self.monitor)
            .command(name)
            .map_err(|error| format!("QEMU did not do \"{name}\": {error}"))
    }

    fn signal(&self, signal: Signal) {
        // ESRCH: it has ended by itself.
        let _ = pidfd_send_signal(&self.pidfd, signal);
    }
}

impl Machine for QemuMachine {
    fn is_paused(&self) -> bool {
        self.command("query-status")
            .is_ok_and(|status| status["status"] == "paused")
    }

    fn pause(&self) -> Result<(), String> {
        self.command("stop").map(drop)
    }

    fn resume(&self) -> Result<(), String> {
        self.command("cont").map(drop)
    }

    fn metrics(&self) -> Value {
        json!({ "vsock": self.metrics.to_json() })
    }

    fn stop(mut self: Box<Self>) {
        self.end();
    }
}

impl QemuMachine {
    fn end(&mut self) {
        let Some(waiter) = self.waiter.take() else {
            return;
        };
        // Not SIGTERM, which QEMU takes a second to obey: what the guest has written to a disk is with the host's kernel
        // already, and nothing else of QEMU outlives it.
        self.signal(Signal::KILL);
        // A panic in it has been printed.
        let _ = waiter.join();
        self.vsock = None;
    }
}

impl Drop for QemuMachine {
    fn drop(&mut self) {
        self.end();
    }
}

type Spawned = (OwnedFd, JoinHandle<()>);

/// Starts the child on a thread of its own, which then waits for it: PR_SET_PDEATHSIG takes the end of the spawning
/// thread for the end of the parent.
fn spawn(
    command: Command,
    inherited: [OwnedFd; 2],
    log: ConsoleLog,
    exit: Arc<ExitSlot>,
) -> io::Result<Spawned> {
    let (sender, receiver) = mpsc::channel();
    let waiter = thread::Builder::new().name("qemu".into()).spawn(move || {
        let mut child = match spawn_here(command, inherited) {
            Ok((child, pidfd)) => {
                // The receiver waits for it.
                let _ = sender.send(Ok(pidfd));
                child
            }
            Err(error) => {
                let _ = sender.send(Err(error));
                return;
            }
        };
        supervise(&mut child, log, &exit);
    })?;
    let pidfd = receiver
        .recv()
        .unwrap_or_else(|_| Err(io::Error::other("the thread that starts QEMU failed")))?;
    Ok((pidfd, waiter))
}

fn spawn_here(mut command: Command, inherited: [OwnedFd; 2]) -> io::Result<(Child, OwnedFd)> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let parent = rustix::process::getpid();
    let keep = inherited.each_ref().map(AsRawFd::as_raw_fd);
    // SAFETY: the closure only makes system calls, which is allowed between fork and exec of a threaded process, and the
    // descriptors are open: `inherited` lives until the child has started.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            if rustix::process::getppid() != Some(parent) {
                // The parent died before the signal was set up.
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            for fd in keep {
                if libc::fcntl(fd, libc::F_SETFD, 0) != 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    let mut child = command.spawn()?;
    drop(inherited);
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pidfd = pid
        .ok_or(rustix::io::Errno::SRCH)
        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()));
    match pidfd {
        Ok(pidfd) => Ok((child, pidfd)),
        Err(error) => {
            // Nobody could signal it later.
            let _ = child.kill();
            let _ = child.wait();
            Err(error.into())
        }
    }
}

/// Copies the console, collects complaints, and reports the end.
fn supervise(child: &mut Child, log: ConsoleLog, exit: &ExitSlot) {
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let complaint = thread::scope(|scope| {
        let stderr = scope.spawn(move || stderr.map(collect_stderr).unwrap_or_default());
        if let Some(stdout) = stdout {
            copy_console(stdout, log);
        }
        stderr.join().unwrap_or_default()
    });
    match child.wait() {
        Ok(status) => report(status, &complaint, exit),
        Err(error) => exit.report(ExitReason::Error, format!("cannot wait for QEMU: {error}")),
    }
}

fn report(status: ExitStatus, complaint: &str, exit: &ExitSlot) {
    let complaint = if complaint.is_empty() {
        String::new()
    } else {
        format!(": {complaint}")
    };
    match (status.code(), status.signal()) {
        // With -no-reboot a reset ends QEMU like a power-off.
        (Some(0), _) => exit.report(ExitReason::GuestReset, "the guest reset itself"),
        (Some(code), _) => exit.report(
            ExitReason::Error,
            format!("QEMU ended with status {code}{complaint}"),
        ),
        (None, Some(signal)) => exit.report(
            ExitReason::Error,
            format!("QEMU was ended by signal {signal}{complaint}"),
        ),
        (None, None) => exit.report(ExitReason::Error, format!("QEMU ended{complaint}")),
    }
}

/// Until QEMU closes it. A log that cannot be written must not stop the guest.
fn copy_console(mut stdout: ChildStdout, mut log: ConsoleLog) {
    let mut buffer = [0; 4096];
    loop {
        match stdout.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => drop(log.write_all(&buffer[..count])),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// The first line that is no warning; all of them go to our own stderr, within bounds.
fn collect_stderr(stderr: ChildStderr) -> String {
    let mut first = String::new();
    let mut reader = BufReader::new(stderr);
    let mut bounded = (&mut reader).take(STDERR_BYTES);
    let mut line = Vec::new();
    while matches!(bounded.read_until(b'\n', &mut line), Ok(count) if count > 0) {
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        tell!("{text}");
        if first.is_empty() && !text.contains("warning:") {
            first = text;
        }
        line.clear();
    }
    // QEMU must not block on a full pipe, whatever it has to say.
    let _ = io::copy(&mut reader, &mut io::sink());
    first
}

/// QEMU's monitor (QMP): one JSON object per line each way.
#[derive(Debug)]
struct Monitor {
    reader: BufReader<UnixStream>,
    ready: bool,
    /// Answers carry the number of their command: one may come after its command was given up.
    last_id: u64,
}

impl Monitor {
    fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_read_timeout(Some(MONITOR_TIMEOUT))?;
        socket.set_write_timeout(Some(MONITOR_TIMEOUT))?;
        Ok(Self {
            reader: BufReader::new(socket),
            ready: false,
            last_id: 0,
        })
    }

    fn command(&mut self, name: &str) -> io::Result<Value> {
        if !self.ready {
            self.execute("qmp_capabilities")?;
            self.ready = true;
        }
        self.execute(name)
    }

    fn execute(&mut self, name: &str) -> io::Result<Value> {
        self.last_id += 1;
        let line = format!("{}\n", json!({ "execute": name, "id": self.last_id }));
        self.reader.get_mut().write_all(line.as_bytes())?;
        loop {
            let mut line = String::new();
            if (&mut self.reader)
                .take(STDERR_BYTES * 16)
                .read_line(&mut line)?
                == 0
            {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let mut answer: Value = serde_json::from_str(&line)?;
            // The greeting, an event, or a late answer.
            if answer["id"].as_u64() != Some(self.last_id) {
                continue;
            }
            if let Some(error) = answer.get("error") {
                return Err(io::Error::other(
                    error["desc"].as_str().unwrap_or("unknown error").to_owned(),
                ));
            }
            return Ok(answer["return"].take());
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
