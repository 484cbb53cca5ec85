//! Which push goes when: lanes in order, limits, backoff, breaker. A machine without clock, chance or I/O.
//!
//! The driver feeds it (`appended`, `reported`, `withdraw`, `buried`), asks (`next`, `next_bury`, `wake_at`) and does
//! what it says. Time is microseconds of any clock that never goes back.
//!
//! Invariants, held by the simulation in `sim.rs`: each event ends exactly once; none starts before it is due; events of
//! a lane go in order, one push in flight; rate, burst and concurrency hold; an endpoint in trouble delays no other;
//! nothing is stuck for ever.

mod burial;
mod chains;
#[cfg(test)]
mod days;
mod endpoint;
mod lanes;
mod reports;
#[cfg(test)]
mod sim;
#[cfg(test)]
mod sim_checks;
mod starts;
#[cfg(test)]
mod tests;
mod views;

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

pub use self::burial::Burial;
use self::burial::Burying;
pub use self::chains::Withdrawn;
pub use self::endpoint::Pauses;
use self::endpoint::{Endpoint, ToldClock};
pub use self::lanes::{LaneId, Retry};
use self::lanes::{Lanes, State};
pub use self::reports::{Breaker, Deferred, Moment, ToRecord};
use self::starts::Flight;
pub use self::starts::Start;
pub use self::views::{EndpointView, LaneView, Waits, WaitsFor};
use super::backlog::{Backlog, Handle};
use super::endpoint::{EndpointName, Limits};
use super::keys::LaneKey;
use super::retry::Delays;
use super::verdict::{DeathReason, RETRY_AFTER_MAX};

/// The rules of `[push]`, `[backoff]` and `[breaker]`.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Waits after failures.
    pub delays: Delays,
    /// Seconds from acceptance after which an event is given up (`push.max_age`).
    pub max_age_s: u64,
    /// Failed attempts after which it is given up; 0: no limit.
    pub max_attempts: u32,
    /// Counted refusals after which it is given up.
    pub max_refusals: u32,
    /// Failed attempts in a row that make an endpoint down.
    pub breaker_failures: u32,
    /// Attempts in flight over all endpoints.
    pub max_in_flight: u32,
    /// Most events offered to one push: each has at least one message.
    pub events_per_push: u32,
}

/// The schedule.
#[derive(Debug)]
pub struct Schedule {
    rules: Arc<Rules>,
    /// What waits. Public to those who fill it from the store.
    pub backlog: Backlog,
    lanes: Lanes,
    endpoints: Vec<Endpoint>,
    by_name: HashMap<EndpointName, u32>,
    runnable: VecDeque<u32>,
    wakes: BTreeSet<(u64, u32)>,
    flights: HashMap<LaneId, Flight>,
    /// Endpoints with lanes to be given up: they take turns.
    to_bury: VecDeque<u32>,
    burying: HashMap<LaneId, Burying>,
    clock: ToldClock,
    clock_at: u64,
    events: u64,
}

impl Schedule {
    /// An empty schedule.
    #[must_use]
    pub fn new(rules: Rules) -> Schedule {
        Schedule {
            rules: Arc::new(rules),
            backlog: Backlog::default(),
            lanes: Lanes::default(),
            endpoints: Vec::new(),
            by_name: HashMap::new(),
            runnable: VecDeque::new(),
            wakes: BTreeSet::new(),
            flights: HashMap::new(),
            to_bury: VecDeque::new(),
            burying: HashMap::new(),
            clock: ToldClock::default(),
            clock_at: 0,
            events: 0,
        }
    }

    /// Configures an endpoint, or changes its limits.
    pub fn put_endpoint(&mut self, name: EndpointName, limits: Limits, now: u64) {
        self.advance_clock(now);
        let id = self.endpoint_id(name);
        let clock = self.clock.clone();
        if let Some(endpoint) = self.endpoint_mut(id) {
            endpoint.set_limits(limits, &clock, now);
        }
        self.touch(id, now);
    }

