//! Whether what the agent reported is what happened. Pure: plan, truth and what was seen go in.

use airlock_client::{Cause, Ended, ExitReport, Status, StreamTotals};
use airlock_tests::oracle_plan::{Ender, Holders, Plan};

use crate::drive::{Seen, Truth};

pub(crate) fn judge(plan: &Plan, truth: &Truth, seen: &Seen) -> Result<(), String> {
    let ExitReport::Ended {
        ended,
        stdout,
        stderr,
        tree_killed,
    } = &seen.report
    else {
        return Err(format!("its end is not known: {:?}", seen.report));
    };
    judge_exit(plan, truth, ended)?;
    for (stream, totals) in [stdout, stderr].into_iter().enumerate() {
        judge_stream(plan, truth, seen, stream, totals)
            .map_err(|what| format!("{} {what}", ["stdout", "stderr"][stream]))?;
    }
    if *tree_killed && plan.holder.is_none() && plan.ender == Ender::Nobody {
        return Err("something was killed where nothing was left".to_owned());
    }
    Ok(())
}

fn judge_exit(plan: &Plan, truth: &Truth, ended: &Ended) -> Result<(), String> {
    let signal = |number| Status::Signal {
        number,
        core: false,
    };
    let expected = match plan.ender {
        Ender::Nobody => (truth.status, Cause::Normal),
        Ender::Client { .. } => (signal(9), Cause::Killed),
        Ender::Timeout { .. } => (signal(15), Cause::Timeout),
    };
    if (ended.status, ended.cause) == expected {
        return Ok(());
    }
    Err(format!(
        "it ended by {expected:?} and was reported as {:?}",
        (ended.status, ended.cause)
    ))
}

fn judge_stream(
    plan: &Plan,
    truth: &Truth,
    seen: &Seen,
    stream: usize,
    totals: &StreamTotals,
) -> Result<(), String> {
    let (whole, came) = (&truth.streams[stream], &seen.streams[stream]);
    if totals.cut_bytes != 0 || totals.total_bytes != came.len() as u64 {
        return Err(format!("{} bytes came, and it says {totals:?}", came.len()));
    }
    let same = whole.iter().zip(came).take_while(|(a, b)| a == b).count();
    if same < came.len() {
        let (whole, came) = (whole.len(), came.len());
        return Err(format!("differs at {same} of {came}; {whole} were written"));
    }
    // A leader that is ended from outside may have written any part; a holder may be cut off, the leader never.
    let ended_from_outside = plan.ender != Ender::Nobody;
    let holder = plan.holder.filter(|holder| holder.streams[stream]);
    let cut_off = holder.is_some() && plan.holders != Holders::Wait;
    let least = match (ended_from_outside, cut_off) {
        (true, _) => 0,
        (false, true) => plan.leader_bytes(stream) as usize,
        (false, false) => whole.len(),
    };
    if came.len() < least {
        let came = came.len();
        return Err(format!("lost bytes: {came} of {least} came"));
    }
    let before = seen.before_exit[stream];
    let due = if ended_from_outside {
        came.len()
    } else {
        plan.leader_bytes(stream) as usize
    };
    if before < due {
        return Err(format!(
            "exit came before its bytes: after {before} of {due}"
        ));
    }
    if totals.held_open && !cut_off {
        return Err("is said to be held, and nobody held it".to_owned());
    }
    Ok(())
}
