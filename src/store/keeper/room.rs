//! Room on the disk: held ready, given back, freed.

use std::io;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::Keeper;
use crate::store::journal::{SPARE, SPARE_NEW};
use crate::store::queue::{Queue, QueueError};
use crate::store::{Notice, disk, segment};

impl Keeper<'_> {
    /// What a checkpoint frees is worth more than what is held ready.
    pub(super) fn make_room(&mut self, error: &QueueError) {
        if error.is_no_space() {
            disk::release_reserve(&self.inner.options.dir);
            self.is_full = true;
        }
    }

    /// Creates the next segment's file ahead, so that beginning it costs no allocation. Not where room is short: an
    /// allocation that fails takes, for a moment, what the journal wants to write.
    pub(super) fn prepare_spare(&self, free: u64) {
        let bytes = u64::from(self.inner.options.segment_bytes);
        if free < self.inner.free_min.load(Ordering::Relaxed).saturating_add(2 * bytes) {
            return;
        }
        let dir = disk::journal_dir(&self.inner.options.dir);
        let spare = dir.join(SPARE);
        if spare.exists() {
            return;
        }
        let new = dir.join(SPARE_NEW);
        let made = segment::create(&new, bytes).and_then(|_| std::fs::rename(&new, &spare));
        if let Err(error) = made {
            self.inner.failed("allocate", &error);
        }
    }

    pub(super) fn remove(&self, queue: &Queue, freed: &[u64]) -> Result<(), QueueError> {
        let dir = disk::journal_dir(&self.inner.options.dir);
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
