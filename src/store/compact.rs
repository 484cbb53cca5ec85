//! Gives disk back that dead events hold: the segments with the least that still waits are rewritten with only that, in
//! place, each event keeping its sequence number. What waits is never out of reach: the old file stays open for those
//! who read it, the new one takes its name when it is on stable storage.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, PoisonError};

use super::codec::{self, Opened, Record};
use super::journal::SegmentFile;
use super::queue::{BLOCK_EVENTS, IndexEntry, Queue, QueueError};
use super::segment::{self, Frame};
use super::{Compacted, Inner, Notice, Snapshot, disk, recover};
use crate::domain::backlog::{GroupMark, first_seq};
use crate::domain::keys::LaneKey;

/// Segments rewritten after one checkpoint.
const SEGMENTS_MAX: usize = 4;
/// A segment that is being written.
pub(super) const TEMPORARY: &str = "compacting";
/// Bytes gathered before they are written.
const CHUNK: usize = 1 << 20;

/// Rewrites a few segments, when dead space has passed a third of the whole.
/// Those that hold damage stay as they are, and are remembered. Only segments `below` that number, and none of `gone`.
pub(super) fn compact(
    inner: &Inner,
    queue: &Queue,
    (snapshot, below): (&Snapshot, u64),
    gone: &HashSet<u64>,
    uncompactable: &mut HashSet<u64>,
) -> Result<(), QueueError> {
    let mut sizes: Vec<(u64, u64, &GroupMark)> = Vec::new();
    for mark in &snapshot.marks {
        let stays = gone.contains(&mark.segment) || uncompactable.contains(&mark.segment);
        if mark.segment >= below || stays {
            continue;
        }
        let path = segment::path(&disk::journal_dir(&inner.options.dir), mark.segment);
        let len = match std::fs::metadata(path) {
            // Somebody has removed it: what waits in it is read from the file that is open.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            found => found?.len(),
        };
        sizes.push((len, mark.live_bytes.min(len), mark));
    }
    let mut whole: u64 = sizes.iter().map(|(len, _, _)| len).sum();
    let mut dead: u64 = sizes.iter().map(|(len, live, _)| len - live).sum();
    // The least live first.
    sizes.sort_by_key(|(len, live, _)| live.saturating_mul(1_000) / len.max(&1));
    for (len, live, mark) in sizes.into_iter().take(SEGMENTS_MAX) {
        if dead * 3 < whole || dead < u64::from(inner.options.segment_bytes) {
            break;
        }
        let rewritten = rewrite(inner, queue, mark);
        if rewritten.is_err() {
            // It takes room for nothing.
            drop(std::fs::remove_file(disk::journal_dir(&inner.options.dir).join(TEMPORARY)));
        }
        if !rewritten? {
            tracing::warn!(segment = mark.segment, "not compacted: a record of what waits in it does not read back");
            uncompactable.insert(mark.segment);
            continue;
        }
        tracing::info!(segment = mark.segment, bytes = len, live, "compacted a segment");
        whole -= len - live;
        dead -= len - live;
    }
    Ok(())
}

