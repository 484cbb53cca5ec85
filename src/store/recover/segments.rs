//! The journal's segments as a start finds them: which there are, and where each ends.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::sync::Arc;

use super::Opening;
use crate::clock;
use crate::domain::keys::HashKey;
use crate::store::checkpoint::{Checkpoint, Live};
use crate::store::codec::Record;
use crate::store::disk::journal_dir;
use crate::store::journal::{SPARE, SPARE_NEW};
use crate::store::{compact, segment};

/// A segment as found at start.
pub(super) struct Found {
    pub number: u64,
    pub generation: u32,
    pub file: Arc<File>,
    /// Up to where it is valid; of the newest, what a scan says.
    pub end: u32,
    pub waits: Option<Live>,
}

/// What the first records of the segments say.
struct Header {
    file: Arc<File>,
    generation: u32,
    end: Option<u32>,
    /// Its first record says its number: it was begun here.
    is_own: bool,
}

/// Whether a crash may have left a file of this name.
fn is_left_behind(name: &OsStr) -> bool {
    [SPARE, SPARE_NEW, compact::TEMPORARY].iter().any(|ours| name == *ours)
}

impl Opening<'_> {
    /// Lists the segments, removes those that a checkpoint had freed, and finds where each ends.
    pub(super) fn find_segments(&mut self) -> io::Result<()> {
        let dir = journal_dir(&self.options.dir);
        let mut numbers = Vec::new();
        for entry in std::fs::read_dir(&dir)? {
            let entry = entry?;
            let name = entry.file_name();
            match name.to_str().and_then(segment::number) {
                Some(number) => numbers.push(number),
                None if is_left_behind(&name) => std::fs::remove_file(entry.path())?,
                // Not ours.
                None => {}
            }
        }
        numbers.sort_unstable();
        let mut opened: BTreeMap<u64, Header> = BTreeMap::new();
        let mut identity = self.checkpoint.as_ref().map(|checkpoint| checkpoint.identity);
        for number in numbers {
            let marked = self.checkpoint.as_ref().is_some_and(|checkpoint| {
                number < checkpoint.position.segment && !checkpoint.segments.iter().any(|mark| mark.number == number)
            });
            let path = segment::path(&dir, number);
            if marked {
                std::fs::remove_file(path)?;
                continue;
            }
            let file = File::options().read(true).write(true).open(&path);
            let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
            let file = Arc::new(file.map_err(named)?);
            let mut header = Header { file, generation: 0, end: None, is_own: false };
            if let Some(frame) = segment::read_frame(&header.file, number, 0)?
                && let Some(Record::Opened(record)) = Record::decode(frame.body())
            {
                identity = identity.or(Some(record.identity));
                header.generation = record.generation;
                header.is_own = true;
                if let Some((before, end)) = record.previous
                    && let Some(before) = opened.get_mut(&before)
                {
                    before.end = Some(end);
                }
            }
            opened.insert(number, header);
        }
        self.check_missing(&opened);
        self.identity = identity.unwrap_or_else(clock::random);
        self.hashing = HashKey::of(self.identity);
        for (number, Header { file, generation, end: known, .. }) in opened {
            let floor = self
                .checkpoint
                .as_ref()
                .filter(|checkpoint| checkpoint.position.segment == number)
                .map_or(0, |checkpoint| checkpoint.position.offset);
            let mark = |checkpoint: &Checkpoint| {
                checkpoint.segments.iter().find(|mark| mark.number == number).map(|mark| mark.live.clone())
            };
            let waits = self.checkpoint.as_ref().and_then(mark);
            let is_covered = self.checkpoint.as_ref().is_some_and(|checkpoint| number < checkpoint.position.segment);
            let end = match known {
                // Written whole, and synced before it took its name.
                _ if generation > 0 => file.metadata()?.len() as u32,
                Some(end) => end,
                // Complete, and all of it synced.
                None if is_covered => file.metadata()?.len() as u32,
                None => {
                    let scan = segment::scan(&file, number, 0, floor, |_| {})?;
                    self.note_scan(number, &scan);
                    self.noted += scan.damaged.len() as u64;
                    // What only the page cache held must not be lost after it was answered `duplicate`.
                    file.set_len(scan.valid_len)?;
                    file.sync_all()?;
                    // A segment is far smaller.
                    scan.valid_len as u32
                }
            };
            self.found.push(Found { number, generation, file, end, waits });
        }
        segment::sync_dir(&dir)
    }

    /// A segment that the checkpoint lists and that is not there is damage, and so is one between those that came after
    /// it: none of those has been freed.
    fn check_missing(&self, opened: &BTreeMap<u64, Header>) {
        let listed = self.checkpoint.iter().flat_map(|checkpoint| &checkpoint.segments);
        let listed = listed.filter(|mark| !mark.live.is_empty()).map(|mark| mark.number);
        let mut own = opened.iter().filter(|(_, header)| header.is_own).map(|(number, _)| *number);
        // Without a checkpoint nobody knows what had been freed before the oldest.
        let oldest = own.next().unwrap_or(0);
        let after = self.checkpoint.as_ref().map_or(oldest, |checkpoint| checkpoint.position.segment);
        let newest = own.next_back().unwrap_or(oldest);
        let expected: BTreeSet<u64> = listed.chain(after + 1..newest.max(after + 1)).collect();
        for segment in expected.into_iter().filter(|number| !opened.contains_key(number)) {
            tracing::error!(segment, "a journal segment is missing: its events are lost");
            self.metrics.damaged("journal", 1);
        }
    }

    fn note_scan(&self, segment: u64, scan: &segment::Scan) {
        for offset in &scan.damaged {
            tracing::error!(segment, offset, "a damaged record in the journal");
        }
        self.metrics.damaged("journal", scan.damaged.len() as u64);
        if scan.is_torn {
            tracing::warn!(segment, at = scan.valid_len, "cut a torn end, none of which is known to have been synced");
            self.metrics.damaged("torn_tail", 1);
        }
    }
}
