//! The journal's writer: what makes a 202 true.
//!
//! Requests that wait are written with one write(2) and synced with one fdatasync on a thread of its own, while the next
//! ones gather: one event costs one fdatasync, load makes groups grow, no timers. What needs no sync of its own
//! (settlements) is written straight away behind them.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::admission::{Request, Staged};
use super::codec::{self, Opened, Record};
use super::segment;
use super::{Position, Segments};
use crate::clock;
use crate::domain::backlog::{PLACES_MAX, first_seq};
use crate::domain::endpoint::EndpointName;
use crate::domain::keys::LaneKey;

/// A segment's number and file, for readers.
#[derive(Clone, Debug)]
pub(super) struct SegmentFile {
    pub number: u64,
    /// How often it was compacted.
    pub generation: u32,
    pub file: Arc<File>,
}

/// An event that is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appended {
    /// Slot of its segment.
    pub slot: u16,
    /// Offset of its record.
    pub offset: u32,
    /// Bytes of its record.
    pub len: u32,
    /// Its lane.
    pub lane: LaneKey,
    /// Where it goes.
    pub endpoint: EndpointName,
    /// When it was accepted, Unix seconds.
    pub second: u32,
}

/// What writing a group came to.
#[derive(Debug)]
pub(super) struct Written {
    /// The group's events, each request's apart.
    pub events: Vec<Vec<Appended>>,
    /// Where the group ends.
    pub end: Position,
    file: Arc<File>,
}

/// A segment that has been begun.
#[derive(Clone, Copy, Debug)]
pub(super) struct Begun {
    pub slot: u16,
    pub segment: u64,
}

#[derive(Debug)]
struct Active {
    slot: u16,
    number: u64,
    file: Arc<File>,
    /// Where its second record begins.
    begin: u32,
    len: u32,
    synced: u32,
    events: u32,
}

/// The writer. One lock around it, held for a write(2); for a sync only where a segment begins.
#[derive(Debug)]
pub(super) struct Writer {
    dir: PathBuf,
    identity: [u8; 32],
    segment_bytes: u32,
    active: Option<Active>,
    next_number: u64,
    previous: Option<(u64, u32)>,
    /// Settlements that could not be written yet.
    owed: Vec<Vec<u8>>,
    /// How many of these there may be before they are thinned out.
    owed_max: usize,
    /// Not written again before this, but with a group.
    owes_until: Duration,
    buffer: Vec<u8>,
}

/// How often settlements that the disk does not take are tried again.
const OWED_AGAIN: Duration = Duration::from_secs(1);
/// Records that wait for the disk beyond which only the last of each lane's delays is kept: others are of no use.
const OWED_MAX: usize = 100_000;
/// Of these, so many have room kept for them.
const OWED_KEPT: usize = 1_000;
/// Bytes of the buffer that are kept between groups.
const BUFFER_KEPT: usize = 4 << 20;
/// Room that a segment is begun with where the disk has none for a whole one, bytes.
const ROOM_MIN: u64 = 1 << 20;
/// The next segment, created ahead.
pub(super) const SPARE: &str = "spare";
/// The next segment, while it is created.
pub(super) const SPARE_NEW: &str = "spare.new";

impl Writer {
    pub(super) fn new(
        dir: PathBuf,
        identity: [u8; 32],
        segment_bytes: u32,
        next_number: u64,
        previous: Option<(u64, u32)>,
    ) -> Writer {
        Writer {
            dir,
            identity,
            segment_bytes,
            active: None,
            next_number,
            previous,
            owed: Vec::new(),
            owed_max: OWED_MAX,
            owes_until: Duration::ZERO,
            buffer: Vec::new(),
        }
    }

    /// Where the journal ends.
    pub(super) fn end(&self) -> Position {
        self.active.as_ref().map_or(Position { segment: self.next_number, offset: 0 }, |active| Position {
            segment: active.number,
            offset: active.len,
        })
    }

    /// The segment before the active one, and where it ends.
    pub(super) fn previous(&self) -> Option<(u64, u32)> {
        self.previous
    }

    /// Whether the next group, of so many records, belongs into a new segment. One that only waits for what was written
    /// before does not, or late: there may be no room for a segment.
    pub(super) fn wants_roll(&self, records: usize) -> bool {
        let is_full =
            |active: &Active| active.len >= self.segment_bytes || active.events as usize + records >= PLACES_MAX - 1;
        let is_overfull = |active: &Active| active.len / 4 >= self.segment_bytes;
        self.active.as_ref().is_none_or(|active| records > 0 && is_full(active) || is_overfull(active))
    }

