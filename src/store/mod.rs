//! The outbox on disk: what makes the promise true.
//!
//! The **journal** makes a 202 durable and holds the payloads; **sled** is the queue's index and state on disk, rebuildable
//! and never in the way of a 202; what the schedule works on is in memory ([`crate::domain::backlog`]).
//!
//! ```text
//! data_dir/journal/N.log      append-only segments: accepted events and every change
//! data_dir/queue/             sled: index, customers, names, idempotency keys, retry state, settings, nonces
//! data_dir/state-N.log        customers, names, settings and nonces, which the queue would lose with sled
//! data_dir/dead/N.log         dead letters with their payload; N.idx says where each is, N.gone which are gone
//! data_dir/checkpoint         which events wait, and from where the journal is to be replayed; checkpoint.before the last
//! data_dir/queue-N/           in its place after it was copied N times; queue.damaged-TIME/ what was set aside
//! data_dir/journal/spare      the next segment, created ahead
//! data_dir/lock, reserve      room that is given back when the disk is full
//! ```
//!
//! Two threads: one writes and syncs the journal, one keeps everything else in step with it (`keeper`). This folder is the
//! only one that names sled or opens a data file. Its API is a future where it waits for the journal; synchronous where
//! memory has what is asked for, or at most a row of a customer is read from sled; what reads files besides says that it
//! blocks.

mod admission;
mod applier;
mod checkpoint;
mod codec;
mod compact;
mod customers;
mod dead_letters;
mod disk;
mod groups;
mod ids;
mod journal;
mod keeper;
mod letters;
#[cfg(test)]
mod model;
mod nonces;
mod notice;
mod open_queue;
#[cfg(test)]
mod power;
mod queue;
mod reader;
mod recover;
mod requests;
mod segment;
mod segments;
mod state;
mod state_log;
mod verify;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};

use self::admission::Admission;
pub use self::admission::{Post, Posted, Refusal, Rules, WithdrawCustomer};
use self::codec::Record;
pub use self::codec::{Accepted, Dead, Ending};
use self::dead_letters::DeadLetters;
pub use self::dead_letters::{LetterFilter, LetterId};
pub use self::disk::owner;
pub use self::journal::Appended;
use self::journal::Writer;
pub use self::letters::{DeadLetter, Letter, Replay};
pub use self::notice::{Answers, Compacted, Item, Note, Notice, Snapshot};
pub use self::queue::is_guarded;
use self::queue::{Queue, QueueError};
pub use self::reader::{Reader, Stored};
pub use self::recover::OpenError;
use self::segments::Segments;
pub use self::verify::{VerifiedFile, verify};
use crate::clock;
use crate::domain::endpoint::EndpointName;
use crate::domain::keys::{EventKey, HashKey};
use crate::metrics::StoreMetrics;

/// How the store is to be.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whether what waits is to be relayed, and not only looked at.
    pub is_relaying: bool,
    /// The data directory; created if it is not there.
    pub dir: PathBuf,
    /// Size at which a segment is complete, bytes.
    pub segment_bytes: u32,
    /// Free space below which events are refused, bytes (`outbox.min_free_disk`).
    pub free_min: u64,
    /// Longest time between checkpoints while there is work.
    pub checkpoint_every: Duration,
    /// Size from which the queue's file may be copied into a smaller one, bytes.
    pub queue_bytes_min: u64,
    /// What the gate goes by.
    pub rules: Rules,
    /// `dead_letters.keep`, seconds.
    pub dead_keep_s: u64,
    /// `dead_letters.max` of an endpoint; 0: no limit.
    pub dead_max: u64,
}

/// A complete segment's size unless told otherwise.
pub const SEGMENT_BYTES: u32 = 64 << 20;
/// Size from which the queue's file may be copied into a smaller one unless told otherwise.
pub const QUEUE_BYTES_MIN: u64 = 128 << 20;

/// A place in the journal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Position {
    segment: u64,
    offset: u32,
}

/// What is known of an event by its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fate {
    /// When it was accepted, Unix seconds.
    pub accepted_s: u64,
    /// How it ended, and when, in Unix seconds; `None`: it waits, or has just ended.
    pub ended: Option<(Ending, u64)>,
}

/// How often one and the same error of the store is logged.
const SAID_AGAIN: Duration = Duration::from_secs(10);

