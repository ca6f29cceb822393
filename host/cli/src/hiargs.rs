//! What will run: the typed arguments with everything looked up, merged and checked.

use std::collections::BTreeMap;
use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{IsTerminal, Read, stdin};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::time::Duration;

use airlock_sandbox::client::{Attach, Command, Stream};
use airlock_sandbox::image::Defaults;
use airlock_sandbox::{EngineChoice, LaunchSpec, Name};
use anyhow::{Context, bail, ensure};

use crate::lowargs::{EngineArg, ExecOptions, MachineArgs, SessionOptions};
use crate::record::Recording;
use crate::terminal;

/// A command and how its streams are connected.
#[derive(Debug)]
pub(crate) struct Execution {
    pub(crate) what: What,
    pub(crate) streams: Streams,
}

#[derive(Debug)]
pub(crate) enum What {
    Start(Box<Command>),
    Attach(Attach),
}

#[derive(Debug)]
pub(crate) struct Streams {
    pub(crate) stdin: bool,
    pub(crate) tty: bool,
    /// After this the guest ends it.
    pub(crate) timeout: Option<Duration>,
    /// Events instead of output.
    pub(crate) json: bool,
    /// It outlives us, so we say what we have written, and do not end it when we must go.
    pub(crate) kept: bool,
    /// Where its output begins for us.
    pub(crate) from: [u64; 2],
    pub(crate) recording: Option<Recording>,
}

/// The machine that was asked for.
pub(crate) fn launch_spec(args: MachineArgs, name: Name, ephemeral: bool) -> LaunchSpec {
    LaunchSpec {
        name,
        image: args.image,
        kernel: args.kernel,
        engine: match args.engine {
            EngineArg::Auto => EngineChoice::Auto,
            EngineArg::Kvm => EngineChoice::Kvm,
            EngineArg::Qemu => EngineChoice::Qemu,
        },
        cpus: args.cpus,
        memory_mib: args.memory,
        scratch: args.scratch,
        boot_timeout: args.boot_timeout,
        ephemeral,
    }
}

/// Longest `--env-file`. The environment has to fit into an exec's request, which is 3 MiB.
const MAX_ENV_FILE_BYTES: u64 = 4 << 20;

/// The variables of every `--env-file`, the last one last.
#[derive(Debug, Default)]
pub(crate) struct EnvFiles(Vec<(OsString, OsString)>);

/// Checks what can be checked, and reads what is to be read, before anything is booted and while a signal still ends us.
pub(crate) fn check_early(
    options: &ExecOptions,
    command: &[OsString],
    detached: bool,
) -> anyhow::Result<EnvFiles> {
    ensure!(
        !command.is_empty() || options.tty,
        "no command given: put one after the options, or use -it for the image's shell"
    );
    ensure!(
        !(options.tty && options.interactive) || detached || stdin().is_terminal(),
        "-it needs a terminal, and stdin is none: leave out -t"
    );
    if let Some(dir) = &options.workdir {
        ensure!(
            Path::new(dir).is_absolute(),
            "the working directory {} is not an absolute path",
            dir.display()
        );
    }
    ensure!(
        options.user.as_deref() != Some(""),
        "-u names no user: leave it out, or give a name or number"
    );
    let mut variables = Vec::new();
    for file in &options.env_file {
        read_env_file(file, &mut variables)?;
    }
    Ok(EnvFiles(variables))
}

