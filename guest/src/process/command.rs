//! From an [`ExecStart`] to a [`Command`]: everything checked and every string made before the clone.

use std::ffi::CString;
use std::sync::OnceLock;

use airlock_proto::v1::{ExecStart, SpawnStage};

use super::SpawnError;
use super::child::Limit;
use crate::users::{Identity, UserError, Users};

/// The search path an exec starts with, and the one it is looked up in if its environment has none.
const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const DEFAULT_TERM: &str = "xterm-256color";
const DEFAULT_SHELL: &[u8] = b"/bin/sh";
/// Entries of PATH that are tried; each costs a system call while the agent waits.
const MAX_CANDIDATES: usize = 64;
/// Resource limits the kernel knows (RLIM_NLIMITS, asm-generic/resource.h).
const RLIMIT_COUNT: u32 = 16;
/// Open files an exec starts with: what systemd gives its services. Above 1024, programs that use select() break; the
/// hard limit lets the others raise it.
const DEFAULT_NOFILE: Limit = Limit {
    soft: 1024,
    hard: 524_288,
};

/// [`DEFAULT_NOFILE`] within what the agent itself has: raising a limit takes a privilege it may lack in tests.
fn default_nofile() -> Limit {
    static LIMIT: OnceLock<Limit> = OnceLock::new();
    *LIMIT.get_or_init(|| {
        let own = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let hard = own
            .maximum
            .map_or(DEFAULT_NOFILE.hard, |own| own.min(DEFAULT_NOFILE.hard));
        let soft = DEFAULT_NOFILE.soft.min(hard);
        Limit { soft, hard }
    })
}

/// What to run, ready for the child.
#[derive(Debug)]
pub(crate) struct Command {
    pub(super) argv: Vec<CString>,
    pub(super) env: Vec<CString>,
    pub(super) candidates: Vec<CString>,
    pub(super) cwd: Vec<CString>,
    pub(crate) identity: Identity,
    pub(super) oom_score_adj: i32,
    pub(super) limits: Vec<(u32, Limit)>,
    pub(super) nice: Option<i32>,
    pub(super) umask: u32,
    pub(super) drop_capabilities: u64,
    pub(super) no_new_privs: bool,
}

impl Command {
    /// `path` as root without arguments or environment.
    pub(crate) fn bare(path: &[u8]) -> Self {
        let path = CString::new(path).unwrap_or_default();
        Self {
            argv: vec![path.clone()],
            env: Vec::new(),
            candidates: vec![path],
            cwd: vec![c"/".to_owned()],
            identity: Identity {
                uid: rustix::process::geteuid().as_raw(),
                gid: rustix::process::getegid().as_raw(),
                groups: Vec::new(),
                name: Vec::new(),
                home: Vec::new(),
                shell: Vec::new(),
            },
            oom_score_adj: 0,
            limits: vec![(libc::RLIMIT_NOFILE, default_nofile())],
            nice: None,
            umask: 0o022,
            drop_capabilities: 0,
            no_new_privs: false,
        }
    }

    /// One line about a failure in the child.
    pub(super) fn explain(&self, stage: SpawnStage, errno: i32) -> SpawnError {
        let program = self.argv.first().map(|a| a.to_string_lossy());
        let program = program.unwrap_or_default();
        let why = std::io::Error::from_raw_os_error(errno);
        let message = match (stage, errno) {
            (SpawnStage::SpawnLookup, libc::ENOENT) => {
                if program.contains('/') {
                    format!("{program}: no such file")
                } else {
                    format!("{program}: not found in PATH")
                }
            }
            (SpawnStage::SpawnLookup, _) => format!("{program}: not executable: {why}"),
            (SpawnStage::SpawnExec, libc::ENOENT) => {
                format!("{program}: its interpreter does not exist")
            }
            (SpawnStage::SpawnExec, libc::ENOEXEC) => {
                format!("{program}: neither a program nor a script with #!")
            }
            (SpawnStage::SpawnCwd, _) => {
                let cwd = self.cwd.last().map(|c| c.to_string_lossy());
                format!("working directory {}: {why}", cwd.unwrap_or_default())
            }
            (SpawnStage::SpawnCredentials, _) => {
                format!(
                    "cannot become user {} with its limits: {why}",
                    self.identity.uid
                )
            }
            (SpawnStage::SpawnTty, _) => format!("cannot take the terminal: {why}"),
            _ => format!("{program}: {why}"),
        };
        SpawnError::new(stage, errno, message)
    }
}

