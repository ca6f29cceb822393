//! `airlock doctor`: what this host has and lacks.

use std::fmt::Write;

use airlock_sandbox::Paths;
use airlock_sandbox::doctor::{Severity, examine};
use serde_json::json;

use crate::exit::OWN_FAILURE;
use crate::lowargs::DoctorArgs;
use crate::output::print;

pub(crate) fn doctor(args: &DoctorArgs) -> anyhow::Result<u8> {
    let findings = examine(&Paths::from_env()?, args.fix);
    if args.json {
        print(&format!("{:#}\n", json!(findings)))?;
    } else {
        let mut text = String::new();
        for finding in &findings {
            let mark = match finding.severity {
                Severity::Ok => "ok   ",
                Severity::Warning => "warn ",
                Severity::Error => "ERROR",
            };
            // Writing to a String does not fail.
            let _ = writeln!(text, "{mark}  {:14} {}", finding.check, finding.seen);
            if !finding.advice.is_empty() {
                let _ = writeln!(text, "{:22}{}", "", finding.advice);
            }
        }
        print(&text)?;
    }
    // An engine that cannot be used is no failure while the other can.
    let failed = findings
        .iter()
        .any(|finding| finding.severity == Severity::Error);
    Ok(if failed { OWN_FAILURE } else { 0 })
}
