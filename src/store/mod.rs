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
//! data_dir/checkpoint         which events wait, and from where the journal is to be replayed
//! data_dir/lock, reserve
//! ```
//!
//! Three threads: one writes and syncs the journal, one keeps everything else in step with it (`keeper`), and the caller
//! of [`Store::post`] waits. This folder is the only one that names sled or opens a data file; its API is synchronous
//! where it is fast and a future where it waits for the disk.

mod admission;
mod checkpoint;
mod codec;
mod compact;
mod dead_letters;
mod ids;
mod journal;
mod keeper;
#[cfg(test)]
mod model;
mod nonces;
#[cfg(test)]
mod power;
mod queue;
mod recover;
mod segment;
mod state;
mod verify;

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};

use self::admission::{Admission, Request, Staged, Step, Ticket};
pub use self::admission::{Post, Posted, Refusal, Rules, WithdrawCustomer};
pub use self::codec::{Accepted, Dead, Ending};
use self::codec::{DeferredRecord, Record, Settled};
use self::dead_letters::DeadLetters;
pub use self::dead_letters::{LetterFilter, LetterId};
pub use self::journal::Appended;
use self::journal::{Begun, SegmentFile, Writer};
pub use self::queue::is_guarded;
use self::queue::{Queue, QueueError};
pub use self::recover::OpenError;
use self::segment::Frame;
use self::state::StateKey;
pub use self::verify::{VerifiedFile, verify};
use crate::clock;
use crate::domain::backlog::{GroupMark, SLOTS_MAX};
use crate::domain::customer::{Customer, Hearing, NameKind};
use crate::domain::endpoint::{EndpointName, Plugin};
use crate::domain::keys::{EventKey, HashKey, LaneKey};
use crate::domain::outcome::DeathReason;
use crate::domain::schedule::Retry;
use crate::metrics::StoreMetrics;

/// How the store is to be.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The data directory; created if it is not there.
    pub dir: PathBuf,
    /// Size at which a segment is complete, bytes.
    pub segment_bytes: u32,
    /// Free space below which events are refused, bytes (`outbox.min_free_disk`).
    pub free_min: u64,
    /// Longest time between checkpoints while there is work.
    pub checkpoint_every: Duration,
    /// What the gate goes by.
    pub rules: Rules,
    /// `dead_letters.keep`, seconds.
    pub dead_keep_s: u64,
    /// `dead_letters.max` of an endpoint; 0: no limit.
    pub dead_max: u64,
}

/// A complete segment's size unless told otherwise.
pub const SEGMENT_BYTES: u32 = 64 << 20;

/// A place in the journal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Position {
    segment: u64,
    offset: u32,
}

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
pub struct Answers(Vec<oneshot::Sender<Result<(), Refusal>>>);

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

/// A stored event, read back.
#[derive(Debug)]
pub struct Stored {
    frame: Frame,
}

impl Stored {
    /// Its sequence number.
    #[must_use]
    pub fn seq(&self) -> u64 {
        self.frame.header.seq
    }

    /// The event; `None` for any other record.
    #[must_use]
    pub fn event(&self) -> Option<Accepted<'_>> {
        Record::decode(self.frame.body())?.into_event()
    }
}

/// A letter to be buried.
#[derive(Debug)]
pub struct Letter {
    /// The event's sequence number.
    pub seq: u64,
    /// Its endpoint.
    pub endpoint: EndpointName,
    /// The event; `None` when its record does not read back.
    pub stored: Option<Stored>,
    /// What its last attempt failed with.
    pub problem: Option<Arc<str>>,
}

/// A dead letter, read back.
#[derive(Debug)]
pub struct DeadLetter {
    /// Its name.
    pub id: LetterId,
    frame: Frame,
}

impl DeadLetter {
    /// What it says; `None` when its record does not read back.
    #[must_use]
    pub fn dead(&self) -> Option<Dead<'_>> {
        match Record::decode(self.frame.body())? {
            Record::Dead(dead) => Some(dead),
            Record::Opened(_)
            | Record::Accepted(_)
            | Record::Settled(_)
            | Record::Deferred(_)
            | Record::State(_)
            | Record::Sealed { .. }
            | Record::Gone(_) => None,
        }
    }
}

