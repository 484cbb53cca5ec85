//! Opening a data directory: after a clean stop, a crash, a power cut, or damage.
//!
//! 1. The checkpoint says which segments there are and which of their events wait.
//! 2. sled is opened; if it does not open, or is older than the checkpoint, it is set aside and built anew from the state
//!    log and the journal.
//! 3. The rest of the journal is applied to its rows, and replayed for what waits.
//! 4. A new segment will be begun: no old one is ever appended to.

mod loading;
mod segments;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Condvar, Mutex, RwLock};
use std::time::Duration;

use tokio::sync::{mpsc, watch};

pub(super) use self::loading::index_entry;
use self::loading::{Loading, Unrecorded, index_rows};
use self::segments::Found;
use super::admission::Admission;
use super::applier::Applier;
use super::checkpoint::Checkpoint;
use super::dead_letters::{DeadLetters, DeadMark};
use super::disk::{RESERVE_BYTES, dead_dir, free_bytes, journal_dir, release_reserve, say_free};
use super::ids::Ids;
use super::journal::{SegmentFile, Writer};
use super::keeper::{self, Keeper};
use super::open_queue::Opener;
use super::queue::{self, ID_ROW, Queue, QueueError};
use super::segment;
use super::{Ending, Inner, Note, Notice, Options, Position, SEGMENT_BYTES, Segments, Store, Threads};
use crate::clock;
use crate::domain::keys::{EventKey, HashKey, LaneKey};
use crate::domain::schedule::Schedule;
use crate::metrics::StoreMetrics;

/// Why a data directory could not be opened. Nothing in it was lost by trying.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it open.
    #[error("{}: another h5push-relay is running on this data directory", .0.display())]
    InUse(PathBuf),
    /// The file system said no.
    #[error("{}: {error}", .path.display())]
    Io {
        /// What was being opened.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// sled cannot be opened for want of space, or cannot even be built anew.
    #[error("the queue could not be opened: {0}")]
    Queue(String),
}

/// What is handed from step to step.
struct Opening<'a> {
    options: &'a Options,
    metrics: &'a StoreMetrics,
    identity: [u8; 32],
    hashing: HashKey,
    checkpoint: Option<Checkpoint>,
    found: Vec<Found>,
    /// Damaged records that were counted when the segments were found.
    noted: u64,
}

