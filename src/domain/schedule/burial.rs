//! Events that are given up, a few at a time.

use std::collections::VecDeque;

use super::Schedule;
use super::lanes::{Lane, LaneId, Retry, State};
use super::reports::after_singles;
use crate::domain::backlog::Handle;
use crate::domain::endpoint::EndpointName;
use crate::domain::verdict::DeathReason;

/// Most events given up in one step, so that burying a large backlog never holds up the rest.
const BURY_EVENTS_MAX: u32 = 64;

/// Events to be made dead letters.
#[derive(Debug, PartialEq, Eq)]
pub struct Burial {
    /// The lane, to say `buried` of.
    pub lane: LaneId,
    /// Its endpoint.
    pub endpoint: EndpointName,
    /// The lane's first events.
    pub events: Vec<Handle>,
    /// Why.
    pub reason: DeathReason,
    /// Attempts that were made.
    pub attempts: u32,
}

/// A lane whose first events are to be given up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Burying {
    /// How many.
    pub left: u32,
    /// How many of those are in a [`Burial`] that was handed out.
    pub handed: u32,
    pub reason: DeathReason,
    /// How many are to be given up afterwards, as an operator said.
    pub then: u32,
}

impl Schedule {
    /// Gives up what waits in a lane, or only its first event. What is in flight is given up if the attempt fails.
    /// Answers how many events that is at most.
    pub fn bury(&mut self, lane_id: LaneId, first_only: bool) -> u32 {
        let Some(lane) = self.lanes.get(lane_id).copied() else { return 0 };
        let count = if first_only { lane.len.min(1) } else { lane.len };
        match lane.state {
            // Emptied by a withdrawal: it leaves its queue when its turn comes.
            State::Ready | State::Waiting if count == 0 => 0,
            State::Free => 0,
            State::Burying => match self.burying.get_mut(&lane_id) {
                Some(burying) => {
                    burying.then = burying.then.max(count.saturating_sub(burying.left));
                    count
                }
                None => 0,
            },
            State::Ready | State::Waiting => {
                self.begin_burying(lane_id, count, DeathReason::Buried);
                count
            }
            State::Flying => match self.flights.get_mut(&lane_id) {
                Some(flight) => {
                    flight.bury = flight.bury.max(count);
                    count
                }
                None => 0,
            },
        }
    }

    /// Whether anything of a lane is being given up, or will be after its attempt.
    #[must_use]
    pub fn is_burying(&self, lane: LaneId) -> bool {
        self.burying.contains_key(&lane) || self.flights.get(&lane).is_some_and(|flight| flight.bury > 0)
    }

    /// The next events to be given up. They stay in their lane until [`Schedule::buried`].
    pub fn next_bury(&mut self) -> Option<Burial> {
        loop {
            let id = self.to_bury.pop_front()?;
            let Some(endpoint) = self.endpoint_mut(id) else { continue };
            let next = endpoint.to_bury.pop_front();
            if !endpoint.to_bury.is_empty() {
                self.to_bury.push_back(id);
            }
            // An entry may be stale: its events were withdrawn.
            let Some(lane_id) = next else { continue };
            let Some(burying) = self.burying.get(&lane_id).copied().filter(|burying| burying.handed == 0) else {
                continue;
            };
            let Some(lane) = self.lanes.get(lane_id).copied() else { continue };
            let Some(endpoint) = self.endpoints.get(lane.endpoint as usize).map(|endpoint| endpoint.name) else {
                continue;
            };
            let events = self.chain(lane.head, burying.left.min(BURY_EVENTS_MAX));
            self.burying.insert(lane_id, Burying { handed: events.len() as u32, ..burying });
            let attempts = self.lanes.retry(lane_id).map_or(0, Retry::made);
            return Some(Burial { lane: lane_id, endpoint, events, reason: burying.reason, attempts });
        }
    }

