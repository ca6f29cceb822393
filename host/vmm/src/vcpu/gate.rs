//! Where vCPU threads wait between two entries into the guest, so that a VM can be paused and stopped.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// A signal that arrives just before KVM_RUN is lost, so it is sent again after this time.
const KICK_EVERY: Duration = Duration::from_millis(1);
/// A vCPU leaves the guest within microseconds of a signal; one that takes this long never will.
const GIVE_UP_AFTER: Duration = Duration::from_secs(5);

/// Shared by the vCPU threads of one VM and whoever controls them.
#[derive(Debug)]
pub(super) struct Gate {
    /// Fast path: false while vCPUs may run. Written under the lock.
    closed: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    wish: Wish,
    /// vCPUs that may be in the guest.
    inside: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    Run,
    Pause,
    Stop,
}

/// What a vCPU does after passing the gate.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Passed {
    Run,
    /// Run, and the guest's clock should know that time went by.
    RunAfterPause,
    Stop,
}

impl Gate {
    pub(super) fn new(vcpus: usize) -> Self {
        Self {
            closed: AtomicBool::new(false),
            state: Mutex::new(State {
                wish: Wish::Run,
                inside: vcpus,
            }),
            changed: Condvar::new(),
        }
    }

    /// For vCPU threads, before each entry: waits while the VM is paused.
    pub(super) fn pass(&self) -> Passed {
        if !self.closed.load(Ordering::Acquire) {
            return Passed::Run;
        }
        let mut state = self.lock();
        state.inside -= 1;
        self.changed.notify_all();
        while state.wish == Wish::Pause {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        state.inside += 1;
        if state.wish == Wish::Stop {
            Passed::Stop
        } else {
            Passed::RunAfterPause
        }
    }

    /// For vCPU threads: this one will not enter the guest again.
    pub(super) fn leave(&self) {
        self.lock().inside -= 1;
        self.changed.notify_all();
    }

    /// Changes the wish; `kick` makes the vCPUs leave the guest. True when all of them are where they are wished.
    pub(super) fn set(&self, wish: Wish, kick: impl Fn()) -> bool {
        let mut state = self.lock();
        if state.wish == Wish::Stop {
            return wish == Wish::Stop;
        }
        state.wish = wish;
        self.closed.store(wish != Wish::Run, Ordering::Release);
        self.changed.notify_all();
        if wish == Wish::Run {
            return true;
        }
        let deadline = Instant::now() + GIVE_UP_AFTER;
        while state.inside > 0 && Instant::now() < deadline {
            kick();
            state = match self.changed.wait_timeout(state, KICK_EVERY) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        state.inside == 0
    }

    pub(super) fn wish(&self) -> Wish {
        self.lock().wish
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;
    use std::thread;

    #[test]
    fn a_paused_vcpu_makes_no_progress_until_resumed() {
        let gate = Arc::new(Gate::new(2));
        let rounds = Arc::new(AtomicU64::new(0));
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let (gate, rounds) = (gate.clone(), rounds.clone());
                thread::spawn(move || {
                    while gate.pass() != Passed::Stop {
                        rounds.fetch_add(1, Ordering::SeqCst);
                        thread::yield_now();
                    }
                    gate.leave();
                })
            })
            .collect();
        assert!(gate.set(Wish::Pause, || {}));
        let at_pause = rounds.load(Ordering::SeqCst);
        thread::yield_now();
        assert_eq!(rounds.load(Ordering::SeqCst), at_pause);
        assert!(gate.set(Wish::Run, || {}));
        while rounds.load(Ordering::SeqCst) < at_pause + 10 {
            thread::yield_now();
        }
        assert!(gate.set(Wish::Stop, || {}));
        for thread in threads {
            thread.join().unwrap();
        }
        assert!(
            !gate.set(Wish::Run, || {}),
            "a stopped VM does not start again"
        );
    }
}
