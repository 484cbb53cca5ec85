//! What is due: which attempt begins next, and when to look again.

use std::cmp::Reverse;
use std::time::Duration;

use super::Schedule;
use super::lanes::{LaneId, State};
use crate::domain::backlog::Handle;
use crate::domain::endpoint::EndpointName;
use crate::domain::verdict::DeathReason;

/// An attempt to be started.
#[derive(Debug, PartialEq, Eq)]
pub struct Start {
    /// The lane, to report on.
    pub lane: LaneId,
    /// Its endpoint.
    pub endpoint: EndpointName,
    /// The lane's first events, in order: the push takes all of them, or as many as fit where not `is_fixed`.
    pub events: Vec<Handle>,
    /// Whether the push has been tried before.
    pub is_fixed: bool,
    /// Number of this attempt at the push, from 1.
    pub attempt: u32,
}

#[derive(Debug)]
pub(super) struct Flight {
    /// Events offered to the push.
    pub(super) offered: u32,
    /// How many of the lane's first events are to be given up afterwards.
    pub(super) bury: u32,
    pub(super) is_probe: bool,
    /// Its endpoint is another receiver since: what comes of it says nothing of that one, and takes none of its room.
    pub(super) is_outdated: bool,
    /// The events' sequence numbers, when the customer was toggled off or forgotten meanwhile: they are in no lane any
    /// more.
    pub(super) withdrawn: Option<Vec<u64>>,
    pub(super) mark: u64,
}

impl Schedule {
    /// The next attempt that may start now.
    pub fn next(&mut self, now: u64) -> Option<Start> {
        self.advance_clock(now);
        while let Some(&(due, id)) = self.wakes.first() {
            if due > now {
                break;
            }
            self.wakes.pop_first();
            if let Some(endpoint) = self.endpoint_mut(id) {
                endpoint.wake = 0;
            }
            self.touch(id, now);
        }
        while self.flights.len() < self.rules.max_in_flight as usize {
            let id = self.runnable.pop_front()?;
            if let Some(start) = self.try_start(id, now) {
                self.runnable.push_back(id);
                return Some(start);
            }
            if let Some(endpoint) = self.endpoint_mut(id) {
                endpoint.is_runnable = false;
            }
            self.set_wake(id, now);
        }
        None
    }

    /// When `next` is to be asked again if nothing else happens; `None`: not before something happens.
    #[must_use]
    pub fn wake_at(&self) -> Option<u64> {
        self.wakes.first().map(|(at, _)| *at)
    }

    /// Puts a lane that is in no queue where it belongs: into a queue, to the graves, or out of the table.
    pub(super) fn make_ready(&mut self, lane_id: LaneId, now: u64) {
        let Some(lane) = self.lanes.get(lane_id).copied() else { return };
        if lane.len == 0 {
            return self.lanes.release(lane_id);
        }
        let is_tried = self.lanes.retry(lane_id).is_some();
        let Some(endpoint) = self.endpoint_mut(lane.endpoint) else { return };
        if endpoint.limits.is_none() {
            return self.begin_burying(lane_id, u32::MAX, DeathReason::EndpointRemoved);
        }
        let queue = if is_tried { &mut endpoint.tried } else { &mut endpoint.fresh };
        queue.push_back(lane_id);
        if let Some(lane) = self.lanes.get_mut(lane_id) {
            lane.state = State::Ready;
        }
        self.touch(lane.endpoint, now);
    }

    /// Moves timers' lanes to the ready ones, in the order in which they were due.
    pub(super) fn requeue(&mut self, id: u32, timers: Vec<Reverse<(u64, LaneId)>>) {
        for Reverse((due, lane_id)) in timers.into_iter().rev() {
            self.timer_fired(id, due, lane_id);
        }
    }

    pub(super) fn timer_fired(&mut self, id: u32, due: u64, lane_id: LaneId) {
        let is_current = self.lanes.retry(lane_id).is_some_and(|retry| retry.due == due);
        let Some(lane) = self.lanes.get_mut(lane_id) else { return };
        if lane.state != State::Waiting || !is_current || lane.endpoint != id {
            return;
        }
        lane.state = State::Ready;
        if let Some(endpoint) = self.endpoint_mut(id) {
            endpoint.tried.push_back(lane_id);
        }
    }