    /// Whether somebody has removed the active segment's file.
    pub(super) fn is_removed(&self) -> bool {
        self.active.as_ref().is_some_and(|active| {
            // Cheap; and looked up only then, for there are file systems that count no links.
            rustix::fs::fstat(&active.file).is_ok_and(|stat| stat.st_nlink == 0)
                && segment::path(&self.dir, active.number).try_exists().is_ok_and(|is_there| !is_there)
        })
    }

    /// Seals the active segment and begins the next.
    ///
    /// # Errors
    /// The active segment stays, and may be written on.
    pub(super) fn roll(&mut self, segments: &mut Segments) -> io::Result<Begun> {
        let slot = segments.free_slot().ok_or(io::Error::from(io::ErrorKind::StorageFull))?;
        let number = self.next_number;
        let path = segment::path(&self.dir, number);
        let spare = self.dir.join(SPARE);
        let file = match File::options().read(true).write(true).open(&spare) {
            Ok(file) => {
                std::fs::rename(&spare, &path)?;
                file
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                match segment::create(&path, u64::from(self.segment_bytes)) {
                    // It grows as it is written.
                    Err(error) if error.kind() == io::ErrorKind::StorageFull => segment::create(&path, ROOM_MIN)?,
                    made => made?,
                }
            }
            Err(error) => return Err(error),
        };
        segment::sync_dir(&self.dir)?;
        if let Some(active) = &mut self.active {
            self.buffer.clear();
            let body = Record::Sealed { events: active.events }.encode();
            codec::write_frame(&mut self.buffer, active.number, active.len, active.synced, 0, &body);
            // Without it the segment is as valid: its length stands in the next one.
            if active.file.write_all_at(&self.buffer, u64::from(active.len)).is_ok() {
                active.len += self.buffer.len() as u32;
            }
            if let Err(error) = active.file.sync_data() {
                // What was noted behind the last group may be gone though the next sync would say that all is well.
                let number = active.number;
                self.give_up(number);
                return Err(error);
            }
            active.file.set_len(u64::from(active.len))?;
            self.previous = Some((active.number, active.len));
        }
        self.buffer.clear();
        let opened = Opened {
            identity: self.identity,
            segment: number,
            previous: self.previous,
            generation: 0,
            version: env!("CARGO_PKG_VERSION"),
        };
        codec::write_frame(&mut self.buffer, number, 0, 0, 0, &Record::Opened(opened).encode());
        file.write_all_at(&self.buffer, 0)?;
        let file = Arc::new(file);
        segments.add(slot, SegmentFile { number, generation: 0, file: Arc::clone(&file) });
        let begin = self.buffer.len() as u32;
        self.active = Some(Active { slot, number, file, begin, len: begin, synced: 0, events: 0 });
        self.next_number = number + 1;
        Ok(Begun { slot, segment: number })
    }

    /// Writes a group of requests, not yet synced.
    ///
    /// # Errors
    /// Nothing of the group is in the journal.
    pub(super) fn write_group(&mut self, requests: &[Request]) -> io::Result<Written> {
        let active = self.active.as_mut().ok_or(io::Error::from(io::ErrorKind::NotFound))?;
        self.buffer.clear();
        let start = active.len;
        let mut events = Vec::with_capacity(requests.len());
        let mut count = active.events;
        let number = active.number;
        let mut frame = |body: &[u8], seq: u64| {
            let offset = start + self.buffer.len() as u32;
            codec::write_frame(&mut self.buffer, number, offset, active.synced, seq, body);
            offset
        };
        for body in &self.owed {
            frame(body, 0);
        }
        for request in requests {
            let mut appended = Vec::new();
            for staged in &request.staged {
                match staged {
                    Staged::Other(body) => {
                        frame(body, 0);
                    }
                    Staged::Event { record, lane, endpoint, second } => {
                        let offset = frame(record, first_seq(number) + u64::from(count));
                        count += 1;
                        appended.push(Appended {
                            slot: active.slot,
                            offset,
                            len: (record.len() + codec::FRAME_LEN) as u32,
                            lane: *lane,
                            endpoint: *endpoint,
                            second: *second,
                        });
                    }
                }
            }
            events.push(appended);
        }
        write_or_cut(&active.file, &self.buffer, start)?;
        active.len += self.buffer.len() as u32;
        self.buffer.clear();
        self.buffer.shrink_to(BUFFER_KEPT);
        active.events = count;
        self.owed.clear();
        self.owed.shrink_to(OWED_KEPT);
        self.owes_until = Duration::ZERO;
        let end = Position { segment: active.number, offset: active.len };
        Ok(Written { events, end, file: Arc::clone(&active.file) })
    }

