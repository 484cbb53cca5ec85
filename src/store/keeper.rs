//! Keeps everything on disk in step with the journal, behind the 202: the queue's rows, checkpoints, removal and
//! compaction of segments, expiry, free space.
//!
//! It reads the journal's own files from where the queue's rows end, so a slow or broken sled holds up nothing: after an
//! error sled is opened again and the rest is applied.

use std::collections::HashSet;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::applier::{Applier, advance};
use super::checkpoint::{Checkpoint, Live, SegmentMark};
use super::compact;
use super::journal::SPARE;
use super::open_queue;
use super::queue::{self, Queue, QueueError};
use super::segment;
use super::state_log::StateLog;
use super::{Inner, Notice, Position, Snapshot, disk, lock, state};
use crate::clock;
use crate::domain::customer::Customer;

/// Longest sleep: free space is looked at this often.
const TICK: Duration = Duration::from_secs(1);
/// Groups are applied together that come within this.
const GATHER: Duration = Duration::from_millis(20);
/// How long the relay may take to answer.
const SNAPSHOT_LIMIT: Duration = Duration::from_secs(30);
/// Journal bytes after which a checkpoint is due however young the last one is.
const CHECKPOINT_BYTES: u64 = 64 << 20;
/// Buckets of customers looked through in a second for those to be forgotten: all of them in about a day.
const SWEEP_BUCKETS: u32 = 3;
/// Rows of the queue that are copied at a time: a few milliseconds.
const COPY_ROWS: usize = 500;
/// The queue's file is copied when it is so many times what its rows should take. sled's own share is less than half.
const COPY_RATIO: u64 = 4;
/// How long no copy is begun after one that failed.
const COPY_AGAIN: Duration = Duration::from_secs(600);

/// The keeper's thread.
pub(super) struct Keeper<'a> {
    inner: &'a Inner,
    applier: Option<Applier>,
    /// The last checkpoint: up to where, when (monotonic), and what it said.
    last: Position,
    last_at: Duration,
    swept: u32,
    removed_logs: u64,
    /// The state log of the last checkpoint.
    log_before: u64,
    is_copying: bool,
    /// The queue that was copied, until two checkpoints name the copy; and how many do.
    copied: Option<(Arc<Queue>, u32)>,
    /// Bytes of the queue's file after it was copied last.
    copied_bytes: u64,
    /// After one that failed.
    no_copy_before: Duration,
}

impl<'a> Keeper<'a> {
    pub(super) fn new(inner: &'a Inner, applier: Applier) -> Keeper<'a> {
        let removed_logs = applier.state_log.number;
        let last_at = clock::monotonic();
        Keeper {
            inner,
            applier: Some(applier),
            last: Position::default(),
            last_at,
            swept: 0,
            removed_logs,
            log_before: removed_logs,
            is_copying: false,
            copied: None,
            copied_bytes: 0,
            no_copy_before: Duration::ZERO,
        }
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
                self.begin_copy();
            }
            let is_copying = self.copy_some();
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
            if !is_copying {
                self.wait_for_more(durable);
            }
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
        match open_queue::reopen(self.inner) {
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
        let is_new = self.copied.is_some() || lock(&self.inner.writer).end() != self.last;
        self.applier.is_some() && (far || is_old) && is_new
    }

    /// Begins to copy the queue's rows when its file has become much larger than what is in it: sled never shrinks it.
    fn begin_copy(&mut self) {
        let inner = self.inner;
        let (Some(queue), Some(applier), None) = (inner.queue(), &self.applier, &self.copied) else { return };
        let bytes = queue.file_bytes();
        let waiting = lock(&inner.admission).waiting();
        let is_large = bytes >= inner.settings.queue_bytes_min.max(2 * self.copied_bytes);
        let is_empty = applier.row_bytes(waiting) * COPY_RATIO < bytes;
        let has_room = inner.free_bytes.load(Ordering::Relaxed) > inner.settings.free_min.saturating_add(bytes);
        let is_early = clock::monotonic() < self.no_copy_before;
        if self.is_copying || is_early || !is_large || !is_empty || !has_room {
            return;
        }
        self.is_copying = true;
        if let Err(error) = queue.begin_copy(&inner.settings.dir) {
            inner.failed("queue", &error);
        }
    }

    /// Copies some more, and changes over to the copy when it is whole. Says whether there is more to copy.
    fn copy_some(&mut self) -> bool {
        let inner = self.inner;
        if !self.is_copying {
            return false;
        }
        let Some(queue) = inner.queue().filter(|queue| queue.is_copying()) else {
            // Given up: what there is of it goes.
            self.is_copying = false;
            self.no_copy_before = clock::monotonic() + COPY_AGAIN;
            let number = inner.queue_number.load(Ordering::Relaxed);
            if let Err(error) = queue::remove_others(&inner.settings.dir, number) {
                inner.failed("queue", &error);
            }
            return false;
        };
        match queue.copy_some(&inner.settings.dir, COPY_ROWS) {
            Ok(None) => true,
            Ok(Some(copy)) => {
                let (before, after) = (queue.file_bytes(), copy.file_bytes());
                tracing::info!(before, after, "copied the queue into a smaller file");
                self.copied_bytes = after;
                self.is_copying = false;
                inner.queue_number.store(copy.number(), Ordering::Relaxed);
                *inner.queue.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(copy));
                self.copied = Some((queue, 0));
                false
            }
            Err(error) => {
                inner.failed("queue", &error);
                true
            }
        }
    }

