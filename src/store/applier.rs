//! Applies the journal to the queue's rows and to the state log.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::PoisonError;

use super::codec::{Ending, Record, StateChange};
use super::dead_letters::{DeadLetters, LetterId};
use super::queue::{BLOCK_EVENTS, ID_ROW, IdEntry, IndexEntry, PositionRow, Queue, QueueError, RetryRow};
use super::segment::{self, Frame};
use super::state_log::StateLog;
use super::{Inner, Position, lock, state};
use crate::domain::keys::HashKey;

/// State log bytes beyond which it may be written anew.
const STATE_LOG_MIN: u64 = 16 << 20;
/// About how many bytes of the state log a row stands for.
const ROW_BYTES: usize = 150;
/// Changes of customers and names that are gathered before their rows are changed.
const CHANGES_MAX: usize = 8_192;

/// Applies the journal to the queue's rows.
#[derive(Debug)]
pub(super) struct Applier {
    at: PositionRow,
    block: Vec<IndexEntry>,
    ids: Vec<IdEntry>,
    /// Customers and names whose rows are yet to be changed, in the order of the journal, with their bytes in the log.
    changes: Vec<(StateChange, usize)>,
    /// Events that have ended and whose rows are yet to say so: sequence number, how, Unix second.
    ended: Vec<(u64, Ending, u32)>,
    /// The rows of idempotency keys that are kept: the first sequence number of each. Read when first needed.
    id_rows: Option<VecDeque<(u64, u64)>>,
    has_new_ids: bool,
    /// Dead letters that the journal says are gone, yet to be written down.
    gone: Vec<LetterId>,
    pub state_log: StateLog,
    /// State records before this are in the rows already, maybe with newer ones.
    state_from: Position,
    hashing: HashKey,
    dedupe_max: u64,
    is_dirty: bool,
    pub damaged: u64,
}

impl Applier {
    /// Goes on from what the queue's rows say.
    pub(super) fn resume(
        queue: &Queue,
        at: PositionRow,
        state_log: StateLog,
        state_from: Position,
        settings: (HashKey, u64),
    ) -> Result<Applier, QueueError> {
        let (hashing, dedupe_max) = settings;
        let mut block = queue.block(at.segment, 0, at.block)?.unwrap_or_default();
        // Rows may be ahead of the position: that part is applied again.
        block.retain(|entry| entry.offset < at.offset);
        let mut ids = queue.ids(at.next_id / ID_ROW as u64)?.unwrap_or_default();
        ids.truncate((at.next_id % ID_ROW as u64) as usize);
        Ok(Applier {
            at,
            block,
            ids,
            changes: Vec::new(),
            ended: Vec::new(),
            id_rows: None,
            has_new_ids: false,
            gone: Vec::new(),
            state_log,
            state_from,
            hashing,
            dedupe_max,
            is_dirty: false,
            damaged: 0,
        })
    }

    pub(super) fn position(&self) -> Position {
        Position { segment: self.at.segment, offset: self.at.offset }
    }

    pub(super) fn next_id(&self) -> u64 {
        self.at.next_id
    }

    /// Applies a stretch of one segment that is known to be synced, but for the last changes of customers and names
    /// ([`Applier::change_rows`]). `progress` hears up to where all is in the rows.
    pub(super) fn apply(
        &mut self,
        queue: &Queue,
        file: &File,
        (segment, to): (u64, u32),
        mut progress: impl FnMut(Position),
    ) -> Result<(), QueueError> {
        if segment != self.at.segment {
            self.end_block(queue)?;
            self.at = PositionRow { segment, offset: 0, block: 0, ..self.at };
        }
        if to <= self.at.offset {
            return Ok(());
        }
        let mut result = Ok(());
        let scan = segment::scan_synced(file, segment, self.at.offset, u64::from(to), |frame| {
            if result.is_ok() && self.changes.len().max(self.ended.len()) >= CHANGES_MAX {
                self.at.offset = frame.header.offset;
                result = self.change_rows(queue);
                progress(self.position());
            }
            if result.is_ok() {
                result = self.apply_frame(queue, frame);
            }
        })?;
        result?;
        self.damaged += scan.damaged.len() as u64;
        self.at.offset = to;
        self.is_dirty = true;
        Ok(())
    }

    /// Changes the rows of customers and names. They are gone through in their own order, so that each of sled's pages
    /// is read once for many of them.
    pub(super) fn change_rows(&mut self, queue: &Queue) -> Result<(), QueueError> {
        let mut changes = std::mem::take(&mut self.changes);
        changes.sort_by_cached_key(|(change, _)| state::place(&self.hashing, change));
        for (change, bytes) in &changes {
            // What it replaces was about as long.
            let gone = state::apply(queue, &self.hashing, change)?;
            self.state_log.dead += (gone * bytes) as u64;
        }
        self.end_events(queue)?;
        if self.has_new_ids && !self.ids.is_empty() {
            queue.put_ids(self.at.next_id / ID_ROW as u64, &self.ids)?;
        }
        self.has_new_ids = false;
        Ok(())
    }