    /// Brings an endpoint's queues, its turn and its wake up to date.
    pub(super) fn touch(&mut self, id: u32, now: u64) {
        while let Some(endpoint) = self.endpoint_mut(id) {
            match endpoint.timers.peek() {
                Some(Reverse((due, _))) if *due <= now => {}
                _ => break,
            }
            if let Some(Reverse((due, lane_id))) = endpoint.timers.pop() {
                self.timer_fired(id, due, lane_id);
            }
        }
        let is_crowded = self.is_crowded();
        let Some(endpoint) = self.endpoint_mut(id) else { return };
        let may_start =
            endpoint.has_ready() && endpoint.open_at() <= now && endpoint.in_flight < endpoint.room(now, is_crowded);
        if may_start && !endpoint.is_runnable {
            endpoint.is_runnable = true;
            self.runnable.push_back(id);
        }
        self.set_wake(id, now);
    }

    pub(super) fn set_wake(&mut self, id: u32, now: u64) {
        let Some(endpoint) = self.endpoints.get_mut(id as usize) else { return };
        let timer = endpoint.timers.peek().map(|Reverse((due, _))| *due);
        let opens = Some(endpoint.open_at()).filter(|at| endpoint.has_ready() && *at > now);
        let wake = [timer, opens].into_iter().flatten().min().unwrap_or(0);
        if wake != endpoint.wake {
            self.wakes.remove(&(endpoint.wake, id));
            endpoint.wake = wake;
            if wake != 0 {
                self.wakes.insert((wake, id));
            }
        }
    }

    pub(super) fn is_crowded(&self) -> bool {
        self.flights.len() > self.rules.max_in_flight as usize / 2
    }

    pub(super) fn try_start(&mut self, id: u32, now: u64) -> Option<Start> {
        let is_crowded = self.is_crowded();
        let clock = self.clock.clone();
        let (lane_id, lane) = loop {
            let endpoint = self.endpoints.get_mut(id as usize)?;
            if endpoint.open_at() > now || endpoint.in_flight >= endpoint.room(now, is_crowded) {
                return None;
            }
            let lane_id = endpoint.take_ready()?;
            let Some(lane) = self.lanes.get(lane_id).copied() else { continue };
            match (lane.state, lane.len) {
                _ if lane.endpoint != id => {}
                (State::Ready, 0) => self.lanes.release(lane_id),
                (State::Ready, _) => break (lane_id, lane),
                // Stale entries: the lane has moved on.
                (State::Free | State::Waiting | State::Flying | State::Burying, _) => {}
            }
        };
        let is_tried = self.lanes.retry(lane_id).is_some();
        let endpoint = self.endpoint_mut(id)?;
        if !endpoint.take_permit(&clock, now) {
            let queue = if is_tried { &mut endpoint.tried } else { &mut endpoint.fresh };
            queue.push_front(lane_id);
            return None;
        }
        endpoint.in_flight += 1;
        let is_probe = endpoint.down.is_some();
        if let Some(down) = endpoint.down.as_mut() {
            down.is_probing = true;
        }
        let (name, mark) = (endpoint.name, endpoint.successes);
        let retry = self.lanes.retry(lane_id).copied().unwrap_or_default();
        let most = match (retry.fixed, retry.singles) {
            (0, 0) => self.rules.events_per_push,
            (0, _) => 1,
            (fixed, _) => fixed,
        };
        let events = self.chain(lane.head, most.min(lane.len));
        if let Some(lane) = self.lanes.get_mut(lane_id) {
            lane.state = State::Flying;
        }
        let flight =
            Flight { offered: events.len() as u32, bury: 0, is_probe, is_outdated: false, withdrawn: None, mark };
        self.flights.insert(lane_id, flight);
        Some(Start { lane: lane_id, endpoint: name, events, is_fixed: retry.fixed > 0, attempt: retry.tries + 1 })
    }

    pub(super) fn advance_clock(&mut self, now: u64) {
        if let Some(passed) = now.checked_sub(self.clock_at).filter(|passed| *passed > 0) {
            self.clock.advance(Duration::from_micros(passed));
            self.clock_at = now;
        }
    }
}
