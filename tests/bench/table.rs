//! The table as Markdown.

use std::fmt::Write;

use crate::Options;
use crate::rows::Row;

/// Runs of the deterministic clock differ by so much: a smaller distance says nothing.
const NOISE: f64 = 0.03;

/// The whole report.
pub(crate) fn markdown(options: &Options, facts: &[(&str, String)], rows: &[Row]) -> String {
    let mut out = String::new();
    let baseline = if options.engine == "kvm" {
        "QEMU microvm + vhost-vsock"
    } else {
        "the agent as a process (start: QEMU alone)"
    };
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "### engine {}{}{}\n",
        options.engine,
        if options.label.is_empty() { "" } else { ", " },
        options.label
    );
    for (name, value) in facts {
        let _ = writeln!(out, "- {name}: {value}");
    }
    let _ = writeln!(
        out,
        "- guest: {} MiB, 1 vCPU; median of {} rounds\n",
        options.memory_mib, options.rounds
    );
    let _ = writeln!(
        out,
        "| row | airlock | {baseline} | ratio | |\n|---|---|---|---|---|"
    );
    for row in rows {
        let number = |value: Option<f64>| match value {
            None => "-".to_owned(),
            Some(value) if value >= 100.0 => format!("{value:.0} {}", row.unit),
            Some(value) => format!("{value:.1} {}", row.unit),
        };
        let (ratio, verdict) = match (row.ours, row.baseline) {
            (Some(ours), Some(baseline)) if baseline > 0.0 => {
                let better = (ours < baseline) == row.less_is_better;
                let verdict = match (options.engine.as_str(), better) {
                    // The baseline runs on the real CPU: the ratio says what emulation costs, and nothing is lost by it.
                    ("qemu", _) => "",
                    _ if (ours / baseline - 1.0).abs() < NOISE => "same",
                    (_, true) => "better",
                    (_, false) => "worse",
                };
                (format!("{:.2}", ours / baseline), verdict)
            }
            _ => ("-".to_owned(), ""),
        };
        let _ = writeln!(
            out,
            "| {} | {} | {} | {ratio} | {verdict} |",
            row.name,
            number(row.ours).trim(),
            number(row.baseline).trim()
        );
    }
    out.push('\n');
    out
}
