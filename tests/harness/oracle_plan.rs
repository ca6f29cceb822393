//! What one run of the oracle test does, from a seed: the program that runs it and the test that judges it read the
//! same plan. No I/O lives here.

use std::ops::RangeInclusive;

/// Most bytes that the leader writes to one stream.
pub const MAX_STREAM_BYTES: u64 = 1 << 20;
/// Most writes of one run, so that small writes of a large stream do not take all the time there is.
const MAX_WRITES: u64 = 160;
/// What pipes, pages, frames and packets are sized in: one byte beside these is where mistakes live.
const EDGES: [u64; 8] = [
    4096,
    8 << 10,
    16 << 10,
    64 << 10,
    128 << 10,
    192 << 10,
    256 << 10,
    MAX_STREAM_BYTES - 1,
];
/// Smallest ring that a slow reader reads from.
const MIN_SLOW_RING_BYTES: u64 = 1024;
/// Signals that end a process and that nothing here ignores, blocks or handles.
const SIGNALS: [u8; 10] = [4, 5, 6, 8, 9, 10, 14, 15, 26, 31];

/// SplitMix64: a few instructions, and every seed is a good one.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// A sequence of its own for each pair.
    #[must_use]
    pub fn new(seed: u64, run: u64) -> Self {
        let mut rng = Self(seed ^ run.wrapping_mul(0xd6e8_feb8_6659_fd93));
        rng.draw();
        rng
    }

    /// 64 bits.
    fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn within(&mut self, range: RangeInclusive<u64>) -> u64 {
        range.start() + self.draw() % (range.end() - range.start() + 1)
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.draw().is_multiple_of(n)
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[(self.draw() % of.len() as u64) as usize]
    }
}

/// Something the leader does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Writes the next so many bytes of a stream (0 stdout, 1 stderr), in one write(2) as far as that takes them.
    Write {
        stream: usize,
        bytes: u64,
    },
    Pause {
        us: u64,
    },
    /// Lets go of a stream for good.
    Close {
        stream: usize,
    },
    /// Starts the holder.
    Fork,
}

/// How the leader ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Code(u8),
    Signal(u8),
    /// It does not, by itself: somebody is to end it.
    Never,
}

/// A child that outlives the leader with the leader's streams open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holder {
    /// Which streams.
    pub streams: [bool; 2],
    /// Bytes that it writes to them once the leader has gone.
    pub writes: [u64; 2],
    /// How long it stays after that.
    pub stays_us: u64,
}

/// What is asked of the agent for streams that are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holders {
    Grace { ms: u64 },
    Wait,
    Kill,
}

/// Who ends a leader that ends never.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ender {
    Nobody,
    /// The client, with SIGKILL to the tree, when so many bytes have come.
    Client {
        after_bytes: u64,
    },
    Timeout {
        ms: u64,
    },
}

/// One run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub steps: Vec<Step>,
    pub end: End,
    pub holder: Option<Holder>,
    pub holders: Holders,
    pub ender: Ender,
    /// 0: none.
    pub replay_bytes: u64,
    /// The client takes its time over every piece of output.
    pub slow_reader: bool,
    keys: [u64; 2],
}

impl Plan {
    /// The plan of run `run` under `seed`.
    #[must_use]
    pub fn new(seed: u64, run: u64) -> Self {
        let mut rng = Rng::new(seed, run);
        let keys = [rng.draw(), rng.draw()];
        let totals = [size(&mut rng), size(&mut rng)];
        let ender = match rng.within(0..=15) {
            0 => Ender::Client {
                after_bytes: rng.within(0..=totals[0] + totals[1]),
            },
            1 => Ender::Timeout {
                ms: rng.within(1..=30),
            },
            _ => Ender::Nobody,
        };
        let end = match (ender, rng.within(0..=3)) {
            (Ender::Nobody, 0) => End::Signal(rng.pick(&SIGNALS)),
            (Ender::Nobody, 1) => End::Code(0),
            (Ender::Nobody, _) => End::Code(rng.within(0..=255) as u8),
            _ => End::Never,
        };
        let holder = (ender == Ender::Nobody && rng.one_in(6)).then(|| holder(&mut rng));
        let steps = steps(&mut rng, totals, holder.is_some());
        let holders = match rng.within(0..=2) {
            0 => Holders::Wait,
            1 => Holders::Kill,
            _ => Holders::Grace {
                ms: rng.within(1..=20),
            },
        };
        let replay_bytes = match rng.within(0..=7) {
            0 => rng.within(1..=5000),
            1 => rng.within(5000..=256 << 10),
            _ => 0,
        };
        // A ring of a few bytes makes pieces of a few bytes; a wait at each of them would take minutes.
        let slow_reader =
            rng.one_in(32) && (replay_bytes == 0 || replay_bytes >= MIN_SLOW_RING_BYTES);
        Self {
            steps,
            end,
            holder,
            holders,
            ender,
            replay_bytes,
            slow_reader,
            keys,
        }
    }

