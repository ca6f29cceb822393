//! What the command's end is as an exit status.

use airlock_sandbox::client::{Cause, Ended, SpawnFailure, SpawnStage, Status};

/// The command's time was up (as timeout(1) says it).
pub(crate) const TIMEOUT: u8 = 124;
/// airlock itself failed; usage errors too.
pub(crate) const OWN_FAILURE: u8 = 125;
/// The command was found and could not be started.
pub(crate) const NOT_STARTED: u8 = 126;
/// The command was not found.
pub(crate) const NOT_FOUND: u8 = 127;
/// A signal ended it: this plus the signal's number.
pub(crate) const SIGNAL_BASE: u8 = 128;
/// Whoever read our output stopped: what a program killed by SIGPIPE (13) shows.
pub(crate) const BROKEN_PIPE: u8 = SIGNAL_BASE + 13;

/// Linux errno ENOENT.
const ENOENT: i32 = 2;

/// The status of a command that ended.
pub(crate) fn of_ended(ended: &Ended) -> u8 {
    match (ended.cause, ended.status) {
        (Cause::Timeout, _) => TIMEOUT,
        // The kernel hands on eight bits of an exit code (wait(2)).
        (_, Status::Code(code)) => u8::try_from(code & 0xff).unwrap_or(u8::MAX),
        (_, Status::Signal { number, .. }) => of_signal(number),
    }
}

/// The status of something that a signal ended.
pub(crate) fn of_signal(number: u32) -> u8 {
    u8::try_from(number).map_or(u8::MAX, |number| SIGNAL_BASE.saturating_add(number))
}

/// The status of a command that did not start.
pub(crate) fn of_spawn_failure(failure: &SpawnFailure) -> u8 {
    match failure.stage {
        SpawnStage::SpawnLookup | SpawnStage::SpawnExec if failure.errno == ENOENT => NOT_FOUND,
        // The guest has no room: no fault of the command's.
        SpawnStage::SpawnResources => OWN_FAILURE,
        _ => NOT_STARTED,
    }
}

#[cfg(test)]
mod tests {
    use airlock_sandbox::client::Usage;

    use super::*;

    fn ended(status: Status, cause: Cause) -> Ended {
        Ended {
            status,
            cause,
            usage: Usage::default(),
        }
    }

    #[test]
    fn the_documented_statuses() {
        let signal = |number| Status::Signal {
            number,
            core: false,
        };
        for (status, cause, expected) in [
            (Status::Code(0), Cause::Normal, 0),
            (Status::Code(7), Cause::Normal, 7),
            (Status::Code(255), Cause::Normal, 255),
            (signal(9), Cause::Normal, 137),
            (signal(9), Cause::Oom, 137),
            (signal(15), Cause::Killed, 143),
            (signal(64), Cause::Normal, 192),
            (signal(15), Cause::Timeout, 124),
            (Status::Code(0), Cause::Timeout, 124),
        ] {
            assert_eq!(
                of_ended(&ended(status, cause)),
                expected,
                "{status:?} {cause:?}"
            );
        }
        // A hostile guest's numbers end in a failure, not in 0.
        assert_ne!(of_ended(&ended(signal(u32::MAX), Cause::Normal)), 0);
    }

    #[test]
    fn a_command_that_is_not_there_and_one_that_cannot_run_differ() {
        let failure = |stage, errno| SpawnFailure {
            stage,
            errno,
            message: String::new(),
        };
        assert_eq!(of_spawn_failure(&failure(SpawnStage::SpawnLookup, 2)), 127);
        assert_eq!(of_spawn_failure(&failure(SpawnStage::SpawnLookup, 13)), 126);
        // The interpreter of a script is missing.
        assert_eq!(of_spawn_failure(&failure(SpawnStage::SpawnExec, 2)), 127);
        assert_eq!(of_spawn_failure(&failure(SpawnStage::SpawnExec, 8)), 126);
        assert_eq!(of_spawn_failure(&failure(SpawnStage::SpawnCwd, 2)), 126);
        assert_eq!(of_spawn_failure(&failure(SpawnStage::SpawnUser, 0)), 126);
        assert_eq!(
            of_spawn_failure(&failure(SpawnStage::SpawnResources, 12)),
            125
        );
    }
}
