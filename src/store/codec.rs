//! The stored form of every record, and the frame around it.
//!
//! A frame is a header of [`HEADER_LEN`] bytes with a checksum of its own, so that a reader finds the next record
//! after damage; the body; and the body's checksum. All numbers are little-endian, checksums are CRC-32C.
//!
//! ```text
//! magic 4 | body length 4 | segment 4 | own offset 4 | synced 4 | sequence number 8 | header crc 4 | body … | body crc 4
//! ```
//!
//! `synced` says up to which offset the file was known to be on stable storage when the record was written: a bad
//! record below any such mark is damage, above all of them it is a torn tail.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use super::dead_letters::LetterId;
use crate::domain::customer::{Customer, NameKind};
use crate::domain::endpoint::{EndpointName, Plugin};
use crate::domain::keys::{self, EventKey, LaneKey};
use crate::domain::schedule::Retry;
use crate::domain::verdict::DeathReason;

/// Begins every frame; the last byte is the version of the format.
const MAGIC: [u8; 4] = [b'H', b'5', b'R', 1];
/// Bytes before a body.
pub(super) const HEADER_LEN: usize = 32;
/// Bytes around a body.
pub(super) const FRAME_LEN: usize = HEADER_LEN + 4;

/// Every kind of record. New kinds are added at the end: the place is the stored tag.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Record<'a> {
    /// The first record of a segment.
    #[serde(borrow)]
    Opened(Opened<'a>),
    /// An event that was answered 202 once this is on stable storage.
    #[serde(borrow)]
    Accepted(Accepted<'a>),
    /// Events that have ended.
    Settled(Settled),
    /// What the head of a lane waits with.
    Deferred(DeferredRecord),
    /// What is remembered of customers.
    State(StateChange),
    /// The last record of a complete segment: how many events it holds.
    Sealed {
        /// Events in the segment.
        events: u32,
    },
    /// A dead letter; in `dead/` only.
    #[serde(borrow)]
    Dead(Dead<'a>),
    /// Dead letters that were replayed or purged.
    Gone(Vec<LetterId>),
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Opened<'a> {
    /// Identity and hash key of the data directory.
    pub identity: [u8; 32],
    pub segment: u64,
    /// The segment before, and up to where it is valid.
    pub previous: Option<(u64, u32)>,
    /// How often the segment was compacted.
    pub generation: u32,
    /// Version of the program that wrote it.
    pub version: &'a str,
}

/// An accepted event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Accepted<'a> {
    /// Where it goes.
    pub endpoint: EndpointName,
    /// Its plugin.
    pub plugin: Plugin,
    /// Its lane.
    pub lane: LaneKey,
    /// Its idempotency key.
    #[serde(with = "postcard::fixint::le")]
    pub key: EventKey,
    /// When it was accepted, Unix milliseconds.
    pub accepted_ms: u64,
    /// Its id as given or made up; `None`: derived, so that its key says it.
    pub given_id: Option<&'a str>,
    /// The customer; of a survey, the session.
    pub web_token: &'a str,
    /// How many messages.
    pub count: u32,
    /// The messages, as they stood between the brackets; of a survey, the body.
    pub messages: &'a str,
}

impl<'a> Accepted<'a> {
    /// Its id, as the IM server knows it.
    #[must_use]
    pub fn event_id(&self) -> Cow<'a, str> {
        self.given_id.map_or_else(|| Cow::Owned(keys::derived_id(self.key)), Cow::Borrowed)
    }
}

/// How events ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// Their push succeeded.
    Delivered,
    /// They are dead letters.
    Buried,
    /// The customer was toggled off or forgotten.
    Withdrawn,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Settled {
    pub lane: LaneKey,
    pub ending: Ending,
    /// Whether an earlier `Deferred` of the lane is over.
    pub retry_is_over: bool,
    /// When, Unix seconds.
    pub second: u32,
    pub seqs: Vec<u64>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct DeferredRecord {
    pub lane: LaneKey,
    /// Sequence number of the lane's first event.
    pub head: u64,
    pub retry: Retry,
    /// Unix milliseconds.
    pub due_ms: u64,
}

/// One change of what is remembered; repeating it changes nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum StateChange {
    /// The customer as it stands now.
    PutCustomer(Customer),
    /// The customer is forgotten.
    DropCustomer { plugin: Plugin, web_token: String },
    /// A name means this customer now; `None`: nobody.
    Name { kind: NameKind, plugin: Plugin, name: String, web_token: Option<String> },
    /// Something that an operator set or a receiver asked for; `None`: unset. See [`super::Store::set`].
    Setting { key: String, value: Option<String> },
    /// A signed call's nonce is used up, and to be remembered until then, in Unix seconds.
    Nonce { key: u128, until_s: u64 },
}

