//! Rows that have a form of their own.

use serde::{Deserialize, Serialize};

use crate::domain::schedule::Retry;
use crate::store::codec::Ending;

/// Up to where the journal is applied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::store) struct PositionRow {
    pub segment: u64,
    pub offset: u32,
    /// The state log that goes with it, and its length then.
    pub state_log: u64,
    pub state_len: u64,
    /// About how much of the state log is out of date, in bytes.
    pub state_dead: u64,
    /// Number of the next idempotency key.
    pub next_id: u64,
    /// The index row that is being filled.
    pub block: u32,
}

/// One idempotency key in its row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::store) struct IdEntry {
    pub key: [u8; 16],
    pub second: u32,
    /// The event's sequence number.
    pub seq: u64,
    /// How it ended, and when, in Unix seconds.
    pub ended: Option<(Ending, u32)>,
}

/// A lane's retry state as a row.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(in crate::store) struct RetryRow {
    pub lane: u64,
    pub head: u64,
    pub retry: Retry,
    pub due_ms: u64,
}
