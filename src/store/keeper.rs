//! Keeps everything on disk in step with the journal, behind the 202: the queue's rows, checkpoints, removal and
//! compaction of segments, expiry, free space.
//!
//! It reads the journal's own files from where the queue's rows end, so a slow or broken sled holds up nothing: after an
//! error sled is opened again and the rest is applied.

use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::checkpoint::{Checkpoint, Live, SegmentMark};
use super::codec::{self, Ending, Record, StateChange};
use super::compact;
use super::dead_letters::{DeadLetters, LetterId};
use super::journal::SPARE;
use super::queue::{BLOCK_EVENTS, ID_ROW, IdEntry, IndexEntry, PositionRow, Queue, QueueError};
use super::segment::{self, Frame};
use super::{Inner, Notice, Position, Snapshot, lock, recover, state};
use crate::clock;
use crate::domain::customer::Customer;
use crate::domain::keys::HashKey;
use crate::domain::schedule::Retry;
use serde::{Deserialize, Serialize};

/// Longest sleep: free space is looked at this often.
const TICK: Duration = Duration::from_secs(1);
/// Groups are applied together that come within this.
const GATHER: Duration = Duration::from_millis(20);
/// How long the relay may take to answer.
const SNAPSHOT_LIMIT: Duration = Duration::from_secs(30);
/// Journal bytes after which a checkpoint is due however young the last one is.
const CHECKPOINT_BYTES: u64 = 64 << 20;
/// State log bytes beyond which it may be written anew.
const STATE_LOG_MIN: u64 = 16 << 20;
/// Bytes for the state log that are gathered before they are written. What is written before the position row says so
/// is cut off again at a start.
const STATE_BUFFER: usize = 256 << 10;
/// Changes of customers and names that are gathered before their rows are changed.
const CHANGES_MAX: usize = 8_192;
/// Buckets of customers looked through in a second for those to be forgotten: all of them in about a day.
const SWEEP_BUCKETS: u32 = 3;

/// A lane's retry state as a row.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct RetryRow {
    pub lane: u64,
    pub head: u64,
    pub retry: Retry,
    pub due_ms: u64,
}

/// Customers and names in a log of their own, from which the queue can be rebuilt.
#[derive(Debug)]
pub(super) struct StateLog {
    pub number: u64,
    pub len: u64,
    file: File,
    buffer: Vec<u8>,
    /// About how much of it is out of date, in bytes.
    dead: u64,
}

impl StateLog {
    pub(super) fn path(dir: &Path, number: u64) -> PathBuf {
        dir.join(format!("state-{number}.log"))
    }

    /// Opens the log that the row names, at its length then; what is behind it will be written again.
    pub(super) fn open(dir: &Path, at: &PositionRow) -> io::Result<StateLog> {
        let (number, len) = (at.state_log, at.state_len);
        let path = StateLog::path(dir, number);
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        file.set_len(len)?;
        segment::sync_dir(dir)?;
        Ok(StateLog { number, len, file, buffer: Vec::new(), dead: at.state_dead })
    }

    /// Answers how many bytes it takes.
    fn push(&mut self, change: &StateChange) -> io::Result<usize> {
        let before = self.buffer.len();
        let offset = self.len + self.buffer.len() as u64;
        let body = Record::State(change.clone()).encode();
        codec::write_frame(&mut self.buffer, self.number, offset as u32, 0, 0, &body);
        let bytes = self.buffer.len() - before;
        if self.buffer.len() >= STATE_BUFFER {
            self.write()?;
        }
        Ok(bytes)
    }