    /// Bytes that the leader writes to a stream.
    #[must_use]
    pub fn leader_bytes(&self, stream: usize) -> u64 {
        let of_stream = |step: &Step| match step {
            Step::Write { stream: s, bytes } if *s == stream => *bytes,
            _ => 0,
        };
        self.steps.iter().map(of_stream).sum()
    }

    /// Bytes of a stream from `offset` on, into all of `data`. Each place has its own, so that a piece that is missing,
    /// doubled or from the other stream shows.
    pub fn fill(&self, stream: usize, offset: u64, data: &mut [u8]) {
        let word = |index: u64| {
            let word = (index ^ self.keys[stream]).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (word ^ (word >> 29)).to_le_bytes()
        };
        let head = ((8 - offset % 8) % 8).min(data.len() as u64) as usize;
        let (first, rest) = data.split_at_mut(head);
        for (place, byte) in (offset..).zip(first) {
            *byte = word(place / 8)[(place % 8) as usize];
        }
        let start = (offset + head as u64) / 8;
        for (index, chunk) in (start..).zip(rest.chunks_mut(8)) {
            chunk.copy_from_slice(&word(index)[..chunk.len()]);
        }
    }
}

fn size(rng: &mut Rng) -> u64 {
    match rng.within(0..=7) {
        0 | 1 => rng.within(0..=64),
        2 => rng.pick(&EDGES) - 1 + rng.within(0..=2),
        3 => rng.within(0..=MAX_STREAM_BYTES),
        _ => {
            let bits = rng.within(0..=20);
            rng.within(0..=1 << bits)
        }
    }
}

fn holder(rng: &mut Rng) -> Holder {
    let streams = rng.pick(&[[true, false], [false, true], [true, true]]);
    let silent = rng.one_in(2);
    let mut bytes = |held: bool| {
        if silent || !held {
            0
        } else {
            size(rng).min(64 << 10)
        }
    };
    let writes = streams.map(&mut bytes);
    Holder {
        streams,
        writes,
        stays_us: rng.within(0..=20_000),
    }
}

fn steps(rng: &mut Rng, mut left: [u64; 2], forks: bool) -> Vec<Step> {
    let most = left[0].max(left[1]).max(1);
    let chunk = match rng.within(0..=2) {
        0 => most,
        1 => most.min(16 << 10),
        _ => rng.within(1..=512),
    };
    let chunk = chunk.max((left[0] + left[1]) / MAX_WRITES);
    let paced = rng.one_in(8);
    let mut steps = Vec::new();
    if paced {
        steps.push(Step::Pause {
            us: rng.within(0..=4000),
        });
    }
    while left[0] + left[1] > 0 {
        let stream = rng.within(0..=1) as usize;
        if left[stream] == 0 {
            continue;
        }
        let bytes = rng.within(1..=chunk).min(left[stream]);
        left[stream] -= bytes;
        steps.push(Step::Write { stream, bytes });
        if paced && rng.one_in(8) {
            steps.push(Step::Pause {
                us: rng.within(0..=1500),
            });
        }
    }
    if forks {
        let at = rng.within(0..=steps.len() as u64) as usize;
        steps.insert(at, Step::Fork);
    } else {
        for stream in [0, 1] {
            if rng.one_in(16) {
                steps.push(Step::Close { stream });
            }
        }
        if rng.one_in(16) {
            steps.push(Step::Pause {
                us: rng.within(0..=4000),
            });
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_the_same_in_whatever_pieces_it_is_made() {
        let plan = Plan::new(1, 2);
        let mut whole = vec![0; 100];
        plan.fill(1, 3, &mut whole);
        for cut in 0..100 {
            let mut pieces = vec![0; 100];
            let (a, b) = pieces.split_at_mut(cut);
            plan.fill(1, 3, a);
            plan.fill(1, 3 + cut as u64, b);
            assert_eq!(pieces, whole, "cut at {cut}");
        }
    }

    #[test]
    fn every_kind_of_run_comes_up_and_sizes_keep_their_bound() {
        let plans: Vec<Plan> = (0..2000).map(|run| Plan::new(7, run)).collect();
        for stream in [0, 1] {
            let bytes = |p: &Plan| p.leader_bytes(stream);
            assert!(plans.iter().all(|p| bytes(p) <= MAX_STREAM_BYTES));
            assert!(plans.iter().any(|p| bytes(p) == 0));
            assert!(plans.iter().any(|p| bytes(p) > MAX_STREAM_BYTES / 2));
        }
        assert!(plans.iter().any(|p| matches!(p.end, End::Signal(_))));
        assert!(
            plans
                .iter()
                .any(|p| p.holder.is_some_and(|h| h.writes[0] > 0))
        );
        assert!(
            plans
                .iter()
                .any(|p| matches!(p.ender, Ender::Client { .. }))
        );
        assert!(
            plans
                .iter()
                .any(|p| matches!(p.ender, Ender::Timeout { .. }))
        );
        assert_eq!(Plan::new(7, 5), plans[5]);
    }
}