/// A dead letter to be put back into the outbox.
#[derive(Debug)]
pub struct Replay<'a> {
    /// Which.
    pub id: LetterId,
    /// The event as it is accepted anew.
    pub event: Accepted<'a>,
    /// How many events may wait for its endpoint.
    pub events_max: u64,
}

/// What is known of an event by its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fate {
    /// When it was accepted, Unix seconds.
    pub accepted_s: u64,
    /// How it ended, and when, in Unix seconds; `None`: it waits, or has just ended.
    pub ended: Option<(Ending, u64)>,
}

/// Which events are being read: a slot, kept open while it is read.
#[derive(Clone, Debug)]
pub struct Reader {
    segment: SegmentFile,
}

impl Reader {
    /// Reads the event at an offset; `None` when it is damaged.
    ///
    /// # Errors
    /// The file cannot be read just now.
    pub fn read(&self, offset: u32) -> io::Result<Option<Stored>> {
        Ok(segment::read_frame(&self.segment.file, self.segment.number, offset)?.map(|frame| Stored { frame }))
    }
}

/// The segments there are.
#[derive(Debug, Default)]
pub(crate) struct Segments {
    by_slot: Vec<Option<SegmentFile>>,
    slots: BTreeMap<u64, u16>,
    /// Where complete segments end.
    ends: BTreeMap<u64, u32>,
}

impl Segments {
    fn free_slot(&self) -> Option<u16> {
        let free = self.by_slot.iter().position(Option::is_none).unwrap_or(self.by_slot.len());
        // The last slot stays unused: its last place would be `Handle::NONE`.
        (free < SLOTS_MAX - 1).then_some(free as u16)
    }

    fn add(&mut self, slot: u16, file: SegmentFile) {
        self.slots.insert(file.number, slot);
        let slot = usize::from(slot);
        if self.by_slot.len() <= slot {
            self.by_slot.resize_with(slot + 1, || None);
        }
        if let Some(place) = self.by_slot.get_mut(slot) {
            *place = Some(file);
        }
    }

    fn free(&mut self, slot: u16) {
        if let Some(place) = self.by_slot.get_mut(usize::from(slot)) {
            *place = None;
        }
    }

    fn remove(&mut self, number: u64) -> Option<u16> {
        let slot = self.slots.remove(&number)?;
        self.ends.remove(&number);
        self.free(slot);
        Some(slot)
    }

    fn by_number(&self, number: u64) -> Option<&SegmentFile> {
        self.by_slot.get(usize::from(*self.slots.get(&number)?))?.as_ref()
    }

    fn next_number(&self, number: u64) -> Option<u64> {
        self.slots.range(number + 1..).next().map(|(number, _)| *number)
    }
}

/// What the threads of the store share.
#[derive(Debug)]
struct Inner {
    settings: Settings,
    identity: [u8; 32],
    admission: Mutex<Admission>,
    work: Condvar,
    writer: Mutex<Writer>,
    segments: RwLock<Segments>,
    durable: Mutex<Position>,
    durable_moved: Condvar,
    queue: RwLock<Option<Arc<Queue>>>,
    dead: Mutex<DeadLetters>,
    /// Held by the request whose turn it is to wait for the queue's rows.
    rows_turn: tokio::sync::Mutex<()>,
    notices: mpsc::Sender<Notice>,
    /// Moves whenever a group is durable or has failed.
    fates: watch::Sender<()>,
    metrics: StoreMetrics,
    is_ending: AtomicBool,
    /// Ends without a last checkpoint, as a crash does: for tests.
    is_crashing: AtomicBool,
    free_bytes: AtomicU64,
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

/// How long a request waits at most for the queue's rows to catch up, and how often it looks.
const ROWS_LIMIT: Duration = Duration::from_secs(10);
const ROWS_AGAIN: Duration = Duration::from_millis(5);
/// How often rows are fetched for a request before it is given up: each time something else changed meanwhile.
const FETCHES_MAX: usize = 100;

impl Store {
    /// The secret that names are hashed with.
    #[must_use]
    pub fn hashing(&self) -> HashKey {
        self.inner.hashing()
    }

