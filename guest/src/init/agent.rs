//! The agent as PID 1's child: forked while there is one thread, started again if it fails, not for ever.

#![expect(unsafe_code, reason = "fork")]

use std::process::exit;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use rustix::process::{Pid, WaitOptions, getpid, wait};

use super::{CGROUP, power};
use crate::{Options, log, server};

/// Restarts within [`RESTART_PERIOD`] after which the machine is given up: an agent that fails at once would fail again.
const MAX_RESTARTS: usize = 5;
const RESTART_PERIOD: Duration = Duration::from_secs(60);
/// Not to be chosen by the OOM killer (proc(5)).
const NEVER_KILL: &str = "-1000";

/// Runs the agent, reaps what is orphaned, and ends the machine when it is told to. Never returns.
pub(super) fn supervise(options: &Options) -> ! {
    protect_from_oom();
    let mut options = options.clone();
    let mut starts: Vec<Instant> = Vec::new();
    loop {
        starts.retain(|start| start.elapsed() < RESTART_PERIOD);
        if starts.len() > MAX_RESTARTS {
            log::error(format_args!(
                "the agent failed {MAX_RESTARTS} times in a row; resetting"
            ));
            power::reset();
        }
        starts.push(Instant::now());
        match fork_agent(&options) {
            Ok(agent) => wait_for(agent),
            Err(error) => {
                log::error(format_args!("cannot fork the agent: {error}"));
                power::reset();
            }
        }
        options.restarts += 1;
    }
}

fn fork_agent(options: &Options) -> std::io::Result<Pid> {
    // SAFETY: this process has one thread, so the child's copy of memory holds no lock that another thread had, and
    // everything may be called in it.
    match unsafe { libc::fork() } {
        0 => {
            if let Err(errno) = crate::cgroup::set(
                &std::path::Path::new(CGROUP).join("agent"),
                "cgroup.procs",
                "0",
            ) {
                log::info(format_args!("the agent has no cgroup of its own: {errno}"));
            }
            let result = server::serve(options);
            if let Err(error) = &result {
                log::error(format_args!("{error}"));
            }
            exit(i32::from(result.is_err()));
        }
        pid if pid > 0 => {
            Pid::from_raw(pid).ok_or_else(|| std::io::Error::other("fork gave no pid"))
        }
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Reaps until `agent` has ended. Every orphan of the guest ends up here.
fn wait_for(agent: Pid) {
    let mut signals = SigSet::empty();
    // What init programs take as "power off" or "reboot" (busybox, sysvinit, systemd); in a guest both are a reset.
    let ends = [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        Signal::SIGPWR,
    ];
    signals.add(Signal::SIGCHLD);
    ends.iter().for_each(|signal| signals.add(*signal));
    let _ = signals.thread_block();
    loop {
        // All that have ended: one SIGCHLD may stand for many.
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if pid == agent {
                let how = match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => format!("ended with code {code}"),
                    (_, Some(signal)) => format!("was killed by signal {signal}"),
                    _ => "ended".to_owned(),
                };
                log::error(format_args!("the agent {how}; starting it again"));
                let _ = signals.thread_unblock();
                return;
            }
        }
        if let Ok(signal) = signals.wait()
            && ends.contains(&signal)
        {
            log::info(format_args!("{signal} to PID 1: resetting"));
            power::reset();
        }
    }
}

fn protect_from_oom() {
    // Inherited by the agent; the agent takes it back from every exec.
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", NEVER_KILL) {
        log::info(format_args!(
            "the OOM killer may choose {}: {error}",
            getpid().as_raw_nonzero()
        ));
    }
}
