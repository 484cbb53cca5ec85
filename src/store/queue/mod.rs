//! sled: the queue's index and state on disk. Rebuildable, and never in the way of a 202.
//!
//! Only the keeper's thread writes here (and a start, before there is one): single idempotent inserts of at most
//! [`ROW_MAX`] bytes, the applier's position row last.
//! `apply_batch`, `transaction`, `flush_async` and sled's flush timer are not used: they stall readers, deadlock or end
//! silently. sled's `flush` does not sync the file (0.34.7 uses `sync_file_range`), so [`Queue::flush`] does; rows stay
//! small because sled puts large ones into files that nobody syncs.
//!
//! | key | row |
//! | --- | --- |
//! | `p` | up to where the journal is applied |
//! | `i` segment generation block | lane, offset and time of up to [`BLOCK_EVENTS`] events |
//! | `c` bucket page | customers |
//! | `n` bucket page | other names of customers |
//! | `d` row | idempotency keys |
//! | `r` lane | what the head of a lane waits with |
//! | `s` key | what operators have set and receivers asked for |
//! | `o` moment nonce | nonces that were used |

mod blocks;
mod buckets;
mod copy;
mod error;
mod rows;

use std::any::Any;
use std::cell::Cell;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, RwLock, mpsc};
use std::time::Duration;

pub(in crate::store) use self::blocks::{BLOCK_EVENTS, IndexEntry};
use self::blocks::{pack, unpack};
use self::buckets::BUCKET_LOCKS;
use self::copy::Copying;
pub(in crate::store) use self::copy::{highest, remove_others};
pub(in crate::store) use self::error::QueueError;
pub(in crate::store) use self::rows::{IdEntry, PositionRow, RetryRow};
use super::{lock, segment};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Largest row, in bytes.
const ROW_MAX: usize = 4_096;
/// Idempotency keys of a row.
pub(in crate::store) const ID_ROW: usize = 100;
/// Rows that one call drops.
const NONCES_EXPIRED_AT_ONCE: usize = 1_000;
/// sled's page cache. Rows are read at start and when a customer is not in our own cache.
const CACHE_BYTES: u64 = 2 << 20;
/// How long opening may take before it counts as hung.
const OPEN_LIMIT: Duration = Duration::from_secs(120);
/// How often opening is tried while the last process's lock is still going away.
const OPEN_TRIES: u32 = 20;

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Whether a panic on this thread will be caught here, so that it need not end the process.
#[must_use]
pub fn is_guarded() -> bool {
    GUARDED.get()
}

fn guarded<T>(call: impl FnOnce() -> Result<T, QueueError>) -> Result<T, QueueError> {
    let before = GUARDED.replace(true);
    let result = catch_unwind(AssertUnwindSafe(call));
    GUARDED.set(before);
    result.unwrap_or_else(|panic| Err(QueueError::Panicked(text_of(panic.as_ref()))))
}

fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref().copied());
    text.unwrap_or("without a word").to_owned()
}

/// The open queue directory.
pub(in crate::store) struct Queue {
    number: u64,
    db: sled::Db,
    file: File,
    bucket_locks: [RwLock<()>; BUCKET_LOCKS],
    copying: Mutex<Option<Box<Copying>>>,
}

/// The directory of a number below the data directory. Numbers count how often the rows were copied into a new one.
pub(in crate::store) fn path(dir: &Path, number: u64) -> PathBuf {
    if number == 0 { dir.join("queue") } else { dir.join(format!("queue-{number}")) }
}

impl Queue {
    /// Opens or creates the directory of that number.
    pub(in crate::store) fn open(dir: &Path, number: u64) -> Result<Queue, QueueError> {
        let (tell, told) = mpsc::channel();
        let dir = path(dir, number);
        let path = dir.clone();
        // On a thread of its own: a damaged file can make sled hang.
        std::thread::Builder::new().name("sled-open".into()).spawn(move || {
            // Nobody listens any more when it hung and came back after all.
            drop(tell.send(guarded(|| open_patiently(&path))));
        })?;
        let db = told.recv_timeout(OPEN_LIMIT).map_err(|_| QueueError::Hung)??;
        let file = File::open(dir.join("db"))?;
        Ok(Queue {
            number,
            db,
            file,
            bucket_locks: [const { RwLock::new(()) }; BUCKET_LOCKS],
            copying: Mutex::new(None),
        })
    }

