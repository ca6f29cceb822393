//! What was typed: the command line as clap reads it. What will run is made of it in `hiargs`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use airlock_sandbox::scratch::parse_mib;
use airlock_sandbox::{CpuCount, MemoryMib, Name, ScratchSpec};
use clap::builder::Resettable;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::forward::Forward;
use crate::limits::{self, Limits};

/// The agent's own limit for each stream.
const MAX_REPLAY_MIB: u64 = 16;

const EXIT_STATUS: &str = "\
Exit status:
  that of the command; 128+n if signal n ended it
  124  its time was up (--timeout)
  125  airlock itself failed, or was used wrongly
  126  the command could not be started (not executable, no such user or folder)
  127  the command was not found";

/// Runs commands inside microVMs.
#[derive(Debug, Parser)]
#[command(name = "airlock", version, after_help = EXIT_STATUS, max_term_width = 100)]
pub(crate) struct Cli {
    /// Say what is chosen and why
    #[arg(short, long, global = true)]
    pub(crate) verbose: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a command in a new sandbox and remove the sandbox
    #[command(after_help = EXIT_STATUS)]
    Run(Box<RunArgs>),
    /// Start a sandbox that stays
    Up(Box<UpArgs>),
    /// Run a command in a sandbox that was started with `up`
    #[command(after_help = EXIT_STATUS)]
    Exec(Box<ExecArgs>),
    /// Copy files and folders into a sandbox, or out of one
    Cp(CpArgs),
    /// Let ports here lead to ports in a sandbox
    PortForward(ForwardArgs),
    /// Open the image's shell in a sandbox
    Shell(Box<ShellArgs>),
    /// List sandboxes, or the commands in one
    Ps(PsArgs),
    /// Signal a command in a sandbox
    Kill(KillArgs),
    /// Wait for a command in a sandbox, and exit as it did
    #[command(after_help = EXIT_STATUS)]
    Wait(WaitArgs),
    /// Print a sandbox's console, or what a command in it has written
    Logs(LogsArgs),
    /// Stop sandboxes; their logs stay until `rm`
    Stop(StopArgs),
    /// Remove sandboxes that have ended
    Rm(RmArgs),
    /// List root images and kernels
    Images(ListArgs),
    /// Check this host, and find what killed processes left behind
    Doctor(DoctorArgs),
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
    /// Print the manual page of airlock or of one of its commands
    Man(ManArgs),
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
    #[command(flatten)]
    pub(crate) exec: ExecOptions,
    /// Write engine, times and the command's end to FILE, as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,
    /// The command and its arguments; with -t, the image's shell if there is none
    #[arg(value_name = "CMD", trailing_var_arg = true, help_heading = Resettable::Reset)]
    pub(crate) command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// Name of the new sandbox
    pub(crate) name: Name,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    #[command(flatten)]
    pub(crate) exec: ExecOptions,
    #[command(flatten)]
    pub(crate) session: SessionOptions,
    /// Write times and the command's end to FILE, as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,
    /// Name of the sandbox
    #[arg(help_heading = Resettable::Reset)]
    pub(crate) name: Name,
    /// The command and its arguments; with -t, the image's shell if there is none
    #[arg(value_name = "CMD", trailing_var_arg = true, help_heading = Resettable::Reset)]
    pub(crate) command: Vec<OsString>,
}

/// A command that outlives this client.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Session")]
pub(crate) struct SessionOptions {
    /// Start the command, print its id and leave it running
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Let the command outlive us, and wait for a client rather than lose output
    #[arg(long)]
    pub(crate) keep: bool,
    /// How much of each stream is kept for clients that attach, with M, at most 16M
    #[arg(long, value_name = "SIZE", value_parser = replay, default_value = "1M")]
    pub(crate) replay: u64,
    /// The id that the command gets, instead of a random one
    #[arg(long)]
    pub(crate) id: Option<String>,
    /// Go on with the command that has this id, instead of starting one
    #[arg(long, value_name = "ID", conflicts_with_all = ["detach", "keep", "id", "command", "env", "env_file", "workdir", "user", "tty", "timeout", "limit"])]
    pub(crate) attach: Option<String>,
    /// With --attach: begin at these bytes of stdout and stderr, instead of at the oldest that are kept
    #[arg(long, value_name = "OUT[,ERR]", value_parser = offsets, requires = "attach", conflicts_with = "command")]
    pub(crate) from: Option<[u64; 2]>,
}