    /// Judges events and stores those that are to be pushed. When this returns, they are on stable storage.
    ///
    /// # Errors
    /// The whole is refused: nothing was stored.
    pub async fn post(&self, mut posts: Vec<Post<'_>>, now_ms: u64) -> Result<Vec<Posted>, Refusal> {
        self.wait_for_rows().await?;
        let judged = self.decided(|admission| admission.post(&mut posts, now_ms))?;
        self.wait(judged.ticket).await?;
        for key in judged.fate_of {
            let mut fates = self.inner.fates.subscribe();
            loop {
                if let Some(fate) = lock(&self.inner.admission).fate(key) {
                    break fate?;
                }
                fates.changed().await.map_err(|_| Refusal::Stopping)?;
            }
        }
        Ok(judged.posted)
    }

    /// Records what is said of a customer. With `withdraws`, a switch that is off afterwards withdraws what waits, and
    /// this returns when that is done and durable. `None`: there is no such customer and there must be.
    ///
    /// # Errors
    /// Nothing was stored.
    pub async fn change_customer(
        &self,
        plugin: Plugin,
        web_token: &str,
        hearing: &Hearing,
        must_exist: bool,
        now_s: u64,
    ) -> Result<Option<Customer>, Refusal> {
        let mut withdrawn = None;
        let decided = self.decided(|admission| {
            let (done, receiver) = oneshot::channel();
            withdrawn = Some(receiver);
            let withdraws = hearing.toggle.is_some().then_some(done);
            admission.change(plugin, web_token, hearing, must_exist, now_s, withdraws)
        })?;
        let Some((customer, ticket)) = decided else { return Ok(None) };
        self.wait(ticket).await?;
        if let Some(withdrawn) = withdrawn.filter(|_| hearing.toggle == Some(crate::domain::customer::Toggle::Off)) {
            withdrawn.await.map_err(|_| Refusal::DiskLow)?;
        }
        Ok(Some(customer))
    }

    /// Forgets a customer, at one plugin or at all. Answers at how many plugins it was known, and how many events were
    /// withdrawn; when this returns, that is durable.
    ///
    /// # Errors
    /// Nothing was forgotten.
    pub async fn forget(&self, plugin: Option<Plugin>, web_token: &str, now_s: u64) -> Result<(u64, u64), Refusal> {
        let plugins = match plugin {
            Some(plugin) => vec![plugin],
            None => self.plugins_of(web_token)?,
        };
        let mut known = Vec::new();
        for plugin in plugins {
            if self.customer(plugin, web_token, now_s)?.is_some() {
                known.push(plugin);
            }
        }
        if known.is_empty() {
            return Ok((0, 0));
        }
        let mut receivers = Vec::new();
        let ticket = self.decided(|admission| {
            receivers.clear();
            admission.forget(&known, web_token, || {
                let (done, receiver) = oneshot::channel();
                receivers.push(receiver);
                done
            })
        })?;
        self.wait(ticket).await?;
        let mut withdrawn = 0;
        for receiver in receivers {
            withdrawn += receiver.await.map_err(|_| Refusal::DiskLow)?;
        }
        Ok((known.len() as u64, withdrawn))
    }

    /// Stores an event that asks no gate. When this returns, it is on stable storage; `false`: too many wait for its
    /// endpoint, and it is not stored.
    ///
    /// # Errors
    /// It is not stored.
    pub async fn post_ungated(&self, event: &Accepted<'_>, events_max: u64) -> Result<bool, Refusal> {
        let second = (event.accepted_ms / 1_000) as u32;
        let record = Record::Accepted(event.clone()).encode();
        let staged = Staged::Event { record, lane: event.lane, endpoint: event.endpoint, second };
        let ticket = lock(&self.inner.admission).post_ungated(event.key, staged, (event.endpoint, events_max))?;
        let is_taken = ticket.is_some();
        self.wake_writer();
        self.wait(ticket).await?;
        Ok(is_taken)
    }

    /// What operators set: a few small texts by key, at most 3.5 KB each, because a row of sled's is to be small.
    #[must_use]
    pub fn settings(&self) -> BTreeMap<String, String> {
        lock(&self.inner.admission).settings.clone()
    }

    /// Sets or unsets. When this returns, that is on stable storage.
    ///
    /// # Errors
    /// Nothing changed.
    pub async fn set(&self, key: &str, value: Option<String>) -> Result<(), Refusal> {
        let ticket = lock(&self.inner.admission).set(key, value)?;
        self.wake_writer();
        self.wait(ticket).await
    }