    /// The events of a [`Burial`] are dead letters now.
    pub fn buried(&mut self, burial: &Burial, now: u64) {
        let count = burial.events.len() as u32;
        for event in self.pop(burial.lane, count) {
            self.backlog.settle(event);
        }
        let (left, then) = self
            .burying
            .remove(&burial.lane)
            .map_or((0, 0), |burying| (burying.left.saturating_sub(count), burying.then));
        if left > 0 {
            return self.queue_burying(burial.lane, left, burial.reason, then);
        }
        if then > 0 {
            return self.begin_burying(burial.lane, then, DeathReason::Buried);
        }
        let after = self.lanes.retry(burial.lane).and_then(|retry| after_singles(retry, count, 0));
        self.lanes.set_retry(burial.lane, after);
        let endpoint = self.lanes.get(burial.lane).map(|lane| lane.endpoint);
        self.make_ready(burial.lane, now);
        if let Some(endpoint) = endpoint {
            self.touch(endpoint, now);
        }
    }

    /// A burial that could not be done now: to be asked for again.
    pub fn not_buried(&mut self, burial: &Burial) {
        if let Some(burying) = self.burying.remove(&burial.lane) {
            self.queue_burying(burial.lane, burying.left, burial.reason, burying.then);
        }
    }

    fn queue_burying(&mut self, lane_id: LaneId, left: u32, reason: DeathReason, then: u32) {
        let Some(id) = self.lanes.get(lane_id).map(|lane| lane.endpoint) else { return };
        self.burying.insert(lane_id, Burying { left, handed: 0, reason, then });
        let Some(endpoint) = self.endpoint_mut(id) else { return };
        let is_first = endpoint.to_bury.is_empty();
        endpoint.to_bury.push_back(lane_id);
        if is_first {
            self.to_bury.push_back(id);
        }
    }

    pub(super) fn begin_burying(&mut self, lane_id: LaneId, count: u32, reason: DeathReason) {
        if let Some(lane) = self.lanes.get_mut(lane_id) {
            lane.state = State::Burying;
            let left = count.min(lane.len);
            self.queue_burying(lane_id, left, reason, 0);
        }
    }

    /// After events have left a lane that is being given up.
    pub(super) fn bury_at_most_all(&mut self, lane_id: LaneId, now: u64) {
        let Some(len) = self.lanes.get(lane_id).map(|lane| lane.len) else { return };
        if len == 0 {
            self.burying.remove(&lane_id);
            self.make_ready(lane_id, now);
        } else if let Some(burying) = self.burying.get_mut(&lane_id) {
            burying.left = burying.left.min(len);
        }
    }

    /// How many of a lane's first `most` events are too old.
    pub(super) fn expired(&self, endpoint: u32, head: Handle, most: u32, second: u64) -> u32 {
        let Some(endpoint) = self.endpoints.get(endpoint as usize) else { return 0 };
        let age = |event: &Handle| endpoint.pauses.age(u64::from(self.backlog.second(*event)), second);
        // Both are whole seconds, cut off: never before its time.
        let too_old = |event: &Handle| age(event) > self.rules.max_age_s;
        self.walk(head, most).take_while(too_old).count() as u32
    }

    /// After a failed probe: gives up what is too old in the lanes that had no attempt of their own.
    pub(super) fn expire_ready(&mut self, id: u32, second: u64) {
        let max_age_s = self.rules.max_age_s;
        let Some(endpoint) = self.endpoint_mut(id) else { return };
        if endpoint.ages.oldest().is_none_or(|oldest| endpoint.pauses.age(u64::from(oldest), second) <= max_age_s) {
            return;
        }
        for is_tried in [false, true] {
            let Some(endpoint) = self.endpoint_mut(id) else { return };
            let queue = std::mem::take(if is_tried { &mut endpoint.tried } else { &mut endpoint.fresh });
            let mut kept = VecDeque::with_capacity(queue.len());
            for lane_id in queue {
                let is_here = |lane: &&Lane| lane.endpoint == id && lane.state == State::Ready;
                let Some(lane) = self.lanes.get(lane_id).filter(is_here) else { continue };
                let expired = self.expired(id, lane.head, lane.len, second);
                if expired > 0 {
                    self.begin_burying(lane_id, expired, DeathReason::Expired);
                } else {
                    kept.push_back(lane_id);
                }
            }
            let Some(endpoint) = self.endpoint_mut(id) else { return };
            *(if is_tried { &mut endpoint.tried } else { &mut endpoint.fresh }) = kept;
        }
    }
}
