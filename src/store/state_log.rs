//! What the journal does not keep for ever, in a log of its own: customers, names, settings, nonces. The queue's rows can be
//! rebuilt from it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::codec::{self, Record, StateChange};
use super::queue::PositionRow;
use super::segment;

/// Bytes for the state log that are gathered before they are written. What is written before the position row says so
/// is cut off again at a start.
const STATE_BUFFER: usize = 256 << 10;

/// The log that is written.
#[derive(Debug)]
pub(super) struct StateLog {
    pub number: u64,
    pub len: u64,
    pub file: File,
    buffer: Vec<u8>,
    /// About how much of it is out of date, in bytes.
    pub dead: u64,
    /// Up to where it is on stable storage.
    synced: u64,
    /// A sync of it failed: it is to be written anew.
    pub is_suspect: bool,
}

impl StateLog {
    pub(super) fn path(dir: &Path, number: u64) -> PathBuf {
        dir.join(format!("state-{number}.log"))
    }

    /// The number in a log's file name.
    pub(super) fn number_of(name: &str) -> Option<u64> {
        name.strip_prefix("state-")?.strip_suffix(".log")?.parse().ok()
    }

    /// Removes the logs of lower numbers.
    pub(super) fn remove_before(dir: &Path, number: u64) -> io::Result<()> {
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            if StateLog::number_of(&entry.file_name().to_string_lossy()).is_some_and(|found| found < number) {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// Opens the log that the row names, at its length then; what is behind it will be written again.
    pub(super) fn open(dir: &Path, at: &PositionRow) -> io::Result<StateLog> {
        let (number, len) = (at.state_log, at.state_len);
        let path = StateLog::path(dir, number);
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        file.set_len(len)?;
        segment::sync_dir(dir)?;
        Ok(StateLog { number, len, file, buffer: Vec::new(), dead: at.state_dead, synced: 0, is_suspect: false })
    }

    /// Answers how many bytes it takes.
    pub(super) fn push(&mut self, change: &StateChange) -> io::Result<usize> {
        let before = self.buffer.len();
        let offset = self.len + self.buffer.len() as u64;
        let body = Record::State(change.clone()).encode();
        codec::write_frame(&mut self.buffer, self.number, offset as u32, 0, 0, &body);
        let bytes = self.buffer.len() - before;
        if self.buffer.len() >= STATE_BUFFER {
            self.write()?;
        }
        Ok(bytes)
    }

    /// Syncs what was written since the last time.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        if self.synced < self.len {
            let synced = self.file.sync_data();
            self.is_suspect |= synced.is_err();
            synced?;
            self.synced = self.len;
        }
        // The next sync of the same file may say that all is well.
        if self.is_suspect { Err(io::Error::other("an earlier sync of the state log failed")) } else { Ok(()) }
    }

    pub(super) fn write(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.buffer, self.len)?;
        self.len += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}
