//! Keeps everything on disk in step with the journal, behind the 202: the queue's rows, checkpoints, removal and
//! compaction of segments, expiry, free space.
//!
//! It reads the journal's own files from where the queue's rows end, so a slow or broken sled holds up nothing: after an
//! error sled is opened again and the rest is applied.

mod copying;
mod room;

use std::collections::HashSet;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::oneshot;

use self::copying::Copying;
use super::applier::{Applier, advance};
use super::checkpoint::{Checkpoint, Live, SegmentMark};
use super::compact;
use super::dead_letters::DeadMark;
use super::open_queue;
use super::queue::QueueError;
use super::state_log::StateLog;
use super::{Inner, Notice, Position, Refusal, Snapshot, disk, lock, state};
use crate::clock;
use crate::domain::customer::Customer;

/// How often is looked whether what was noted is synced.
const SYNC_AGAIN: Duration = Duration::from_millis(1);
/// Longest sleep: free space is looked at this often.
const TICK: Duration = Duration::from_secs(1);
/// Groups are applied together that come within this.
const GATHER: Duration = Duration::from_millis(20);
/// How long the relay may take to answer.
const SNAPSHOT_LIMIT: Duration = Duration::from_secs(30);
/// Journal bytes after which a checkpoint is due however young the last one is.
const CHECKPOINT_BYTES: u64 = 64 << 20;
/// A step of the wall clock that is none of time.
const LEAP: Duration = Duration::from_secs(60);
/// After a leap of the wall clock nothing is dropped for its age for so long: somebody may put it right.
const DISTRUST: Duration = Duration::from_secs(3_600);
/// Buckets of customers looked through in a second for those to be forgotten: all of them in about a day.
const SWEEP_BUCKETS: u32 = 3;

/// The keeper's thread.
pub(super) struct Keeper<'a> {
    inner: &'a Inner,
    applier: Option<Applier>,
    /// The last checkpoint: up to where, and when (monotonic).
    last: Position,
    last_at: Duration,
    /// The segment in which the part of the journal ends that the last checkpoint covers; 0 before the first.
    covered: u64,
    swept: u32,
    /// The wall clock less the monotonic one, and until when (monotonic) the first is not to be trusted.
    skew_ms: u64,
    distrusted_until: Duration,
    /// The state log of the last checkpoint; 0 before the first.
    log_before: u64,
    copying: Copying,
    /// Segments that hold damage.
    uncompactable: HashSet<u64>,
    /// Segments of which nothing waited at the last checkpoint, and that are there yet: should that one be damaged, the
    /// one before it needs what they say of others.
    empty_before: HashSet<u64>,
    /// The dead letters at the last checkpoint, or at the start.
    dead_before: DeadMark,
    /// The room held ready was given back, and no checkpoint has made any since.
    is_full: bool,
}

