//! What waits, in memory: about 7 bytes for an event, whatever its size; payloads stay on disk.
//!
//! Events are named by a [`Handle`]: the slot of their journal segment and their place in it. Each has the link to the
//! next event of its lane, the offset of its record, and one bit that says whether it is settled.

use crate::domain::offsets::Offsets;

/// An event that waits: segment slot (14 bits) and place in the segment (18 bits).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Handle(u32);

/// Bits of a handle, and of a sequence number, that say the place within a segment.
pub const PLACE_BITS: u32 = 18;
/// Most events of one segment.
pub const PLACES_MAX: usize = 1 << PLACE_BITS;
/// Most segments at once.
pub const SLOTS_MAX: usize = 1 << (32 - PLACE_BITS);

impl Handle {
    /// No event: the end of a lane. Never a real handle, the last place of the last slot being left unused.
    pub const NONE: Handle = Handle(u32::MAX);

    /// The event at that place of that slot.
    #[must_use]
    pub fn new(slot: u16, place: u32) -> Handle {
        Handle((u32::from(slot) << PLACE_BITS) | place)
    }

    /// The segment's slot.
    #[must_use]
    pub fn slot(self) -> u16 {
        (self.0 >> PLACE_BITS) as u16
    }

    fn place(self) -> usize {
        self.0 as usize & (PLACES_MAX - 1)
    }
}

/// The waiting events of one journal segment.
#[derive(Debug, Default)]
pub struct Group {
    segment: u64,
    /// Of a compacted segment: each event's sequence number.
    seqs: Option<Vec<u64>>,
    next: Vec<u32>,
    offsets: Offsets,
    /// (first place, second of acceptance), a row where the second changes.
    times: Vec<(u32, u32)>,
    settled: Vec<u64>,
    live: u32,
    live_bytes: u64,
}

impl Group {
    /// Events that are not settled.
    #[must_use]
    pub fn live(&self) -> u32 {
        self.live
    }

    /// Events in all.
    #[must_use]
    pub fn len(&self) -> usize {
        self.next.len()
    }

    /// Whether there is no event.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.next.is_empty()
    }

    /// Bytes of records that wait, each settled event counted as an average one.
    #[must_use]
    pub fn live_bytes(&self) -> u64 {
        self.live_bytes
    }

    fn is_settled(&self, place: usize) -> bool {
        self.settled.get(place / 64).is_some_and(|word| word >> (place % 64) & 1 == 1)
    }
}

/// A segment's settled events, for a checkpoint.
#[derive(Debug)]
pub struct GroupMark {
    /// The segment's number.
    pub segment: u64,
    /// A bit for each place, set where the event is settled; first place in the lowest bit.
    pub settled: Vec<u64>,
    /// Places there are.
    pub places: u32,
    /// Bytes of records that wait, about.
    pub live_bytes: u64,
}

impl GroupMark {
    /// Whether there is an event at a place that has not ended.
    #[must_use]
    pub fn waits(&self, place: usize) -> bool {
        let word = self.settled.get(place / 64).filter(|_| place < self.places as usize);
        word.is_some_and(|word| word >> (place % 64) & 1 == 0)
    }
}

/// The first sequence number of a segment's events.
#[must_use]
pub fn first_seq(segment: u64) -> u64 {
    segment << PLACE_BITS
}

/// All groups, by slot.
#[derive(Debug, Default)]
pub struct Backlog {
    groups: Vec<Option<Group>>,
}

impl Backlog {
    /// Begins the group of a segment.
    pub fn open(&mut self, slot: u16, segment: u64) {
        let slot = usize::from(slot);
        if self.groups.len() <= slot {
            self.groups.resize_with(slot + 1, || None);
        }
        if let Some(group) = self.groups.get_mut(slot) {
            *group = Some(Group { segment, ..Group::default() });
        }
    }

    /// Forgets a group, all of whose events are settled.
    pub fn close(&mut self, slot: u16) {
        if let Some(group) = self.groups.get_mut(usize::from(slot)) {
            *group = None;
        }
    }

