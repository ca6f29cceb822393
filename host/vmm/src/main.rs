//! `airlock-vmm run --config FILE` runs one VM; `airlock-vmm probe` judges this host's KVM.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use airlock_vmm::config::{EngineConfig, VmConfig};
use airlock_vmm::control::Control;
use airlock_vmm::lifeline::Lifeline;
use airlock_vmm::machine::{Exit, ExitReason, ExitSlot, Machine, with_causes};
use airlock_vmm::probe;
use airlock_vmm::qemu;
use airlock_vmm::run_dir;
use airlock_vmm::seccomp;
use airlock_vmm::tell;
use airlock_vmm::vm::KvmMachine;

const USAGE: &str =
    "usage: airlock-vmm run --config FILE | airlock-vmm probe | airlock-vmm --version";
/// The VM failed, or did not start.
const EXIT_FAILURE: u8 = 1;
/// Wrong arguments, or a configuration that cannot be read.
const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    seccomp::keep_one_heap();
    // Sockets and logs are the owner's alone.
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["run", "--config", path] => run(Path::new(path)),
        ["probe"] => print_probe(),
        ["--version"] => {
            println!("airlock-vmm {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        _ => {
            tell!("{USAGE}");
            ExitCode::from(EXIT_USAGE)
        }
    }
}

fn print_probe() -> ExitCode {
    match serde_json::to_string(&probe::probe()) {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            tell!("airlock-vmm: {error}");
            ExitCode::from(EXIT_FAILURE)
        }
    }
}

fn run(config_path: &Path) -> ExitCode {
    let config = match read_config(config_path) {
        Ok(config) => config,
        Err(error) => {
            tell!("airlock-vmm: {error}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    let lifeline = match config.lifeline_fd.map(Lifeline::inherit).transpose() {
        Ok(lifeline) => lifeline,
        Err(error) => {
            tell!("airlock-vmm: the lifeline: {error}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    // From here on the run folder is this process's: nobody else answers on its control socket.
    let control = match Control::listen(&config.control_socket) {
        Ok(control) => control,
        Err(error) => {
            tell!("airlock-vmm: {}", with_causes(&error));
            return ExitCode::from(EXIT_FAILURE);
        }
    };
    let exit = run_vm(&config, control, lifeline.as_ref()).unwrap_or_else(|detail| Exit {
        reason: ExitReason::Error,
        detail,
    });
    let exit = run_dir::with_kernel_panic(exit, &config.console_log);
    if !exit.reason.is_orderly() {
        tell!("airlock-vmm: {}", exit.detail);
    }
    let owner_is_gone = lifeline.as_ref().is_some_and(Lifeline::is_cut);
    run_dir::leave(&config, config_path, &exit, owner_is_gone);
    if exit.reason.is_orderly() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(EXIT_FAILURE)
    }
}

fn read_config(path: &Path) -> Result<VmConfig, String> {
    let text =
        std::fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    serde_json::from_slice(&text)
        .map_err(|error| format!("{} is no VM configuration: {error}", path.display()))
}

/// From its start to its end.
fn run_vm(
    config: &VmConfig,
    mut control: Control,
    lifeline: Option<&Lifeline>,
) -> Result<Exit, String> {
    let exit = Arc::new(ExitSlot::new().map_err(|error| with_causes(&error))?);
    let machine = start(config, exit.clone())?;
    if matches!(config.engine, EngineConfig::Kvm {}) {
        seccomp::install(seccomp::Thread::Control)?;
    }
    let ending = control.serve(&*machine, &exit, lifeline);
    machine.stop();
    Ok(ending)
}

fn start(config: &VmConfig, exit: Arc<ExitSlot>) -> Result<Box<dyn Machine>, String> {
    match &config.engine {
        EngineConfig::Kvm {} => match KvmMachine::start(config, exit) {
            Ok(machine) => Ok(Box::new(machine)),
            Err(error) => Err(with_causes(&error)),
        },
        EngineConfig::Qemu { binary } => Ok(Box::new(qemu::start(config, binary, exit)?)),
    }
}
