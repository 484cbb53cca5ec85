//! Opens the queue, or builds it anew from the state log and the journal: at a start, and after an error of sled's.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::applier::{Applier, advance};
use super::checkpoint::Checkpoint;
use super::codec::Record;
use super::queue::{self, PositionRow, Queue, QueueError};
use super::state_log::StateLog;
use super::{Inner, Options, Position, lock, segment, state};
use crate::clock;
use crate::domain::keys::{EventKey, HashKey};
use crate::metrics::StoreMetrics;

/// What a queue is opened by.
pub(super) struct Opener<'a> {
    pub options: &'a Options,
    pub metrics: &'a StoreMetrics,
    pub checkpoint: Option<&'a Checkpoint>,
    pub hashing: HashKey,
    /// Not a further try after an error.
    pub is_start: bool,
    /// Known not to read back, though it may open.
    pub is_damaged: bool,
    /// It may not read back: all of it is read.
    pub is_suspect: bool,
}

/// A queue whose rows are applied up to the end of the journal.
pub(super) struct Opened {
    pub queue: Arc<Queue>,
    pub applier: Applier,
    /// Idempotency keys have other numbers than before.
    pub is_new: bool,
}

impl Opener<'_> {
    /// Opens the directory of that number, or builds it anew where it is of no use. `apply_rest` applies the journal.
    ///
    /// # Errors
    /// There is no room, or it cannot even be built anew. What is there stays for the next try.
    pub(super) fn open(
        &self,
        number: u64,
        apply_rest: impl Fn(&Queue, &mut Applier) -> Result<(), QueueError>,
    ) -> Result<Opened, QueueError> {
        let dir = queue::path(&self.options.dir, number);
        let needed = self.checkpoint.map(|checkpoint| checkpoint.position);
        if dir.exists() {
            let resumed = if self.is_damaged {
                Err(QueueError::Damaged("it did not read back"))
            } else {
                self.resume(number, needed, &apply_rest)
            };
            match resumed {
                Ok((queue, applier)) => return Ok(Opened { queue, applier, is_new: false }),
                // Nothing is wrong with it, or maybe only for the moment.
                Err(error)
                    if error.is_no_space()
                        || error.is_of_this_process()
                        || (!self.is_start && error.is_of_a_file()) =>
                {
                    return Err(error);
                }
                Err(error) => {
                    tracing::error!(%error, "the queue is set aside and built anew from the journal");
                    set_aside(&self.options.dir, &dir)?;
                    self.metrics.damaged("queue", 1);
                }
            }
        } else if needed.is_some() && self.is_start {
            tracing::error!("the queue is missing and built anew from the journal");
            self.metrics.damaged("queue", 1);
        }
        match self.build(number, &apply_rest) {
            Ok((queue, applier)) => Ok(Opened { queue, applier, is_new: true }),
            Err(error) => {
                // Half of one would pass for one that was damaged.
                drop(std::fs::remove_dir_all(&dir));
                Err(error)
            }
        }
    }

    fn resume(
        &self,
        number: u64,
        needed: Option<Position>,
        apply_rest: impl Fn(&Queue, &mut Applier) -> Result<(), QueueError>,
    ) -> Result<(Arc<Queue>, Applier), QueueError> {
        let queue = Queue::open(&self.options.dir, number)?;
        let at = queue.position()?.unwrap_or_default();
        let here = Position { segment: at.segment, offset: at.offset };
        if needed.is_some_and(|needed| here < needed) {
            return Err(QueueError::Damaged("it is older than the checkpoint"));
        }
        let state_log = StateLog::open(&self.options.dir, &at)?;
        // What a start reads besides must be whole too.
        queue.settings()?;
        queue.nonces()?;
        let mut applier = Applier::resume(&queue, at, state_log, Position::default(), self.applier_settings())?;
        apply_rest(&queue, &mut applier)?;
        applier.commit(&queue)?;
        // Last: where the disk is full it does not come to this, and all of it is not read at every try.
        if self.is_suspect {
            queue.read_through()?;
        }
        Ok((Arc::new(queue), applier))
    }

    fn build(
        &self,
        number: u64,
        apply_rest: impl Fn(&Queue, &mut Applier) -> Result<(), QueueError>,
    ) -> Result<(Arc<Queue>, Applier), QueueError> {
        let queue = Queue::open(&self.options.dir, number)?;
        let (number, from, synced) = match self.checkpoint {
            Some(found) => (found.state_log, found.position, found.state_len),
            None => (0, Position::default(), 0),
        };
        let (mut len, mut damaged) = (synced, 0);
        let path = StateLog::path(&self.options.dir, number);
        match File::open(&path) {
            Ok(file) => {
                let mut result = Ok(());
                let apply = |frame: &segment::Frame| {
                    let Some(Record::State(change)) = Record::decode(frame.body()) else { return };
                    if result.is_ok() {
                        result = state::apply(&queue, &self.hashing, &change).map(drop);
                    }
                };
                // What came after the checkpoint is in the journal, and written again from there. Without a checkpoint
                // all there is has to do.
                let scan = match self.checkpoint {
                    Some(_) => segment::scan_synced(&file, number, 0, synced, apply)?,
                    None => segment::scan(&file, number, 0, 0, apply)?,
                };
                result?;
                if self.checkpoint.is_none() {
                    len = scan.valid_len;
                }
                let missing = u64::from(file.metadata()?.len() < synced);
                damaged = scan.damaged.len() as u64 + missing;
                self.metrics.damaged("state_log", damaged);
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && synced == 0 => {}
            // Without it the customers are gone: nothing is built on a file that cannot be read just now.
            Err(error) => {
                return Err(std::io::Error::new(error.kind(), format!("{}: {error}", path.display())).into());
            }
        }
        let at = PositionRow { state_log: number, state_len: len, ..PositionRow::default() };
        let state_log = StateLog::open(&self.options.dir, &at)?;
        let mut applier = Applier::resume(&queue, at, state_log, from, self.applier_settings())?;
        apply_rest(&queue, &mut applier)?;
        if damaged > 0 {
            // It is written from the rows: all that was read must be in them. The position comes after it, so that a crash
            // in between builds all of it again.
            applier.change_rows(&queue)?;
            applier.rewrite_state_log(&queue, &self.options.dir)?;
        }
        applier.commit(&queue)?;
        queue.flush()?;
        Ok((Arc::new(queue), applier))
    }

    fn applier_settings(&self) -> (HashKey, u64) {
        let rules = &self.options.rules;
        (self.hashing, rules.dedupe_max as u64)
    }
}

