//! Rows of many small entries: a bucket is spread over as many pages as it needs.

use std::sync::{PoisonError, RwLock};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Queue, QueueError, guarded};

/// Buckets share so many locks.
pub(super) const BUCKET_LOCKS: usize = 64;
/// Bytes of entries that a bucket's page is filled with before the next is begun.
const PAGE_FILL: usize = 3_500;

impl Queue {
    /// An entry may move from page to page: a bucket is read and written whole.
    fn bucket_lock(&self, bucket: u32) -> &RwLock<()> {
        &self.bucket_locks[bucket as usize % BUCKET_LOCKS]
    }

    /// Shows a bucket's pages one after another, as stored, until `visit` has what it looks for.
    pub(in crate::store) fn look_in_bucket<T>(
        &self,
        kind: u8,
        bucket: u32,
        mut visit: impl FnMut(&[u8]) -> Result<Option<T>, QueueError>,
    ) -> Result<Option<T>, QueueError> {
        let _reading = self.bucket_lock(bucket).read().unwrap_or_else(PoisonError::into_inner);
        for page in 0..=u8::MAX {
            let Some(row) = guarded(|| Ok(self.db.get(page_key(kind, bucket, page))?))? else { break };
            if let Some(found) = visit(&row)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// All entries of a bucket, over its pages.
    pub(in crate::store) fn bucket<T: DeserializeOwned>(&self, kind: u8, bucket: u32) -> Result<Vec<T>, QueueError> {
        let _reading = self.bucket_lock(bucket).read().unwrap_or_else(PoisonError::into_inner);
        let mut all = Vec::new();
        for page in 0..=u8::MAX {
            match self.get_row::<Vec<T>>(&page_key(kind, bucket, page), "bucket")? {
                Some(entries) => all.extend(entries),
                None => break,
            }
        }
        Ok(all)
    }

    /// Writes a bucket, over as many pages as it needs. The pages are not written as one: what is replayed after a
    /// crash writes all of them again.
    pub(in crate::store) fn put_bucket<T: Serialize>(
        &self,
        kind: u8,
        bucket: u32,
        entries: &[T],
    ) -> Result<(), QueueError> {
        let mut pages: Vec<Vec<&T>> = Vec::new();
        let mut filled = 0;
        for entry in entries {
            let len = postcard::to_stdvec(entry).map_or(0, |bytes| bytes.len());
            match pages.last_mut() {
                Some(page) if filled + len <= PAGE_FILL => page.push(entry),
                _ => {
                    pages.push(vec![entry]);
                    filled = 0;
                }
            }
            filled += len;
        }
        let _writing = self.bucket_lock(bucket).write().unwrap_or_else(PoisonError::into_inner);
        for (page, entries) in pages.iter().enumerate().take(usize::from(u8::MAX)) {
            self.put_row(&page_key(kind, bucket, page as u8), entries)?;
        }
        for page in pages.len().min(usize::from(u8::MAX)) as u8..=u8::MAX {
            if !self.remove_row(&page_key(kind, bucket, page))? {
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
impl Queue {
    /// Makes no page of any bucket read back.
    pub(in crate::store) fn spoil_buckets(&self, kind: u8) {
        for key in self.db.scan_prefix([kind]).keys() {
            self.db.insert(key.unwrap(), &[0xff_u8; 9]).unwrap();
        }
    }
}

pub(super) fn page_key(kind: u8, bucket: u32, page: u8) -> [u8; 6] {
    let [a, b, c, d] = bucket.to_be_bytes();
    [kind, a, b, c, d, page]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_spill_over_to_further_pages_and_shrink_again() {
        let dir = tempfile::tempdir().unwrap();
        let queue = Queue::open(dir.path(), 0).unwrap();
        let many: Vec<String> = (0..200).map(|n| format!("{n:0>100}")).collect();
        queue.put_bucket(b'c', 7, &many).unwrap();
        assert_eq!(queue.bucket::<String>(b'c', 7).unwrap(), many);
        assert_eq!(queue.bucket::<String>(b'c', 8).unwrap(), Vec::<String>::new());
        queue.put_bucket(b'c', 7, &many[..3]).unwrap();
        assert_eq!(queue.bucket::<String>(b'c', 7).unwrap(), many[..3]);
        queue.flush().unwrap();
    }

    #[test]
    fn an_entry_that_moves_between_pages_is_always_found() {
        let dir = tempfile::tempdir().unwrap();
        let queue = Queue::open(dir.path(), 0).unwrap();
        let mut entries: Vec<String> = (0..120).map(|n| format!("{n:0>100}")).collect();
        queue.put_bucket(b'c', 7, &entries).unwrap();
        let is_done = std::sync::atomic::AtomicBool::new(false);
        let wanted = format!("{:0>100}", 60);
        std::thread::scope(|threads| {
            threads.spawn(|| {
                while !is_done.load(std::sync::atomic::Ordering::SeqCst) {
                    let found = queue.look_in_bucket(b'c', 7, |page| {
                        let page: Vec<String> = postcard::from_bytes(page).unwrap();
                        Ok(page.contains(&wanted).then_some(()))
                    });
                    assert_eq!(found.unwrap(), Some(()));
                    assert!(queue.bucket::<String>(b'c', 7).unwrap().contains(&wanted));
                }
            });
            for _ in 0..1_000 {
                // Each change puts its entry last, and all others move up.
                entries.rotate_left(1);
                queue.put_bucket(b'c', 7, &entries).unwrap();
            }
            is_done.store(true, std::sync::atomic::Ordering::SeqCst);
        });
    }
}