    /// The group at a slot.
    #[must_use]
    pub fn group(&self, slot: u16) -> Option<&Group> {
        self.groups.get(usize::from(slot)).and_then(Option::as_ref)
    }

    /// Every group with its slot.
    pub fn groups(&self) -> impl Iterator<Item = (u16, &Group)> {
        self.groups.iter().enumerate().filter_map(|(slot, group)| group.as_ref().map(|group| (slot as u16, group)))
    }

    /// Adds the next event of a segment, unsettled. `seq` is needed only where it is not the next number: in compacted
    /// segments. `None` when the slot is not open or full.
    pub fn append(&mut self, slot: u16, seq: Option<u64>, offset: u32, second: u32, bytes: u32) -> Option<Handle> {
        let group = self.groups.get_mut(usize::from(slot))?.as_mut()?;
        let place = group.next.len();
        if place + 1 >= PLACES_MAX {
            return None;
        }
        if let Some(seq) = seq {
            group.seqs.get_or_insert_default().push(seq);
        }
        group.next.push(Handle::NONE.0);
        group.offsets.push(offset);
        if place.is_multiple_of(64) {
            group.settled.push(0);
        }
        if group.times.last().is_none_or(|(_, last)| *last != second) {
            group.times.push((place as u32, second));
        }
        group.live += 1;
        group.live_bytes += u64::from(bytes);
        Some(Handle::new(slot, place as u32))
    }

    /// Keeps the events of a segment by sequence number from here on: some are missing.
    pub fn make_sparse(&mut self, slot: u16) {
        if let Some(group) = self.groups.get_mut(usize::from(slot)).and_then(Option::as_mut)
            && group.seqs.is_none()
        {
            let first = first_seq(group.segment);
            group.seqs = Some((0..group.next.len() as u64).map(|place| first + place).collect());
        }
    }

    /// Whether a segment's events are kept by sequence number.
    #[must_use]
    pub fn is_sparse(&self, slot: u16) -> bool {
        self.group(slot).is_some_and(|group| group.seqs.is_some())
    }

    /// Gives back the room that growth left over, once a segment is complete.
    pub fn seal(&mut self, slot: u16) {
        if let Some(group) = self.groups.get_mut(usize::from(slot)).and_then(Option::as_mut) {
            group.next.shrink_to_fit();
            group.offsets.seal();
            group.settled.shrink_to_fit();
            group.times.shrink_to_fit();
        }
    }

    /// Marks an event settled; says whether it was not before.
    pub fn settle(&mut self, handle: Handle) -> bool {
        let Some(group) = self.groups.get_mut(usize::from(handle.slot())).and_then(Option::as_mut) else {
            return false;
        };
        let place = handle.place();
        if group.is_settled(place) || place >= group.next.len() {
            return false;
        }
        if let Some(word) = group.settled.get_mut(place / 64) {
            *word |= 1 << (place % 64);
        }
        group.live_bytes -= group.live_bytes / u64::from(group.live.max(1));
        group.live = group.live.saturating_sub(1);
        if group.live == 0 {
            group.live_bytes = 0;
        }
        true
    }

    /// Whether an event is settled; also when its group is gone.
    #[must_use]
    pub fn is_settled(&self, handle: Handle) -> bool {
        self.group(handle.slot()).is_none_or(|group| group.is_settled(handle.place()))
    }

    /// The next event of the lane.
    #[must_use]
    pub fn next(&self, handle: Handle) -> Handle {
        let next = self.group(handle.slot()).and_then(|group| group.next.get(handle.place()));
        Handle(next.copied().unwrap_or(Handle::NONE.0))
    }

    /// Links an event to the next of its lane.
    pub fn link(&mut self, handle: Handle, next: Handle) {
        let group = self.groups.get_mut(usize::from(handle.slot())).and_then(Option::as_mut);
        if let Some(link) = group.and_then(|group| group.next.get_mut(handle.place())) {
            *link = next.0;
        }
    }

