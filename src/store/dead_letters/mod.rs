//! Dead letters: events that were given up, whole, in log files of their own. Expiry unlinks files.
//!
//! Beside `N.log` with the letters, `N.idx` has 24 bytes for each, so that listing reads little and memory holds one
//! bit a letter: whether it is gone (replayed, purged, too many). `N.idx` is made anew from the log when it does not fit.
//! That a letter is gone is a record of the journal, but for those beyond `dead_letters.max`; what the journal says is written to `N.gone` before a checkpoint
//! covers it.

mod file;
mod find;
mod id;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use self::file::{Bits, DeadFile, ENTRY, Entry, GONE_ENTRY, gone_crc, gone_place, numbers, read_if_there};
pub use self::id::LetterId;
use super::codec::{self, Dead, Record};
use super::segment::{self};
use crate::domain::endpoint::EndpointName;
use crate::domain::keys::{HashKey, LaneKey};

/// A file is closed at this size.
const FILE_BYTES: u32 = 16 << 20;
/// And after this part of `dead_letters.keep`, so that what expires goes soon after.
const FILE_PARTS: u64 = 14;
/// Index entries read at once.
const CHUNK: u32 = 4_096;

/// Which letters are meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LetterFilter {
    /// Only of this endpoint.
    pub endpoint: Option<EndpointName>,
    /// Only of this customer.
    pub web_token: Option<String>,
}

/// How long the logs were at a checkpoint: what came later may not be settled in the journal.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct DeadMark {
    files: Vec<(u64, u32)>,
    /// The highest number that a file has had: none is used twice.
    last: u64,
}

impl DeadMark {
    /// With the numbers that files have had since.
    pub(super) fn up_to_file_of(self, later: &DeadMark) -> DeadMark {
        DeadMark { last: later.last, ..self }
    }
}

/// All dead letters.
#[derive(Debug)]
pub(super) struct DeadLetters {
    dir: PathBuf,
    hashing: HashKey,
    files: VecDeque<DeadFile>,
    last: u64,
    active: Option<Active>,
    /// Files whose `N.gone` is written and not synced.
    unsynced: BTreeSet<u64>,
    keep_ms: u64,
    /// 0: no limit.
    max: u64,
}

#[derive(Debug)]
struct Active {
    log: File,
    index: File,
}

/// What opening found.
#[derive(Debug, Default)]
pub(super) struct DeadFound {
    /// Events that were buried since the mark: settled, whatever the journal says.
    pub events: Vec<(EndpointName, LaneKey, u64)>,
    /// Damaged stretches.
    pub damaged: u64,
}

impl DeadLetters {
    /// Opens the directory and reads what came after the mark.
    pub(super) fn open(
        dir: PathBuf,
        mark: &DeadMark,
        hashing: HashKey,
        (keep_s, max): (u64, u64),
    ) -> io::Result<(DeadLetters, DeadFound)> {
        std::fs::create_dir_all(&dir)?;
        let mut letters = DeadLetters {
            dir,
            hashing,
            files: VecDeque::new(),
            last: mark.last,
            active: None,
            unsynced: BTreeSet::new(),
            keep_ms: keep_s.saturating_mul(1_000),
            max,
        };
        let mut found = DeadFound::default();
        for number in numbers(&letters.dir)? {
            let marked = mark.files.iter().find(|(file, _)| *file == number).map_or(0, |(_, len)| *len);
            let file = letters.open_file(number, marked, &mut found)?;
            letters.files.push_back(file);
            letters.last = letters.last.max(number);
        }
        Ok((letters, found))
    }