    /// Says in the rows of idempotency keys what became of events. Those are in the order of the events.
    fn end_events(&mut self, queue: &Queue) -> Result<(), QueueError> {
        let mut ended = std::mem::take(&mut self.ended);
        if ended.is_empty() {
            return Ok(());
        }
        ended.sort_unstable_by_key(|(seq, ..)| *seq);
        let current = self.at.next_id / ID_ROW as u64;
        if self.id_rows.is_none() {
            let mut rows = VecDeque::new();
            for row in current.saturating_sub(self.rows_kept())..current {
                rows.extend(queue.ids(row)?.and_then(|entries| Some((entries.first()?.seq, row))));
            }
            rows.extend(self.ids.first().map(|entry| (entry.seq, current)));
            self.id_rows = Some(rows);
        }
        let Some(rows) = &self.id_rows else { return Ok(()) };
        let row_of = |seq: u64| {
            let after = rows.partition_point(|(first, _)| *first <= seq);
            rows.get(after.checked_sub(1)?).map(|(_, row)| *row)
        };
        let mut open: Option<(u64, Vec<IdEntry>)> = None;
        for (seq, ending, second) in ended {
            let Some(row) = row_of(seq) else { continue };
            if row == current {
                end_in(&mut self.ids, seq, ending, second);
                self.has_new_ids = true;
                continue;
            }
            if open.as_ref().is_none_or(|(number, _)| *number != row) {
                if let Some((number, entries)) = open.take() {
                    queue.put_ids(number, &entries)?;
                }
                open = queue.ids(row)?.map(|entries| (row, entries));
            }
            if let Some((_, entries)) = &mut open {
                end_in(entries, seq, ending, second);
            }
        }
        match open {
            Some((number, entries)) => queue.put_ids(number, &entries),
            None => Ok(()),
        }
    }

    fn rows_kept(&self) -> u64 {
        self.dedupe_max / ID_ROW as u64 + 1
    }

    /// The idempotency key that was applied last, as in its row.
    pub(super) fn last_id(&self, queue: &Queue) -> Result<Option<[u8; 16]>, QueueError> {
        let before = (self.at.next_id / ID_ROW as u64).checked_sub(1).filter(|_| self.ids.is_empty());
        let row = before.map(|row| queue.ids(row)).transpose()?.flatten();
        Ok(row.as_ref().unwrap_or(&self.ids).last().map(|entry| entry.key))
    }

    /// About how many bytes the rows should take, with so many events waiting: an index entry has about 16 bytes, and
    /// what is dead of the journal is at most a third; a key has about 30.
    pub(super) fn row_bytes(&self, waiting: u64) -> u64 {
        let state = self.state_log.len.saturating_sub(self.state_log.dead);
        24 * waiting + 30 * self.at.next_id.min(self.dedupe_max) + state
    }

    /// Writes down what the journal says is gone of dead letters.
    pub(super) fn write_gone(&mut self, dead: &mut DeadLetters) -> io::Result<()> {
        dead.write_gone(&self.gone)?;
        self.gone.clear();
        Ok(())
    }

    fn apply_frame(&mut self, queue: &Queue, frame: &Frame) -> Result<(), QueueError> {
        match Record::decode(frame.body()) {
            Some(Record::Accepted(event)) => {
                let entry = IndexEntry::of(frame, &event);
                self.block.push(entry);
                if self.block.len() == BLOCK_EVENTS {
                    self.end_block(queue)?;
                    self.at.block += 1;
                }
                let IndexEntry { seq, second, .. } = entry;
                self.push_id(queue, IdEntry { key: event.key.to_le_bytes(), second, seq, ended: None })
            }
            Some(Record::Settled(settled)) => {
                self.ended.extend(settled.seqs.iter().map(|seq| (*seq, settled.ending, settled.second)));
                if settled.retry_is_over { queue.remove_retry(settled.lane.0) } else { Ok(()) }
            }
            Some(Record::Gone(letters)) => {
                self.gone.extend(letters);
                Ok(())
            }
            Some(Record::Deferred(deferred)) => {
                let (lane, head, retry, due_ms) = (deferred.lane.0, deferred.head, deferred.retry, deferred.due_ms);
                queue.put_retry(&RetryRow { lane, head, retry, due_ms })
            }
            Some(Record::State(change)) => {
                let here = Position { segment: self.at.segment, offset: frame.header.offset };
                if here < self.state_from {
                    return Ok(());
                }
                let bytes = self.state_log.push(&change)?;
                self.changes.push((change, bytes));
                Ok(())
            }
            Some(Record::Opened(_) | Record::Sealed { .. } | Record::Dead(_)) => Ok(()),
            None => {
                self.damaged += 1;
                Ok(())
            }
        }
    }

