//! Finds and reads letters.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::file::{ENTRY, Entry};
use super::{CHUNK, DeadLetters, LetterFilter, LetterId};
use crate::domain::endpoint::EndpointName;
use crate::store::disk::dead_dir;
use crate::store::segment::{self, Frame};

impl DeadLetters {
    /// Where letters are, from `first` on, oldest first: their names and offsets. The filter is by hash as far as
    /// customers go.
    pub(in crate::store) fn find(
        &self,
        filter: &LetterFilter,
        first: LetterId,
        most: usize,
    ) -> io::Result<Vec<(LetterId, u32)>> {
        let customer = filter.web_token.as_deref().map(|web_token| self.hashing.bucket(web_token));
        let endpoint = filter.endpoint.map(EndpointName::number);
        let mut found = Vec::new();
        for file in self.files.iter().filter(|file| file.number >= first.file) {
            if endpoint.is_some_and(|endpoint| !file.counts.contains_key(&endpoint)) || file.counts.is_empty() {
                continue;
            }
            let from = if file.number == first.file { first.place } else { 0 };
            let index = File::open(self.path(file.number, "idx"))?;
            let mut place = from;
            while place < file.letters {
                let count = CHUNK.min(file.letters - place);
                let mut bytes = vec![0; count as usize * ENTRY];
                index.read_exact_at(&mut bytes, u64::from(place) * ENTRY as u64)?;
                for entry in bytes.chunks(ENTRY).filter_map(Entry::read) {
                    let is_it = endpoint.is_none_or(|endpoint| endpoint == entry.endpoint)
                        && customer.is_none_or(|customer| customer == entry.customer);
                    if is_it && !file.gone.has(place) {
                        found.push((LetterId { file: file.number, place }, entry.offset));
                        if found.len() >= most {
                            return Ok(found);
                        }
                    }
                    place += 1;
                }
            }
        }
        Ok(found)
    }

    /// After every letter.
    pub(in crate::store) fn end(&self) -> LetterId {
        self.files.back().map_or(LetterId::FIRST, |last| LetterId { file: last.number, place: last.letters })
    }

    /// Where one letter is; `None` when there is no such letter any more.
    pub(in crate::store) fn offset(&self, id: LetterId) -> io::Result<Option<u32>> {
        Ok(self.there(id)?.map(|entry| entry.offset))
    }

    pub(super) fn there(&self, id: LetterId) -> io::Result<Option<Entry>> {
        let Some(file) = self.file(id.file) else { return Ok(None) };
        if id.place >= file.letters || file.gone.has(id.place) {
            return Ok(None);
        }
        let mut bytes = [0; ENTRY];
        let index = File::open(self.path(id.file, "idx"))?;
        index.read_exact_at(&mut bytes, u64::from(id.place) * ENTRY as u64)?;
        Ok(Entry::read(&bytes))
    }

    /// Reads a letter at an offset of its file, without holding anything.
    pub(in crate::store) fn read(dir: &Path, id: LetterId, offset: u32) -> io::Result<Option<Frame>> {
        match File::open(segment::path(&dead_dir(dir), id.file)) {
            Ok(file) => segment::read_frame(&file, id.file, offset),
            // Expired meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}
