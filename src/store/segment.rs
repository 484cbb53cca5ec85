//! One journal segment: an append-only file of frames, read by offset, scanned after a restart.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::codec::{self, FRAME_LEN, HEADER_LEN, Header};

/// Where a segment's file is.
pub(super) fn path(dir: &Path, segment: u64) -> PathBuf {
    dir.join(format!("{segment:016}.log"))
}

/// The number in a segment's file name.
pub(super) fn number(name: &str) -> Option<u64> {
    name.strip_suffix(".log").filter(|digits| digits.len() == 16)?.parse().ok()
}

/// Creates the file of a segment with room for `bytes`, so that appending neither grows it nor fails for want of space.
pub(super) fn create(path: &Path, bytes: u64) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
    match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes) {
        // A file system without it: the file grows as it is written.
        Ok(()) | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(file),
        Err(error) => {
            drop(file);
            std::fs::remove_file(path)?;
            Err(error.into())
        }
    }
}

/// Makes names created, renamed or removed in a directory durable.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// A record whose checksums hold.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub header: Header,
    pub bytes: Vec<u8>,
}

impl Frame {
    /// The record's body.
    pub(super) fn body(&self) -> &[u8] {
        self.bytes.get(HEADER_LEN..HEADER_LEN + self.header.body_len as usize).unwrap_or_default()
    }
}

/// First bytes read of a frame of unknown length: most frames whole.
const READ_FIRST: usize = 2_048;

/// Reads the frame at an offset; `None` when there is none whose checksums hold.
pub(super) fn read_frame(file: &File, segment: u64, offset: u32) -> io::Result<Option<Frame>> {
    read_frame_by(File::read_at, file, segment, offset)
}

/// Like [`read_frame`], from memory only.
///
/// # Errors
/// `WouldBlock`: it has to be read from the disk.
pub(super) fn read_cached_frame(file: &File, segment: u64, offset: u32) -> io::Result<Option<Frame>> {
    read_frame_by(read_cached, file, segment, offset)
}

/// Reads what the page cache has; all there is on a file system that cannot say.
fn read_cached(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
    use rustix::io::{Errno, ReadWriteFlags, preadv2};
    match preadv2(file, &mut [io::IoSliceMut::new(bytes)], offset, ReadWriteFlags::NOWAIT) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => file.read_at(bytes, offset),
        read => Ok(read?),
    }
}

type ReadAt = fn(&File, &mut [u8], u64) -> io::Result<usize>;