    /// Uses a nonce up, durably. `false`: it was used before, or too many are remembered.
    ///
    /// # Errors
    /// It is not used up.
    pub async fn use_nonce(&self, key: EventKey, until_s: u64, now_s: u64) -> Result<bool, Refusal> {
        let ticket = lock(&self.inner.admission).use_nonce(key, until_s, now_s)?;
        let is_fresh = ticket.is_some();
        self.wake_writer();
        self.wait(ticket).await?;
        Ok(is_fresh)
    }

    fn wake_writer(&self) {
        self.inner.work.notify_one();
    }

    /// The plugins at which a customer may be known.
    ///
    /// # Errors
    /// It cannot be read just now.
    pub fn plugins_of(&self, web_token: &str) -> Result<Vec<Plugin>, Refusal> {
        let mut plugins = lock(&self.inner.admission).cache.customers_of(web_token);
        let queue = self.inner.queue().ok_or(Refusal::DiskLow)?;
        let known = state::plugins_of(&queue, &self.hashing(), web_token);
        plugins.extend(known.map_err(|error| self.inner.queue_failed("read", &error))?);
        plugins.sort_unstable();
        plugins.dedup();
        Ok(plugins)
    }

    /// A customer as remembered.
    ///
    /// # Errors
    /// It cannot be read just now.
    pub fn customer(&self, plugin: Plugin, web_token: &str, now_s: u64) -> Result<Option<Customer>, Refusal> {
        let key = StateKey::Customer(plugin, web_token.to_owned());
        self.decided(|admission| {
            Ok(match admission.cache.get(&key) {
                None => Step::Missing(vec![(key.clone(), admission.cache.version(&key))]),
                Some(_) => Step::Done(admission.known(plugin, web_token, now_s)),
            })
        })
    }

    /// The customer that another name means.
    ///
    /// # Errors
    /// It cannot be read just now.
    pub fn customer_named(&self, kind: NameKind, plugin: Plugin, name: &str) -> Result<Option<String>, Refusal> {
        let key = StateKey::Name(kind, plugin, name.to_owned());
        self.decided(|admission| {
            Ok(match admission.cache.get(&key) {
                None => Step::Missing(vec![(key.clone(), admission.cache.version(&key))]),
                Some(state::StateValue::Name(web_token)) => Step::Done(web_token.clone()),
                Some(state::StateValue::Customer(_)) => Step::Done(None),
            })
        })
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

    /// Waits until all that was noted before is on stable storage.
    ///
    /// # Errors
    /// It is not.
    pub fn sync(&self) -> impl Future<Output = Result<(), Refusal>> + Send + use<> {
        let receiver = lock(&self.inner.admission).stage_sync();
        self.inner.work.notify_all();
        async move { receiver.await.unwrap_or(Err(Refusal::Stopping)) }
    }

    /// Writes dead letters and puts them on stable storage. Blocks.
    ///
    /// # Errors
    /// They are not buried.
    pub fn bury(&self, letters: &[Letter], reason: DeathReason, attempts: u32, now_ms: u64) -> io::Result<()> {
        let dead: Vec<Dead<'_>> = letters
            .iter()
            .map(|letter| Dead {
                seq: letter.seq,
                reason,
                buried_ms: now_ms,
                attempts,
                event: letter.stored.as_ref().and_then(Stored::event),
                endpoint: letter.endpoint,
                problem: letter.problem.as_deref(),
            })
            .collect();
        let result = lock(&self.inner.dead).bury(&dead, now_ms);
        result.inspect_err(|error| self.inner.failed("bury", error))
    }

    /// Some dead letters after `after`, oldest first; with the names of all that were found, also of those whose record
    /// does not read back. Blocks.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn letters(
        &self,
        filter: &LetterFilter,
        after: Option<LetterId>,
        most: usize,
    ) -> io::Result<(Vec<DeadLetter>, Vec<LetterId>)> {
        let first = after.map_or(LetterId::FIRST, LetterId::next);
        let found = lock(&self.inner.dead).find(filter, first, most)?;
        let ids = found.iter().map(|(id, _)| *id).collect();
        let mut letters = Vec::with_capacity(found.len());
        for (id, offset) in found {
            letters.extend(self.read_letter(id, offset)?);
        }
        Ok((letters, ids))
    }