#[derive(Debug, Args)]
pub(crate) struct ShellArgs {
    /// Set a variable; without a value, pass it on from here
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<OsString>,
    /// Working directory in the sandbox
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<OsString>,
    /// User: a name or number, with :GROUP if wanted
    #[arg(short, long)]
    pub(crate) user: Option<String>,
    /// Record the terminal to FILE, as asciicast v2
    #[arg(long, value_name = "FILE")]
    pub(crate) record: Option<PathBuf>,
    /// Name of the sandbox
    pub(crate) name: Name,
}

#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// List the commands in this sandbox instead, those that have ended lately too
    #[arg(long, value_name = "NAME")]
    pub(crate) execs: Option<Name>,
    #[command(flatten)]
    pub(crate) list: ListArgs,
}

#[derive(Debug, Args)]
pub(crate) struct KillArgs {
    /// Signal, by name or number
    #[arg(short, long, value_parser = crate::signals::parse, default_value = "TERM")]
    pub(crate) signal: u32,
    /// Signal every process of the command, not only its first
    #[arg(long)]
    pub(crate) tree: bool,
    /// Name of the sandbox
    pub(crate) name: Name,
    /// Id of the command; `airlock ps --execs NAME` lists them
    pub(crate) id: String,
}

#[derive(Debug, Args)]
pub(crate) struct WaitArgs {
    /// Name of the sandbox
    pub(crate) name: Name,
    /// Id of the command
    pub(crate) id: String,
}

/// What the sandbox is made of.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sandbox")]
pub(crate) struct MachineArgs {
    /// Root image; `airlock images` lists them
    #[arg(long, value_name = "NAME", default_value = "busybox")]
    pub(crate) image: String,
    /// Guest kernel [default: tuned if it is built, else debian]
    #[arg(long, value_name = "NAME")]
    pub(crate) kernel: Option<String>,
    /// What runs the guest's CPU; auto measures KVM
    #[arg(long, value_enum, env = "AIRLOCK_ENGINE", default_value_t = EngineArg::Auto)]
    pub(crate) engine: EngineArg,
    /// Number of vCPUs
    #[arg(long, value_name = "N", value_parser = cpus, allow_hyphen_values = true, default_value = "1")]
    pub(crate) cpus: CpuCount,
    /// Memory, with M or G
    #[arg(long, value_name = "SIZE", value_parser = memory, allow_hyphen_values = true, default_value = "512M")]
    pub(crate) memory: MemoryMib,
    /// Disk for what the sandbox writes, with M, G or T; `memory` keeps it in the guest's memory
    #[arg(long, value_name = "SIZE", value_parser = scratch, allow_hyphen_values = true, default_value = "8G")]
    pub(crate) scratch: ScratchSpec,
    /// Give up if the guest has not answered after this long [default: 60s with kvm, 180s with qemu]
    #[arg(long, value_name = "TIME", value_parser = duration, allow_hyphen_values = true)]
    pub(crate) boot_timeout: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum EngineArg {
    Auto,
    Kvm,
    Qemu,
}

/// How the command runs.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Command")]
pub(crate) struct ExecOptions {
    /// Set a variable; without a value, pass it on from here
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<OsString>,
    /// Set variables from a file of NAME=VALUE lines
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// Working directory in the sandbox
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<OsString>,
    /// User: a name or number, with :GROUP if wanted
    #[arg(short, long)]
    pub(crate) user: Option<String>,
    /// Pass stdin on to the command
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// End the command after this long: 10s, 500ms, 2m, 1h
    #[arg(long, value_name = "TIME", value_parser = duration, allow_hyphen_values = true)]
    pub(crate) timeout: Option<Duration>,
    /// Limit the command's processes together: memory=SIZE, pids=N, cpu=CPUS
    #[arg(long, value_name = "KEY=VALUE,...", value_parser = limits::parse)]
    pub(crate) limit: Vec<Limits>,
    /// Record what the command writes to FILE, as asciicast v2
    #[arg(long, value_name = "FILE")]
    pub(crate) record: Option<PathBuf>,
    /// Print events instead of output, one JSON object a line
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CpArgs {
    /// Keep owners and set-id bits, besides modes, times and links
    #[arg(short, long)]
    pub(crate) archive: bool,
    /// What to copy: a path, NAME:PATH in a sandbox, or - for stdin
    #[arg(value_name = "SRC")]
    pub(crate) source: OsString,
    /// Where to: a path, NAME:PATH in a sandbox, or - for stdout
    #[arg(value_name = "DST")]
    pub(crate) destination: OsString,
}

#[derive(Debug, Args)]
pub(crate) struct ForwardArgs {
    /// Name of the sandbox
    pub(crate) name: Name,
    /// A port here (0: any free one) and a port or a socket's path in the sandbox; bound to 127.0.0.1 if there is no
    /// ADDRESS in front
    #[arg(value_name = "[ADDRESS:]HOST:GUEST", required = true)]
    pub(crate) forwards: Vec<Forward>,
}

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// For programs
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// Name of the sandbox
    pub(crate) name: Name,
    /// What the VMM had to say instead
    #[arg(long)]
    pub(crate) vmm: bool,
    /// What is kept of the output of the command with this id instead
    #[arg(long, value_name = "ID", conflicts_with = "vmm")]
    pub(crate) exec: Option<String>,
    /// With --exec: go on until the command's end
    #[arg(short, long, requires = "exec")]
    pub(crate) follow: bool,
}

#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    /// Names of the sandboxes
    #[arg(required = true)]
    pub(crate) names: Vec<Name>,
    /// How long processes in the sandbox may take to end
    #[arg(long, value_name = "TIME", value_parser = duration, allow_hyphen_values = true, default_value = "5s")]
    pub(crate) timeout: Duration,
}