/// Puts a damaged queue where somebody may look at it. Only the last one is kept: they take room.
fn set_aside(dir: &Path, damaged: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("queue.damaged-") {
            let is_dir = entry.file_type()?.is_dir();
            if is_dir { std::fs::remove_dir_all(entry.path())? } else { std::fs::remove_file(entry.path())? }
        }
    }
    std::fs::rename(damaged, dir.join(format!("queue.damaged-{}", clock::wall_ms())))
}

/// After an error of sled's while running: opens it again, or builds it anew, up to what is durable.
pub(super) fn reopen(inner: &Inner) -> Result<(Arc<Queue>, Applier), QueueError> {
    let (checkpoint, _) = Checkpoint::read(&inner.options.dir)?;
    let opener = Opener {
        options: &inner.options,
        metrics: &inner.metrics,
        checkpoint: checkpoint.as_ref(),
        hashing: inner.hashing(),
        is_start: false,
        is_damaged: inner.queue_is_damaged.load(Ordering::SeqCst),
        is_suspect: inner.queue_is_suspect.load(Ordering::SeqCst),
    };
    let durable = *inner.durable.lock().unwrap_or_else(PoisonError::into_inner);
    let number = inner.queue_number.load(Ordering::Relaxed);
    let opened = opener.open(number, |queue, applier| advance(inner, applier, queue, durable))?;
    if opened.is_new {
        renumber_ids(inner, &opened)?;
        inner.queue_is_damaged.store(false, Ordering::SeqCst);
    }
    inner.queue_is_suspect.store(false, Ordering::SeqCst);
    Ok((opened.queue, opened.applier))
}

/// Keys of events whose segments are gone have no rows any more: from now on a key's row is found by the number that
/// the last one has.
fn renumber_ids(inner: &Inner, opened: &Opened) -> Result<(), QueueError> {
    let last = opened.applier.last_id(&opened.queue)?;
    let admission = lock(&inner.admission);
    let number = last.and_then(|key| admission.ids.number(EventKey::from_le_bytes(key)));
    let next = number.map_or(admission.ids.next_number(), |(number, _)| number + 1);
    inner.ids_without_rows.store(next.saturating_sub(opened.applier.next_id()), Ordering::Relaxed);
    Ok(())
}