    /// One dead letter; `None` when there is none of that name, or no more. Blocks.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn letter(&self, id: LetterId) -> io::Result<Option<DeadLetter>> {
        let offset = lock(&self.inner.dead).offset(id)?;
        offset.map_or(Ok(None), |offset| self.read_letter(id, offset))
    }

    /// After every letter that there is now.
    #[must_use]
    pub fn letters_end(&self) -> LetterId {
        lock(&self.inner.dead).end()
    }

    fn read_letter(&self, id: LetterId, offset: u32) -> io::Result<Option<DeadLetter>> {
        let frame = DeadLetters::read(&self.inner.settings.dir, id, offset)?;
        Ok(frame.map(|frame| DeadLetter { id, frame }))
    }

    /// Removes dead letters for good. Answers how many of them were there; when this returns, that is durable.
    ///
    /// # Errors
    /// None was removed.
    pub async fn purge(&self, ids: &[LetterId]) -> Result<u64, Refusal> {
        let taken = self.take_letters(ids)?;
        let ticket = lock(&self.inner.admission).stage_gone(&taken);
        self.settle_letters(ticket, &taken).await?;
        Ok(taken.len() as u64)
    }

    /// Puts dead letters back into the outbox, each behind what waits in its lane, except those of customers who are
    /// switched off and those whose endpoint is full. Answers which; when this returns, that is durable.
    ///
    /// # Errors
    /// None was replayed.
    pub async fn replay(&self, replays: &[Replay<'_>], now_s: u64) -> Result<Vec<LetterId>, Refusal> {
        let ids: Vec<LetterId> = replays.iter().map(|replay| replay.id).collect();
        let taken = self.take_letters(&ids)?;
        let mut left: HashSet<LetterId> = taken.iter().copied().collect();
        // Each once, however often it is named.
        let replays: Vec<&Replay<'_>> = replays.iter().filter(|replay| left.remove(&replay.id)).collect();
        let staged = self.decided(|admission| admission.replay(&replays, now_s));
        let (replayed, ticket) = match staged {
            Ok(staged) => staged,
            Err(refusal) => {
                self.put_letters_back(&taken);
                return Err(refusal);
            }
        };
        let left: Vec<LetterId> = taken.into_iter().filter(|id| !replayed.contains(id)).collect();
        self.put_letters_back(&left);
        self.settle_letters(Ok(ticket), &replayed).await?;
        Ok(replayed)
    }

    fn take_letters(&self, ids: &[LetterId]) -> Result<Vec<LetterId>, Refusal> {
        let mut dead = lock(&self.inner.dead);
        let mut taken = Vec::with_capacity(ids.len());
        for id in ids {
            match dead.take(*id) {
                Ok(true) => taken.push(*id),
                Ok(false) => {}
                Err(error) => {
                    self.inner.failed("read", &error);
                    taken.iter().for_each(|id| dead.put_back(*id));
                    return Err(Refusal::DiskLow);
                }
            }
        }
        Ok(taken)
    }

    fn put_letters_back(&self, ids: &[LetterId]) {
        let mut dead = lock(&self.inner.dead);
        ids.iter().for_each(|id| dead.put_back(*id));
    }

    async fn settle_letters(&self, ticket: Result<Option<Ticket>, Refusal>, ids: &[LetterId]) -> Result<(), Refusal> {
        let result = match ticket {
            Ok(ticket) => {
                self.wake_writer();
                self.wait(ticket).await
            }
            Err(refusal) => Err(refusal),
        };
        if result.is_err() {
            self.put_letters_back(ids);
        }
        result
    }

    /// What is known of an event, within the window in which its id is known. Blocks.
    ///
    /// # Errors
    /// It cannot be read just now.
    pub fn fate(&self, key: EventKey, now_s: u64) -> Result<Option<Fate>, Refusal> {
        let found = {
            let mut admission = lock(&self.inner.admission);
            admission.ids.expire(now_s);
            admission.ids.number(key)
        };
        let Some((number, accepted_s)) = found else { return Ok(None) };
        let queue = self.inner.queue().ok_or(Refusal::DiskLow)?;
        let row = queue.ids(number / queue::ID_ROW as u64).map_err(|error| self.inner.queue_failed("read", &error))?;
        let entry = row.and_then(|row| row.get((number % queue::ID_ROW as u64) as usize).copied());
        // Not in its row yet: it was accepted just now.
        let ended = entry.filter(|entry| entry.key == key.to_le_bytes()).and_then(|entry| entry.ended);
        let ended = ended.map(|(ending, second)| (ending, u64::from(second)));
        Ok(Some(Fate { accepted_s: u64::from(accepted_s), ended }))
    }

    /// Dead letters that are kept, by endpoint.
    #[must_use]
    pub fn dead_letters(&self) -> Vec<(EndpointName, u64)> {
        let counts = lock(&self.inner.dead).counts();
        counts.into_iter().map(|(endpoint, count)| (EndpointName::from_number(endpoint), count)).collect()
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

    /// Whether events are refused for want of space.
    #[must_use]
    pub fn is_disk_low(&self) -> bool {
        lock(&self.inner.admission).is_disk_low
    }

    /// Bytes of the data directory's files.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        recover::bytes_below(&self.inner.settings.dir)
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
        self.inner.is_ending.store(true, Ordering::SeqCst);
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

    /// Repeats a decision until the rows that it needs are at hand.
    fn decided<T>(&self, mut decide: impl FnMut(&mut Admission) -> Result<Step<T>, Refusal>) -> Result<T, Refusal> {
        for _ in 0..FETCHES_MAX {
            let (step, is_awaited) = {
                let mut admission = lock(&self.inner.admission);
                let step = decide(&mut admission)?;
                (step, admission.is_writer_idle && !admission.pending.is_empty())
            };
            if is_awaited {
                self.inner.work.notify_one();
            }
            let keys = match step {
                Step::Done(done) => return Ok(done),
                Step::Missing(keys) => keys,
            };
            let queue = self.inner.queue().ok_or(Refusal::DiskLow)?;
            let hashing = self.hashing();
            let mut rows = Vec::with_capacity(keys.len());
            for (key, version) in keys {
                let value =
                    state::read(&queue, &hashing, &key).map_err(|error| self.inner.queue_failed("read", &error))?;
                rows.push((key, version, value));
            }
            let mut admission = lock(&self.inner.admission);
            for (key, version, value) in rows {
                admission.cache.fill(key, version, value);
            }
        }
        Err(Refusal::DiskLow)
    }

    /// Waits while the queue's rows are far behind: what they have not taken yet is held in memory.
    async fn wait_for_rows(&self) -> Result<(), Refusal> {
        let is_crowded = || lock(&self.inner.admission).cache.is_crowded();
        if !is_crowded() {
            return Ok(());
        }
        let waited = tokio::time::timeout(ROWS_LIMIT, async {
            // One after another, first come, first served: who only looked now and then might never see room.
            let _turn = self.inner.rows_turn.lock().await;
            while is_crowded() {
                tokio::time::sleep(ROWS_AGAIN).await;
            }
        });
        waited.await.map_err(|_| Refusal::DiskLow)
    }

    async fn wait(&self, ticket: Option<Ticket>) -> Result<(), Refusal> {
        match ticket {
            None => Ok(()),
            Some(ticket) => ticket.done.await.unwrap_or(Err(Refusal::Stopping)),
        }
    }
}

impl Note {
    fn into_record(self) -> Record<'static> {
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

/// Encodes an event's record.
#[must_use]
pub fn encode_event(event: Accepted<'_>) -> Vec<u8> {
    Record::Accepted(event).encode()
}

impl Inner {
    fn hashing(&self) -> HashKey {
        let mut key = [0; 16];
        for (place, byte) in key.iter_mut().zip(self.identity) {
            *place = byte;
        }
        HashKey(key)
    }

    fn queue(&self) -> Option<Arc<Queue>> {
        self.queue.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn failed(&self, op: &'static str, error: &dyn std::fmt::Display) {
        self.metrics.errors.with_label_values(&[op]).inc();
        tracing::error!(op, %error, "the store failed");
    }

    fn queue_failed(&self, op: &'static str, error: &QueueError) -> Refusal {
        self.failed(op, error);
        Refusal::DiskLow
    }

    fn note(&self, bodies: Vec<Vec<u8>>) {
        let mut writer = lock(&self.writer);
        match writer.note(bodies) {
            Ok(true) => {}
            Ok(false) => {
                drop(writer);
                // An empty group: the journal's thread begins a segment for it. Nobody waits for that.
                drop(lock(&self.admission).stage_sync());
                self.work.notify_all();
            }
            Err(error) => {
                // Room for just this is held ready.
                recover::release_reserve(&self.settings.dir);
                if let Err(error) = writer.note(Vec::new()) {
                    self.failed("append", &error);
                }
                self.failed("append", &error);
            }
        }
    }

    /// The journal's thread: writes and syncs groups of requests until the end.
    fn write_groups(&self) {
        loop {
            let requests = {
                let mut admission = lock(&self.admission);
                while admission.pending.is_empty() && !self.is_ending.load(Ordering::SeqCst) {
                    admission.is_writer_idle = true;
                    admission = self.work.wait(admission).unwrap_or_else(PoisonError::into_inner);
                }
                admission.is_writer_idle = false;
                std::mem::take(&mut admission.pending)
            };
            if requests.is_empty() {
                break;
            }
            match self.write_durably(&requests) {
                Ok(written) => self.publish(requests, written),
                Err(error) => {
                    self.failed("append", &error);
                    lock(&self.admission).fail(requests, Refusal::DiskLow);
                    self.fates.send_replace(());
                }
            }
        }
    }

    /// Writes a group and syncs it. After a failed sync the group is written again, once, into a new segment: pages of the
    /// old one may be marked clean without being on disk.
    fn write_durably(&self, requests: &[Request]) -> io::Result<journal::Written> {
        for is_last in [false, true] {
            let (begun, written) = {
                let mut writer = lock(&self.writer);
                let events = requests.iter().map(|request| request.staged.len()).sum();
                let begun = if writer.wants_roll(events) { Some(self.roll(&mut writer)?) } else { None };
                (begun, writer.write_group(requests))
            };
            // With the lock released: the relay may be waiting for it while its channel is full.
            if let Some(begun) = begun {
                let notice = Notice::SegmentBegun { slot: begun.slot, segment: begun.segment };
                drop(self.notices.blocking_send(notice));
            }
            let written = written?;
            let timer = self.metrics.sync_seconds.start_timer();
            let synced = written.sync();
            timer.observe_duration();
            let mut writer = lock(&self.writer);
            match synced {
                Ok(()) => {
                    writer.synced(&written);
                    return Ok(written);
                }
                Err(error) => {
                    self.failed("sync", &error);
                    writer.abandon(&written);
                    if is_last {
                        return Err(error);
                    }
                }
            }
        }
        Err(io::ErrorKind::Other.into())
    }

    /// Begins a segment before anything is accepted, for what is noted of the events that wait. Where the disk does not
    /// take it, it is begun with the first group.
    fn begin_segment(&self) {
        match self.roll(&mut lock(&self.writer)) {
            Ok(Begun { slot, segment }) => {
                // The first notice of all: there is room.
                drop(self.notices.try_send(Notice::SegmentBegun { slot, segment }));
            }
            Err(error) => self.failed("append", &error),
        }
    }

    fn roll(&self, writer: &mut Writer) -> io::Result<Begun> {
        let mut segments = self.segments.write().unwrap_or_else(PoisonError::into_inner);
        let begun = writer.roll(&mut segments)?;
        if let Some((number, end)) = writer.previous() {
            segments.ends.insert(number, end);
        }
        tracing::debug!(segment = begun.segment, "began a segment");
        Ok(begun)
    }

    fn publish(&self, requests: Vec<Request>, written: journal::Written) {
        lock(&self.admission).durable(&requests, written.end);
        *lock(&self.durable) = written.end;
        self.durable_moved.notify_all();
        self.fates.send_replace(());
        let mut items = Vec::new();
        let mut answers = Vec::with_capacity(requests.len());
        for (request, events) in requests.into_iter().zip(written.events) {
            items.extend(events.into_iter().map(Item::Appended));
            items.extend(request.withdraw.into_iter().map(Item::Withdraw));
            answers.push(request.done);
        }
        let notice = Notice::Durable { items, end: written.end, answers: Answers(answers) };
        if let Err(mpsc::error::SendError(Notice::Durable { answers, .. })) = self.notices.blocking_send(notice) {
            // The relay has ended: what it was not told is found at the next start.
            answers.send();
        }
    }
}