impl Store {
    /// Opens the data directory and fills `schedule` with what waits, after `prepare` has configured its endpoints by the
    /// settings. Starts the threads, which tell `notices` what becomes durable from then on.
    ///
    /// # Errors
    /// The directory cannot be used.
    pub fn open(
        options: Options,
        metrics: StoreMetrics,
        schedule: &mut Schedule,
        prepare: impl FnOnce(&BTreeMap<String, String>, &mut Schedule),
        notices: mpsc::Sender<Notice>,
    ) -> Result<(Store, Threads), OpenError> {
        // Of a clock that leaps while what waits is loaded, too.
        let skew_ms = keeper::skew_ms(clock::monotonic());
        let dir = options.dir.clone();
        let io_error = |path: &Path| {
            let path = path.to_owned();
            move |error| OpenError::Io { path, error }
        };
        let journal = journal_dir(&dir);
        create_dirs(&dir)?;
        let lock = take_lock(&dir)?;
        if free_bytes(&dir).is_ok_and(|free| free < RESERVE_BYTES) {
            release_reserve(&dir);
        }
        let (checkpoint, is_damaged) = Checkpoint::read(&dir).map_err(io_error(&dir))?;
        if is_damaged {
            metrics.damaged("checkpoint", 1);
            tracing::error!(
                usable = checkpoint.is_some(),
                "the last checkpoint is damaged: what was pushed since may repeat"
            );
        }
        let mut opening = Opening {
            options: &options,
            metrics: &metrics,
            identity: [0; 32],
            hashing: HashKey::of([0; 32]),
            checkpoint,
            found: Vec::new(),
            noted: 0,
        };
        let begun = clock::now();
        opening.find_segments().map_err(io_error(&journal))?;
        tracing::debug!(segments = opening.found.len(), elapsed = ?begun.elapsed(), "segments found");
        let (queue, mut applier) = opening.open_queue()?;
        // Beside those that the search for the segments' ends has met already.
        let found = applier.damaged.saturating_sub(opening.noted);
        if found > 0 {
            tracing::error!(found, "damaged records in the journal");
            metrics.damaged("journal", found);
        }
        tracing::debug!(elapsed = ?begun.elapsed(), "queue open");
        let remembered = |error: QueueError| OpenError::Queue(error.to_string());
        let set: BTreeMap<String, String> = queue.settings().map_err(remembered)?.into_iter().collect();
        prepare(&set, schedule);
        let mut segments = Segments::default();
        let mut withdrawn = opening.load(&queue, schedule, &mut segments).map_err(io_error(&journal))?;
        tracing::debug!(elapsed = ?begun.elapsed(), "what waits is loaded");
        let ids = opening.load_ids(&queue, applier.next_id());
        tracing::debug!(elapsed = ?begun.elapsed(), "idempotency keys loaded");
        let (mut dead, buried) = opening.open_dead(schedule, &mut withdrawn).map_err(io_error(&dir))?;
        // What the rest of the journal said is gone.
        applier.write_gone(&mut dead).map_err(io_error(&dir))?;
        opening.restore_retries(&queue, schedule, &segments);
        let last = opening.found.last();
        let next_number = last
            .map_or(1, |found| found.number + 1)
            .max(opening.checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.position.segment + 1));
        let previous = last.map(|found| (found.number, found.end));
        let nonces = queue.nonces().map_err(remembered)?;
        let mut admission = admission(Admission::new(options.rules, ids), schedule, set, nonces);
        let identity = opening.identity;
        let free = free_bytes(&dir).map_err(io_error(&dir))?;
        admission.is_disk_low = free < options.free_min;
        if admission.is_disk_low {
            say_free(free, options.free_min);
        }
        let inner = Arc::new(Inner {
            identity,
            admission: Mutex::new(admission),
            work: Condvar::new(),
            writer: Mutex::new(Writer::new(journal, identity, options.segment_bytes, next_number, previous)),
            segments: RwLock::new(segments),
            durable: Mutex::new(applier.position()),
            durable_moved: Condvar::new(),
            queue_number: AtomicU64::new(queue.number()),
            queue_is_damaged: AtomicBool::new(false),
            queue_is_suspect: AtomicBool::new(false),
            ids_without_rows: AtomicU64::new(0),
            queue: RwLock::new(Some(queue)),
            dead: Mutex::new(dead),
            rows_turn: tokio::sync::Mutex::default(),
            notices,
            fates: watch::Sender::new(()),
            is_failing: AtomicBool::new(false),
            said: Mutex::default(),
            is_ending: AtomicBool::new(false),
            is_crashing: AtomicBool::new(false),
            free_bytes: AtomicU64::new(free),
            free_min: AtomicU64::new(options.free_min),
            _lock: lock,
            metrics,
            options,
        });
        if inner.options.is_relaying && schedule.events() > 0 {
            inner.begin_segment();
        }
        let threads = start_threads(&inner, applier, skew_ms).map_err(io_error(&dir))?;
        let store = Store { inner };
        store.note(ended(withdrawn, buried));
        Ok((store, threads))
    }
}

/// What is judged by, with what was there before the start.
fn admission(
    mut admission: Admission,
    schedule: &mut Schedule,
    settings: BTreeMap<String, String>,
    nonces: Vec<(u128, u64)>,
) -> Admission {
    for view in schedule.endpoints(0) {
        admission.count_waiting(view.name, view.events);
    }
    admission.settings = settings;
    // The row of an earlier use may have come back with a crash: the last one counts.
    for (key, until_s) in nonces.into_iter().rev() {
        admission.nonces.take(key, until_s, 0);
    }
    admission
}

