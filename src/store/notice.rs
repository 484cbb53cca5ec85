//! What the store and the relay tell each other.

use tokio::sync::oneshot;

use super::codec::{DeferredRecord, Record, Settled};
use super::{Appended, Ending, Position, Refusal, WithdrawCustomer};
use crate::clock;
use crate::domain::backlog::GroupMark;
use crate::domain::keys::LaneKey;
use crate::domain::schedule::Retry;

/// What the store tells the relay, in the order of the journal.
#[derive(Debug)]
pub enum Notice {
    /// A segment was begun: events will come in this slot.
    SegmentBegun {
        /// Its slot.
        slot: u16,
        /// Its number.
        segment: u64,
    },
    /// These are durable now.
    Durable {
        /// Events, and withdrawals between them.
        items: Vec<Item>,
        /// Up to here.
        end: Position,
        /// Who waits for that: to be answered when the items are taken. One message for a group, so that a group costs
        /// one wake of another thread, not one for each caller.
        answers: Answers,
    },
    /// The state of what waits is wanted, as of the last `Durable`.
    Snapshot(std::sync::mpsc::Sender<Snapshot>),
    /// The segment in this slot has been removed, nothing of it waiting.
    SegmentRemoved(u16),
    /// The segment in one slot has been rewritten into another, with only the events that waited.
    SegmentCompacted(Compacted),
}

/// Callers whose requests are durable.
#[derive(Debug)]
pub struct Answers(pub(super) Vec<oneshot::Sender<Result<(), Refusal>>>);

impl Answers {
    /// Tells them.
    pub fn send(self) {
        for answer in self.0 {
            // The caller may have gone.
            answer.send(Ok(())).ok();
        }
    }
}

/// One thing that became durable.
#[derive(Debug)]
pub enum Item {
    /// An event.
    Appended(Appended),
    /// A customer was toggled off or forgotten: what waits is to be withdrawn.
    Withdraw(WithdrawCustomer),
}

/// What waits, at a place of the journal.
#[derive(Debug)]
pub struct Snapshot {
    /// Everything before this is in `marks`.
    pub position: Position,
    /// Every segment.
    pub marks: Vec<GroupMark>,
}

/// A segment that was rewritten.
#[derive(Debug)]
pub struct Compacted {
    /// Its number.
    pub segment: u64,
    /// Where it was.
    pub old_slot: u16,
    /// Where it is.
    pub new_slot: u16,
    /// The events that it still holds: sequence number, offset, record length, lane, second of acceptance.
    pub events: Vec<(u64, u32, u32, LaneKey, u32)>,
    /// Answered when the old slot is used no more.
    pub done: std::sync::mpsc::Sender<()>,
}

/// What the relay reports, to be recorded.
#[derive(Debug)]
pub enum Note {
    /// Events that have ended.
    Settled {
        /// Their lane.
        lane: LaneKey,
        /// How.
        ending: Ending,
        /// Whether an earlier `Deferred` of the lane is over.
        retry_is_over: bool,
        /// Their sequence numbers.
        seqs: Vec<u64>,
    },
    /// What the head of a lane waits with.
    Deferred {
        /// The lane.
        lane: LaneKey,
        /// Sequence number of its first event.
        head: u64,
        /// Its state.
        retry: Retry,
        /// When it is due, Unix milliseconds.
        due_ms: u64,
    },
}

impl Note {
    pub(super) fn into_record(self) -> Record<'static> {
        match self {
            Note::Settled { lane, ending, retry_is_over, seqs } => {
                let second = (clock::wall_ms() / 1_000) as u32;
                Record::Settled(Settled { lane, ending, retry_is_over, second, seqs })
            }
            Note::Deferred { lane, head, retry, due_ms } => {
                Record::Deferred(DeferredRecord { lane, head, retry, due_ms })
            }
        }
    }
}