    /// Goes by other rules from now on.
    pub fn set_rules(&mut self, rules: Rules) {
        self.rules = Arc::new(rules);
    }

    /// Pauses an endpoint or lets it go on.
    pub fn set_pauses(&mut self, name: EndpointName, pauses: Pauses, now: u64) {
        let id = self.endpoint_id(name);
        if let Some(endpoint) = self.endpoint_mut(id) {
            endpoint.pauses = pauses;
        }
        self.touch(id, now);
    }

    /// Leaves an endpoint alone for so long at least, as it asked before a restart, or in answer to an operator's test.
    /// Says whether that is longer than it was to be already.
    pub fn hold(&mut self, name: EndpointName, wait: Duration, now: u64) -> bool {
        let id = self.endpoint_id(name);
        let until = now.saturating_add(micros(wait.min(RETRY_AFTER_MAX)));
        let is_longer = self.endpoint_mut(id).is_some_and(|endpoint| {
            let is_longer = until > endpoint.held_until;
            endpoint.held_until = endpoint.held_until.max(until);
            is_longer
        });
        self.touch(id, now);
        is_longer
    }

    /// Makes all lanes of an endpoint due, and its next probe if it is down; what a 429 or 503 asked for is forgotten.
    pub fn retry_now(&mut self, name: EndpointName, now: u64) {
        let Some(id) = self.by_name.get(&name).copied() else { return };
        let Some(endpoint) = self.endpoint_mut(id) else { return };
        endpoint.held_until = 0;
        endpoint.throttles = 0;
        if let Some(down) = endpoint.down.as_mut() {
            down.due = now;
        }
        let timers = std::mem::take(&mut endpoint.timers);
        self.requeue(id, timers.into_sorted_vec());
        self.touch(id, now);
    }

    /// Makes all lanes of an endpoint due: it is another receiver now, to which nothing applies that was seen of the old
    /// one, or that comes of the attempts in flight there.
    pub fn forget_failures(&mut self, name: EndpointName, now: u64) {
        let Some(id) = self.by_name.get(&name).copied() else { return };
        self.forget_receiver(id);
        self.retry_now(name, now);
    }

    fn forget_receiver(&mut self, id: u32) {
        for (lane, flight) in &mut self.flights {
            flight.is_outdated |= self.lanes.get(*lane).is_some_and(|lane| lane.endpoint == id);
        }
        if let Some(endpoint) = self.endpoint_mut(id) {
            endpoint.forget_failures();
        }
    }

    /// Takes a permit of an endpoint's rate for an attempt beside the lanes.
    ///
    /// # Errors
    /// How long to wait for one.
    pub fn take_permit(&mut self, name: EndpointName, now: u64) -> Result<(), Duration> {
        self.advance_clock(now);
        let clock = self.clock.clone();
        let id = self.endpoint_id(name);
        let Some(endpoint) = self.endpoint_mut(id) else { return Ok(()) };
        if endpoint.take_permit(&clock, now) {
            return Ok(());
        }
        Err(Duration::from_micros(endpoint.rate_limited_until.saturating_sub(now)))
    }

    /// Takes an endpoint away: what waits for it is given up as `endpoint_removed`.
    pub fn remove_endpoint(&mut self, name: EndpointName) {
        let id = self.endpoint_id(name);
        self.forget_receiver(id);
        let Some(endpoint) = self.endpoint_mut(id) else { return };
        endpoint.limits = None;
        endpoint.held_until = 0;
        let mut waiting: Vec<LaneId> = endpoint.fresh.drain(..).chain(endpoint.tried.drain(..)).collect();
        waiting.extend(std::mem::take(&mut endpoint.timers).into_iter().map(|Reverse((_, lane))| lane));
        for lane in waiting {
            let Some(found) = self.lanes.get(lane).filter(|found| found.endpoint == id) else { continue };
            match (found.state, found.len) {
                (State::Ready, 0) => self.lanes.release(lane),
                (State::Ready | State::Waiting, _) => self.begin_burying(lane, u32::MAX, DeathReason::EndpointRemoved),
                (State::Free | State::Flying | State::Burying, _) => {}
            }
        }
    }