/// Merges the image's defaults, `--env-file` and `-e`; later ones win.
pub(crate) fn execution(
    options: ExecOptions,
    env_files: EnvFiles,
    command: Vec<OsString>,
    session: &SessionOptions,
    defaults: &Defaults,
) -> anyhow::Result<Execution> {
    let mut command = command.into_iter();
    let mut built = match command.next() {
        Some(program) => Command::new(program).args(command),
        None if defaults.shell.is_empty() => bail!("the image names no shell: give a command"),
        None => Command::new(&defaults.shell),
    };
    let mut env: BTreeMap<OsString, OsString> = defaults
        .env
        .iter()
        .map(|(name, value)| (name.into(), value.into()))
        .collect();
    env.extend(env_files.0);
    for variable in &options.env {
        let (name, value) = variable_of(variable)?;
        match value.or_else(|| env::var_os(&name)) {
            Some(value) => env.insert(name, value),
            None => env.remove(&name),
        };
    }
    for (name, value) in &env {
        built = built.env(name, value);
    }
    let cwd = options
        .workdir
        .unwrap_or_else(|| defaults.cwd.clone().into());
    if !cwd.is_empty() {
        built = built.cwd(cwd);
    }
    built = built.user(options.user.unwrap_or_else(|| defaults.user.clone()));
    if let Some(timeout) = options.timeout {
        built = built.timeout(timeout);
    }
    if options.interactive {
        built = built.stdin();
    }
    if options.tty {
        let (rows, cols) = terminal::size();
        built = built.tty(rows, cols, env::var("TERM").unwrap_or_default());
    }
    for limits in options.limit {
        built = limits.apply(built);
    }
    if session.detach || session.keep {
        built = built.keep(session.replay);
    }
    if session.keep {
        built = built.hold_output();
    }
    if let Some(id) = &session.id {
        built = built.id(id);
    }
    Ok(Execution {
        what: What::Start(Box::new(built)),
        streams: Streams {
            stdin: options.interactive,
            tty: options.tty,
            timeout: options.timeout,
            json: options.json,
            kept: session.keep,
            from: [0; 2],
            recording: record(options.record.as_deref(), options.tty)?,
        },
    })
}

/// Going on with a command, which has a terminal or not.
pub(crate) fn attachment(
    options: &ExecOptions,
    id: &str,
    from: [u64; 2],
    tty: bool,
) -> anyhow::Result<Execution> {
    let mut attach = Attach::new(id)
        .from(Stream::Stdout, from[0])
        .from(Stream::Stderr, from[1])
        .manual_acks();
    if options.interactive {
        attach = attach.stdin();
    }
    Ok(Execution {
        what: What::Attach(attach),
        streams: Streams {
            stdin: options.interactive,
            tty,
            timeout: None,
            json: options.json,
            kept: true,
            from,
            recording: record(options.record.as_deref(), tty)?,
        },
    })
}

fn record(path: Option<&Path>, tty: bool) -> anyhow::Result<Option<Recording>> {
    path.map(|path| Recording::create(path, tty)).transpose()
}

/// `NAME=VALUE`, or `NAME` alone.
fn variable_of(text: &OsStr) -> anyhow::Result<(OsString, Option<OsString>)> {
    let bytes = text.as_bytes();
    let (name, value) = match bytes.iter().position(|byte| *byte == b'=') {
        Some(at) => (&bytes[..at], Some(&bytes[at + 1..])),
        None => (bytes, None),
    };
    ensure!(!name.is_empty(), "{} names no variable", text.display());
    let own = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
    Ok((own(name), value.map(own)))
}

/// Lines of `NAME=VALUE`; empty ones and those that begin with `#` are passed over. No quotes, as in Docker's.
fn read_env_file(path: &Path, variables: &mut Vec<(OsString, OsString)>) -> anyhow::Result<()> {
    let mut text = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_ENV_FILE_BYTES + 1).read_to_end(&mut text))
        .with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(
        text.len() as u64 <= MAX_ENV_FILE_BYTES,
        "{} is no file of variables: it has more than {} MiB",
        path.display(),
        MAX_ENV_FILE_BYTES >> 20
    );
    for (number, line) in text.split(|byte| *byte == b'\n').enumerate() {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        match variable_of(OsStr::from_bytes(line)) {
            Ok((name, Some(value))) => {
                variables.push((name, value));
            }
            _ => bail!(
                "{}, line {}: NAME=VALUE is expected",
                path.display(),
                number + 1
            ),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
