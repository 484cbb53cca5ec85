//! Fills the schedule with what waits in one segment.

use std::collections::HashMap;
use std::io;

use super::Found;
use crate::domain::backlog::{Handle, first_seq};
use crate::domain::customer::Toggle;
use crate::domain::endpoint::{EndpointName, Plugin};
use crate::domain::keys::{HashKey, LaneKey};
use crate::domain::schedule::Schedule;
use crate::metrics::StoreMetrics;
use crate::store::checkpoint::Live;
use crate::store::codec::{Record, StateChange};
use crate::store::queue::{BLOCK_EVENTS, IndexEntry, Queue, QueueError};
use crate::store::segment::{self, Frame};
use crate::store::{Position, Segments};

/// Events that have ended without a record that says so, by sequence number, with their lanes.
pub(super) type Unrecorded = HashMap<u64, LaneKey>;

/// Events whose lanes are looked up together.
const EXPECTED: usize = 64;

/// One segment on its way into the schedule.
pub(super) struct Loading<'a> {
    pub(super) found: &'a Found,
    pub(super) slot: u16,
    /// Before this, the checkpoint says what waits.
    pub(super) covered: Position,
    pub(super) segments: &'a Segments,
}

impl Loading<'_> {
    pub(super) fn is_covered(&self, offset: u32) -> bool {
        Position { segment: self.found.number, offset } < self.covered
    }

    /// Adds the events before the checkpoint that wait, by the index rows, or by the segment itself where those are
    /// missing.
    pub(super) fn load_covered(
        &self,
        rows: Result<Vec<IndexEntry>, QueueError>,
        schedule: &mut Schedule,
        metrics: &StoreMetrics,
    ) -> io::Result<()> {
        let waits = self.found.waits.as_ref().map(Live::unpack);
        // A segment that the checkpoint does not list: only with an older checkpoint. All of it waits.
        let waits = |seq: u64| waits.as_ref().is_none_or(|waits| waits(seq - first_seq(self.found.number)));
        match rows {
            Ok(rows) => {
                for some in rows.chunks(EXPECTED) {
                    schedule.expect(some.iter().map(|entry| LaneKey(entry.lane)));
                    for entry in some.iter().filter(|entry| self.is_covered(entry.offset)) {
                        self.add(schedule, entry, waits(entry.seq));
                    }
                }
            }
            Err(error) => {
                // A compaction that a crash cut off has a file and no rows.
                if self.found.generation == 0 {
                    tracing::error!(segment = self.found.number, %error, "index rows are damaged: reading the segment");
                    metrics.damaged("queue", 1);
                }
                let end = if self.found.number == self.covered.segment {
                    self.covered.offset.min(self.found.end)
                } else {
                    self.found.end
                };
                segment::scan_synced(&self.found.file, self.found.number, 0, u64::from(end), |frame| {
                    if let Some(entry) = index_entry(frame) {
                        self.add(schedule, &entry, waits(entry.seq));
                    }
                })?;
            }
        }
        Ok(())
    }

    /// Adds what came after the checkpoint, and takes out what ended after it. A customer who was switched off or
    /// forgotten is not pushed to: `withdrawn` has the events of which no record says how they ended, for want of it at a
    /// crash.
    pub(super) fn replay(
        &self,
        schedule: &mut Schedule,
        hashing: &HashKey,
        withdrawn: &mut Unrecorded,
    ) -> io::Result<()> {
        let from = if self.is_covered(0) {
            if self.covered.segment != self.found.number {
                return Ok(());
            }
            self.covered.offset
        } else {
            0
        };
        if from >= self.found.end {
            return Ok(());
        }
        segment::scan_synced(&self.found.file, self.found.number, from, u64::from(self.found.end), |frame| {
            match Record::decode(frame.body()) {
                Some(Record::Accepted(_)) => {
                    if let Some(entry) = index_entry(frame) {
                        self.add(schedule, &entry, true);
                    }
                }
                Some(Record::Settled(settled)) => {
                    let events: Vec<Handle> = settled
                        .seqs
                        .iter()
                        .filter_map(|seq| {
                            let number = seq >> crate::domain::backlog::PLACE_BITS;
                            schedule.backlog.find(*self.segments.slots.get(&number)?, *seq)
                        })
                        .collect();
                    schedule.settled_before(settled.lane, &events, 0);
                    for seq in &settled.seqs {
                        withdrawn.remove(seq);
                    }
                }
                Some(Record::State(change)) => {
                    let Some((plugin, web_token)) = withdraws(&change) else { return };
                    for (_, lane) in hashing.lanes(plugin, web_token) {
                        let found = schedule.withdraw(lane, u64::MAX, 0);
                        withdrawn.extend(found.events.iter().map(|event| (schedule.backlog.seq(*event), lane)));
                    }
                }
                Some(Record::Opened(_) | Record::Deferred(_) | Record::Sealed { .. })
                | Some(Record::Dead(_) | Record::Gone(_))
                | None => {}
            }
        })
        .map(drop)
    }

    fn add(&self, schedule: &mut Schedule, entry: &IndexEntry, waits: bool) {
        let place = entry.seq.saturating_sub(first_seq(self.found.number));
        let is_sparse = schedule.backlog.group(self.slot).is_some_and(|group| group.len() as u64 != place);
        let seq = is_sparse.then_some(entry.seq);
        // A segment with a gap is kept by number from there on.
        if is_sparse {
            schedule.backlog.make_sparse(self.slot);
        }
        let seq = seq.or_else(|| schedule.backlog.is_sparse(self.slot).then_some(entry.seq));
        let Some(handle) = schedule.backlog.append(self.slot, seq, entry.offset, entry.second, entry.len) else {
            return;
        };
        if waits {
            let endpoint = EndpointName::from_number(entry.endpoint);
            schedule.appended(handle, LaneKey(entry.lane), endpoint, 0);
        } else {
            schedule.backlog.settle(handle);
        }
    }
}

/// The index rows of a segment.
pub(super) fn index_rows(found: &Found, queue: &Queue) -> Result<Vec<IndexEntry>, QueueError> {
    let mut rows = Vec::new();
    for block in 0.. {
        match queue.block(found.number, found.generation, block)? {
            Some(entries) => {
                let is_last = entries.len() < BLOCK_EVENTS;
                rows.extend(entries);
                if is_last {
                    break;
                }
            }
            None => break,
        }
    }
    // What waits beyond the rows' end would be lost: then the rows are not to be believed.
    let places = found.waits.as_ref().map(Live::highest).unwrap_or_default();
    let indexed = rows.last().map_or(0, |last| last.seq - first_seq(found.number) + 1);
    if places > indexed {
        return Err(QueueError::Damaged("index rows are missing"));
    }
    Ok(rows)
}

/// The customer whose waiting events a change withdraws.
fn withdraws(change: &StateChange) -> Option<(Plugin, &str)> {
    match change {
        StateChange::PutCustomer(customer) if customer.toggle == Toggle::Off => {
            Some((customer.plugin, &customer.web_token))
        }
        StateChange::DropCustomer { plugin, web_token } => Some((*plugin, web_token)),
        StateChange::PutCustomer(_) | StateChange::Name { .. } => None,
        StateChange::Setting { .. } | StateChange::Nonce { .. } => None,
    }
}

/// What an index row says of an event; `None` for any other record.
pub(in crate::store) fn index_entry(frame: &Frame) -> Option<IndexEntry> {
    Some(IndexEntry::of(frame, &Record::decode(frame.body())?.into_event()?))
}
