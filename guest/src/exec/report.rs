//! Moves an exec's output and tells its facts to whoever is attached, in the protocol's order: Started, output,
//! LeaderExited once all that was written before the exit has gone ahead, the end of each stream, TreeEmpty, ExecDone.

use airlock_proto::MAX_DATA_BYTES;
use airlock_proto::v1::from_agent::Body;
use airlock_proto::v1::{ExecDone, Started, StreamEnd, TreeEmpty};

use super::source::{Source, Step};
use super::{Attachment, Exec};
use crate::out_queue::{OutQueue, Outlet};
use crate::table::Key;

/// Bytes that one exec moves before others get their turn, where no connection's room bounds it.
const TURN_BYTES: u64 = 1 << 20;

/// What a pump came to.
#[derive(Debug, Default)]
pub(crate) struct Pumped {
    /// There is more to move without waiting for an event.
    pub(crate) again: bool,
    /// These connections have heard the last of the exec.
    pub(crate) done: Vec<Key>,
    /// Output was queued for somebody.
    pub(crate) output: bool,
}

impl Exec {
    pub(crate) fn attach(&mut self, attachment: Attachment) {
        self.attachments.push(attachment);
    }

    /// Where a stream's newest byte is; what an attachment without a ring starts from.
    pub(crate) fn totals(&self) -> [u64; 2] {
        [0, 1].map(|index: usize| self.sources.get(index).map_or(0, Source::total))
    }

    pub(crate) fn acknowledge(&mut self, offsets: [u64; 2]) {
        let known = self.acknowledged.get_or_insert([0; 2]);
        for (known, new) in known.iter_mut().zip(offsets) {
            *known = (*known).max(new);
        }
    }

    /// Moves what can be moved and tells what can be told.
    pub(crate) fn pump(&mut self, outlets: &mut impl Outlet) -> Pumped {
        let mut pumped = Pumped::default();
        self.tell_started(outlets);
        for index in 0..self.sources.len() {
            if self.sources[index].ring.is_some() {
                self.move_through_ring(index, outlets, &mut pumped);
            } else {
                self.move_directly(index, outlets, &mut pumped);
            }
        }
        if let Some(controller) = self.controller()
            && let Some(out) = outlets.out(controller)
            && let Some(credit) = self.stdin.take_credit()
        {
            out.push(Body::StdinCredit(credit));
        }
        self.tell(outlets, &mut pumped);
        self.attachments
            .retain(|a| !pumped.done.contains(&a.connection));
        pumped
    }

    /// Tells those who have not heard that the exec runs.
    pub(crate) fn tell_started(&mut self, outlets: &mut impl Outlet) {
        if self.attachments.iter().all(|a| a.started_told) {
            return;
        }
        let started = self.started();
        for attachment in &mut self.attachments {
            if !attachment.started_told
                && let Some(out) = outlets.out(attachment.connection)
            {
                attachment.started_told = out.push(Body::Started(started.clone()));
            }
        }
    }

    /// What says that it runs.
    pub(crate) fn started(&self) -> Started {
        Started {
            id: self.id.clone(),
            pid: self.pid,
            start_unix_ns: self.start_unix_ns,
            stdin_credit: self.stdin.credit(),
            stdin_offset: self.stdin.received(),
        }
    }

    /// Without a ring there is one reader at most, and output goes straight to it.
    fn move_directly(&mut self, index: usize, outlets: &mut impl Outlet, pumped: &mut Pumped) {
        let source = &mut self.sources[index];
        let reader = self.attachments.first_mut();
        let limit = source.total() + TURN_BYTES;
        match reader.and_then(|a| Some((outlets.out(a.connection)?, a))) {
            Some((out, attachment)) => {
                while source.may_have_data() && out.has_room() {
                    pumped.output |= source.read_to(out) == Step::Data;
                }
                attachment.cursor[index] = source.total();
                attachment.missed[index] = source.discarded();
            }
            None => {
                while source.may_have_data() && source.total() < limit {
                    source.read_to_nobody();
                }
                pumped.again |= source.may_have_data();
            }
        }
    }

    fn move_through_ring(&mut self, index: usize, outlets: &mut impl Outlet, pumped: &mut Pumped) {
        let limit = self.sources[index].total() + TURN_BYTES;
        loop {
            let keep_from = self.keep_from(index);
            let source = &mut self.sources[index];
            let mut moved = false;
            while source.may_have_data() && source.total() < limit {
                match source.read_to_ring(keep_from) {
                    Some(Step::Data) => moved = true,
                    Some(_) | None => break,
                }
            }
            for attachment in &mut self.attachments {
                if let Some(out) = outlets.out(attachment.connection)
                    && replay(source, attachment, index, out)
                {
                    moved = true;
                    pumped.output = true;
                }
            }
            if !moved {
                break;
            }
            if source.total() >= limit {
                pumped.again = true;
                break;
            }
        }
    }

    /// The oldest byte of a stream that may not be overwritten: one the controller has not been sent, or, once the
    /// client acknowledges, one it has not acknowledged. Observers hold nothing up.
    fn keep_from(&self, index: usize) -> u64 {
        if let Some(acknowledged) = self.acknowledged {
            return acknowledged[index];
        }
        let controller = self.attachments.iter().find(|a| !a.observer);
        controller.map_or(u64::MAX, |a| a.cursor[index])
    }

    fn tell(&mut self, outlets: &mut impl Outlet, pumped: &mut Pumped) {
        let is_over = self.is_over();
        for attachment in &mut self.attachments {
            let Some(out) = outlets.out(attachment.connection) else {
                continue;
            };
            let delivered = self.sources.iter().enumerate().all(|(index, source)| {
                source
                    .report_offset()
                    .is_some_and(|offset| attachment.cursor[index] >= offset)
            });
            if let Some(exit) = &self.exit
                && delivered
                && !attachment.exit_told
            {
                attachment.exit_told = out.push(Body::LeaderExited(*exit));
            }
            for (index, source) in self.sources.iter().enumerate() {
                let all_sent = attachment.cursor[index] >= source.total();
                if source.has_ended() && all_sent && !attachment.end_told[index] {
                    attachment.end_told[index] = out.push(Body::StreamEnd(StreamEnd {
                        stream: source.stream.into(),
                        total_bytes: source.total(),
                        cut_bytes: attachment.missed[index],
                        held_open: source.is_held_open(),
                    }));
                }
            }
            if self.tree.is_none() && attachment.exit_told && !attachment.tree_told {
                attachment.tree_told = out.push(Body::TreeEmpty(TreeEmpty {
                    killed: self.killing,
                }));
            }
            let streams_done = attachment.end_told[..self.sources.len()].iter().all(|t| *t);
            if is_over && attachment.exit_told && streams_done {
                out.push(Body::ExecDone(ExecDone {}));
                pumped.done.push(attachment.connection);
            }
        }
    }
}

/// Sends an attachment what the ring has for it and the connection takes. True if that was anything.
fn replay(source: &Source, attachment: &mut Attachment, index: usize, out: &mut OutQueue) -> bool {
    let Some(ring) = &source.ring else {
        return false;
    };
    let cursor = &mut attachment.cursor[index];
    if *cursor < ring.start() {
        attachment.missed[index] += ring.start() - *cursor;
        *cursor = ring.start();
    }
    let mut moved = false;
    while out.has_room() {
        let data = ring.at(*cursor);
        let data = &data[..data.len().min(MAX_DATA_BYTES)];
        if data.is_empty() {
            break;
        }
        out.push_output(source.stream, *cursor, data);
        *cursor += data.len() as u64;
        moved = true;
    }
    moved
}