/// What is to be noted of events that have ended, a note for each lane. What was tried of them is found to be over when it
/// is restored.
fn ended(withdrawn: Unrecorded, buried: Unrecorded) -> Vec<Note> {
    let mut notes = Vec::new();
    for (events, ending) in [(withdrawn, Ending::Withdrawn), (buried, Ending::Buried)] {
        let mut lanes: BTreeMap<LaneKey, Vec<u64>> = BTreeMap::new();
        for (seq, lane) in events {
            lanes.entry(lane).or_default().push(seq);
        }
        notes.extend(lanes.into_iter().map(|(lane, seqs)| Note::Settled { lane, ending, retry_is_over: false, seqs }));
    }
    notes
}

fn start_threads(inner: &Arc<Inner>, applier: Applier, skew_ms: u64) -> io::Result<Threads> {
    let writer = Arc::clone(inner);
    let keeper = Arc::clone(inner);
    let named = |name: &str| std::thread::Builder::new().name(name.to_owned());
    let threads = vec![
        named("journal").spawn(move || writer.write_groups())?,
        named("keeper").spawn(move || Keeper::new(&keeper, applier, skew_ms).run())?,
    ];
    Ok(Threads { threads })
}

fn create_dirs(dir: &Path) -> Result<(), OpenError> {
    // What is in it is for nobody else: messages, and what operators have set.
    let create = |path: &Path| match std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(io::Error::other("is no directory")),
        created => created,
    };
    for path in [dir, &journal_dir(dir), &dead_dir(dir)] {
        create(path).map_err(|error| OpenError::Io { path: path.to_owned(), error })?;
    }
    // Their names too are to be there after a power cut.
    segment::sync_dir(dir).map_err(|error| OpenError::Io { path: dir.to_owned(), error })?;
    // The directory above is somebody else's, and perhaps not to be opened.
    drop(dir.parent().map(segment::sync_dir));
    Ok(())
}

fn take_lock(dir: &Path) -> Result<File, OpenError> {
    let path = dir.join("lock");
    let open = File::options().create(true).truncate(false).write(true).open(&path);
    let file = open.map_err(|error| OpenError::Io { path: path.clone(), error })?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(OpenError::InUse(dir.to_owned())),
        Err(error) => Err(OpenError::Io { path, error: error.into() }),
    }
}