    /// Notes that a group was synced.
    pub(super) fn synced(&mut self, written: &Written) {
        if let Some(active) = self.active.as_mut().filter(|active| active.number == written.end.segment) {
            active.synced = active.synced.max(written.end.offset);
        }
    }

    /// Gives the segment of a group up whose sync failed.
    pub(super) fn abandon(&mut self, written: &Written) {
        self.give_up(written.end.segment);
    }

    /// Gives a segment up whose sync failed: its page cache is not to be trusted, so it ends where it was synced last.
    fn give_up(&mut self, segment: u64) {
        if let Some(active) = self.active.take_if(|active| active.number == segment) {
            let end = active.synced.max(active.begin);
            // What was noted since the last sync, within the group or behind it, is noted again: twice does no harm.
            let mut noted = Vec::new();
            let keep = |frame: &segment::Frame| {
                if matches!(Record::decode(frame.body()), Some(Record::Settled(_) | Record::Deferred(_))) {
                    noted.push(frame.body().to_vec());
                }
            };
            if let Err(error) =
                segment::scan_synced(&active.file, active.number, active.synced, u64::from(active.len), keep)
            {
                tracing::error!(%error, "what was noted last cannot be read back: pushes may repeat");
            }
            noted.append(&mut self.owed);
            self.owed = noted;
            self.previous = Some((active.number, end));
            // Cut for the next reader; the next segment says the same.
            drop(active.file.set_len(u64::from(end)));
        }
    }

    /// Writes records that need no sync of their own. What cannot be written is kept for the next write; without a
    /// segment they wait for one.
    pub(super) fn note(&mut self, bodies: Vec<Vec<u8>>) -> io::Result<()> {
        self.owed.extend(bodies);
        if self.owed.len() > self.owed_max {
            self.thin_out();
        }
        // All of it is written at once: not at every turn while the disk takes nothing.
        if clock::monotonic() < self.owes_until { Ok(()) } else { self.write_owed() }
    }

    /// Of delays, the last of each lane counts.
    fn thin_out(&mut self) {
        let mut lanes = HashSet::new();
        let mut kept: Vec<Vec<u8>> = Vec::new();
        for body in std::mem::take(&mut self.owed).into_iter().rev() {
            let is_of_use = match Record::decode(&body) {
                Some(Record::Deferred(deferred)) => lanes.insert(deferred.lane),
                _ => true,
            };
            if is_of_use {
                kept.push(body);
            }
        }
        kept.reverse();
        self.owed_max = OWED_MAX.max(2 * kept.len());
        self.owed = kept;
    }

    /// Whether something could not be written yet.
    pub(super) fn owes(&self) -> bool {
        !self.owed.is_empty()
    }

    /// Writes what could not be written yet.
    pub(super) fn write_owed(&mut self) -> io::Result<()> {
        let Some(active) = self.active.as_mut() else { return Ok(()) };
        self.buffer.clear();
        for body in &self.owed {
            let offset = active.len + self.buffer.len() as u32;
            codec::write_frame(&mut self.buffer, active.number, offset, active.synced, 0, body);
        }
        if let Err(error) = write_or_cut(&active.file, &self.buffer, active.len) {
            self.owes_until = clock::monotonic() + OWED_AGAIN;
            return Err(error);
        }
        active.len += self.buffer.len() as u32;
        self.buffer.clear();
        self.buffer.shrink_to(BUFFER_KEPT);
        self.owed.clear();
        self.owed.shrink_to(OWED_KEPT);
        Ok(())
    }
}

impl Written {
    /// Puts the group on stable storage.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// Writes all, or leaves the file as it was.
fn write_or_cut(file: &File, bytes: &[u8], offset: u32) -> io::Result<()> {
    file.write_all_at(bytes, u64::from(offset)).inspect_err(|_| {
        // Zeros are the end for a reader; the room stays preallocated where it can.
        let left = file.metadata().map_or(0, |metadata| metadata.len()).saturating_sub(u64::from(offset));
        let zeros = vec![0; bytes.len().min(left as usize)];
        if file.write_all_at(&zeros, u64::from(offset)).is_err() {
            drop(file.set_len(u64::from(offset)));
        }
    })
}

#[cfg(test)]
mod tests;
