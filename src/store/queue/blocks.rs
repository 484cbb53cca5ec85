//! Index rows: lane, offset and time of a run of events, about 16 bytes each.

use serde::{Deserialize, Serialize};

use crate::store::codec::Accepted;
use crate::store::segment::Frame;

/// Events of an index row.
pub(in crate::store) const BLOCK_EVENTS: usize = 128;

/// One event in an index row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::store) struct IndexEntry {
    pub seq: u64,
    pub lane: u64,
    pub endpoint: u64,
    pub offset: u32,
    pub second: u32,
    pub len: u32,
}

impl IndexEntry {
    /// The entry of an event, by its record.
    pub(in crate::store) fn of(frame: &Frame, event: &Accepted<'_>) -> IndexEntry {
        IndexEntry {
            seq: frame.header.seq,
            lane: event.lane.0,
            endpoint: event.endpoint.number(),
            offset: frame.header.offset,
            second: (event.accepted_ms / 1_000) as u32,
            len: frame.header.frame_len() as u32,
        }
    }
}

/// Index entries, each number as the difference to the entry before.
pub(super) fn pack(entries: &[IndexEntry]) -> Vec<u8> {
    let mut out = Vec::with_capacity(entries.len() * 20);
    let mut last = IndexEntry { seq: 0, lane: 0, endpoint: 0, offset: 0, second: 0, len: 0 };
    for entry in entries {
        out.extend_from_slice(&entry.lane.to_le_bytes());
        for number in [
            entry.seq.wrapping_sub(last.seq),
            entry.endpoint,
            u64::from(entry.offset.wrapping_sub(last.offset)),
            u64::from(entry.second.wrapping_sub(last.second)),
            u64::from(entry.len),
        ] {
            push_varint(&mut out, number);
        }
        last = *entry;
    }
    out
}

pub(super) fn unpack(bytes: &[u8]) -> Option<Vec<IndexEntry>> {
    let mut rest = bytes;
    let mut entries = Vec::with_capacity(BLOCK_EVENTS);
    let mut last = IndexEntry { seq: 0, lane: 0, endpoint: 0, offset: 0, second: 0, len: 0 };
    while !rest.is_empty() {
        let (lane, after) = rest.split_at_checked(8)?;
        rest = after;
        let lane = u64::from_le_bytes(lane.try_into().ok()?);
        let seq = last.seq.wrapping_add(take_varint(&mut rest)?);
        let endpoint = take_varint(&mut rest)?;
        let offset = last.offset.wrapping_add(u32::try_from(take_varint(&mut rest)?).ok()?);
        let second = last.second.wrapping_add(u32::try_from(take_varint(&mut rest)?).ok()?);
        let len = u32::try_from(take_varint(&mut rest)?).ok()?;
        last = IndexEntry { seq, lane, endpoint, offset, second, len };
        entries.push(last);
    }
    Some(entries)
}

fn push_varint(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::queue::ROW_MAX;

    #[test]
    fn index_rows_read_back_and_stay_small_in_the_worst_case() {
        // The longest endpoint names and records there can be; a segment's events ascend in place, offset and time.
        let entries: Vec<IndexEntry> = (0..BLOCK_EVENTS as u64)
            .map(|n| IndexEntry {
                seq: (u64::from(u32::MAX) << 18) + 2 * n,
                lane: u64::MAX - n,
                endpoint: u64::MAX >> 1,
                offset: 400_000 * n as u32,
                second: 1_795_000_000 + 100 * n as u32,
                len: 400_000,
            })
            .collect();
        let packed = pack(&entries);
        assert!(packed.len() + 3 <= ROW_MAX, "{}", packed.len());
        assert_eq!(unpack(&packed), Some(entries));
        assert_eq!(unpack(&packed[..packed.len() - 1]), None);
    }
}