    /// The offset of an event's record in its segment.
    #[must_use]
    pub fn offset(&self, handle: Handle) -> u32 {
        self.group(handle.slot()).and_then(|group| group.offsets.get(handle.place())).unwrap_or(0)
    }

    /// When an event was accepted, Unix seconds.
    #[must_use]
    pub fn second(&self, handle: Handle) -> u32 {
        let Some(group) = self.group(handle.slot()) else { return 0 };
        let row = group.times.partition_point(|(place, _)| *place as usize <= handle.place());
        row.checked_sub(1).and_then(|row| group.times.get(row)).map_or(0, |(_, second)| *second)
    }

    /// An event's sequence number: the segment's number and the place in it, kept when it is compacted.
    #[must_use]
    pub fn seq(&self, handle: Handle) -> u64 {
        let Some(group) = self.group(handle.slot()) else { return 0 };
        match &group.seqs {
            Some(seqs) => seqs.get(handle.place()).copied().unwrap_or(0),
            None => first_seq(group.segment) + handle.place() as u64,
        }
    }

    /// The handle of a sequence number in a slot; `None` when it is not there.
    #[must_use]
    pub fn find(&self, slot: u16, seq: u64) -> Option<Handle> {
        let group = self.group(slot)?;
        let place = match &group.seqs {
            Some(seqs) => seqs.binary_search(&seq).ok()?,
            None => usize::try_from(seq.checked_sub(first_seq(group.segment))?).ok()?,
        };
        (place < group.next.len()).then(|| Handle::new(slot, place as u32))
    }

    /// Which events of each segment wait, by their place when the segment was written.
    pub fn marks(&self) -> impl Iterator<Item = GroupMark> {
        self.groups().map(|(_, group)| {
            let live_bytes = group.live_bytes;
            let mark = |settled, places| GroupMark { segment: group.segment, settled, places, live_bytes };
            match &group.seqs {
                None => mark(group.settled.clone(), group.next.len() as u32),
                Some(seqs) => {
                    let place = |seq: u64| (seq - first_seq(group.segment)) as usize;
                    let places = seqs.last().map_or(0, |last| place(*last) + 1);
                    let mut settled = vec![u64::MAX; places.div_ceil(64)];
                    for (at, seq) in seqs.iter().enumerate().filter(|(at, _)| !group.is_settled(*at)) {
                        debug_assert!(at < group.next.len());
                        if let Some(word) = settled.get_mut(place(*seq) / 64) {
                            *word &= !(1 << (place(*seq) % 64));
                        }
                    }
                    mark(settled, places as u32)
                }
            }
        })
    }

    /// Bytes of all records that wait.
    #[must_use]
    pub fn live_bytes(&self) -> u64 {
        self.groups().map(|(_, group)| group.live_bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_keep_link_offset_time_and_number() {
        let mut backlog = Backlog::default();
        backlog.open(3, 9);
        let handles: Vec<Handle> =
            (0..200).map(|n| backlog.append(3, None, n * 10, 100 + n / 50, 10).unwrap()).collect();
        backlog.link(handles[0], handles[199]);
        assert_eq!(backlog.next(handles[0]), handles[199]);
        assert_eq!(backlog.next(handles[1]), Handle::NONE);
        assert_eq!(backlog.offset(handles[150]), 1_500);
        assert_eq!(backlog.second(handles[149]), 102);
        assert_eq!(backlog.second(handles[150]), 103);
        assert_eq!(backlog.seq(handles[7]), (9 << PLACE_BITS) + 7);
        assert_eq!(backlog.find(3, (9 << PLACE_BITS) + 7), Some(handles[7]));
        assert_eq!(backlog.find(3, (9 << PLACE_BITS) + 200), None);
        assert!(backlog.settle(handles[7]) && !backlog.settle(handles[7]));
        assert!(backlog.is_settled(handles[7]) && !backlog.is_settled(handles[8]));
        for handle in handles {
            backlog.settle(handle);
        }
        assert_eq!((backlog.group(3).unwrap().live(), backlog.live_bytes()), (0, 0));
        backlog.close(3);
        assert!(backlog.group(3).is_none());
    }
}
