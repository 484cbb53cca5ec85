//! The segments that there are, by slot and by number.

use std::collections::BTreeMap;

use super::journal::SegmentFile;
use crate::domain::backlog::SLOTS_MAX;

/// The segments there are.
#[derive(Debug, Default)]
pub(crate) struct Segments {
    pub(super) by_slot: Vec<Option<SegmentFile>>,
    pub(super) slots: BTreeMap<u64, u16>,
    /// Where complete segments end.
    pub(super) ends: BTreeMap<u64, u32>,
}

impl Segments {
    pub(super) fn free_slot(&self) -> Option<u16> {
        let free = self.by_slot.iter().position(Option::is_none).unwrap_or(self.by_slot.len());
        // The last slot stays unused: its last place would be `Handle::NONE`.
        (free < SLOTS_MAX - 1).then_some(free as u16)
    }

    pub(super) fn add(&mut self, slot: u16, file: SegmentFile) {
        self.slots.insert(file.number, slot);
        let slot = usize::from(slot);
        if self.by_slot.len() <= slot {
            self.by_slot.resize_with(slot + 1, || None);
        }
        if let Some(place) = self.by_slot.get_mut(slot) {
            *place = Some(file);
        }
    }

    pub(super) fn free(&mut self, slot: u16) {
        if let Some(place) = self.by_slot.get_mut(usize::from(slot)) {
            *place = None;
        }
    }

    pub(super) fn remove(&mut self, number: u64) -> Option<u16> {
        let slot = self.slots.remove(&number)?;
        self.ends.remove(&number);
        self.free(slot);
        Some(slot)
    }

    pub(super) fn by_number(&self, number: u64) -> Option<&SegmentFile> {
        self.by_slot.get(usize::from(*self.slots.get(&number)?))?.as_ref()
    }

    pub(super) fn next_number(&self, number: u64) -> Option<u64> {
        self.slots.range(number + 1..).next().map(|(number, _)| *number)
    }
}