    fn push_id(&mut self, queue: &Queue, entry: IdEntry) -> Result<(), QueueError> {
        let row = self.at.next_id / ID_ROW as u64;
        if let (true, Some(rows)) = (self.ids.is_empty(), &mut self.id_rows) {
            rows.push_back((entry.seq, row));
        }
        self.ids.push(entry);
        self.has_new_ids = true;
        self.at.next_id += 1;
        if self.ids.len() >= ID_ROW {
            queue.put_ids(row, &self.ids)?;
            self.ids.clear();
            if let Some(old) = row.checked_sub(self.rows_kept()) {
                queue.remove_ids(old)?;
                if let Some(rows) = &mut self.id_rows {
                    while rows.front().is_some_and(|(_, row)| *row <= old) {
                        rows.pop_front();
                    }
                }
            }
        }
        Ok(())
    }

    fn end_block(&mut self, queue: &Queue) -> Result<(), QueueError> {
        if !self.block.is_empty() {
            queue.put_block(self.at.segment, 0, self.at.block, &self.block)?;
            self.block.clear();
        }
        Ok(())
    }

    /// Writes the rows that are being filled, and up to where the journal is applied, last.
    pub(super) fn commit(&mut self, queue: &Queue) -> Result<(), QueueError> {
        if !self.is_dirty {
            return Ok(());
        }
        self.change_rows(queue)?;
        if !self.block.is_empty() {
            queue.put_block(self.at.segment, 0, self.at.block, &self.block)?;
        }
        // What is gone of dead letters is not in rows of sled's: the position never gets ahead of it, nor of the state log.
        if !self.gone.is_empty() {
            return Ok(());
        }
        self.state_log.write()?;
        self.state_log.sync()?;
        self.at.state_log = self.state_log.number;
        self.at.state_len = self.state_log.len;
        self.at.state_dead = self.state_log.dead;
        queue.put_position(&self.at)?;
        self.is_dirty = false;
        Ok(())
    }

    /// Counts rows that are gone without a change that says so.
    pub(super) fn count_gone(&mut self, rows: usize) {
        self.state_log.dead += (rows * ROW_BYTES) as u64;
    }

    /// Writes the state log anew from the rows, when it has become much longer than needed, or a sync of it failed.
    pub(super) fn renew_state_log(&mut self, queue: &Queue, dir: &Path) -> Result<(), QueueError> {
        let (len, dead) = (self.state_log.len, self.state_log.dead);
        let is_long = len >= STATE_LOG_MIN && 2 * dead >= len;
        if !is_long && !self.state_log.is_suspect {
            return Ok(());
        }
        self.rewrite_state_log(queue, dir)
    }

    /// Writes the state log anew from the rows.
    pub(super) fn rewrite_state_log(&mut self, queue: &Queue, dir: &Path) -> Result<(), QueueError> {
        let at = PositionRow { state_log: self.state_log.number + 1, state_len: 0, state_dead: 0, ..self.at };
        let mut new = StateLog::open(dir, &at)?;
        state::dump(queue, |change| new.push(&change).map(drop))?;
        new.write()?;
        self.state_log = new;
        self.is_dirty = true;
        Ok(())
    }
}

/// Applies the journal up to a place that is durable.
pub(super) fn advance(inner: &Inner, applier: &mut Applier, queue: &Queue, to: Position) -> Result<(), QueueError> {
    while applier.position() < to {
        let (file, segment, end) = {
            let segments = inner.segments.read().unwrap_or_else(PoisonError::into_inner);
            let at = applier.position();
            let current = segments.by_number(at.segment).filter(|_| {
                let end = segments.ends.get(&at.segment).copied();
                end.is_none_or(|end| at.offset < end) || at.segment == to.segment
            });
            let number = match current {
                Some(_) => at.segment,
                // Complete, or gone.
                None => match segments.next_number(at.segment) {
                    Some(next) if next <= to.segment => next,
                    _ => break,
                },
            };
            let Some(file) = segments.by_number(number) else { break };
            let end =
                if number == to.segment { to.offset } else { segments.ends.get(&number).copied().unwrap_or(to.offset) };
            (file.file.clone(), number, end)
        };
        let before = applier.position();
        applier.apply(queue, &file, (segment, end), |position| lock(&inner.admission).applied(position))?;
        if applier.position() == before {
            break;
        }
    }
    applier.change_rows(queue)
}

fn end_in(entries: &mut [IdEntry], seq: u64, ending: Ending, second: u32) {
    if let Ok(at) = entries.binary_search_by_key(&seq, |entry| entry.seq)
        && let Some(entry) = entries.get_mut(at)
    {
        entry.ended = Some((ending, second));
    }
}