    fn write(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.buffer, self.len)?;
        self.len += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}

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
    forget_after_s: u64,
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
        settings: (HashKey, u64, u64),
    ) -> Result<Applier, QueueError> {
        let (hashing, dedupe_max, forget_after_s) = settings;
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
            forget_after_s,
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
        let scan = segment::scan_synced(file, segment, self.at.offset, to, |frame| {
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
        let (now_s, forget_after_s) = (clock::wall_ms() / 1_000, self.forget_after_s);
        let is_forgotten = |other: &Customer| other.is_forgotten(now_s, forget_after_s);
        for (change, bytes) in &changes {
            // What it replaces was about as long.
            let gone = state::apply(queue, &self.hashing, change, is_forgotten)?;
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

    /// Writes down what the journal says is gone of dead letters.
    pub(super) fn write_gone(&mut self, dead: &mut DeadLetters) -> io::Result<()> {
        dead.write_gone(&self.gone)?;
        self.gone.clear();
        Ok(())
    }

    fn apply_frame(&mut self, queue: &Queue, frame: &Frame) -> Result<(), QueueError> {
        match Record::decode(frame.body()) {
            Some(Record::Accepted(event)) => {
                let second = (event.accepted_ms / 1_000) as u32;
                self.block.push(IndexEntry {
                    seq: frame.header.seq,
                    lane: event.lane.0,
                    endpoint: event.endpoint.number(),
                    offset: frame.header.offset,
                    second,
                    len: frame.header.frame_len() as u32,
                });
                if self.block.len() == BLOCK_EVENTS {
                    self.end_block(queue)?;
                    self.at.block += 1;
                }
                let seq = frame.header.seq;
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
                queue.put_retry(lane, &RetryRow { lane, head, retry, due_ms })
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
        // What is gone of dead letters is not in rows of sled's: the position never gets ahead of it.
        if !self.is_dirty || !self.gone.is_empty() {
            return Ok(());
        }
        self.change_rows(queue)?;
        if !self.block.is_empty() {
            queue.put_block(self.at.segment, 0, self.at.block, &self.block)?;
        }
        self.state_log.write()?;
        self.at.state_log = self.state_log.number;
        self.at.state_len = self.state_log.len;
        self.at.state_dead = self.state_log.dead;
        queue.put_position(&self.at)?;
        self.is_dirty = false;
        Ok(())
    }

    /// Writes the state log anew from the rows, when it has become much longer than needed.
    fn renew_state_log(&mut self, queue: &Queue, dir: &Path) -> Result<(), QueueError> {
        if self.state_log.len < STATE_LOG_MIN || 2 * self.state_log.dead < self.state_log.len {
            return Ok(());
        }
        let at = PositionRow { state_log: self.state_log.number + 1, state_len: 0, state_dead: 0, ..self.at };
        let mut new = StateLog::open(dir, &at)?;
        state::dump(queue, |change| new.push(&change).map(drop))?;
        new.write()?;
        self.state_log = new;
        self.is_dirty = true;
        Ok(())
    }
}

/// The keeper's thread.
pub(super) struct Keeper<'a> {
    inner: &'a Inner,
    applier: Option<Applier>,
    /// The last checkpoint: up to where, when (monotonic), and what it said.
    last: Position,
    last_at: Duration,
    swept: u32,
    removed_logs: u64,
}

impl<'a> Keeper<'a> {
    pub(super) fn new(inner: &'a Inner, applier: Applier) -> Keeper<'a> {
        let removed_logs = applier.state_log.number;
        let last_at = clock::monotonic();
        Keeper { inner, applier: Some(applier), last: Position::default(), last_at, swept: 0, removed_logs }
    }

    /// Works until the end, and takes a last checkpoint then.
    pub(super) fn run(&mut self) {
        let mut ticked = Duration::ZERO;
        loop {
            let is_ending = self.inner.is_ending.load(Ordering::SeqCst);
            if self.inner.is_crashing.load(Ordering::SeqCst) {
                return;
            }
            let durable = *lock(&self.inner.durable);
            self.apply(durable);
            let now = clock::monotonic();
            if now.saturating_sub(ticked) >= TICK {
                ticked = now;
                self.tick();
            }
            if is_ending || self.is_due(durable, now) {
                self.last_at = now;
                if let Err(error) = self.checkpoint() {
                    self.inner.failed("checkpoint", &error);
                    // A file that cannot be written just now says nothing of sled.
                    if !matches!(error, QueueError::Sync(_)) {
                        self.give_up(&error);
                    }
                }
            }
            if is_ending {
                return;
            }
            self.wait_for_more(durable);
            // Groups come by the thousand; what waits here only waits for its rows.
            if !self.inner.is_ending.load(Ordering::SeqCst) {
                std::thread::sleep(GATHER);
            }
        }
    }

    /// Sleeps until more is durable, or the next tick.
    fn wait_for_more(&self, than: Position) {
        let durable = lock(&self.inner.durable);
        if *durable == than {
            drop(self.inner.durable_moved.wait_timeout(durable, TICK).unwrap_or_else(PoisonError::into_inner));
        }
    }

    fn apply(&mut self, durable: Position) {
        let Some(queue) = self.inner.queue() else { return self.reopen() };
        let Some(applier) = self.applier.as_mut() else { return self.reopen() };
        let before = applier.damaged;
        match advance(self.inner, applier, &queue, durable) {
            Ok(()) => {
                lock(&self.inner.admission).applied(applier.position());
                // Tried again with the next round: until then the position stays where it is.
                if let Err(error) = applier.write_gone(&mut lock(&self.inner.dead)) {
                    self.inner.failed("bury", &error);
                }
            }
            Err(error) => return self.give_up(&error),
        }
        let found = applier.damaged - before;
        if found > 0 {
            tracing::error!(found, "damaged records in the journal");
            self.inner.metrics.damage.with_label_values(&["journal"]).inc_by(found);
        }
    }

    /// An error of sled's: what was half done is done again after it is opened anew.
    fn give_up(&mut self, error: &QueueError) {
        self.inner.failed("queue", error);
        self.applier = None;
        *self.inner.queue.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// After an error of sled's: opens it again, and goes on from its last position.
    fn reopen(&mut self) {
        std::thread::sleep(Duration::from_millis(200));
        match recover::reopen_queue(self.inner) {
            Ok((queue, applier)) => {
                tracing::info!("sled is open again");
                self.applier = Some(applier);
                *self.inner.queue.write().unwrap_or_else(PoisonError::into_inner) = Some(queue);
            }
            Err(error) => self.inner.failed("queue", &error),
        }
    }

    fn is_due(&self, durable: Position, now: Duration) -> bool {
        let far = durable.segment > self.last.segment + 1
            || (durable.segment == self.last.segment
                && u64::from(durable.offset - self.last.offset.min(durable.offset)) > CHECKPOINT_BYTES);
        let is_old = now.saturating_sub(self.last_at) >= self.inner.settings.checkpoint_every;
        self.applier.is_some() && (far || is_old) && lock(&self.inner.writer).end() != self.last
    }

    /// Everything that is done once a second.
    fn tick(&mut self) {
        let inner = self.inner;
        let free = recover::free_bytes(&inner.settings.dir).unwrap_or(u64::MAX);
        inner.free_bytes.store(free, Ordering::Relaxed);
        let is_low = free < inner.settings.free_min;
        let was_low = std::mem::replace(&mut lock(&inner.admission).is_disk_low, is_low);
        if is_low != was_low {
            tracing::warn!(free, floor = inner.settings.free_min, is_low, "free space of the data directory");
        }
        if !is_low {
            recover::keep_reserve(&inner.settings.dir);
            self.prepare_spare();
        }
        // What the relay noted since the last group waits for a sync: so that rows are never far behind.
        if lock(&inner.writer).end() != *lock(&inner.durable) {
            drop(lock(&inner.admission).stage_sync());
            inner.work.notify_all();
        }
        let expired = lock(&inner.dead).expire(clock::wall_ms());
        match expired {
            Ok(gone) => {
                for (endpoint, count) in gone {
                    let name = crate::domain::endpoint::EndpointName::from_number(endpoint);
                    inner.metrics.dead_dropped(name, count);
                }
            }
            Err(error) => inner.failed("expire", &error),
        }
        if let (Some(queue), Some(applier)) = (inner.queue(), self.applier.as_mut()) {
            let (now_s, forget_after_s) = (clock::wall_ms() / 1_000, applier.forget_after_s);
            let is_forgotten = |customer: &Customer| customer.is_forgotten(now_s, forget_after_s);
            let mut swept = applier.commit(&queue).and_then(|()| queue.expire_nonces(now_s));
            for _ in 0..SWEEP_BUCKETS {
                swept = swept.and_then(|()| state::sweep(&queue, &applier.hashing, self.swept, is_forgotten));
                self.swept = (self.swept + 1) % state::BUCKETS;
            }
            if let Err(error) = swept {
                self.give_up(&error);
            }
        }
    }

    /// Creates the next segment's file ahead, so that beginning it costs no allocation.
    fn prepare_spare(&self) {
        let dir = recover::journal_dir(&self.inner.settings.dir);
        let spare = dir.join(SPARE);
        if spare.exists() {
            return;
        }
        let new = dir.join("spare.new");
        let made = segment::create(&new, u64::from(self.inner.settings.segment_bytes))
            .and_then(|_| std::fs::rename(&new, &spare));
        if let Err(error) = made {
            self.inner.failed("allocate", &error);
        }
    }

    /// In this order, so that neither sled nor an unlink can get ahead of the journal: sync the journal; the queue's rows
    /// and the state log; the checkpoint file; only then remove what it frees.
    fn checkpoint(&mut self) -> Result<(), QueueError> {
        let inner = self.inner;
        let (Some(queue), Some(applier)) = (inner.queue(), self.applier.as_mut()) else { return Ok(()) };
        let Some(snapshot) = ask_snapshot(inner) else { return Ok(()) };
        let end = {
            let writer = lock(&inner.writer);
            (writer.end(), writer.active_file())
        };
        if let Some(file) = end.1 {
            file.sync_data()?;
        }
        if let Err(error) = advance(inner, applier, &queue, snapshot.position) {
            self.give_up(&error);
            return Ok(());
        }
        {
            let mut dead = lock(&inner.dead);
            applier.write_gone(&mut dead)?;
            dead.sync_gone()?;
        }
        applier.renew_state_log(&queue, &inner.settings.dir)?;
        applier.commit(&queue)?;
        applier.state_log.file.sync_data()?;
        queue.flush()?;
        let active = snapshot.position.segment;
        let mut freed = Vec::new();
        let mut segments = Vec::new();
        for mark in &snapshot.marks {
            let live = Live::pack(&mark.settled, mark.places);
            if live.is_empty() && mark.segment < active {
                freed.push(mark.segment);
            } else {
                segments.push(SegmentMark { number: mark.segment, live });
            }
        }
        segments.sort_unstable_by_key(|mark| mark.number);
        let checkpoint = Checkpoint {
            identity: inner.identity,
            position: snapshot.position,
            segments,
            state_log: applier.state_log.number,
            dead: lock(&inner.dead).mark(),
        };
        checkpoint.write(&inner.settings.dir)?;
        self.last = end.0;
        self.remove(&queue, &freed)?;
        for number in self.removed_logs..checkpoint.state_log {
            drop(std::fs::remove_file(StateLog::path(&inner.settings.dir, number)));
        }
        self.removed_logs = checkpoint.state_log;
        compact::compact(inner, &queue, &snapshot, &freed.iter().copied().collect())?;
        Ok(())
    }

    fn remove(&self, queue: &Queue, freed: &[u64]) -> Result<(), QueueError> {
        let dir = recover::journal_dir(&self.inner.settings.dir);
        for number in freed {
            let (slot, generation) = {
                let segments = self.inner.segments.read().unwrap_or_else(PoisonError::into_inner);
                let generation = segments.by_number(*number).map_or(0, |file| file.generation);
                (segments.slots.get(number).copied(), generation)
            };
            std::fs::remove_file(segment::path(&dir, *number))?;
            queue.remove_blocks(*number, generation)?;
            if let Some(slot) = slot {
                // Told before the slot can be used again.
                drop(self.inner.notices.blocking_send(Notice::SegmentRemoved(slot)));
            }
            self.inner.segments.write().unwrap_or_else(PoisonError::into_inner).remove(*number);
        }
        if !freed.is_empty() {
            segment::sync_dir(&dir)?;
        }
        Ok(())
    }
}

/// What waits, as the relay says; `None` when it does not answer.
fn ask_snapshot(inner: &Inner) -> Option<Snapshot> {
    let (tell, told) = std::sync::mpsc::channel();
    inner.notices.blocking_send(Notice::Snapshot(tell)).ok()?;
    told.recv_timeout(SNAPSHOT_LIMIT).ok()
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

/// Segments that a checkpoint has freed.
pub(super) type Freed = HashSet<u64>;