impl<'a> Keeper<'a> {
    pub(super) fn new(inner: &'a Inner, applier: Applier, skew_ms: u64) -> Keeper<'a> {
        let last_at = clock::monotonic();
        Keeper {
            inner,
            applier: Some(applier),
            last: Position::default(),
            last_at,
            covered: 0,
            // Not from the first with every start: one a day would never come to the last.
            swept: (clock::dice() * f64::from(state::BUCKETS)) as u32,
            skew_ms,
            distrusted_until: Duration::ZERO,
            log_before: 0,
            copying: Copying::default(),
            uncompactable: HashSet::new(),
            empty_before: HashSet::new(),
            dead_before: lock(&inner.dead).mark(),
            is_full: false,
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
                if let Some(applier) = &self.applier {
                    self.copying.begin(self.inner, applier);
                }
            }
            let is_copying = self.copying.go_on(self.inner, self.applier.as_ref());
            if is_ending || self.is_due(durable, now) {
                self.last_at = now;
                if let Err(error) = self.checkpoint() {
                    self.failed("checkpoint", &error);
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
        if self.applier.is_some() && self.inner.queue_is_damaged.load(Ordering::SeqCst) {
            return self.give_up(&QueueError::Damaged("a caller's read of it failed"));
        }
        if self.applier.is_some() && self.inner.queue_is_suspect.load(Ordering::SeqCst) {
            return self.give_up(&QueueError::Panicked("while a caller read".to_owned()));
        }
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

    /// A file that cannot be written just now says nothing of sled.
    fn failed(&mut self, op: &'static str, error: &QueueError) {
        if matches!(error, QueueError::Sync(_)) {
            self.inner.failed(op, error);
            self.make_room(error);
        } else {
            self.give_up(error);
        }
    }

    /// An error of sled's: what was half done is done again after it is opened anew.
    fn give_up(&mut self, error: &QueueError) {
        self.make_room(error);
        let _: Refusal = self.inner.queue_failed("queue", error);
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
            Err(error) => {
                self.make_room(&error);
                self.inner.failed("queue", &error);
            }
        }
    }

    fn is_due(&self, durable: Position, now: Duration) -> bool {
        let since = now.saturating_sub(self.last_at);
        // After one that failed the next is not at once.
        let far = since >= TICK
            && (durable.segment > self.last.segment + 1
                || (durable.segment == self.last.segment
                    && u64::from(durable.offset - self.last.offset.min(durable.offset)) > CHECKPOINT_BYTES));
        let is_old = since >= self.inner.options.checkpoint_every;
        let is_new = || {
            self.copying.is_replaced()
                || !self.empty_before.is_empty()
                || lock(&self.inner.writer).end() != self.last
                || lock(&self.inner.dead).mark() != self.dead_before
        };
        self.applier.is_some() && (far || is_old) && is_new()
    }

    /// Everything that is done once a second.
    fn tick(&mut self) {
        let inner = self.inner;
        let free = disk::free_bytes(&inner.options.dir).unwrap_or(u64::MAX);
        inner.free_bytes.store(free, Ordering::Relaxed);
        let floor = inner.free_min.load(Ordering::Relaxed);
        let is_low = free < floor;
        let was_low = std::mem::replace(&mut lock(&inner.admission).is_disk_low, is_low);
        if is_low != was_low {
            disk::say_free(free, floor);
        }
        if !is_low {
            if !self.is_full {
                disk::keep_reserve(&inner.options.dir);
            }
            self.prepare_spare(free);
        }
        if inner.is_failing.load(Ordering::Relaxed) {
            lock(&inner.admission).stage_probe();
            inner.work.notify_all();
        }
        // What the relay noted since the last group waits for a sync: so that rows are never far behind.
        let is_behind = {
            let writer = lock(&inner.writer);
            writer.owes() || writer.end() != *lock(&inner.durable)
        };
        if is_behind {
            drop(lock(&inner.admission).stage_sync());
            inner.work.notify_all();
        }
        let now_ms = clock::wall_ms();
        let is_trusted = self.trusts_the_clock();
        if is_trusted {
            lock(&inner.admission).trusted_s = now_ms / 1_000;
        }
        let expired = lock(&inner.dead).expire(if is_trusted { now_ms } else { 0 });
        match expired {
            Ok(gone) => {
                for (endpoint, count) in gone {
                    let name = crate::domain::endpoint::EndpointName::from_number(endpoint);
                    inner.metrics.dead_dropped(name, count);
                }
            }
            Err(error) => inner.failed("expire", &error),
        }
        let forget_after_s = inner.options.rules.forget_after_s;
        self.commit_rows(|customer| is_trusted && customer.is_forgotten(now_ms / 1_000, forget_after_s));
    }

    /// Whether the wall clock went as time goes, for a while.
    fn trusts_the_clock(&mut self) -> bool {
        let now = clock::monotonic();
        let skew_ms = skew_ms(now);
        let before = std::mem::replace(&mut self.skew_ms, skew_ms);
        if Duration::from_millis(skew_ms.wrapping_sub(before).cast_signed().unsigned_abs()) >= LEAP {
            tracing::warn!("the clock has leapt: nothing is dropped for its age for an hour");
            self.distrusted_until = now + DISTRUST;
        }
        now >= self.distrusted_until
    }

    /// Puts what was applied into the rows, and drops from some of them what is over.
    fn commit_rows(&mut self, is_forgotten: impl Fn(&Customer) -> bool + Copy) {
        let inner = self.inner;
        if let (Some(queue), Some(applier)) = (inner.queue(), self.applier.as_mut()) {
            let now_s = clock::wall_ms() / 1_000;
            let mut swept = applier.commit(&queue).and_then(|()| queue.expire_nonces(now_s));
            for _ in 0..SWEEP_BUCKETS {
                let gone = swept.and_then(|()| state::sweep(&queue, &inner.hashing(), self.swept, is_forgotten));
                swept = gone.map(|gone| applier.count_gone(gone));
                self.swept = (self.swept + 1) % state::BUCKETS;
            }
            if let Err(error) = swept {
                self.failed("queue", &error);
            }
        }
    }

    /// Has what was noted since the last group put on stable storage, by the journal's thread: an error of a sync made
    /// here would be told here only, and the next group be taken for synced. Where the disk does not take it, a checkpoint
    /// says what has ended, and may free the room for it.
    fn sync_notes(&self) {
        let inner = self.inner;
        let mut ticket = lock(&inner.admission).stage_sync();
        inner.work.notify_all();
        let deadline = clock::monotonic() + SNAPSHOT_LIMIT;
        loop {
            match ticket.done.try_recv() {
                // Closed: the journal's thread has ended, and what is noted is read back at the next start.
                Ok(_) | Err(oneshot::error::TryRecvError::Closed) => return,
                Err(oneshot::error::TryRecvError::Empty) => {}
            }
            if inner.is_ending.load(Ordering::SeqCst) || clock::monotonic() > deadline {
                return;
            }
            std::thread::sleep(SYNC_AGAIN);
        }
    }

    /// In this order, so that neither sled nor an unlink can get ahead of the journal: sync the journal; the queue's rows
    /// and the state log; the checkpoint file; only then remove what it frees.
    fn checkpoint(&mut self) -> Result<(), QueueError> {
        let inner = self.inner;
        self.sync_notes();
        let (Some(queue), Some(applier)) = (inner.queue(), self.applier.as_mut()) else { return Ok(()) };
        let end = lock(&inner.writer).end();
        let dead_mark = lock(&inner.dead).mark();
        let Some(snapshot) = ask_snapshot(inner) else { return Ok(()) };
        if let Err(error) = advance(inner, applier, &queue, snapshot.position) {
            self.give_up(&error);
            return Ok(());
        }
        {
            let mut dead = lock(&inner.dead);
            applier.write_gone(&mut dead)?;
            dead.sync_gone()?;
        }
        applier.renew_state_log(&queue, &inner.options.dir)?;
        applier.commit(&queue)?;
        applier.state_log.sync()?;
        queue.flush()?;
        let active = snapshot.position.segment;
        let mut freed = Vec::new();
        let mut empty = HashSet::new();
        let mut segments = Vec::new();
        for mark in &snapshot.marks {
            let live = Live::pack(&mark.settled, mark.places);
            let is_empty = live.is_empty() && mark.segment < active;
            if is_empty && self.empty_before.contains(&mark.segment) {
                freed.push(mark.segment);
                continue;
            }
            if is_empty {
                empty.insert(mark.segment);
            }
            segments.push(SegmentMark { number: mark.segment, live });
        }
        segments.sort_unstable_by_key(|mark| mark.number);
        let checkpoint = Checkpoint {
            identity: inner.identity,
            position: snapshot.position,
            segments,
            state_log: applier.state_log.number,
            state_len: applier.state_log.len,
            // A letter may be there before the relay has heard of it, whose event still waits in the snapshot: it is found
            // behind an older mark, and the event is not pushed.
            dead: self.dead_before.clone().up_to_file_of(&dead_mark),
            queue: queue.number(),
        };
        checkpoint.write(&inner.options.dir)?;
        self.last = end;
        self.is_full = false;
        self.dead_before = dead_mark;
        self.empty_before.clone_from(&empty);
        let before = std::mem::replace(&mut self.covered, active);
        self.remove(&queue, &freed)?;
        // What the checkpoint before this one names stays, should this one be damaged.
        StateLog::remove_before(&inner.options.dir, self.log_before)?;
        self.log_before = checkpoint.state_log;
        self.copying.checkpointed(inner)?;
        // Should this checkpoint be damaged, the one before it knows the offsets of its segments.
        let below = before.min(active);
        let gone: HashSet<u64> = freed.into_iter().chain(empty).collect();
        compact::compact(inner, &queue, (&snapshot, below), &gone, &mut self.uncompactable)?;
        Ok(())
    }
}

/// The wall clock less the monotonic one, which is at `now`.
pub(super) fn skew_ms(now: Duration) -> u64 {
    clock::wall_ms().wrapping_sub(u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}

/// What waits, as the relay says; `None` when it does not answer.
fn ask_snapshot(inner: &Inner) -> Option<Snapshot> {
    let (tell, told) = std::sync::mpsc::channel();
    inner.notices.blocking_send(Notice::Snapshot(tell)).ok()?;
    told.recv_timeout(SNAPSHOT_LIMIT).ok()
}
