//! What is seen of the schedule from outside.

use std::time::Duration;

use super::Schedule;
use super::lanes::{LaneId, Retry, State};
use crate::domain::backlog::Handle;
use crate::domain::endpoint::EndpointName;
use crate::domain::keys::LaneKey;

/// How an endpoint stands, for people and metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndpointView {
    /// Its name.
    pub name: EndpointName,
    /// Events that wait, in flight included.
    pub events: u64,
    /// Attempts in flight.
    pub in_flight: u32,
    /// Whether it is up.
    pub is_up: bool,
    /// Whether pushing is stopped.
    pub is_paused: bool,
    /// When its oldest event was accepted, Unix seconds.
    pub oldest: Option<u32>,
    /// Microseconds for which the rate forbade an attempt that was due when that began.
    pub rate_limited: u64,
}

impl EndpointView {
    /// The contract's word for it (§6).
    #[must_use]
    pub fn state(&self) -> &'static str {
        match (self.is_paused, self.is_up) {
            (true, _) => "paused",
            (false, true) => "up",
            (false, false) => "down",
        }
    }
}

/// What a lane, or all of an endpoint, waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitsFor {
    /// Its endpoint is paused.
    Resume,
    /// The time for which its receiver asked to be left alone, with 429 or 503.
    Receiver,
    /// The next probe of an endpoint that is down.
    Probe,
    /// The endpoint's rate.
    Rate,
    /// The delay after its own failure.
    Backoff,
}

impl WaitsFor {
    /// As it is shown.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            WaitsFor::Resume => "resume",
            WaitsFor::Receiver => "receiver",
            WaitsFor::Probe => "probe",
            WaitsFor::Rate => "rate",
            WaitsFor::Backoff => "backoff",
        }
    }
}

/// What is waited for, and for how long; `None`: nobody knows.
pub type Waits = (WaitsFor, Option<Duration>);

/// How a lane stands, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneView {
    /// Its place in the table.
    pub id: LaneId,
    /// Its key.
    pub key: LaneKey,
    /// Its endpoint.
    pub endpoint: EndpointName,
    /// Its first event.
    pub head: Handle,
    /// Events that wait, in flight included.
    pub events: u32,
    /// Whether a push is in flight.
    pub in_flight: bool,
    /// Whether it waits for what its `retry` says.
    pub is_waiting: bool,
    /// What is known of the push at its head, when that has failed.
    pub retry: Option<Retry>,
}

impl Schedule {
    /// The lanes in which something waits, from that place of the table on.
    pub fn lanes_from(&self, first: LaneId) -> impl Iterator<Item = LaneView> {
        self.lanes.from(first).filter(|(_, lane)| lane.len > 0).filter_map(|(id, lane)| {
            Some(LaneView {
                id,
                key: lane.key,
                endpoint: self.endpoints.get(lane.endpoint as usize)?.name,
                head: lane.head,
                events: lane.len,
                in_flight: lane.state == State::Flying,
                is_waiting: lane.state == State::Waiting,
                retry: self.lanes.retry(id).copied(),
            })
        })
    }

    /// What all lanes of an endpoint wait for, if anything.
    #[must_use]
    pub fn endpoint_waits(&self, name: EndpointName, now: u64) -> Option<Waits> {
        let endpoint = self.endpoints.get(*self.by_name.get(&name)? as usize)?;
        if endpoint.pauses.is_paused() {
            return Some((WaitsFor::Resume, None));
        }
        let (what, until) = endpoint.opens();
        let left = until.checked_sub(now).filter(|left| *left > 0)?;
        Some((what, Some(Duration::from_micros(left))))
    }

    /// What a lane waits for, if anything.
    #[must_use]
    pub fn lane_waits(&self, lane: &LaneView, now: u64) -> Option<Waits> {
        let due = lane.retry.filter(|_| lane.is_waiting).and_then(|retry| retry.due.checked_sub(now));
        let own = due.map(|left| (WaitsFor::Backoff, Some(Duration::from_micros(left))));
        let endpoints = self.endpoint_waits(lane.endpoint, now).filter(|_| !lane.in_flight);
        // Nobody knows for how long is longest.
        [own, endpoints].into_iter().flatten().max_by_key(|(_, left)| left.unwrap_or(Duration::MAX))
    }

    /// Every endpoint that ever was.
    pub fn endpoints(&self, now: u64) -> impl Iterator<Item = EndpointView> {
        self.endpoints.iter().map(move |endpoint| EndpointView {
            name: endpoint.name,
            events: endpoint.events,
            in_flight: endpoint.in_flight,
            is_up: endpoint.down.is_none(),
            is_paused: endpoint.pauses.is_paused(),
            oldest: endpoint.ages.oldest(),
            rate_limited: endpoint.rate_limited(now),
        })
    }

    /// The lane of that key, while something waits in it.
    #[must_use]
    pub fn lane_id(&self, key: LaneKey) -> Option<LaneId> {
        self.lanes.find(key)
    }

    /// The key of a lane.
    #[must_use]
    pub fn lane_key(&self, id: LaneId) -> Option<LaneKey> {
        self.lanes.get(id).map(|lane| lane.key)
    }

    /// The endpoint of a lane.
    #[must_use]
    pub fn endpoint_of(&self, id: LaneId) -> Option<EndpointName> {
        let lane = self.lanes.get(id)?;
        self.endpoints.get(lane.endpoint as usize).map(|endpoint| endpoint.name)
    }

    /// Whether the attempt in flight in a lane goes to a receiver that is no longer the endpoint's.
    #[must_use]
    pub fn is_outdated(&self, id: LaneId) -> bool {
        self.flights.get(&id).is_some_and(|flight| flight.is_outdated)
    }

    /// Events that wait in a lane.
    #[must_use]
    pub fn waiting(&self, key: LaneKey) -> u32 {
        self.lanes.find(key).and_then(|id| self.lanes.get(id)).map_or(0, |lane| lane.len)
    }

    /// The events that wait in a lane, in order.
    #[must_use]
    pub fn events_of(&self, key: LaneKey) -> Vec<Handle> {
        let lane = self.lanes.find(key).and_then(|id| self.lanes.get(id));
        lane.map_or_else(Vec::new, |lane| self.chain(lane.head, lane.len))
    }

    /// Attempts in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.flights.len()
    }

    /// Events that wait, in flight included.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.events
    }

    /// Lanes in which something waits.
    #[must_use]
    pub fn lanes(&self) -> usize {
        self.lanes.len()
    }
}