fn read_frame_by(read_at: ReadAt, file: &File, segment: u64, offset: u32) -> io::Result<Option<Frame>> {
    let mut bytes = vec![0; READ_FIRST];
    let read = read_up_to(read_at, file, &mut bytes, u64::from(offset))?;
    bytes.truncate(read);
    let Some(header) =
        Header::read(&bytes).filter(|header| header.segment == segment as u32 && header.offset == offset)
    else {
        return Ok(None);
    };
    let len = header.frame_len() as usize;
    if len > bytes.len() {
        let have = bytes.len();
        let file_len = file.metadata()?.len();
        if u64::from(offset) + len as u64 > file_len {
            return Ok(None);
        }
        bytes.resize(len, 0);
        let rest = bytes.get_mut(have..).unwrap_or_default();
        if read_up_to(read_at, file, rest, u64::from(offset) + have as u64)? < len - have {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    bytes.truncate(len);
    Ok(codec::checked_body(&header, &bytes).is_some().then_some(Frame { header, bytes }))
}

fn read_up_to(read_at: ReadAt, file: &File, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match read_at(file, rest, offset + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// What a scan found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Scan {
    /// Up to where the file is to be believed.
    pub valid_len: u64,
    /// Offsets of damaged stretches below that.
    pub damaged: Vec<u64>,
    /// Whether something behind `valid_len` was cut: a group that was never synced.
    pub is_torn: bool,
}

/// How much is read at once.
const CHUNK: usize = 1 << 20;

/// Walks a segment from `from`, calling `visit` for each good frame up to where the segment is to be believed. Other files
/// of frames may be longer than 4 GiB: their frames have the low 32 bits of their offsets.
///
/// A bad stretch below `floor` (known to have been synced) or below the `synced` mark of any good record is damage and
/// skipped; the first one above is the torn end, where the segment is cut.
pub(super) fn scan(
    file: &File,
    segment: u64,
    from: u32,
    floor: u32,
    mut visit: impl FnMut(&Frame),
) -> io::Result<Scan> {
    let file_len = file.metadata()?.len();
    let mut floor = u64::from(floor);
    let mut bad = Vec::new();
    let mut end = u64::from(from);
    walk(file, segment, u64::from(from), file_len, &mut |found| match found {
        Found::Frame(frame, behind) => {
            floor = floor.max(u64::from(frame.header.synced));
            end = behind;
        }
        Found::Bad(offset) => bad.push(offset),
    })?;
    let cut = bad.iter().copied().find(|offset| *offset >= floor);
    let mut scan = Scan { valid_len: cut.unwrap_or(end), damaged: bad, is_torn: cut.is_some() };
    scan.damaged.retain(|offset| *offset < scan.valid_len);
    if scan.valid_len < floor {
        // What was synced ends early: the file was cut.
        scan.damaged.push(scan.valid_len);
    }
    scan_synced(file, segment, from, scan.valid_len, &mut visit)?;
    Ok(scan)
}

/// Like [`scan`], for a stretch that is known to be synced up to `to`: whatever is bad there is damage, zeros too.
pub(super) fn scan_synced(
    file: &File,
    segment: u64,
    from: u32,
    to: u64,
    mut visit: impl FnMut(&Frame),
) -> io::Result<Scan> {
    let mut damaged = Vec::new();
    let file_len = file.metadata()?.len();
    let mut end = u64::from(from);
    walk(file, segment, u64::from(from), file_len.min(to), &mut |found| match found {
        Found::Frame(frame, behind) => {
            end = behind;
            visit(&frame);
        }
        Found::Bad(offset) => damaged.push(offset),
    })?;
    if end < to && damaged.last().is_none_or(|last| *last < end) {
        damaged.push(end);
    }
    Ok(Scan { valid_len: to, damaged, is_torn: false })
}

enum Found {
    /// And where the next one is.
    Frame(Frame, u64),
    Bad(u64),
}

fn walk(file: &File, segment: u64, from: u64, file_len: u64, visit: &mut impl FnMut(Found)) -> io::Result<()> {
    let mut at = from;
    let mut window = Window { bytes: Vec::new(), start: 0, limit: file_len };
    let mut bad_since = None;
    while at + FRAME_LEN as u64 <= file_len {
        let ahead = window.at(file, at, HEADER_LEN)?;
        let header = Header::read(ahead)
            .filter(|header| header.segment == segment as u32 && header.offset == at as u32)
            .filter(|header| at + header.frame_len() <= file_len);
        let Some(header) = header else {
            if bad_since.is_none() {
                // The rest of a preallocated file is zeros.
                if ahead.iter().all(|byte| *byte == 0) && window.is_zero_from(file, at, file_len)? {
                    return Ok(());
                }
                bad_since = Some(at);
            }
            let ahead = window.at(file, at + 1, CHUNK)?;
            at += 1 + codec::find_magic(ahead).unwrap_or(ahead.len().saturating_sub(3).max(1)) as u64;
            continue;
        };
        let len = header.frame_len() as usize;
        let bytes = window.at(file, at, len)?;
        if codec::checked_body(&header, bytes).is_some() {
            if let Some(offset) = bad_since.take() {
                visit(Found::Bad(offset));
            }
            visit(Found::Frame(Frame { header, bytes: bytes.to_vec() }, at + len as u64));
        } else if bad_since.is_none() {
            bad_since = Some(at);
        }
        at += len as u64;
    }
    let has_rest = at < file_len && !window.is_zero_from(file, at, file_len)?;
    if let Some(offset) = bad_since.or(has_rest.then_some(at)) {
        visit(Found::Bad(offset));
    }
    Ok(())
}

/// A part of a file in memory.
struct Window {
    bytes: Vec<u8>,
    start: u64,
    /// Nothing is read from here on.
    limit: u64,
}

impl Window {
    /// Up to `len` bytes at `at`; fewer at the end of the file.
    fn at(&mut self, file: &File, at: u64, len: usize) -> io::Result<&[u8]> {
        let end = self.start + self.bytes.len() as u64;
        if at < self.start || (at + len as u64 > end && end < self.limit) {
            let left = usize::try_from(self.limit.saturating_sub(at)).unwrap_or(usize::MAX);
            self.bytes.resize(len.max(CHUNK).min(left), 0);
            let read = read_up_to(File::read_at, file, &mut self.bytes, at)?;
            self.bytes.truncate(read);
            self.start = at;
        }
        let skip = (at - self.start) as usize;
        let rest = self.bytes.get(skip..).unwrap_or_default();
        Ok(rest.get(..len).unwrap_or(rest))
    }

    fn is_zero_from(&mut self, file: &File, from: u64, to: u64) -> io::Result<bool> {
        let mut at = from;
        while at < to {
            let bytes = self.at(file, at, CHUNK)?;
            if bytes.is_empty() {
                break;
            }
            if bytes.iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
            at += bytes.len() as u64;
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENT: u64 = 5;

    /// Frames of different sizes, in groups of two that were synced before the next was written.
    fn sample() -> (Vec<u8>, Vec<u32>) {
        let mut bytes = Vec::new();
        let mut offsets = Vec::new();
        let mut synced = 0;
        for n in 0..8u64 {
            let offset = bytes.len() as u32;
            if n % 2 == 0 {
                synced = offset;
            }
            offsets.push(offset);
            codec::write_frame(&mut bytes, SEGMENT, offset, synced, n, &vec![n as u8 + 1; 3 + 7 * n as usize]);
        }
        (bytes, offsets)
    }

    fn scanned(bytes: &[u8], floor: u32) -> (Vec<u64>, Scan) {
        let dir = tempfile::tempdir().unwrap();
        let path = path(dir.path(), SEGMENT);
        std::fs::write(&path, bytes).unwrap();
        let mut seqs = Vec::new();
        let file = File::open(path).unwrap();
        let scan = scan(&file, SEGMENT, 0, floor, |frame| seqs.push(frame.header.seq)).unwrap();
        (seqs, scan)
    }

    #[test]
    fn a_whole_segment_is_read_also_with_preallocated_room_behind_it() {
        let (mut bytes, _) = sample();
        let len = bytes.len() as u32;
        for room in [0, 10, 5_000] {
            bytes.resize(len as usize + room, 0);
            let (seqs, scan) = scanned(&bytes, 0);
            assert_eq!(seqs, (0..8).collect::<Vec<u64>>());
            assert_eq!(scan, Scan { valid_len: u64::from(len), damaged: vec![], is_torn: false });
        }
    }

    #[test]
    fn a_segment_cut_anywhere_keeps_all_whole_records_and_says_when_synced_ones_are_gone() {
        let (bytes, offsets) = sample();
        let floor = offsets[6];
        for cut in 0..bytes.len() {
            let (seqs, scan) = scanned(&bytes[..cut], floor);
            let whole = offsets.iter().skip(1).filter(|offset| **offset as usize <= cut).count() as u64;
            assert_eq!(seqs, (0..whole).collect::<Vec<u64>>(), "cut at {cut}");
            let lost_synced = (cut as u32) < floor;
            assert_eq!(!scan.damaged.is_empty(), lost_synced, "cut at {cut}: {scan:?}");
        }
    }

    #[test]
    fn a_byte_flipped_anywhere_costs_one_record_below_the_mark_and_ends_the_segment_above() {
        let (bytes, offsets) = sample();
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x41;
            let hit = offsets.iter().rposition(|offset| *offset as usize <= at).unwrap();
            let (seqs, scan) = scanned(&flipped, 0);
            if hit < 6 {
                let others: Vec<u64> = (0..8).filter(|n| *n != hit as u64).collect();
                assert_eq!(seqs, others, "byte {at}");
                assert_eq!((scan.damaged.len(), scan.is_torn), (1, false), "byte {at}: {scan:?}");
            } else {
                assert_eq!(seqs, (0..hit as u64).collect::<Vec<u64>>(), "byte {at}");
                assert_eq!((scan.damaged.len(), scan.is_torn), (0, true), "byte {at}: {scan:?}");
                assert_eq!(scan.valid_len, u64::from(offsets[hit]));
            }
        }
    }

    #[test]
    fn frames_are_walked_beyond_four_gibibytes() {
        let (bytes, _) = sample();
        let from = (1 << 32) - bytes.len() as u64 / 2;
        let mut moved = Vec::new();
        for n in 0..8u64 {
            let offset = from + moved.len() as u64;
            codec::write_frame(&mut moved, SEGMENT, offset as u32, 0, n, &[n as u8; 40]);
        }
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&moved, from).unwrap();
        let (mut seqs, mut ends) = (Vec::new(), Vec::new());
        walk(&file, SEGMENT, from, from + moved.len() as u64, &mut |found| match found {
            Found::Frame(frame, behind) => {
                seqs.push(frame.header.seq);
                ends.push(behind);
            }
            Found::Bad(at) => panic!("bad at {at}"),
        })
        .unwrap();
        assert_eq!(seqs, (0..8).collect::<Vec<u64>>());
        assert_eq!(ends.last(), Some(&(from + moved.len() as u64)));
        assert!(from < 1 << 32 && ends[7] > 1 << 32);
    }

    #[test]
    fn a_frame_is_read_by_offset_and_a_bad_one_is_none() {
        let (mut bytes, offsets) = sample();
        bytes.resize(bytes.len() + 100, 0);
        let dir = tempfile::tempdir().unwrap();
        let path = path(dir.path(), SEGMENT);
        bytes[offsets[3] as usize + HEADER_LEN] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let file = File::open(path).unwrap();
        let body = |offset| read_frame(&file, SEGMENT, offset).unwrap().map(|frame| frame.body().to_vec());
        assert_eq!(body(offsets[2]), Some(vec![3; 17]));
        assert_eq!(body(offsets[3]), None);
        assert_eq!(body(offsets[2] + 1), None);
        assert_eq!(body(bytes.len() as u32 - 50), None);
        assert_eq!(read_frame(&file, SEGMENT + 1, offsets[2]).unwrap(), None);
    }

    #[test]
    fn no_bytes_make_the_reader_panic_or_go_round_for_ever() {
        let mut whole = Vec::new();
        for number in 0..4 {
            let offset = whole.len() as u32;
            super::super::codec::write_frame(&mut whole, 7, offset, offset, number, &[number as u8; 40]);
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("segment");
        crate::fuzz::fuzz(&[&whole], |bytes| {
            std::fs::write(&path, bytes).unwrap();
            let file = File::options().read(true).write(true).open(&path).unwrap();
            let mut records = 0;
            let scan = scan(&file, 7, 0, 0, |frame| {
                assert!(frame.header.frame_len() <= bytes.len() as u64);
                records += 1;
            });
            assert!(scan.unwrap().valid_len as usize <= bytes.len() && records <= bytes.len() / 36);
        });
    }
}
