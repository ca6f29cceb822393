//! `airlock-bench`: one table, each figure beside its baseline from the same run, the host's facts above it.
//!
//! Two machines with the same kernel, initramfs, root image and agent take turns: airlock-vmm, and a baseline. On engine
//! `kvm` the baseline is QEMU's microvm with the host kernel's vhost-vsock. On engine `qemu` there is no vhost-vsock to
//! compare with, so the baseline is the agent as an ordinary process of the host (and, for starting, QEMU alone with the
//! same kernel): what emulation costs.
//!
//! scripts/bench runs it, in the lab under the deterministic clock for engine `kvm`.

mod facts;
mod machine;
mod rows;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;

/// What to measure with.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) engine: String,
    pub(crate) vmm: PathBuf,
    pub(crate) agent: PathBuf,
    pub(crate) qemu: PathBuf,
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
    pub(crate) rootfs: PathBuf,
    pub(crate) memory_mib: u32,
    pub(crate) rounds: usize,
    pub(crate) label: String,
}

const USAGE: &str = "usage: airlock-bench --engine kvm|qemu --vmm PATH --agent PATH --kernel PATH --initramfs PATH \
--rootfs PATH [--qemu PATH] [--memory MIB] [--rounds N] [--label TEXT]";

fn options() -> Result<Options, String> {
    let mut options = Options {
        engine: String::new(),
        vmm: PathBuf::new(),
        agent: PathBuf::new(),
        qemu: "qemu-system-x86_64".into(),
        kernel: PathBuf::new(),
        initramfs: PathBuf::new(),
        rootfs: PathBuf::new(),
        memory_mib: 128,
        rounds: 5,
        label: String::new(),
    };
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        let value = args
            .next()
            .ok_or_else(|| format!("{name} needs a value\n{USAGE}"))?;
        match name.as_str() {
            "--engine" => options.engine = value,
            "--vmm" => options.vmm = value.into(),
            "--agent" => options.agent = value.into(),
            "--qemu" => options.qemu = value.into(),
            "--kernel" => options.kernel = value.into(),
            "--initramfs" => options.initramfs = value.into(),
            "--rootfs" => options.rootfs = value.into(),
            "--memory" => {
                options.memory_mib = value
                    .parse()
                    .map_err(|_| format!("--memory {value}: not a number"))?
            }
            "--rounds" => {
                options.rounds = value
                    .parse()
                    .map_err(|_| format!("--rounds {value}: not a number"))?
            }
            "--label" => options.label = value,
            _ => return Err(format!("{name} is no option\n{USAGE}")),
        }
    }
    if !matches!(options.engine.as_str(), "kvm" | "qemu") {
        return Err(format!("--engine must be kvm or qemu\n{USAGE}"));
    }
    for path in [
        &options.vmm,
        &options.agent,
        &options.kernel,
        &options.initramfs,
        &options.rootfs,
    ] {
        if !path.exists() {
            return Err(format!(
                "{:?} does not exist\n{USAGE}",
                path.display().to_string()
            ));
        }
    }
    Ok(options)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(text) => {
            eprintln!("airlock-bench: {text}");
            return ExitCode::from(2);
        }
    };
    match rows::measure(&options).await {
        Ok(rows) => {
            print!("{}", table::markdown(&options, &facts::host(), &rows));
            ExitCode::SUCCESS
        }
        Err(text) => {
            eprintln!("airlock-bench: {text}");
            ExitCode::FAILURE
        }
    }
}