    /// Adds an event, which is in the backlog and durable, to the end of its lane.
    pub fn appended(&mut self, event: Handle, key: LaneKey, endpoint: EndpointName, now: u64) {
        let id = self.endpoint_id(endpoint);
        let second = self.backlog.second(event);
        let lane_id = self.lanes.find(key).unwrap_or_else(|| self.lanes.create(key, id));
        let Some(lane) = self.lanes.get_mut(lane_id) else { return };
        let tail = std::mem::replace(&mut lane.tail, event);
        if lane.len == 0 {
            lane.head = event;
        } else {
            self.backlog.link(tail, event);
        }
        lane.len += 1;
        let is_idle = lane.state == State::Free;
        self.events += 1;
        let Some(endpoint) = self.endpoint_mut(id) else { return };
        endpoint.events += 1;
        endpoint.ages.add(second);
        if is_idle {
            self.make_ready(lane_id, now);
        }
    }

    /// Looks up the lanes of events that are about to be [`appended`](Schedule::appended), up to about a hundred. Nothing
    /// comes of it but speed: these look-ups wait for memory together, where each `appended` would wait for its own.
    pub fn expect(&self, lanes: impl Iterator<Item = LaneKey>) {
        for lane in lanes {
            std::hint::black_box(self.lanes.find(lane));
        }
    }

    /// At start: events of a lane that had ended before. They are its first ones, unless a crash came between a
    /// withdrawal and the end of what was being given up just then.
    pub fn settled_before(&mut self, key: LaneKey, events: &[Handle], now: u64) {
        for event in events {
            self.backlog.settle(*event);
        }
        let Some(lane_id) = self.lanes.find(key) else { return };
        let Some(lane) = self.lanes.get(lane_id).copied() else { return };
        let ended = self.walk(lane.head, lane.len).take_while(|event| self.backlog.is_settled(*event)).count();
        self.pop(lane_id, ended as u32);
        if ended < events.len() {
            self.drop_settled(lane_id);
        }
        match lane.state {
            State::Waiting => self.make_ready(lane_id, now),
            // Its endpoint is gone. What has ended is not to be given up.
            State::Burying => self.bury_at_most_all(lane_id, now),
            State::Free | State::Ready | State::Flying => {}
        }
    }

    /// Puts back what a lane's head was waiting with before a restart, for no longer than its failures make it: the wall
    /// clock may have been set back. Ignored unless `head` is its head.
    pub fn restore(&mut self, key: LaneKey, head: Handle, retry: Retry, wait: Duration, now: u64) {
        let Some(lane_id) = self.lanes.find(key) else { return };
        let Some(lane) = self.lanes.get_mut(lane_id).filter(|lane| lane.head == head && lane.state == State::Ready)
        else {
            return;
        };
        lane.state = State::Waiting;
        let endpoint = lane.endpoint;
        let due = now.saturating_add(micros(wait.min(self.rules.delays.delay(retry.made(), 1.0))));
        let retry = Retry { fixed: retry.fixed.min(lane.len), due, ..retry };
        self.lanes.set_retry(lane_id, Some(retry));
        if let Some(endpoint) = self.endpoint_mut(endpoint) {
            // Its entry among the fresh ones is stale now, and skipped when it comes up.
            endpoint.timers.push(Reverse((due, lane_id)));
        }
        self.touch(endpoint, now);
    }

    fn endpoint_id(&mut self, name: EndpointName) -> u32 {
        *self.by_name.entry(name).or_insert_with(|| {
            self.endpoints.push(Endpoint::new(name));
            (self.endpoints.len() - 1) as u32
        })
    }

    fn endpoint_mut(&mut self, id: u32) -> Option<&mut Endpoint> {
        self.endpoints.get_mut(id as usize)
    }
}

/// A length of time in the unit of the schedule.
#[must_use]
pub fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