/// Checks a request and makes everything the child will need.
pub(crate) fn prepare(request: &ExecStart, users: &mut Users) -> Result<Command, SpawnError> {
    let argv = request
        .argv
        .iter()
        .map(|a| c_string(a.to_vec(), "an argument"))
        .collect::<Result<Vec<_>, _>>()?;
    let program = match request.argv.first() {
        None => return Err(invalid("no command given")),
        Some(program) if program.is_empty() => return Err(invalid("the command's name is empty")),
        Some(program) => program,
    };
    let identity = users
        .resolve(&request.user, &request.extra_gids)
        .map_err(|error| {
            let errno = match error {
                UserError::TooManyGroups | UserError::NoId => libc::EINVAL,
                UserError::NoUser(_) | UserError::NoGroup(_) => libc::ENOENT,
            };
            SpawnError::new(SpawnStage::SpawnUser, errno, error.to_string())
        })?;
    let env = environment(request, &identity)?;
    let candidates = candidates(program, &env)?;
    let cwd = working_directories(request, &identity)?;
    Ok(Command {
        argv,
        candidates,
        cwd,
        oom_score_adj: oom_score_adj(request)?,
        limits: limits(request)?,
        nice: request.nice.map(|n| n.clamp(-20, 19)),
        umask: request.umask.unwrap_or(0o022) & 0o777,
        drop_capabilities: capability_mask(&request.drop_capabilities)?,
        no_new_privs: request.no_new_privs,
        env: env
            .into_iter()
            .map(|(name, value)| {
                let mut entry = name;
                entry.push(b'=');
                entry.extend_from_slice(&value);
                c_string(entry, "the environment")
            })
            .collect::<Result<_, _>>()?,
        identity,
    })
}

fn invalid(message: impl Into<String>) -> SpawnError {
    SpawnError::new(SpawnStage::SpawnRequest, libc::EINVAL, message)
}

fn c_string(bytes: Vec<u8>, what: &str) -> Result<CString, SpawnError> {
    CString::new(bytes).map_err(|_| invalid(format!("{what} has a NUL byte")))
}

type Environment = Vec<(Vec<u8>, Vec<u8>)>;

/// The defaults (unless cleared) with the request's on top, in the order they were given.
fn environment(request: &ExecStart, identity: &Identity) -> Result<Environment, SpawnError> {
    let mut env = Environment::new();
    if !request.env_clear {
        let or = |value: &[u8], other: &[u8]| {
            if value.is_empty() {
                other.to_vec()
            } else {
                value.to_vec()
            }
        };
        let number = identity.uid.to_string();
        let name = or(
            &identity.name,
            if identity.uid == 0 {
                b"root"
            } else {
                number.as_bytes()
            },
        );
        env.push((b"PATH".to_vec(), DEFAULT_PATH.to_vec()));
        env.push((b"HOME".to_vec(), or(&identity.home, b"/")));
        env.push((b"USER".to_vec(), name.clone()));
        env.push((b"LOGNAME".to_vec(), name));
        env.push((b"SHELL".to_vec(), or(&identity.shell, DEFAULT_SHELL)));
    }
    if let Some(tty) = &request.tty
        && !(request.env_clear && tty.term.is_empty())
    {
        let term = if tty.term.is_empty() {
            DEFAULT_TERM
        } else {
            &tty.term
        };
        env.push((b"TERM".to_vec(), term.as_bytes().to_vec()));
    }
    // A map from name to place: a client may send thousands of variables.
    let mut places: std::collections::HashMap<Vec<u8>, usize> = env
        .iter()
        .enumerate()
        .map(|(at, (name, _))| (name.clone(), at))
        .collect();
    for variable in &request.env {
        if variable.name.is_empty() || variable.name.contains(&b'=') {
            return Err(invalid("a variable's name is empty or has a '='"));
        }
        let (name, value) = (variable.name.to_vec(), variable.value.to_vec());
        match places.get(&name).and_then(|at| env.get_mut(*at)) {
            Some(entry) => entry.1 = value,
            None => {
                places.insert(name.clone(), env.len());
                env.push((name, value));
            }
        }
    }
    Ok(env)
}

/// The paths execve is tried on: the program itself if it has a slash, else one for each entry of the exec's PATH.
fn candidates(program: &[u8], env: &Environment) -> Result<Vec<CString>, SpawnError> {
    if program.contains(&b'/') {
        return Ok(vec![c_string(program.to_vec(), "the program's name")?]);
    }
    let path = env.iter().find(|(name, _)| name == b"PATH");
    let path = path.map_or(DEFAULT_PATH, |(_, value)| value);
    path.split(|b| *b == b':')
        .take(MAX_CANDIDATES)
        .map(|folder| {
            // An empty entry is the working directory (POSIX).
            let mut candidate = if folder.is_empty() {
                b".".to_vec()
            } else {
                folder.to_vec()
            };
            candidate.push(b'/');
            candidate.extend_from_slice(program);
            c_string(candidate, "PATH")
        })
        .collect()
}