/// What the threads of the store share.
#[derive(Debug)]
struct Inner {
    options: Options,
    identity: [u8; 32],
    admission: Mutex<Admission>,
    work: Condvar,
    writer: Mutex<Writer>,
    segments: RwLock<Segments>,
    durable: Mutex<Position>,
    durable_moved: Condvar,
    queue: RwLock<Option<Arc<Queue>>>,
    /// Which directory of the queue's is in use.
    queue_number: AtomicU64,
    /// Somebody met damage in the queue: it is to be built anew.
    queue_is_damaged: AtomicBool,
    /// sled panicked: the queue is to be opened again, and read through.
    queue_is_suspect: AtomicBool,
    /// By how much the numbers of idempotency keys are ahead of those in the queue's rows, since those were built anew.
    ids_without_rows: AtomicU64,
    dead: Mutex<DeadLetters>,
    /// Held by the request whose turn it is to wait for the queue's rows.
    rows_turn: tokio::sync::Mutex<()>,
    notices: mpsc::Sender<Notice>,
    /// Moves whenever a group is durable or has failed.
    fates: watch::Sender<()>,
    metrics: StoreMetrics,
    /// The last group could not be written.
    is_failing: AtomicBool,
    /// Of each kind of error, when it was logged last and what it said.
    said: Mutex<BTreeMap<&'static str, (Duration, String)>>,
    is_ending: AtomicBool,
    /// Ends without a last checkpoint, as a crash does: for tests.
    is_crashing: AtomicBool,
    free_bytes: AtomicU64,
    /// Below so many events are refused.
    free_min: AtomicU64,
    _lock: std::fs::File,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Queue")
    }
}

/// Locks, also after a panic elsewhere: what is in there is kept consistent by its own methods.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The store, shared by all who use it.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

/// The store's threads, to be joined at the end.
#[derive(Debug)]
pub struct Threads {
    threads: Vec<JoinHandle<()>>,
}

impl Store {
    /// The secret that names are hashed with.
    #[must_use]
    pub fn hashing(&self) -> HashKey {
        self.inner.hashing()
    }

    /// What operators set (endpoints, pauses) and what receivers asked for (holds): a few small texts by key. Callers keep
    /// them under 3.5 KB each, because a row of sled's is to be small.
    #[must_use]
    pub fn settings(&self) -> BTreeMap<String, String> {
        lock(&self.inner.admission).settings.clone()
    }

    /// Whether there is a text by that key.
    #[must_use]
    pub fn has_setting(&self, key: &str) -> bool {
        lock(&self.inner.admission).settings.contains_key(key)
    }

    /// Who reads the events of a slot; `None` when there is no such segment any more.
    #[must_use]
    pub fn reader(&self, slot: u16) -> Option<Reader> {
        let segments = self.inner.segments.read().unwrap_or_else(PoisonError::into_inner);
        segments.by_slot.get(usize::from(slot))?.clone().map(|segment| Reader { segment })
    }

    /// Writes what the relay reports behind what is there, without waiting for the disk. What cannot be written now is
    /// written with the next records; a crash before that repeats pushes, and loses nothing.
    pub fn note(&self, notes: Vec<Note>) {
        let bodies = notes.into_iter().map(|note| note.into_record().encode()).collect();
        self.inner.note(bodies);
    }

    /// Uncounts events that have ended.
    pub fn uncount(&self, endpoint: EndpointName, events: u64) {
        lock(&self.inner.admission).uncount(endpoint, events);
    }

    /// What is known of an event, within the window in which its id is known. Blocks.
    ///
    /// # Errors
    /// It cannot be read just now.
    pub fn fate(&self, key: EventKey, now_s: u64) -> Result<Option<Fate>, Refusal> {
        let found = {
            let mut admission = lock(&self.inner.admission);
            let now_s = admission.aging(now_s);
            admission.ids.expire(now_s);
            admission.ids.number(key)
        };
        let Some((number, accepted_s)) = found else { return Ok(None) };
        // What became of it went with its row.
        let Some(number) = number.checked_sub(self.inner.ids_without_rows.load(Ordering::Relaxed)) else {
            return Ok(None);
        };
        let queue = self.inner.queue().ok_or(Refusal::DiskLow)?;
        let row = queue.ids(number / queue::ID_ROW as u64).map_err(|error| self.inner.queue_failed("read", &error))?;
        let entry = row.and_then(|row| row.get((number % queue::ID_ROW as u64) as usize).copied());
        // Not in its row yet: it was accepted just now.
        let ended = entry.filter(|entry| entry.key == key.to_le_bytes()).and_then(|entry| entry.ended);
        let ended = ended.map(|(ending, second)| (ending, u64::from(second)));
        Ok(Some(Fate { accepted_s: u64::from(accepted_s), ended }))
    }

