//! Events read back from the journal.

use std::io;

use super::codec::{Accepted, Record};
use super::journal::SegmentFile;
use super::segment::{self, Frame};

/// A stored event, read back.
#[derive(Debug)]
pub struct Stored {
    pub(super) frame: Frame,
}

impl Stored {
    /// Its sequence number.
    #[must_use]
    pub fn seq(&self) -> u64 {
        self.frame.header.seq
    }

    /// The event; `None` for any other record.
    #[must_use]
    pub fn event(&self) -> Option<Accepted<'_>> {
        Record::decode(self.frame.body())?.into_event()
    }
}

/// Which events are being read: a slot, kept open while it is read.
#[derive(Clone, Debug)]
pub struct Reader {
    pub(super) segment: SegmentFile,
}

impl Reader {
    /// Reads the event at an offset; `None` when it is damaged. Blocks.
    ///
    /// # Errors
    /// The file cannot be read just now.
    pub fn read(&self, offset: u32) -> io::Result<Option<Stored>> {
        Ok(segment::read_frame(&self.segment.file, self.segment.number, offset)?.map(|frame| Stored { frame }))
    }

    /// Like [`Reader::read`], from memory only.
    ///
    /// # Errors
    /// `WouldBlock`: it has to be read from the disk. Or the file cannot be read just now.
    pub fn read_cached(&self, offset: u32) -> io::Result<Option<Stored>> {
        Ok(segment::read_cached_frame(&self.segment.file, self.segment.number, offset)?.map(|frame| Stored { frame }))
    }
}
