//! One file of letters: what is known of it in memory, and the entries beside it.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use crate::store::segment;

/// Bytes of an index entry: offset 4, second of burial 4, endpoint 8, hash of the customer 8.
pub(super) const ENTRY: usize = 24;
/// Bytes of an entry of what is gone: place 4, checksum of file and place 4.
pub(super) const GONE_ENTRY: usize = 8;

#[derive(Debug)]
pub(super) struct DeadFile {
    pub(super) number: u64,
    pub(super) len: u32,
    pub(super) begun_ms: u64,
    pub(super) newest_ms: u64,
    pub(super) letters: u32,
    /// Letters that are gone.
    pub(super) gone: Bits,
    /// Those of them that are in `N.gone`.
    pub(super) written: Bits,
    /// Letters that are there, by endpoint.
    pub(super) counts: BTreeMap<u64, u64>,
}

#[derive(Clone, Copy)]
pub(super) struct Entry {
    pub(super) offset: u32,
    pub(super) second: u32,
    pub(super) endpoint: u64,
    pub(super) customer: u64,
}

impl Entry {
    pub(super) fn to_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(ENTRY);
        bytes.extend_from_slice(&self.offset.to_le_bytes());
        bytes.extend_from_slice(&self.second.to_le_bytes());
        bytes.extend_from_slice(&self.endpoint.to_le_bytes());
        bytes.extend_from_slice(&self.customer.to_le_bytes());
        bytes
    }

    pub(super) fn read(bytes: &[u8]) -> Option<Entry> {
        let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let long = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        Some(Entry { offset: word(0)?, second: word(4)?, endpoint: long(8)?, customer: long(16)? })
    }
}

impl DeadFile {
    pub(super) fn count(&mut self, endpoint: u64, buried_ms: u64) {
        self.letters += 1;
        *self.counts.entry(endpoint).or_default() += 1;
        self.newest_ms = self.newest_ms.max(buried_ms);
        self.begun_ms = self.begun_ms.min(buried_ms);
    }

    pub(super) fn uncount(&mut self, endpoint: u64) {
        if let Some(count) = self.counts.get_mut(&endpoint) {
            *count = count.saturating_sub(1);
        }
        self.counts.retain(|_, count| *count > 0);
    }
}

/// A bit for each letter of a file.
#[derive(Debug, Default)]
pub(super) struct Bits {
    words: Vec<u64>,
    pub(super) count: u32,
}

impl Bits {
    pub(super) fn has(&self, place: u32) -> bool {
        self.words.get(place as usize / 64).is_some_and(|word| word >> (place % 64) & 1 == 1)
    }

    /// Says whether it was not set before.
    pub(super) fn set(&mut self, place: u32) -> bool {
        if self.has(place) {
            return false;
        }
        let word = place as usize / 64;
        if self.words.len() <= word {
            self.words.resize(word + 1, 0);
        }
        if let Some(word) = self.words.get_mut(word) {
            *word |= 1 << (place % 64);
        }
        self.count += 1;
        true
    }

    pub(super) fn clear(&mut self, place: u32) {
        if self.has(place)
            && let Some(word) = self.words.get_mut(place as usize / 64)
        {
            *word &= !(1 << (place % 64));
            self.count -= 1;
        }
    }
}

pub(super) fn gone_crc(file: u64, place: u32) -> u32 {
    crc32c::crc32c(&[file.to_le_bytes().as_slice(), &place.to_le_bytes()].concat())
}

/// The place that an entry of `N.gone` names; `None` when it is damaged or torn.
pub(super) fn gone_place(file: u64, entry: &[u8]) -> Option<u32> {
    let place = u32::from_le_bytes(entry.get(..4)?.try_into().ok()?);
    let crc = u32::from_le_bytes(entry.get(4..8)?.try_into().ok()?);
    (gone_crc(file, place) == crc).then_some(place)
}

pub(super) fn read_if_there(path: &Path) -> io::Result<Vec<u8>> {
    match std::fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other,
    }
}

pub(super) fn numbers(dir: &Path) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        numbers.extend(entry?.file_name().to_str().and_then(segment::number));
    }
    numbers.sort_unstable();
    Ok(numbers)
}