    fn open_file(&self, number: u64, marked: u32, found: &mut DeadFound) -> io::Result<DeadFile> {
        let log = File::options().read(true).write(true).open(segment::path(&self.dir, number))?;
        let mut index = read_if_there(&self.path(number, "idx"))?;
        // The index is not synced: after a power cut its end may be zeros. Offsets only ever grow.
        let offsets = index.chunks(ENTRY).map_while(Entry::read).map(|entry| i64::from(entry.offset));
        let grows = offsets.scan(-1, |last, offset| (offset > std::mem::replace(last, offset)).then_some(())).count();
        index.truncate(grows * ENTRY);
        // Entries are believed up to the last one that names a letter.
        let last = index.len().checked_sub(ENTRY).and_then(|at| Entry::read(index.get(at..)?));
        let end = match last.map(|last| segment::read_frame(&log, number, last.offset)).transpose()?.flatten() {
            Some(frame) => frame.header.offset + frame.header.frame_len() as u32,
            None => 0,
        };
        if end == 0 {
            index.clear();
        }
        let known = index.len();
        let scan = segment::scan(&log, number, end.min(marked), marked, |frame| {
            if let Some(Record::Dead(dead)) = Record::decode(frame.body()) {
                if frame.header.offset >= marked {
                    let lane = dead.event.as_ref().map_or(LaneKey(0), |event| event.lane);
                    found.events.push((dead.endpoint, lane, dead.seq));
                }
                if frame.header.offset >= end {
                    index.extend(self.entry(&dead, frame.header.offset).to_bytes());
                }
            }
        })?;
        found.damaged += scan.damaged.len() as u64;
        if scan.is_torn {
            log.set_len(scan.valid_len)?;
        }
        log.sync_all()?;
        if index.len() != known || known == 0 {
            std::fs::write(self.path(number, "idx"), &index)?;
        }
        let mut file = DeadFile {
            number,
            // Such a file ends long before 4 GiB.
            len: scan.valid_len as u32,
            begun_ms: u64::MAX,
            newest_ms: 0,
            letters: 0,
            gone: Bits::default(),
            written: Bits::default(),
            counts: BTreeMap::new(),
        };
        for entry in index.chunks(ENTRY).filter_map(Entry::read) {
            file.count(entry.endpoint, u64::from(entry.second) * 1_000);
        }
        let gone = read_if_there(&self.path(number, "gone"))?;
        if gone.len() % GONE_ENTRY != 0 {
            let whole = gone.len() - gone.len() % GONE_ENTRY;
            File::options().write(true).open(self.path(number, "gone"))?.set_len(whole as u64)?;
        }
        for entry in gone.chunks(GONE_ENTRY) {
            let place = gone_place(number, entry).filter(|place| *place < file.letters && file.gone.set(*place));
            let Some(place) = place else { continue };
            file.written.set(place);
            let at = place as usize * ENTRY;
            if let Some(entry) = index.get(at..).and_then(Entry::read) {
                file.uncount(entry.endpoint);
            }
        }
        Ok(file)
    }

    fn entry(&self, dead: &Dead<'_>, offset: u32) -> Entry {
        let customer = dead.event.as_ref().map_or(0, |event| self.hashing.bucket(event.web_token));
        Entry { offset, second: (dead.buried_ms / 1_000) as u32, endpoint: dead.endpoint.number(), customer }
    }

    fn path(&self, number: u64, kind: &str) -> PathBuf {
        segment::path(&self.dir, number).with_extension(kind)
    }

    pub(super) fn mark(&self) -> DeadMark {
        DeadMark { files: self.files.iter().map(|file| (file.number, file.len)).collect(), last: self.last }
    }