#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Names of the sandboxes
    #[arg(required = true)]
    pub(crate) names: Vec<Name>,
    /// End the ones that run first
    #[arg(short, long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Remove what killed processes left, and measure KVM again
    #[arg(long)]
    pub(crate) fix: bool,
    /// For programs
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// The shell
    pub(crate) shell: clap_complete::Shell,
}

#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// One of airlock's commands
    pub(crate) command: Option<String>,
}

fn cpus(text: &str) -> Result<CpuCount, String> {
    let number = text
        .parse::<u8>()
        .map_err(|_| format!("{text:?} is no number of CPUs that a sandbox can have"))?;
    CpuCount::new(number).map_err(|error| error.to_string())
}

fn memory(text: &str) -> Result<MemoryMib, String> {
    let mib = parse_mib(text)?;
    let mib = u32::try_from(mib).map_err(|_| format!("{text} is more than any machine has"))?;
    MemoryMib::new(mib).map_err(|error| error.to_string())
}

fn scratch(text: &str) -> Result<ScratchSpec, String> {
    text.parse()
}

fn replay(text: &str) -> Result<u64, String> {
    match parse_mib(text)? {
        mib @ 1..=MAX_REPLAY_MIB => Ok(mib << 20),
        _ => Err(format!("{text:?} is not 1M to {MAX_REPLAY_MIB}M")),
    }
}

fn offsets(text: &str) -> Result<[u64; 2], String> {
    let number = |text: &str| {
        let wrong = |_| format!("{text:?} is no byte offset: use OUT or OUT,ERR, for example 4096");
        text.parse::<u64>().map_err(wrong)
    };
    let (out, err) = text.split_once(',').unwrap_or((text, "0"));
    Ok([number(out)?, number(err)?])
}

fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time: use a number with ms, s, m or h, for example 10s");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    let ms = match &text[digits.len()..] {
        "ms" => Some(1),
        "" | "s" => Some(1000),
        "m" => Some(60_000),
        "h" => Some(3_600_000),
        _ => None,
    };
    let total = ms.and_then(|ms| number.checked_mul(ms)).ok_or_else(wrong)?;
    if total == 0 {
        return Err(format!("{text:?} leaves no time at all"));
    }
    Ok(Duration::from_millis(total))
}

#[cfg(test)]
mod tests;
