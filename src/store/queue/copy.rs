//! Gives the queue's disk back: sled's file never shrinks by itself, so its rows are copied into a new directory, a few
//! at a time, while they change.
//!
//! Rows are copied in the order of their keys; what changes at or before the last one that was copied is changed in
//! both. The new directory counts once a checkpoint names it, and the old one goes after that: a crash in between
//! finds the old one as that checkpoint needs it.

use std::ops::Bound;
use std::path::Path;

use super::{Queue, QueueError, guarded, lock, path, segment};

/// A file that says of a copy that it is whole.
const WHOLE: &str = "whole";

/// The copy on its way.
pub(super) struct Copying {
    to: Queue,
    /// The last key that was copied; empty at the beginning.
    last: Vec<u8>,
}

impl Queue {
    /// Bytes of sled's file.
    pub(in crate::store) fn file_bytes(&self) -> u64 {
        self.file.metadata().map_or(0, |metadata| metadata.len())
    }

    /// Whether a copy has been begun.
    pub(in crate::store) fn is_copying(&self) -> bool {
        lock(&self.copying).is_some()
    }

    /// Begins to copy the rows into the directory of the next number.
    pub(in crate::store) fn begin_copy(&self, dir: &Path) -> Result<(), QueueError> {
        let number = self.number + 1;
        let to = path(dir, number);
        if to.exists() {
            std::fs::remove_dir_all(&to)?;
        }
        *lock(&self.copying) = Some(Box::new(Copying { to: Queue::open(dir, number)?, last: Vec::new() }));
        Ok(())
    }

    /// Copies up to `rows` more. Gives the copy when it has all: from then on it is the queue. After an error there is no
    /// copy any more, and this queue is as good as before unless the error is its own.
    pub(in crate::store) fn copy_some(&self, dir: &Path, rows: usize) -> Result<Option<Queue>, QueueError> {
        let mut copying = lock(&self.copying);
        let Some(mut copy) = copying.take() else { return Ok(None) };
        let more = (Bound::Excluded(copy.last.as_slice()), Bound::Unbounded);
        let found: Vec<(sled::IVec, sled::IVec)> =
            guarded(|| Ok(self.db.range::<&[u8], _>(more).take(rows).collect::<Result<_, _>>()?))?;
        for (key, row) in &found {
            // What is wrong with the copy says nothing of this one.
            guarded(|| Ok(copy.to.db.insert(key, row)?)).map_err(std::io::Error::other)?;
        }
        if let Some((key, _)) = found.last() {
            copy.last = key.to_vec();
        }
        if found.len() == rows {
            *copying = Some(copy);
            return Ok(None);
        }
        copy.to.flush().map_err(std::io::Error::other)?;
        let to = path(dir, copy.to.number);
        std::fs::File::create(to.join(WHOLE))?;
        segment::sync_dir(&to)?;
        segment::sync_dir(dir)?;
        Ok(Some(copy.to))
    }

    /// Changes a row in the copy too, when it was copied already. A copy that cannot be written is given up.
    pub(super) fn also_in_copy(&self, key: &[u8], row: Option<&[u8]>) {
        let mut copying = lock(&self.copying);
        let Some(copy) = copying.as_ref().filter(|copy| key <= copy.last.as_slice()) else { return };
        let changed = guarded(|| match row {
            Some(row) => Ok(copy.to.db.insert(key, row)?),
            None => Ok(copy.to.db.remove(key)?),
        });
        if let Err(error) = changed {
            tracing::warn!(%error, "the copy of the queue is given up");
            *copying = None;
        }
    }
}

/// Removes the directories of other numbers.
pub(in crate::store) fn remove_others(dir: &Path, number: u64) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let other = number_of(&entry.file_name().to_string_lossy());
        if other.is_some_and(|other| other != number) {
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// The highest number of which there is a whole directory, for want of a checkpoint.
pub(in crate::store) fn highest(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| number_of(&entry.file_name().to_string_lossy()));
    numbers.filter(|number| path(dir, *number).join(WHOLE).exists()).max().unwrap_or(0)
}

fn number_of(name: &str) -> Option<u64> {
    if name == "queue" { Some(0) } else { name.strip_prefix("queue-")?.parse().ok().filter(|number| *number > 0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(queue: &Queue) -> Vec<(u64, Vec<u32>)> {
        (0..400)
            .filter_map(|bucket| {
                Some((bucket, queue.bucket(b'c', bucket as u32).unwrap())).filter(|(_, all)| !all.is_empty())
            })
            .collect()
    }

    #[test]
    fn a_copy_has_what_changed_meanwhile_before_and_behind_it() {
        let dir = tempfile::tempdir().unwrap();
        for seed in 0..20 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let queue = Queue::open(dir.path(), seed * 2).unwrap();
            let mut change = |queue: &Queue| {
                let bucket = rng.u32(0..400);
                let entries: Vec<u32> = if rng.u8(0..3) == 0 { Vec::new() } else { vec![rng.u32(..); rng.usize(1..4)] };
                if entries.is_empty() {
                    queue.remove_row(&crate::store::queue::buckets::page_key(b'c', bucket, 0)).unwrap();
                } else {
                    queue.put_bucket(b'c', bucket, &entries).unwrap();
                }
            };
            (0..300).for_each(|_| change(&queue));
            queue.begin_copy(dir.path()).unwrap();
            let copy = loop {
                (0..10).for_each(|_| change(&queue));
                if let Some(copy) = queue.copy_some(dir.path(), 7).unwrap() {
                    break copy;
                }
            };
            assert_eq!((copy.number(), rows(&copy)), (seed * 2 + 1, rows(&queue)));
            assert!(!queue.is_copying());
        }
        remove_others(dir.path(), 39).unwrap();
        assert_eq!((highest(dir.path()), std::fs::read_dir(dir.path()).unwrap().count()), (39, 1));
    }
}
