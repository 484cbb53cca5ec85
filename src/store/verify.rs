//! Reads every record of the journal, the state log and the dead letters, and changes nothing.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::disk::{dead_dir, journal_dir};
use super::segment;
use super::state_log::StateLog;

/// One file of records.
#[derive(Debug)]
pub struct VerifiedFile {
    /// Where it is.
    pub path: PathBuf,
    /// Records that read back.
    pub records: u64,
    /// Bytes that hold them.
    pub bytes: u64,
    /// Where damage begins, place by place.
    pub damaged: Vec<u64>,
    /// Where a torn end begins: behind it nothing is known to have been synced.
    pub torn: Option<u64>,
}

/// Reads the journal, the state log and the dead letters of a data directory.
///
/// # Errors
/// A file cannot be read.
pub fn verify(dir: &Path) -> io::Result<Vec<VerifiedFile>> {
    let mut found = Vec::new();
    for folder in [journal_dir(dir), dead_dir(dir)] {
        if folder.is_dir() {
            for entry in std::fs::read_dir(&folder)? {
                let entry = entry?;
                found.extend(entry.file_name().to_str().and_then(segment::number).map(|number| (entry.path(), number)));
            }
        }
    }
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let number = name.to_str().and_then(StateLog::number_of);
        found.extend(number.map(|number| (entry.path(), number)));
    }
    found.sort();
    found.into_iter().map(|(path, number)| read(path, number)).collect()
}

fn read(path: PathBuf, number: u64) -> io::Result<VerifiedFile> {
    let file = File::open(&path)?;
    let mut records = 0;
    let scan = segment::scan(&file, number, 0, 0, |_| records += 1)?;
    let torn = scan.is_torn.then_some(scan.valid_len);
    Ok(VerifiedFile { path, records, bytes: scan.valid_len, damaged: scan.damaged, torn })
}
