//! Dead letters: events that were given up, whole, in log files of their own. Expiry unlinks files.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::codec::{self, Dead, Record};
use super::segment;
use crate::domain::endpoint::EndpointName;
use crate::domain::keys::LaneKey;

/// A file is closed at this size.
const FILE_BYTES: u32 = 16 << 20;
/// And after this part of `dead_letters.keep`, so that what expires goes soon after.
const FILE_PARTS: u64 = 14;

/// How the dead letters stood at a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct DeadMark {
    files: VecDeque<DeadFile>,
    dropped: BTreeMap<u64, u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct DeadFile {
    number: u64,
    len: u32,
    begun_ms: u64,
    newest_ms: u64,
    /// Letters by endpoint.
    counts: BTreeMap<u64, u64>,
}

/// All dead letters.
#[derive(Debug)]
pub(super) struct DeadLetters {
    dir: PathBuf,
    files: VecDeque<DeadFile>,
    /// Of each endpoint, how many of the oldest letters count as gone although their file is still there.
    dropped: BTreeMap<u64, u64>,
    active: Option<File>,
    keep_ms: u64,
    /// 0: no limit.
    max: u64,
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
    pub(super) fn open(dir: PathBuf, mark: &DeadMark, keep_s: u64, max: u64) -> io::Result<(DeadLetters, DeadFound)> {
        std::fs::create_dir_all(&dir)?;
        let mut found = DeadFound::default();
        let mut files = VecDeque::new();
        for number in numbers(&dir)? {
            let marked = mark.files.iter().find(|file| file.number == number).cloned();
            let mut state = marked.unwrap_or(DeadFile {
                number,
                len: 0,
                begun_ms: u64::MAX,
                newest_ms: 0,
                counts: BTreeMap::new(),
            });
            let file = File::options().read(true).write(true).open(segment::path(&dir, number))?;
            let from = state.len;
            let scan = segment::scan(&file, number, from, from, |frame| {
                if let Some(Record::Dead(dead)) = Record::decode(frame.body()) {
                    let lane = dead.event.as_ref().map_or(LaneKey(0), |event| event.lane);
                    found.events.push((dead.endpoint, lane, dead.seq));
                    state.count(dead.endpoint.number(), dead.buried_ms);
                }
            })?;
            found.damaged += scan.damaged.len() as u64;
            state.len = scan.valid_len;
            if scan.is_torn {
                file.set_len(u64::from(scan.valid_len))?;
            }
            file.sync_all()?;
            files.push_back(state);
        }
        let letters = DeadLetters {
            dir,
            files,
            dropped: mark.dropped.clone(),
            active: None,
            keep_ms: keep_s.saturating_mul(1_000),
            max,
        };
        Ok((letters, found))
    }

    pub(super) fn mark(&self) -> DeadMark {
        DeadMark { files: self.files.clone(), dropped: self.dropped.clone() }
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
        let (Some(state), Some(file)) = (self.files.back_mut(), &self.active) else { return Ok(()) };
        let mut bytes = Vec::new();
        for letter in letters {
            let offset = state.len + bytes.len() as u32;
            let body = Record::Dead(Dead { event: letter.event.clone(), ..*letter }).encode();
            codec::write_frame(&mut bytes, state.number, offset, state.len, letter.seq, &body);
        }
        let done = file.write_all_at(&bytes, u64::from(state.len)).and_then(|()| file.sync_data());
        if let Err(error) = done {
            // Not to be trusted any more: the next burial begins a new file.
            drop(file.set_len(u64::from(state.len)));
            self.active = None;
            return Err(error);
        }
        state.len += bytes.len() as u32;
        for letter in letters {
            state.count(letter.endpoint.number(), letter.buried_ms);
        }
        Ok(())
    }

    fn begin(&mut self, now_ms: u64) -> io::Result<()> {
        let number = self.files.back().map_or(1, |last| last.number + 1);
        let path = segment::path(&self.dir, number);
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
        segment::sync_dir(&self.dir)?;
        self.active = Some(file);
        self.files.push_back(DeadFile { number, len: 0, begun_ms: now_ms, newest_ms: now_ms, counts: BTreeMap::new() });
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
        for (endpoint, dropped) in &self.dropped {
            if let Some(count) = counts.get_mut(endpoint) {
                *count = count.saturating_sub(*dropped);
            }
        }
        counts
    }