impl Opening<'_> {
    /// Opens sled, or builds it anew, and brings its rows up to the end of the journal.
    fn open_queue(&self) -> Result<(Arc<Queue>, Applier), OpenError> {
        let dir = &self.options.dir;
        let named = self.checkpoint.as_ref().map(|checkpoint| checkpoint.queue);
        // A copy that a checkpoint which is damaged named is better than none.
        let number = named.filter(|number| queue::path(dir, *number).exists()).unwrap_or_else(|| queue::highest(dir));
        queue::remove_others(dir, number).map_err(|error| OpenError::Io { path: dir.clone(), error })?;
        let opener = Opener {
            options: self.options,
            metrics: self.metrics,
            checkpoint: self.checkpoint.as_ref(),
            hashing: self.hashing,
            is_start: true,
            is_damaged: false,
            is_suspect: false,
        };
        let opened = opener.open(number, |queue, applier| {
            let at = applier.position().segment;
            let mut rest = self.found.iter().filter(|found| found.number >= at);
            rest.try_for_each(|found| applier.apply(queue, &found.file, (found.number, found.end), |_| ()))
        });
        opened.map(|opened| (opened.queue, opened.applier)).map_err(|error| OpenError::Queue(error.to_string()))
    }

    /// Fills the schedule: from the index rows up to the checkpoint, from the journal itself after it.
    /// Answers what is yet to be recorded as withdrawn.
    fn load(&self, queue: &Queue, schedule: &mut Schedule, segments: &mut Segments) -> io::Result<Unrecorded> {
        let mut withdrawn = Unrecorded::new();
        let covered = self.checkpoint.as_ref().map_or(Position::default(), |checkpoint| checkpoint.position);
        std::thread::scope(|scope| {
            // The rows of a segment are read while those of the one before are taken.
            let (read, rows) = std::sync::mpsc::sync_channel(0);
            scope.spawn(move || {
                let mut all = self.found.iter().filter(|found| found.number <= covered.segment);
                // Until nobody takes them any more.
                drop(all.try_for_each(|found| read.send(index_rows(found, queue))));
            });
            for found in &self.found {
                let slot = segments.free_slot().ok_or(io::Error::from(io::ErrorKind::StorageFull))?;
                let (number, generation) = (found.number, found.generation);
                segments.add(slot, SegmentFile { number, generation, file: Arc::clone(&found.file) });
                segments.ends.insert(found.number, found.end);
                schedule.backlog.open(slot, found.number);
                let loading = Loading { found, slot, covered, segments };
                if loading.is_covered(0) {
                    let rows = rows.recv().map_err(io::Error::other)?;
                    loading.load_covered(rows, schedule, self.metrics)?;
                }
                loading.replay(schedule, &self.hashing, &mut withdrawn)?;
                schedule.backlog.seal(slot);
            }
            Ok::<_, io::Error>(())
        })?;
        Ok(withdrawn)
    }

    fn load_ids(&self, queue: &Queue, next_id: u64) -> Ids {
        let rules = &self.options.rules;
        let mut ids = Ids::new(rules.dedupe_max, rules.dedupe_window_s);
        let first_row = next_id.saturating_sub(rules.dedupe_max as u64) / ID_ROW as u64;
        ids.start_at(first_row * ID_ROW as u64, (next_id - first_row * ID_ROW as u64) as usize);
        for row in first_row..=next_id / ID_ROW as u64 {
            match queue.ids(row) {
                Ok(Some(entries)) => {
                    for entry in entries {
                        ids.push(EventKey::from_le_bytes(entry.key), entry.second);
                    }
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::error!(%error, "idempotency keys cannot be read: repeated posts may be pushed again");
                    self.metrics.damaged("queue", 1);
                }
            }
        }
        ids
    }

    /// Opens the dead letters. An event that is among those written last is buried, whatever the journal says; answers
    /// those of which it says nothing.
    fn open_dead(&self, schedule: &mut Schedule, withdrawn: &mut Unrecorded) -> io::Result<(DeadLetters, Unrecorded)> {
        let none = DeadMark::default();
        let mark = self.checkpoint.as_ref().map_or(&none, |checkpoint| &checkpoint.dead);
        let dir = dead_dir(&self.options.dir);
        let limits = (self.options.dead_keep_s, self.options.dead_max);
        let (letters, found) = DeadLetters::open(dir, mark, self.hashing, limits)?;
        self.metrics.damaged("dead_letters", found.damaged);
        let mut buried = Unrecorded::new();
        for (endpoint, lane, seq) in found.events {
            if withdrawn.remove(&seq).is_some() {
                buried.insert(seq, lane);
            }
            let slots: Vec<u16> = schedule.backlog.groups().map(|(slot, _)| slot).collect();
            let handle = slots.into_iter().find_map(|slot| schedule.backlog.find(slot, seq));
            if let Some(handle) = handle.filter(|handle| !schedule.backlog.is_settled(*handle)) {
                tracing::debug!(%endpoint, seq, "was buried before the crash");
                schedule.settled_before(lane, &[handle], 0);
                buried.insert(seq, lane);
            }
        }
        Ok((letters, buried))
    }

    fn restore_retries(&self, queue: &Queue, schedule: &mut Schedule, segments: &Segments) {
        let rows = match queue.retries() {
            Ok(rows) => rows,
            Err(error) => {
                tracing::error!(%error, "retry state cannot be read: everything that waits is due now");
                self.metrics.damaged("queue", 1);
                return;
            }
        };
        let now_ms = clock::wall_ms();
        for row in rows {
            let slot = segments.slots.get(&(row.head >> crate::domain::backlog::PLACE_BITS));
            let head = slot.and_then(|slot| schedule.backlog.find(*slot, row.head));
            match head.filter(|head| !schedule.backlog.is_settled(*head)) {
                Some(head) => {
                    let wait = Duration::from_millis(row.due_ms.saturating_sub(now_ms));
                    schedule.restore(LaneKey(row.lane), head, row.retry, wait, 0);
                }
                // Over since: the row is of no use.
                None => drop(queue.remove_retry(row.lane)),
            }
        }
    }
}

const _: () = assert!(SEGMENT_BYTES < u32::MAX / 2);
