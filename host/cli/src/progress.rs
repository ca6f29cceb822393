//! Telling a person at a terminal that something takes its time.

use std::convert::Infallible;
use std::future::Future;
use std::io::{IsTerminal, stderr};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

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

/// Takes the line away when the work is done or cancelled.
struct Cleared(ProgressBar);

impl Drop for Cleared {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