    /// Writes dead letters and puts them on stable storage.
    pub(super) fn bury(&mut self, letters: &[Dead<'_>], now_ms: u64) -> io::Result<()> {
        let file_ms = (self.keep_ms / FILE_PARTS).clamp(1_000, 86_400_000);
        let is_full = self
            .files
            .back()
            .is_none_or(|last| last.len >= FILE_BYTES || now_ms.saturating_sub(last.begun_ms) >= file_ms);
        if is_full || self.active.is_none() {
            self.begin(now_ms)?;
        }
        let entries: Vec<Entry> = letters.iter().map(|letter| self.entry(letter, 0)).collect();
        let (Some(file), Some(active)) = (self.files.back_mut(), &self.active) else { return Ok(()) };
        let (mut bytes, mut index) = (Vec::new(), Vec::new());
        for (letter, entry) in letters.iter().zip(entries) {
            let offset = file.len + bytes.len() as u32;
            let body = Record::Dead(Dead { event: letter.event.clone(), ..*letter }).encode();
            codec::write_frame(&mut bytes, file.number, offset, file.len, letter.seq, &body);
            index.extend(Entry { offset, ..entry }.to_bytes());
        }
        let at = u64::from(file.letters) * ENTRY as u64;
        let done = active
            .log
            .write_all_at(&bytes, u64::from(file.len))
            .and_then(|()| active.log.sync_data())
            .and_then(|()| active.index.write_all_at(&index, at));
        if let Err(error) = done {
            // Not to be trusted any more: the next burial begins a new file.
            drop(active.log.set_len(u64::from(file.len)));
            self.active = None;
            return Err(error);
        }
        file.len += bytes.len() as u32;
        for letter in letters {
            file.count(letter.endpoint.number(), letter.buried_ms);
        }
        Ok(())
    }

    fn begin(&mut self, now_ms: u64) -> io::Result<()> {
        self.last += 1;
        let number = self.last;
        let open = |path: PathBuf| File::options().read(true).write(true).create(true).truncate(true).open(path);
        let log = open(segment::path(&self.dir, number))?;
        let index = open(self.path(number, "idx"))?;
        segment::sync_dir(&self.dir)?;
        self.active = Some(Active { log, index });
        self.files.push_back(DeadFile {
            number,
            len: 0,
            begun_ms: now_ms,
            newest_ms: now_ms,
            letters: 0,
            gone: Bits::default(),
            written: Bits::default(),
            counts: BTreeMap::new(),
        });
        Ok(())
    }

    /// Letters that are kept, by endpoint.
    pub(super) fn counts(&self) -> BTreeMap<u64, u64> {
        let mut counts: BTreeMap<u64, u64> = BTreeMap::new();
        for file in &self.files {
            for (endpoint, count) in &file.counts {
                *counts.entry(*endpoint).or_default() += count;
            }
        }
        counts
    }

    /// Takes a letter out, in memory: `false` when it is gone already. Whoever takes it sees to the journal.
    pub(super) fn take(&mut self, id: LetterId) -> io::Result<bool> {
        let Some(entry) = self.there(id)? else { return Ok(false) };
        if let Some(file) = self.file_mut(id.file) {
            file.gone.set(id.place);
            file.uncount(entry.endpoint);
        }
        Ok(true)
    }

    /// Puts back what was taken and could not be recorded.
    pub(super) fn put_back(&mut self, id: LetterId) {
        let Some(file) = self.file_mut(id.file) else { return };
        file.gone.clear(id.place);
        if let Ok(Some(entry)) = self.there(id)
            && let Some(file) = self.file_mut(id.file)
        {
            *file.counts.entry(entry.endpoint).or_default() += 1;
        }
    }

    /// Writes down what the journal says is gone. Repeating it changes nothing.
    pub(super) fn write_gone(&mut self, ids: &[LetterId]) -> io::Result<()> {
        for id in ids {
            self.take(*id)?;
            let path = self.path(id.file, "gone");
            let Some(file) = self.file_mut(id.file).filter(|file| file.gone.has(id.place)) else { continue };
            if file.written.has(id.place) {
                continue;
            }
            let entry = [id.place.to_le_bytes(), gone_crc(id.file, id.place).to_le_bytes()].concat();
            let gone = File::options().create(true).append(true).open(path)?;
            io::Write::write_all(&mut &gone, &entry)?;
            file.written.set(id.place);
            self.unsynced.insert(id.file);
        }
        Ok(())
    }

    /// Puts what [`DeadLetters::write_gone`] wrote on stable storage: before a checkpoint covers it.
    pub(super) fn sync_gone(&mut self) -> io::Result<()> {
        if self.unsynced.is_empty() {
            return Ok(());
        }
        for number in &self.unsynced {
            let path = self.path(*number, "gone");
            match File::open(&path) {
                // After a failed sync its pages may be marked clean: they are written anew.
                Ok(file) => file.sync_all().or_else(|_| write_anew(&path))?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        segment::sync_dir(&self.dir)?;
        self.unsynced.clear();
        Ok(())
    }

    /// Drops what is too old or too many. Answers how many letters went, by endpoint.
    pub(super) fn expire(&mut self, now_ms: u64) -> io::Result<BTreeMap<u64, u64>> {
        let mut gone: BTreeMap<u64, u64> = BTreeMap::new();
        if self.max > 0 {
            for (endpoint, count) in self.counts() {
                let excess = count.saturating_sub(self.max);
                if excess > 0 {
                    let filter = LetterFilter { endpoint: Some(EndpointName::from_number(endpoint)), web_token: None };
                    let found = self.find(&filter, LetterId::FIRST, excess as usize)?;
                    let ids: Vec<LetterId> = found.into_iter().map(|(id, _)| id).collect();
                    self.write_gone(&ids)?;
                    *gone.entry(endpoint).or_default() += ids.len() as u64;
                }
            }
        }
        let newest = self.files.back().map(|file| file.number);
        let keep_ms = self.keep_ms;
        let is_over = |file: &DeadFile| {
            let is_old = now_ms.saturating_sub(file.newest_ms) > keep_ms;
            let is_empty = file.written.count >= file.letters && Some(file.number) != newest;
            is_old || is_empty
        };
        let over: Vec<u64> = self.files.iter().filter(|file| is_over(file)).map(|file| file.number).collect();
        for number in over {
            match std::fs::remove_file(segment::path(&self.dir, number)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
            for kind in ["idx", "gone"] {
                // Without the log they mean nothing.
                drop(std::fs::remove_file(self.path(number, kind)));
            }
            if Some(number) == newest {
                self.active = None;
            }
            let counts = self.file(number).map(|file| file.counts.clone()).unwrap_or_default();
            self.files.retain(|file| file.number != number);
            for (endpoint, count) in counts {
                *gone.entry(endpoint).or_default() += count;
            }
        }
        gone.retain(|_, count| *count > 0);
        Ok(gone)
    }

    fn file(&self, number: u64) -> Option<&DeadFile> {
        self.files.iter().find(|file| file.number == number)
    }

    fn file_mut(&mut self, number: u64) -> Option<&mut DeadFile> {
        self.files.iter_mut().find(|file| file.number == number)
    }
}

/// Puts a file's bytes into another one, on stable storage, that takes its name.
fn write_anew(path: &Path) -> io::Result<()> {
    let new = path.with_extension("gone.new");
    std::fs::write(&new, std::fs::read(path)?)?;
    File::open(&new)?.sync_all()?;
    std::fs::rename(&new, path)
}