fn working_directories(
    request: &ExecStart,
    identity: &Identity,
) -> Result<Vec<CString>, SpawnError> {
    if !request.cwd.is_empty() {
        let cwd = c_string(request.cwd.to_vec(), "the working directory")?;
        if request.cwd.first() != Some(&b'/') {
            return Err(SpawnError::new(
                SpawnStage::SpawnCwd,
                libc::EINVAL,
                format!("working directory {}: not absolute", cwd.to_string_lossy()),
            ));
        }
        return Ok(vec![cwd]);
    }
    let mut folders = Vec::new();
    if identity.home.first() == Some(&b'/') {
        folders.push(c_string(identity.home.clone(), "the home folder")?);
    }
    folders.push(c"/".to_owned());
    Ok(folders)
}

/// 0 unless asked for: the agent's own protection must not be inherited.
fn oom_score_adj(request: &ExecStart) -> Result<i32, SpawnError> {
    let value = request.oom_score_adj.unwrap_or(0);
    if !(-1000..=1000).contains(&value) {
        return Err(invalid(format!(
            "oom_score_adj {value} is not in -1000 to 1000"
        )));
    }
    Ok(value)
}

fn limits(request: &ExecStart) -> Result<Vec<(u32, Limit)>, SpawnError> {
    let mut limits = Vec::with_capacity(request.rlimits.len() + 1);
    if !request
        .rlimits
        .iter()
        .any(|l| l.resource == libc::RLIMIT_NOFILE)
    {
        limits.push((libc::RLIMIT_NOFILE, default_nofile()));
    }
    for limit in &request.rlimits {
        if limit.resource >= RLIMIT_COUNT || limit.soft > limit.hard {
            return Err(invalid(format!(
                "rlimit {}: unknown, or soft {} above hard {}",
                limit.resource, limit.soft, limit.hard
            )));
        }
        let (soft, hard) = (limit.soft, limit.hard);
        limits.push((limit.resource, Limit { soft, hard }));
    }
    Ok(limits)
}

fn capability_mask(numbers: &[u32]) -> Result<u64, SpawnError> {
    numbers.iter().try_fold(0, |mask, number| {
        if *number < 64 {
            Ok(mask | 1 << number)
        } else {
            Err(invalid(format!("capability {number} does not exist")))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use airlock_proto::v1::{EnvVar, Tty};

    fn request(argv: &[&str]) -> ExecStart {
        ExecStart {
            argv: argv.iter().map(|a| a.as_bytes().to_vec().into()).collect(),
            ..ExecStart::default()
        }
    }

    fn env_of(command: &Command) -> Vec<String> {
        command
            .env
            .iter()
            .map(|e| e.to_string_lossy().into_owned())
            .collect()
    }

    fn variable(name: &'static str, value: &'static str) -> EnvVar {
        EnvVar {
            name: name.into(),
            value: value.into(),
        }
    }

    #[test]
    fn a_program_without_a_slash_is_looked_up_in_the_execs_own_path() {
        let mut request = request(&["ls"]);
        request.env.push(variable("PATH", "/a::/b"));
        let command = prepare(&request, &mut Users::default()).unwrap();
        let paths: Vec<_> = command
            .candidates
            .iter()
            .map(|c| c.to_str().unwrap())
            .collect();
        assert_eq!(paths, ["/a/ls", "./ls", "/b/ls"]);
    }

    #[test]
    fn a_cleared_environment_has_only_what_was_sent() {
        let mut request = request(&["/bin/true"]);
        request.env_clear = true;
        request.env = vec![variable("A", "1"), variable("A", "2")];
        let command = prepare(&request, &mut Users::default()).unwrap();
        assert_eq!(env_of(&command), ["A=2"]);
    }

    #[test]
    fn a_terminal_brings_term_unless_the_client_says_otherwise() {
        let mut request = request(&["/bin/true"]);
        request.tty = Some(Tty::default());
        let command = prepare(&request, &mut Users::default()).unwrap();
        assert!(env_of(&command).contains(&"TERM=xterm-256color".to_owned()));
        request.env.push(variable("TERM", "dumb"));
        let command = prepare(&request, &mut Users::default()).unwrap();
        assert!(env_of(&command).contains(&"TERM=dumb".to_owned()));
    }

    #[test]
    fn bad_requests_name_the_stage() {
        let stage =
            |request: &ExecStart| prepare(request, &mut Users::default()).unwrap_err().stage;
        assert_eq!(stage(&request(&[])), SpawnStage::SpawnRequest);
        assert_eq!(stage(&request(&["a\0b"])), SpawnStage::SpawnRequest);
        let mut bad = request(&["a"]);
        bad.cwd = "relative".into();
        assert_eq!(stage(&bad), SpawnStage::SpawnCwd);
        let mut bad = request(&["a"]);
        bad.user = "no-such-user".into();
        assert_eq!(stage(&bad), SpawnStage::SpawnUser);
        let mut bad = request(&["a"]);
        bad.drop_capabilities = vec![64];
        assert_eq!(stage(&bad), SpawnStage::SpawnRequest);
    }
}