    /// How often the rows were copied.
    pub(in crate::store) fn number(&self) -> u64 {
        self.number
    }

    /// Reads every row.
    pub(in crate::store) fn read_through(&self) -> Result<(), QueueError> {
        guarded(|| self.db.iter().try_for_each(|row| Ok(row.map(drop)?)))
    }

    /// Makes all that was inserted durable. Where the disk does not take it, the rows are not to be trusted any more: the
    /// next sync of the same file may say that all is well.
    pub(in crate::store) fn flush(&self) -> Result<(), QueueError> {
        let flushed = guarded(|| {
            self.db.flush()?;
            Ok(self.file.sync_all()?)
        });
        flushed.map_err(|error| {
            if error.is_no_space() || !error.is_of_a_file() {
                return error;
            }
            tracing::error!(%error, "syncing the queue's file");
            QueueError::Damaged("its file could not be synced")
        })
    }

    fn get_row<T: DeserializeOwned>(&self, key: &[u8], what: &'static str) -> Result<Option<T>, QueueError> {
        guarded(|| match self.db.get(key)? {
            None => Ok(None),
            Some(row) => postcard::from_bytes(&row).map(Some).map_err(|_| QueueError::Damaged(what)),
        })
    }

    fn put_row<T: Serialize>(&self, key: &[u8], value: &T) -> Result<(), QueueError> {
        let row = postcard::to_stdvec(value).map_err(|_| QueueError::Damaged("unwritable row"))?;
        debug_assert!(row.len() <= ROW_MAX, "a row of {} bytes", row.len());
        guarded(|| Ok(self.db.insert(key, row.as_slice())?))?;
        self.also_in_copy(key, Some(&row));
        Ok(())
    }

    /// Says whether there was one.
    fn remove_row(&self, key: &[u8]) -> Result<bool, QueueError> {
        let had = guarded(|| Ok(self.db.remove(key)?.is_some()))?;
        self.also_in_copy(key, None);
        Ok(had)
    }

    pub(in crate::store) fn position(&self) -> Result<Option<PositionRow>, QueueError> {
        self.get_row(b"p", "position")
    }

    pub(in crate::store) fn put_position(&self, row: &PositionRow) -> Result<(), QueueError> {
        self.put_row(b"p", row)
    }

    pub(in crate::store) fn block(
        &self,
        segment: u64,
        generation: u32,
        block: u32,
    ) -> Result<Option<Vec<IndexEntry>>, QueueError> {
        let packed: Option<Vec<u8>> = self.get_row(&block_key(segment, generation, block), "index")?;
        packed.map(|packed| unpack(&packed).ok_or(QueueError::Damaged("index"))).transpose()
    }

    pub(in crate::store) fn put_block(
        &self,
        segment: u64,
        generation: u32,
        block: u32,
        entries: &[IndexEntry],
    ) -> Result<(), QueueError> {
        self.put_row(&block_key(segment, generation, block), &pack(entries))
    }

    /// Drops a segment's index rows, of that generation and those before it.
    pub(in crate::store) fn remove_blocks(&self, segment: u64, generation: u32) -> Result<(), QueueError> {
        for generation in 0..=generation {
            for block in 0.. {
                if !self.remove_row(&block_key(segment, generation, block))? {
                    break;
                }
            }
        }
        Ok(())
    }

    pub(in crate::store) fn ids(&self, row: u64) -> Result<Option<Vec<IdEntry>>, QueueError> {
        self.get_row(&numbered(b'd', row), "idempotency keys")
    }

    pub(in crate::store) fn put_ids(&self, row: u64, entries: &[IdEntry]) -> Result<(), QueueError> {
        self.put_row(&numbered(b'd', row), &entries)
    }

    pub(in crate::store) fn remove_ids(&self, row: u64) -> Result<(), QueueError> {
        self.remove_row(&numbered(b'd', row)).map(drop)
    }

    pub(in crate::store) fn put_retry(&self, row: &RetryRow) -> Result<(), QueueError> {
        self.put_row(&numbered(b'r', row.lane), row)
    }