    /// Drops what is too old or too many. Answers how many letters went, by endpoint.
    pub(super) fn expire(&mut self, now_ms: u64) -> io::Result<BTreeMap<u64, u64>> {
        let before = self.counts();
        let mut gone: BTreeMap<u64, u64> = BTreeMap::new();
        if self.max > 0 {
            for (endpoint, count) in before {
                let excess = count.saturating_sub(self.max);
                if excess > 0 {
                    *self.dropped.entry(endpoint).or_default() += excess;
                    *gone.entry(endpoint).or_default() += excess;
                }
            }
        }
        while let Some(first) = self.files.front() {
            let is_old = now_ms.saturating_sub(first.newest_ms) > self.keep_ms;
            let dropped = |endpoint: &u64| self.dropped.get(endpoint).copied().unwrap_or(0);
            let is_dropped = first.counts.iter().all(|(endpoint, count)| dropped(endpoint) >= *count);
            let is_active = self.files.len() == 1 && self.active.is_some();
            if !is_old && (!is_dropped || is_active) {
                break;
            }
            std::fs::remove_file(segment::path(&self.dir, first.number))?;
            if is_active {
                self.active = None;
            }
            let Some(first) = self.files.pop_front() else { break };
            for (endpoint, count) in first.counts {
                let dropped = self.dropped.entry(endpoint).or_default();
                *gone.entry(endpoint).or_default() += count.saturating_sub(*dropped);
                *dropped = dropped.saturating_sub(count);
            }
            self.dropped.retain(|_, dropped| *dropped > 0);
        }
        gone.retain(|_, count| *count > 0);
        Ok(gone)
    }
}

impl DeadFile {
    fn count(&mut self, endpoint: u64, buried_ms: u64) {
        *self.counts.entry(endpoint).or_default() += 1;
        self.newest_ms = self.newest_ms.max(buried_ms);
        self.begun_ms = self.begun_ms.min(buried_ms);
    }
}

fn numbers(dir: &Path) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        numbers.extend(entry?.file_name().to_str().and_then(segment::number));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::outcome::DeathReason;

    fn letter(seq: u64, endpoint: u64, buried_ms: u64) -> Dead<'static> {
        Dead {
            seq,
            reason: DeathReason::Gone,
            buried_ms,
            attempts: 1,
            event: None,
            endpoint: EndpointName::from_number(endpoint),
        }
    }

    #[test]
    fn letters_are_counted_expire_and_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dead");
        let (mut letters, _) = DeadLetters::open(path.clone(), &DeadMark::default(), 1_400, 3).unwrap();
        letters.bury(&[letter(1, 7, 0), letter(2, 0, 0)], 0).unwrap();
        let mark = letters.mark();
        for n in 0..5 {
            letters.bury(&[letter(10 + n, 7, 200_000 * n)], 200_000 * n).unwrap();
        }
        assert_eq!(letters.counts(), BTreeMap::from([(0, 1), (7, 6)]));
        drop(letters);
        // What came after the mark is found again.
        let (mut letters, found) = DeadLetters::open(path.clone(), &mark, 1_400, 3).unwrap();
        let seqs: Vec<u64> = found.events.iter().map(|(_, _, seq)| *seq).collect();
        assert_eq!(seqs, [10, 11, 12, 13, 14]);
        assert_eq!(letters.expire(800_000).unwrap(), BTreeMap::from([(7, 3)]));
        assert_eq!(letters.counts(), BTreeMap::from([(0, 1), (7, 3)]));
        let gone = letters.expire(2_000_000).unwrap();
        assert_eq!(gone.get(&0), Some(&1));
        letters.expire(10_000_000).unwrap();
        assert!(letters.counts().values().all(|count| *count == 0));
        assert_eq!(numbers(&path).unwrap(), Vec::<u64>::new());
    }
}
