//! The data directory's disk: its free space, and the room that is held ready.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::segment;

/// Room held ready for settlements when another program takes the last byte.
pub(super) const RESERVE_BYTES: u64 = 8 << 20;

pub(super) fn journal_dir(dir: &Path) -> PathBuf {
    dir.join("journal")
}

/// Whose store is in a directory, as the user's number; `None`: there is none.
///
/// # Errors
/// It may not be looked at.
pub fn owner(dir: &Path) -> io::Result<Option<u32>> {
    match std::fs::metadata(journal_dir(dir)) {
        Ok(metadata) => Ok(Some(metadata.uid())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

pub(super) fn dead_dir(dir: &Path) -> PathBuf {
    dir.join("dead")
}

/// Free space for unprivileged users, bytes.
pub(super) fn free_bytes(dir: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(dir)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Bytes of all files below a directory.
pub(super) fn bytes_below(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    let size = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes_below(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.flatten().map(size).sum()
}

/// Says that events are refused for want of space, or are no longer.
pub(super) fn say_free(free: u64, floor: u64) {
    tracing::warn!(free, floor, is_low = free < floor, "free space of the data directory");
}

/// Sees to it that the reserve is there.
pub(super) fn keep_reserve(dir: &Path) {
    let path = dir.join("reserve");
    if !path.exists() {
        // It comes with the next second if not now.
        drop(segment::create(&path, RESERVE_BYTES));
    }
}

/// Gives the reserve's room back to the file system.
pub(super) fn release_reserve(dir: &Path) {
    drop(std::fs::remove_file(dir.join("reserve")));
}