/// A dead letter as stored.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Dead<'a> {
    /// The event's sequence number.
    pub seq: u64,
    /// Why it was given up.
    pub reason: DeathReason,
    /// When, Unix milliseconds.
    pub buried_ms: u64,
    /// Attempts that were made.
    pub attempts: u32,
    /// The event. Empty when the event's record could not be read.
    #[serde(borrow)]
    pub event: Option<Accepted<'a>>,
    /// Where it was to go.
    pub endpoint: EndpointName,
    /// What the last attempt failed with.
    pub problem: Option<&'a str>,
}

/// Most bytes that an event's record takes beside its texts.
const ACCEPTED_REST: usize = 96;

impl<'a> Record<'a> {
    /// The body's bytes.
    pub(super) fn encode(&self) -> Vec<u8> {
        // Mostly enough, and not much more: many wait for the disk at once.
        let room = if let Record::Accepted(event) = self {
            ACCEPTED_REST + event.given_id.map_or(0, str::len) + event.web_token.len() + event.messages.len()
        } else {
            64
        };
        // Writing to a vector fails for no value of these types.
        postcard::to_extend(self, Vec::with_capacity(room)).unwrap_or_default()
    }

    pub(super) fn decode(body: &'a [u8]) -> Option<Record<'a>> {
        postcard::from_bytes(body).ok()
    }

    /// The event, of a record that accepts one.
    pub(super) fn into_event(self) -> Option<Accepted<'a>> {
        match self {
            Record::Accepted(event) => Some(event),
            Record::Opened(_)
            | Record::Settled(_)
            | Record::Deferred(_)
            | Record::State(_)
            | Record::Sealed { .. }
            | Record::Dead(_)
            | Record::Gone(_) => None,
        }
    }
}

/// What a frame's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub body_len: u32,
    pub segment: u32,
    pub offset: u32,
    pub synced: u32,
    pub seq: u64,
}

impl Header {
    /// Reads a header; `None` when it is none.
    pub(super) fn read(bytes: &[u8]) -> Option<Header> {
        let bytes = bytes.get(..HEADER_LEN)?;
        let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        if bytes.get(..4)? != MAGIC || crc32c::crc32c(bytes.get(..HEADER_LEN - 4)?) != word(HEADER_LEN - 4)? {
            return None;
        }
        Some(Header {
            body_len: word(4)?,
            segment: word(8)?,
            offset: word(12)?,
            synced: word(16)?,
            seq: u64::from_le_bytes(bytes.get(20..28)?.try_into().ok()?),
        })
    }

    /// Bytes of the whole frame.
    pub(super) fn frame_len(&self) -> u64 {
        u64::from(self.body_len) + FRAME_LEN as u64
    }
}

/// Appends a frame to `out`.
pub(super) fn write_frame(out: &mut Vec<u8>, segment: u64, offset: u32, synced: u32, seq: u64, body: &[u8]) {
    let start = out.len();
    out.extend_from_slice(&MAGIC);
    for word in [body.len() as u32, segment as u32, offset, synced] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.extend_from_slice(&seq.to_le_bytes());
    let crc = crc32c::crc32c(out.get(start..).unwrap_or_default());
    out.extend_from_slice(&crc.to_le_bytes());
    out.extend_from_slice(body);
    out.extend_from_slice(&crc32c::crc32c(body).to_le_bytes());
}

/// Checks the body and its checksum, which follow a header.
pub(super) fn checked_body<'a>(header: &Header, frame: &'a [u8]) -> Option<&'a [u8]> {
    let end = HEADER_LEN.checked_add(header.body_len as usize)?;
    let body = frame.get(HEADER_LEN..end)?;
    let crc = u32::from_le_bytes(frame.get(end..end + 4)?.try_into().ok()?);
    (crc32c::crc32c(body) == crc).then_some(body)
}

/// The magic as a reader looks for it after damage.
pub(super) fn find_magic(bytes: &[u8]) -> Option<usize> {
    bytes.windows(MAGIC.len()).position(|window| window == MAGIC)
}

#[cfg(test)]
mod tests;
