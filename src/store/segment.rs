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
        Err(error @ (Errno::AGAIN | Errno::INTR)) => Err(error.into()),
        Err(_) => file.read_at(bytes, offset),
        Ok(read) => Ok(read),
    }
}

type ReadAt = fn(&File, &mut [u8], u64) -> io::Result<usize>;

fn read_frame_by(read_at: ReadAt, file: &File, segment: u64, offset: u32) -> io::Result<Option<Frame>> {
    let mut first = [0; READ_FIRST];
    let read = read_up_to(read_at, file, &mut first, u64::from(offset))?;
    let first = first.get(..read).unwrap_or_default();
    let Some(header) = Header::read(first).filter(|header| header.segment == segment as u32 && header.offset == offset)
    else {
        return Ok(None);
    };
    let len = header.frame_len() as usize;
    if len > read && u64::from(offset) + len as u64 > file.metadata()?.len() {
        return Ok(None);
    }
    let mut bytes = Vec::with_capacity(len);
    bytes.extend_from_slice(first.get(..len).unwrap_or(first));
    if len > read {
        bytes.resize(len, 0);
        let rest = bytes.get_mut(read..).unwrap_or_default();
        if read_up_to(read_at, file, rest, u64::from(offset) + read as u64)? < len - read {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
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
mod tests;
