//! The events of a lane, chained through the backlog.

use std::collections::HashMap;

use super::Schedule;
use super::lanes::{LaneId, State};
use crate::domain::backlog::Handle;
use crate::domain::keys::LaneKey;

/// The events that were withdrawn from a lane.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Withdrawn {
    /// All that is to be settled, in flight or not.
    pub events: Vec<Handle>,
    /// How many of them are in flight: what becomes of them is said by the report.
    pub in_flight: u32,
    /// Whether the lane had failed: what was recorded of that is over.
    pub had_retry: bool,
}

impl Schedule {
    /// Withdraws all that waits in a lane, except what is being given up just now. What is in flight is settled too, so
    /// that a failure is not repeated.
    pub fn withdraw(&mut self, key: LaneKey) -> Withdrawn {
        let Some(lane_id) = self.lanes.find(key) else { return Withdrawn::default() };
        let Some(lane) = self.lanes.get(lane_id).copied() else { return Withdrawn::default() };
        let mut withdrawn = Withdrawn { had_retry: self.lanes.retry(lane_id).is_some(), ..Withdrawn::default() };
        let mut keep = 0;
        if let Some(burying) = self.burying.get(&lane_id) {
            keep = *burying;
        } else if let Some(flight) = self.flights.get_mut(&lane_id) {
            keep = flight.offered;
            if !flight.is_withdrawn {
                flight.is_withdrawn = true;
                withdrawn.in_flight = flight.offered;
                withdrawn.events = self.chain(lane.head, keep);
            }
        }
        withdrawn.events.extend(self.cut(lane_id, keep));
        self.uncount(lane.endpoint, &withdrawn.events);
        for event in &withdrawn.events {
            self.backlog.settle(*event);
        }
        if keep == 0 {
            self.lanes.set_retry(lane_id, None);
            if lane.state == State::Waiting {
                self.lanes.release(lane_id);
            }
        }
        withdrawn
    }

    /// Puts the events of a segment that was rewritten into another slot: (sequence number, offset, record length, lane,
    /// second of acceptance), in order. Those that have ended meanwhile are settled there.
    pub fn move_events(
        &mut self,
        old_slot: u16,
        new_slot: u16,
        segment: u64,
        events: &[(u64, u32, u32, LaneKey, u32)],
    ) {
        self.backlog.open(new_slot, segment);
        self.backlog.make_sparse(new_slot);
        let mut moved: HashMap<Handle, Handle> = HashMap::new();
        let mut lanes: Vec<LaneKey> = Vec::new();
        for (seq, offset, len, lane, second) in events {
            let new = self.backlog.append(new_slot, Some(*seq), *offset, *second, *len);
            let (Some(new), Some(old)) = (new, self.backlog.find(old_slot, *seq)) else { continue };
            if self.backlog.is_settled(old) {
                self.backlog.settle(new);
            }
            // Also of settled ones: a flight that was withdrawn still holds its events.
            moved.insert(old, new);
            lanes.push(*lane);
        }
        lanes.sort_unstable();
        lanes.dedup();
        let at = |moved: &HashMap<Handle, Handle>, event: Handle| moved.get(&event).copied().unwrap_or(event);
        for lane in lanes {
            let Some(lane_id) = self.lanes.find(lane) else { continue };
            let Some(lane) = self.lanes.get(lane_id).copied() else { continue };
            let chain: Vec<Handle> =
                self.chain(lane.head, lane.len).into_iter().map(|event| at(&moved, event)).collect();
            for pair in chain.windows(2) {
                if let [event, next] = pair {
                    self.backlog.link(*event, *next);
                }
            }
            if let (Some(lane), Some(head), Some(tail)) = (self.lanes.get_mut(lane_id), chain.first(), chain.last()) {
                lane.head = *head;
                lane.tail = *tail;
            }
        }
        self.backlog.seal(new_slot);
        self.backlog.close(old_slot);
    }

    /// The first `most` events from `head`.
    pub(super) fn chain(&self, head: Handle, most: u32) -> Vec<Handle> {
        let mut events = Vec::new();
        let mut at = head;
        while events.len() < most as usize && at != Handle::NONE {
            events.push(at);
            at = self.backlog.next(at);
        }
        events
    }

    /// Takes the first events off a lane and out of the counts.
    pub(super) fn pop(&mut self, lane_id: LaneId, count: u32) -> Vec<Handle> {
        let events = self.unlink(lane_id, count);
        if let Some(endpoint) = self.lanes.get(lane_id).map(|lane| lane.endpoint) {
            self.uncount(endpoint, &events);
        }
        events
    }

    /// Takes the first events off a lane.
    pub(super) fn unlink(&mut self, lane_id: LaneId, count: u32) -> Vec<Handle> {
        let Some(lane) = self.lanes.get(lane_id).copied() else { return Vec::new() };
        let events = self.chain(lane.head, count.min(lane.len));
        let left = lane.len - events.len() as u32;
        let head = match events.last() {
            Some(last) if left > 0 => self.backlog.next(*last),
            Some(_) => Handle::NONE,
            None => lane.head,
        };
        if let Some(lane) = self.lanes.get_mut(lane_id) {
            lane.head = head;
            lane.len = left;
        }
        events
    }

    /// Takes all but the first `keep` events off a lane.
    pub(super) fn cut(&mut self, lane_id: LaneId, keep: u32) -> Vec<Handle> {
        let Some(lane) = self.lanes.get(lane_id).copied() else { return Vec::new() };
        let mut kept = self.chain(lane.head, lane.len);
        let rest = kept.split_off((keep as usize).min(kept.len()));
        let tail = kept.last().copied();
        if let Some(tail) = tail {
            self.backlog.link(tail, Handle::NONE);
        }
        if let Some(lane) = self.lanes.get_mut(lane_id) {
            lane.len = kept.len() as u32;
            lane.tail = tail.unwrap_or(Handle::NONE);
            lane.head = if tail.is_some() { lane.head } else { Handle::NONE };
        }
        rest
    }

    pub(super) fn uncount(&mut self, endpoint: u32, events: &[Handle]) {
        self.events = self.events.saturating_sub(events.len() as u64);
        for event in events {
            let second = self.backlog.second(*event);
            if let Some(endpoint) = self.endpoint_mut(endpoint) {
                endpoint.events = endpoint.events.saturating_sub(1);
                endpoint.ages.remove(second);
            }
        }
    }
}
