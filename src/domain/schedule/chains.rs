//! The events of a lane, chained through the backlog.

use std::collections::HashMap;

use super::Schedule;
use super::lanes::{LaneId, State};
use crate::domain::backlog::Handle;
use crate::domain::keys::LaneKey;
use crate::domain::verdict::DeathReason;

/// The events that were withdrawn from a lane.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Withdrawn {
    /// All that is to be settled, in flight or not.
    pub events: Vec<Handle>,
    /// How many of them are in flight: what becomes of them is said by the report.
    pub in_flight: u32,
    /// Whether the lane had failed: what was recorded of that is over.
    pub had_retry: bool,
    /// When some are being made dead letters just now: the sequence number of the last of them. To be asked for again,
    /// up to that, when it has ended.
    pub burying_until: Option<u64>,
}

impl Schedule {
    /// Withdraws all that waits in a lane, also what is to be given up, but for a [`Burial`](super::Burial) that was handed
    /// out. What is in flight is settled too, so that a failure is not repeated; it leaves the lane at once, because its
    /// segment may be gone before the report comes.
    /// Events with a sequence number above `until` stay.
    pub fn withdraw(&mut self, key: LaneKey, until: u64, now: u64) -> Withdrawn {
        let Some(lane_id) = self.lanes.find(key) else { return Withdrawn::default() };
        let Some(lane) = self.lanes.get(lane_id).copied() else { return Withdrawn::default() };
        let later: Vec<Handle> =
            self.walk(lane.head, lane.len).filter(|event| self.backlog.seq(*event) > until).collect();
        if later.len() == lane.len as usize {
            return Withdrawn::default();
        }
        let mut withdrawn = Withdrawn { had_retry: self.lanes.retry(lane_id).is_some(), ..Withdrawn::default() };
        let (mut keep, mut then) = (0, 0);
        if let Some(burying) = self.burying.get_mut(&lane_id) {
            keep = burying.handed;
            // Of those that stay, as many as were to be given up.
            then = (burying.left + burying.then).saturating_sub(lane.len - later.len() as u32);
            burying.left = keep;
            burying.then = then;
            if keep == 0 {
                self.burying.remove(&lane_id);
            }
            withdrawn.burying_until = self.chain(lane.head, keep).last().map(|event| self.backlog.seq(*event));
        } else if self.flights.get(&lane_id).is_some_and(|flight| flight.withdrawn.is_none()) {
            let offered = self.flights.get(&lane_id).map_or(0, |flight| flight.offered);
            let seqs = self.walk(lane.head, offered).map(|event| self.backlog.seq(event)).collect();
            withdrawn.in_flight = offered;
            if let Some(flight) = self.flights.get_mut(&lane_id) {
                flight.withdrawn = Some(seqs);
            }
        }
        if let Some(flight) = self.flights.get_mut(&lane_id) {
            flight.bury = flight.bury.saturating_sub(lane.len - later.len() as u32);
        }
        withdrawn.events = self.cut(lane_id, keep, &later);
        self.uncount(lane.endpoint, &withdrawn.events);
        for event in &withdrawn.events {
            self.backlog.settle(*event);
        }
        if keep == 0 {
            self.lanes.set_retry(lane_id, None);
            if then > 0 {
                self.begin_burying(lane_id, then, DeathReason::Buried);
            } else if matches!(lane.state, State::Waiting | State::Burying) {
                self.make_ready(lane_id, now);
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
            moved.insert(old, new);
            lanes.push(*lane);
        }
        lanes.sort_unstable();
        lanes.dedup();
        let at = |moved: &HashMap<Handle, Handle>, event: Handle| moved.get(&event).copied().unwrap_or(event);
        for lane in lanes {
            let Some(lane_id) = self.lanes.find(lane) else { continue };
            let Some(lane) = self.lanes.get(lane_id).copied() else { continue };
            let chain: Vec<Handle> = self.walk(lane.head, lane.len).map(|event| at(&moved, event)).collect();
            self.relink(lane_id, &chain);
        }
        self.backlog.seal(new_slot);
        self.backlog.close(old_slot);
    }

    /// The first `most` events from `head`.
    pub(super) fn chain(&self, head: Handle, most: u32) -> Vec<Handle> {
        self.walk(head, most).collect()
    }

    /// The first `most` events from `head`, one after the other.
    pub(super) fn walk(&self, head: Handle, most: u32) -> impl Iterator<Item = Handle> {
        let events = std::iter::successors(Some(head), |event| Some(self.backlog.next(*event)));
        events.take_while(|event| *event != Handle::NONE).take(most as usize)
    }

    /// Takes those events off a lane that have ended, wherever they are.
    pub(super) fn drop_settled(&mut self, lane_id: LaneId) {
        let Some(lane) = self.lanes.get(lane_id).copied() else { return };
        let chain = self.walk(lane.head, lane.len);
        let (ended, left): (Vec<Handle>, Vec<Handle>) = chain.partition(|event| self.backlog.is_settled(*event));
        if ended.is_empty() {
            return;
        }
        self.uncount(lane.endpoint, &ended);
        self.relink(lane_id, &left);
    }

    /// Makes these a lane's events.
    fn relink(&mut self, lane_id: LaneId, events: &[Handle]) {
        for pair in events.windows(2) {
            if let [event, next] = pair {
                self.backlog.link(*event, *next);
            }
        }
        let (head, tail) = (events.first().copied(), events.last().copied());
        if let Some(tail) = tail {
            self.backlog.link(tail, Handle::NONE);
        }
        if let Some(lane) = self.lanes.get_mut(lane_id) {
            lane.len = events.len() as u32;
            lane.head = head.unwrap_or(Handle::NONE);
            lane.tail = tail.unwrap_or(Handle::NONE);
        }
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

    /// Takes all but the first `keep` events, and the last ones, `later`, off a lane.
    fn cut(&mut self, lane_id: LaneId, keep: u32, later: &[Handle]) -> Vec<Handle> {
        let Some(lane) = self.lanes.get(lane_id).copied() else { return Vec::new() };
        let mut kept = self.chain(lane.head, lane.len - later.len() as u32);
        let rest = kept.split_off((keep as usize).min(kept.len()));
        kept.extend_from_slice(later);
        self.relink(lane_id, &kept);
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
