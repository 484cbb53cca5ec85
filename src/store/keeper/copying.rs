//! When the queue is copied into a smaller file, and when the file of before goes.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use crate::clock;
use crate::store::applier::Applier;
use crate::store::queue::{self, Queue};
use crate::store::{Inner, Refusal, lock};

/// Rows of the queue that are copied at a time: a few milliseconds.
const COPY_ROWS: usize = 500;
/// The queue's file is copied when it is so many times what the copy should take.
const COPY_RATIO: f64 = 2.0;
/// How much larger than its rows a file of sled's is when it has just been written, until a copy has shown it.
const OVERHEAD: f64 = 2.0;
/// No copy is begun while from one look to the next, a second later, less than this share of the rows is left: a tenth
/// of them would be gone in a minute, and while a backlog is drained memory is wanted elsewhere.
const SHRINKING: f64 = 0.998;
/// How long no copy is begun after one that failed.
const COPY_AGAIN: Duration = Duration::from_secs(600);

/// The queue's copying.
#[derive(Debug)]
pub(super) struct Copying {
    is_on: bool,
    /// The queue that was copied, until two checkpoints name the copy; and how many do.
    replaced: Option<(Arc<Queue>, u32)>,
    /// How many times what its rows should take the queue's file was after it was copied last.
    overhead: f64,
    /// After one that failed.
    not_before: Duration,
    /// Bytes of the rows when they were looked at last.
    rows_before: f64,
}

impl Default for Copying {
    fn default() -> Copying {
        Copying { is_on: false, replaced: None, overhead: OVERHEAD, not_before: Duration::ZERO, rows_before: 0.0 }
    }
}

impl Copying {
    /// Begins to copy the queue's rows when its file has become much larger than what is in it: sled never shrinks it.
    pub(super) fn begin(&mut self, inner: &Inner, applier: &Applier) {
        let (Some(queue), None) = (inner.queue(), &self.replaced) else { return };
        let bytes = queue.file_bytes();
        let rows = row_bytes(inner, applier);
        // Most of what would be copied will soon be gone, and its room with it.
        let is_shrinking = rows < self.rows_before * SHRINKING;
        self.rows_before = rows;
        let is_large = bytes >= inner.options.queue_bytes_min;
        let is_empty = rows * self.overhead * COPY_RATIO < bytes as f64;
        let has_room =
            inner.free_bytes.load(Ordering::Relaxed) > inner.free_min.load(Ordering::Relaxed).saturating_add(bytes);
        let is_early = clock::monotonic() < self.not_before;
        if self.is_on || is_early || is_shrinking || !is_large || !is_empty || !has_room {
            return;
        }
        self.is_on = true;
        if let Err(error) = queue.begin_copy(&inner.options.dir) {
            inner.failed("queue", &error);
        }
    }

    /// Copies some more, and changes over to the copy when it is whole. Says whether there is more to copy.
    pub(super) fn go_on(&mut self, inner: &Inner, applier: Option<&Applier>) -> bool {
        if !self.is_on {
            return false;
        }
        let Some(queue) = inner.queue().filter(|queue| queue.is_copying()) else {
            // Given up: what there is of it goes.
            self.is_on = false;
            self.not_before = clock::monotonic() + COPY_AGAIN;
            let number = inner.queue_number.load(Ordering::Relaxed);
            if let Err(error) = queue::remove_others(&inner.options.dir, number) {
                inner.failed("queue", &error);
            }
            return false;
        };
        match queue.copy_some(&inner.options.dir, COPY_ROWS) {
            Ok(None) => true,
            Ok(Some(copy)) => {
                let (before, after) = (queue.file_bytes(), copy.file_bytes());
                tracing::info!(before, after, "copied the queue into a smaller file");
                self.overhead = applier.map_or(OVERHEAD, |applier| after as f64 / row_bytes(inner, applier));
                self.is_on = false;
                inner.queue_number.store(copy.number(), Ordering::Relaxed);
                *inner.queue.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(copy));
                self.replaced = Some((queue, 0));
                false
            }
            Err(error) => {
                let _: Refusal = inner.queue_failed("queue", &error);
                true
            }
        }
    }

    /// Whether the queue that was copied is still there.
    pub(super) fn is_replaced(&self) -> bool {
        self.replaced.is_some()
    }

    /// After a checkpoint: removes the queue that was copied, once both checkpoints name the copy and nobody reads it any
    /// more.
    pub(super) fn checkpointed(&mut self, inner: &Inner) -> io::Result<()> {
        match self.replaced.take() {
            Some((queue, named)) if named == 0 || Arc::strong_count(&queue) > 1 => {
                self.replaced = Some((queue, named + 1));
                Ok(())
            }
            Some((queue, _)) => {
                drop(queue);
                let number = inner.queue_number.load(Ordering::Relaxed);
                queue::remove_others(&inner.options.dir, number)
            }
            None => Ok(()),
        }
    }
}

/// About how many bytes the queue's rows should take; never 0.
fn row_bytes(inner: &Inner, applier: &Applier) -> f64 {
    let waiting = lock(&inner.admission).waiting();
    applier.row_bytes(waiting).max(1) as f64
}