/// Says whether all that waits in the segment read back: without that it stays as it is, because the relay knows the
/// record by its place.
fn rewrite(inner: &Inner, queue: &Queue, mark: &GroupMark) -> Result<bool, QueueError> {
    let Some((old_slot, old, end)) = ({
        let segments = inner.segments.read().unwrap_or_else(PoisonError::into_inner);
        let slot = segments.slots.get(&mark.segment).copied();
        let end = segments.ends.get(&mark.segment).copied();
        slot.zip(segments.by_number(mark.segment).cloned()).map(|(slot, old)| (slot, old, end))
    }) else {
        return Ok(true);
    };
    let dir = disk::journal_dir(&inner.options.dir);
    let temporary = dir.join(TEMPORARY);
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&temporary)?;
    let generation = old.generation + 1;
    let mut copy = Copy { segment: mark.segment, file: &file, buffer: Vec::new(), written: 0 };
    let opened = Opened {
        identity: inner.identity,
        segment: mark.segment,
        previous: None,
        generation,
        version: env!("CARGO_PKG_VERSION"),
    };
    copy.push(0, &Record::Opened(opened).encode())?;
    // What is behind the end was given up, and is nothing that waits.
    let len = old.file.metadata()?.len() as u32;
    let end = end.map_or(len, |end| end.min(len));
    let waiting = (0..mark.places as usize).filter(|place| mark.waits(*place)).count();
    let mut events: Vec<IndexEntry> = Vec::with_capacity(waiting);
    let mut result = Ok(());
    segment::scan_synced(&old.file, mark.segment, 0, u64::from(end), |frame| {
        if result.is_ok() {
            result = copy.keep(frame, mark, &mut events);
        }
    })?;
    result?;
    if events.len() < waiting {
        std::fs::remove_file(&temporary)?;
        return Ok(false);
    }
    copy.write()?;
    let len = copy.written as u32;
    file.sync_all()?;
    // The last block is not full: there may be rows of a try that a crash cut off.
    for block in 0..=events.len() / BLOCK_EVENTS {
        let entries: Vec<IndexEntry> = events.iter().skip(block * BLOCK_EVENTS).take(BLOCK_EVENTS).copied().collect();
        queue.put_block(mark.segment, generation, block as u32, &entries)?;
    }
    std::fs::rename(&temporary, segment::path(&dir, mark.segment))?;
    // Under one name or the other all is there.
    let named = segment::sync_dir(&dir);
    let new = SegmentFile { number: mark.segment, generation, file: Arc::new(file) };
    let Some(new_slot) = ({
        let mut segments = inner.segments.write().unwrap_or_else(PoisonError::into_inner);
        let slot = segments.free_slot();
        if let Some(slot) = slot {
            segments.add(slot, new);
            segments.ends.insert(mark.segment, len);
        }
        slot
    }) else {
        // Every slot is taken: the old file stays in use until the next start.
        return Ok(true);
    };
    let (done, told) = std::sync::mpsc::channel();
    let moved = |entry: IndexEntry| (entry.seq, entry.offset, entry.len, LaneKey(entry.lane), entry.second);
    let events = events.into_iter().map(moved).collect();
    let compacted = Compacted { segment: mark.segment, old_slot, new_slot, events, done };
    drop(inner.notices.blocking_send(Notice::SegmentCompacted(compacted)));
    if told.recv().is_ok() {
        inner.segments.write().unwrap_or_else(PoisonError::into_inner).free(old_slot);
        queue.remove_blocks(mark.segment, old.generation)?;
    }
    named?;
    Ok(true)
}

/// The new file on its way.
struct Copy<'a> {
    segment: u64,
    file: &'a File,
    buffer: Vec<u8>,
    written: u64,
}

impl Copy<'_> {
    fn keep(&mut self, frame: &Frame, mark: &GroupMark, events: &mut Vec<IndexEntry>) -> io::Result<()> {
        let Some(mut entry) = recover::index_entry(frame) else { return Ok(()) };
        let place = (entry.seq - first_seq(mark.segment)) as usize;
        if !mark.waits(place) {
            return Ok(());
        }
        entry.offset = (self.written + self.buffer.len() as u64) as u32;
        events.push(entry);
        self.push(entry.seq, frame.body())
    }

    fn push(&mut self, seq: u64, body: &[u8]) -> io::Result<()> {
        let offset = (self.written + self.buffer.len() as u64) as u32;
        // Synced as a whole before it is used.
        codec::write_frame(&mut self.buffer, self.segment, offset, offset, seq, body);
        if self.buffer.len() >= CHUNK { self.write() } else { Ok(()) }
    }

    fn write(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.buffer, self.written)?;
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}