    pub(in crate::store) fn remove_retry(&self, lane: u64) -> Result<(), QueueError> {
        self.remove_row(&numbered(b'r', lane)).map(drop)
    }

    /// Every lane that waits after a failure. At start only.
    pub(in crate::store) fn retries(&self) -> Result<Vec<RetryRow>, QueueError> {
        guarded(|| {
            let mut all = Vec::new();
            for row in self.db.scan_prefix(b"r") {
                let (_, value) = row?;
                all.push(postcard::from_bytes(&value).map_err(|_| QueueError::Damaged("retry"))?);
            }
            Ok(all)
        })
    }

    pub(in crate::store) fn put_setting(&self, key: &str, value: Option<&str>) -> Result<(), QueueError> {
        let row = [b"s", key.as_bytes()].concat();
        match value {
            Some(value) => self.put_row(&row, &value),
            None => self.remove_row(&row).map(drop),
        }
    }

    /// Every setting.
    pub(in crate::store) fn settings(&self) -> Result<Vec<(String, String)>, QueueError> {
        guarded(|| {
            let mut all = Vec::new();
            for row in self.db.scan_prefix(b"s") {
                let (key, value) = row?;
                let key = std::str::from_utf8(key.get(1..).unwrap_or_default());
                let key = key.map_err(|_| QueueError::Damaged("setting"))?;
                let value = postcard::from_bytes(&value).map_err(|_| QueueError::Damaged("setting"))?;
                all.push((key.to_owned(), value));
            }
            Ok(all)
        })
    }

    /// Nonces are ordered by when they may be forgotten.
    pub(in crate::store) fn put_nonce(&self, key: u128, until_s: u64) -> Result<(), QueueError> {
        self.put_row(&nonce_key(key, until_s), &())
    }

    /// Drops some of the nonces that may be forgotten.
    pub(in crate::store) fn expire_nonces(&self, now_s: u64) -> Result<(), QueueError> {
        let expired: Vec<sled::IVec> = guarded(|| {
            let range = self.db.range(numbered(b'o', 0)..numbered(b'o', now_s));
            Ok(range.keys().take(NONCES_EXPIRED_AT_ONCE).collect::<Result<_, _>>()?)
        })?;
        expired.iter().try_for_each(|key| self.remove_row(key).map(drop))
    }

    /// Every nonce, with until when it is to be remembered.
    /// Ascending by their ends.
    pub(in crate::store) fn nonces(&self) -> Result<Vec<(u128, u64)>, QueueError> {
        guarded(|| {
            let mut all = Vec::new();
            for row in self.db.scan_prefix(b"o") {
                let (row, _) = row?;
                let found = row.get(1..).and_then(|row| row.split_at_checked(8)).and_then(|(until, key)| {
                    let until_s = u64::from_be_bytes(until.try_into().ok()?);
                    Some((u128::from_be_bytes(key.try_into().ok()?), until_s))
                });
                all.push(found.ok_or(QueueError::Damaged("nonce"))?);
            }
            Ok(all)
        })
    }
}

fn open_patiently(path: &Path) -> Result<sled::Db, QueueError> {
    let mut tries = 0;
    loop {
        let config = sled::Config::new().path(path).cache_capacity(CACHE_BYTES).flush_every_ms(None);
        match config.open() {
            Err(sled::Error::Io(error)) if tries < OPEN_TRIES && is_locked(&error) => {
                tries += 1;
                std::thread::sleep(Duration::from_millis(100));
            }
            other => return Ok(other?),
        }
    }
}

/// sled reports its lock, still held by threads of a process that is going away, as an error of no kind.
fn is_locked(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Other)
}

fn numbered(kind: u8, number: u64) -> [u8; 9] {
    let mut key = [kind; 9];
    for (place, byte) in key.iter_mut().skip(1).zip(number.to_be_bytes()) {
        *place = byte;
    }
    key
}

fn nonce_key(key: u128, until_s: u64) -> Vec<u8> {
    [numbered(b'o', until_s).as_slice(), &key.to_be_bytes()].concat()
}

fn block_key(segment: u64, generation: u32, block: u32) -> Vec<u8> {
    [numbered(b'i', segment).as_slice(), &generation.to_be_bytes(), &block.to_be_bytes()].concat()
}