    /// Removes the queue that was copied, once both checkpoints name the copy and nobody reads it any more.
    fn remove_copied(&mut self) -> io::Result<()> {
        match self.copied.take() {
            Some((queue, named)) if named == 0 || Arc::strong_count(&queue) > 1 => {
                self.copied = Some((queue, named + 1));
                Ok(())
            }
            Some((queue, _)) => {
                drop(queue);
                let number = self.inner.queue_number.load(Ordering::Relaxed);
                queue::remove_others(&self.inner.settings.dir, number)
            }
            None => Ok(()),
        }
    }

    /// Everything that is done once a second.
    fn tick(&mut self) {
        let inner = self.inner;
        let free = disk::free_bytes(&inner.settings.dir).unwrap_or(u64::MAX);
        inner.free_bytes.store(free, Ordering::Relaxed);
        let is_low = free < inner.settings.free_min;
        let was_low = std::mem::replace(&mut lock(&inner.admission).is_disk_low, is_low);
        if is_low != was_low {
            tracing::warn!(free, floor = inner.settings.free_min, is_low, "free space of the data directory");
        }
        if !is_low {
            disk::keep_reserve(&inner.settings.dir);
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
            let (now_s, forget_after_s) = (clock::wall_ms() / 1_000, inner.settings.rules.forget_after_s);
            let is_forgotten = |customer: &Customer| customer.is_forgotten(now_s, forget_after_s);
            let mut swept = applier.commit(&queue).and_then(|()| queue.expire_nonces(now_s));
            for _ in 0..SWEEP_BUCKETS {
                swept = swept.and_then(|()| state::sweep(&queue, &inner.hashing(), self.swept, is_forgotten));
                self.swept = (self.swept + 1) % state::BUCKETS;
            }
            if let Err(error) = swept {
                self.give_up(&error);
            }
        }
    }

    /// Creates the next segment's file ahead, so that beginning it costs no allocation.
    fn prepare_spare(&self) {
        let dir = disk::journal_dir(&self.inner.settings.dir);
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
        applier.state_log.sync()?;
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
            state_len: applier.state_log.len,
            dead: lock(&inner.dead).mark(),
            queue: queue.number(),
        };
        checkpoint.write(&inner.settings.dir)?;
        self.last = end.0;
        self.remove(&queue, &freed)?;
        // What the checkpoint before this one names stays, should this one be damaged.
        for number in self.removed_logs..self.log_before {
            drop(std::fs::remove_file(StateLog::path(&inner.settings.dir, number)));
        }
        self.removed_logs = self.log_before;
        self.log_before = checkpoint.state_log;
        self.remove_copied()?;
        compact::compact(inner, &queue, &snapshot, &freed.iter().copied().collect())?;
        Ok(())
    }

    fn remove(&self, queue: &Queue, freed: &[u64]) -> Result<(), QueueError> {
        let dir = disk::journal_dir(&self.inner.settings.dir);
        for number in freed {
            let (slot, generation) = {
                let segments = self.inner.segments.read().unwrap_or_else(PoisonError::into_inner);
                let generation = segments.by_number(*number).map_or(0, |file| file.generation);
                (segments.slots.get(number).copied(), generation)
            };
            match std::fs::remove_file(segment::path(&dir, *number)) {
                // It was removed before sled failed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => other?,
            }
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

/// Segments that a checkpoint has freed.
pub(super) type Freed = HashSet<u64>;
