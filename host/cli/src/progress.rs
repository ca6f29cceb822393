//! Telling a person at a terminal that something takes its time.

use std::convert::Infallible;
use std::future::Future;
use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::output::tell;

/// What is quicker than this needs no word.
const PATIENCE: Duration = Duration::from_secs(1);
const TICK: Duration = Duration::from_millis(100);

/// Shows `text` and the seconds gone by while `work` takes longer than a second, if stderr is a terminal.
pub(crate) async fn shown<T>(text: &str, work: impl Future<Output = T>) -> T {
    if !stderr().is_terminal() {
        return work.await;
    }
    let spinner = async {
        tokio::time::sleep(PATIENCE).await;
        let bar = ProgressBar::new_spinner().with_elapsed(PATIENCE);
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
            bar.set_style(style);
        }
        bar.set_message(text.to_owned());
        bar.enable_steady_tick(TICK);
        let _cleared = Cleared(bar);
        std::future::pending::<Infallible>().await
    };
    tokio::select! {
        result = work => result,
        never = spinner => match never {},
    }
}

/// Bytes on their way. Shown once they take longer than a second, if stderr is a terminal.
pub(crate) struct Transfer {
    start: Instant,
    total: Option<u64>,
    done: u64,
    bar: Option<Cleared>,
    terminal: bool,
}

impl Transfer {
    /// `total`: how many there will be, if that is known.
    pub(crate) fn new(total: Option<u64>) -> Self {
        Self {
            start: Instant::now(),
            total,
            done: 0,
            bar: None,
            terminal: stderr().is_terminal(),
        }
    }

    pub(crate) fn add(&mut self, bytes: usize) {
        self.done += bytes as u64;
        if self.bar.is_none() && self.terminal && self.start.elapsed() >= PATIENCE {
            self.bar = Some(Cleared(self.draw()));
        }
        if let Some(Cleared(bar)) = &self.bar {
            bar.set_position(self.done);
        }
    }

    /// A line for the person, above the bar.
    pub(crate) fn say(&self, line: &str) {
        match &self.bar {
            Some(Cleared(bar)) => bar.suspend(|| tell!("{line}")),
            None => tell!("{line}"),
        }
    }

    fn draw(&self) -> ProgressBar {
        let (bar, template) = match self.total {
            Some(total) => (
                ProgressBar::new(total),
                "{bar:30} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left",
            ),
            None => (
                ProgressBar::new_spinner(),
                "{spinner} {binary_bytes}, {binary_bytes_per_sec}",
            ),
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.enable_steady_tick(TICK);
        bar
    }
}

/// Takes the line away when the work is done or cancelled.
struct Cleared(ProgressBar);

impl Drop for Cleared {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
