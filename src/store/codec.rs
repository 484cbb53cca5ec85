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
use crate::domain::outcome::DeathReason;
use crate::domain::schedule::Retry;

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
    /// Something that an operator set; `None`: unset. See [`super::Store::set`].
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
mod tests {
    use super::*;
    use crate::domain::customer::Toggle;

    fn accepted() -> Record<'static> {
        Record::Accepted(Accepted {
            endpoint: EndpointName::of(Plugin::new(12).unwrap()),
            plugin: Plugin::new(12).unwrap(),
            lane: LaneKey(0x0123_4567_89ab_cdef),
            key: 0xfeed,
            accepted_ms: 1_795_000_000_123,
            given_id: Some("e-1"),
            web_token: "wang",
            count: 1,
            messages: r#"{"type":"message"}"#,
        })
    }

    /// Version 1, frozen: a data directory written by any released version is read by every later one.
    #[test]
    fn the_first_version_of_the_format_is_read_as_it_was_written() {
        let mut frame = Vec::new();
        write_frame(&mut frame, 7, 300, 256, (7 << 20) + 5, &accepted().encode());
        let hex: String = frame.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, FROZEN_V1);
        let header = Header::read(&frame).unwrap();
        assert_eq!(
            header,
            Header { body_len: header.body_len, segment: 7, offset: 300, synced: 256, seq: (7 << 20) + 5 }
        );
        assert_eq!(Record::decode(checked_body(&header, &frame).unwrap()).unwrap(), accepted());
    }

    const FROZEN_V1: &str = "4835520140000000070000002c010000000100000500700000000000bce73111010c0cef9bafcdf8acd1\
        9101edfe0000000000000000000000000000fbbcd9f29e340103652d310477616e6701127b2274797065223a226d65\
        7373616765227dbd72c3cf";

    /// Each with its bytes of version 1, frozen as well.
    #[test]
    fn every_kind_of_record_is_written_and_read_as_in_the_first_version() {
        let customer = Customer {
            customer_token: Some("c".to_owned()),
            sdk_token: Some("s".to_owned()),
            h5push: Some(true),
            toggle: Toggle::Off,
            heard: 1_795_000_000,
            ..Customer::new("wang", Plugin::new(12).unwrap())
        };
        let retry = Retry {
            tries: 1,
            attempts: 2,
            refusals: 3,
            fixed: 4,
            singles: 5,
            singles_attempts: 6,
            singles_refusals: 7,
            ..Retry::default()
        };
        let Record::Accepted(event) = accepted() else { unreachable!() };
        let derived = Accepted { given_id: None, ..event.clone() };
        assert_eq!(derived.event_id(), "mid_0000000000000000000000000000feed");
        let dead = Dead {
            seq: 9,
            reason: DeathReason::Refused,
            buried_ms: 1_795_000_000_456,
            attempts: 5,
            event: Some(event),
            endpoint: EndpointName::DEFAULT,
            problem: Some("status 400"),
        };
        let plugin = Plugin::new(12).unwrap();
        let (web_token, name) = ("wang".to_owned(), "c".to_owned());
        let records = [
            (
                Record::Opened(Opened {
                    identity: [3; 32],
                    segment: 9,
                    previous: Some((8, 77)),
                    generation: 1,
                    version: "0.1.0",
                }),
                "0003030303030303030303030303030303030303030303030303030303030303030901084d0105302e312e30",
            ),
            (
                accepted(),
                "010c0cef9bafcdf8acd19101edfe0000000000000000000000000000fbbcd9f29e340103652d310477616e6701127b2274797065223a226d657373616765227d",
            ),
            (
                Record::Accepted(derived),
                "010c0cef9bafcdf8acd19101edfe0000000000000000000000000000fbbcd9f29e34000477616e6701127b2274797065223a226d657373616765227d",
            ),
            (
                Record::Settled(Settled {
                    lane: LaneKey(1),
                    ending: Ending::Withdrawn,
                    retry_is_over: true,
                    second: 5,
                    seqs: vec![1, 2, u64::MAX],
                }),
                "0201020105030102ffffffffffffffffff01",
            ),
            (
                Record::Deferred(DeferredRecord { lane: LaneKey(1), head: 3, retry, due_ms: 4 }),
                "0301030102030405060704",
            ),
            (Record::State(StateChange::PutCustomer(customer)), "04000477616e670c010163010173010102c08df6d706"),
            (Record::State(StateChange::DropCustomer { plugin, web_token: web_token.clone() }), "04010c0477616e67"),
            (
                Record::State(StateChange::Name {
                    kind: NameKind::Sdk,
                    plugin,
                    name: name.clone(),
                    web_token: Some(web_token),
                }),
                "0402010c0163010477616e67",
            ),
            (
                Record::State(StateChange::Name { kind: NameKind::Customer, plugin, name, web_token: None }),
                "0402000c016300",
            ),
            (
                Record::State(StateChange::Setting { key: "a".to_owned(), value: Some("b".to_owned()) }),
                "04030161010162",
            ),
            (Record::State(StateChange::Nonce { key: 7, until_s: 8 }), "04040708"),
            (Record::Sealed { events: 3 }, "0503"),
            (
                Record::Dead(dead),
                "060902c8bfd9f29e3405010c0cef9bafcdf8acd19101edfe0000000000000000000000000000fbbcd9f29e340103652d310477616e6701127b2274797065223a226d657373616765227d00010a73746174757320343030",
            ),
            (Record::Gone(vec!["3-17".parse().unwrap()]), "07010311"),
        ];
        for (record, frozen) in records {
            let bytes = record.encode();
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(hex, frozen, "{record:?}");
            assert_eq!(Record::decode(&bytes).unwrap(), record);
        }
    }

    #[test]
    fn a_flipped_bit_anywhere_is_noticed() {
        let mut frame = Vec::new();
        write_frame(&mut frame, 7, 0, 0, 1, &accepted().encode());
        for bit in 0..frame.len() * 8 {
            let mut flipped = frame.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let body = Header::read(&flipped).and_then(|header| checked_body(&header, &flipped).map(<[u8]>::to_vec));
            assert_eq!(body, None, "bit {bit}");
        }
    }
}