    /// Up to where the journal is on stable storage.
    #[must_use]
    pub fn durable(&self) -> Position {
        *lock(&self.inner.durable)
    }

    /// Events that wait or are being stored.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        lock(&self.inner.admission).waiting()
    }

    /// Free space of the data directory's file system, bytes, as of the last second.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        self.inner.free_bytes.load(Ordering::Relaxed)
    }

    /// Free space below which events are refused, bytes.
    #[must_use]
    pub fn free_floor(&self) -> u64 {
        self.inner.free_min.load(Ordering::Relaxed)
    }

    /// Refuses events below another free space, bytes, within a second.
    pub fn set_free_floor(&self, bytes: u64) {
        self.inner.free_min.store(bytes, Ordering::Relaxed);
    }

    /// Whether events are refused for want of space.
    #[must_use]
    pub fn is_disk_low(&self) -> bool {
        lock(&self.inner.admission).is_disk_low
    }

    /// Whether what came last could not be stored, and the disk takes nothing yet.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        self.inner.is_failing.load(Ordering::Relaxed)
    }

    /// Bytes of the data directory's files.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        disk::bytes_below(&self.inner.options.dir)
    }

    /// Judges by other rules from now on; how long and how many ids and customers are known stays as it was at the
    /// start.
    pub fn set_rules(&self, rules: Rules) {
        let mut admission = lock(&self.inner.admission);
        let Rules { dedupe_window_s, dedupe_max, forget_after_s, .. } = admission.rules;
        admission.rules = Rules { dedupe_window_s, dedupe_max, forget_after_s, ..rules };
    }

    /// Refuses everything new from now on.
    pub fn close(&self) {
        lock(&self.inner.admission).is_stopping = true;
    }

    /// Counts a record that did not read back.
    pub fn damaged(&self, what: &'static str) {
        self.inner.metrics.damage.with_label_values(&[what]).inc();
    }

    /// Writes what is pending, takes a last checkpoint, and ends the threads. Blocks; the relay must still answer
    /// notices.
    pub fn end(&self, threads: Threads) {
        self.close();
        {
            // Under its lock: the journal's thread has either seen it or is waiting already.
            let _admission = lock(&self.inner.admission);
            self.inner.is_ending.store(true, Ordering::SeqCst);
        }
        self.inner.work.notify_all();
        self.inner.durable_moved.notify_all();
        for thread in threads.threads {
            if thread.join().is_err() {
                tracing::error!("a thread of the store had panicked");
            }
        }
    }

    /// Ends as a crash does, as far as files are concerned.
    #[cfg(test)]
    fn crash(self, threads: Threads) {
        self.inner.is_crashing.store(true, Ordering::SeqCst);
        self.end(threads);
    }
}

/// Encodes an event's record.
#[must_use]
pub fn encode_event(event: Accepted<'_>) -> Vec<u8> {
    Record::Accepted(event).encode()
}

impl Inner {
    fn hashing(&self) -> HashKey {
        HashKey::of(self.identity)
    }

    fn queue(&self) -> Option<Arc<Queue>> {
        self.queue.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn failed(&self, op: &'static str, error: &dyn std::fmt::Display) {
        self.metrics.errors.with_label_values(&[op]).inc();
        let (now, error) = (clock::monotonic(), error.to_string());
        let mut said = lock(&self.said);
        if said.get(op).is_none_or(|(at, before)| *before != error || now.saturating_sub(*at) >= SAID_AGAIN) {
            tracing::error!(op, error, "the store failed");
            said.insert(op, (now, error));
        }
    }

    fn queue_failed(&self, op: &'static str, error: &QueueError) -> Refusal {
        self.failed(op, error);
        if error.is_damage() {
            self.queue_is_damaged.store(true, Ordering::SeqCst);
        } else if matches!(error, QueueError::Panicked(_)) {
            self.queue_is_suspect.store(true, Ordering::SeqCst);
        }
        Refusal::DiskLow
    }
}
