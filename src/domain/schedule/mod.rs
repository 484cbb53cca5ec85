//! Which push goes when: lanes in order, limits, backoff, breaker. A machine without clock, chance or I/O.
//!
//! The driver feeds it (`appended`, `reported`, `withdraw`, `buried`), asks (`next`, `next_bury`, `wake_at`) and does
//! what it says. Time is microseconds of any clock that never goes back.
//!
//! Invariants, held by the simulation in `sim.rs`: each event ends exactly once; none starts before it is due; events of
//! a lane go in order, one push in flight; rate, burst and concurrency hold; an endpoint in trouble delays no other;
//! nothing is stuck for ever.

mod endpoint;
mod lanes;
#[cfg(test)]
mod sim;

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Duration;

pub use self::endpoint::Pauses;
use self::endpoint::{Down, Endpoint, ToldClock};
pub use self::lanes::{LaneId, Retry};
use self::lanes::{Lanes, State};
use super::backlog::{Backlog, Handle};
use super::endpoint::{EndpointName, Limits};
use super::keys::LaneKey;
use super::outcome::{DeathReason, Verdict};
use super::retry::Delays;

/// Most events given up in one step, so that burying a large backlog never holds up the rest.
const BURY_EVENTS_MAX: u32 = 64;

/// The rules of `[push]`, `[backoff]` and `[breaker]`.
#[derive(Clone, Debug)]
pub struct Settings {
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

/// What an endpoint's breaker did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Breaker {
    /// Too many failures in a row: one probe at a time from now on.
    WentDown,
    /// The first success.
    CameUp,
}

/// What is to be recorded after a report.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The lane, for the record.
    pub lane: Option<LaneKey>,
    /// Events that are delivered and settled now.
    pub delivered: Vec<Handle>,
    /// Events delivered although they were withdrawn in flight; settled before.
    pub delivered_late: Vec<Handle>,
    /// Events withdrawn in flight that were not delivered; settled before.
    pub withdrawn_late: u32,
    /// What the lane's head waits with now.
    pub deferred: Option<Deferred>,
    /// Whether an earlier `deferred` of the lane is over.
    pub retry_is_over: bool,
    /// What the breaker did.
    pub breaker: Option<Breaker>,
}

/// A push that waits to be tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deferred {
    /// Its first event.
    pub head: Handle,
    /// Its state.
    pub retry: Retry,
    /// How long it waits.
    pub wait: Duration,
}

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

/// When a report came in, and a roll of the dice in 0..1.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// Microseconds of the schedule's clock.
    pub now: u64,
    /// Unix seconds.
    pub second: u64,
    /// Uniform in 0..1.
    pub dice: f64,
}

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
    /// Attempts in flight that it has earned.
    pub window: u32,
    /// When its oldest event was accepted, Unix seconds.
    pub oldest: Option<u32>,
    /// Microseconds in which a lane was ready and the rate forbade it.
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
    /// What is known of the push at its head, when that has failed.
    pub retry: Option<Retry>,
}

#[derive(Debug)]
struct Flight {
    /// Events offered to the push.
    offered: u32,
    /// How many of the lane's first events are to be given up afterwards.
    bury: u32,
    is_probe: bool,
    /// The customer was toggled off or forgotten meanwhile.
    is_withdrawn: bool,
    mark: u64,
}

/// The schedule.
#[derive(Debug)]
pub struct Schedule {
    settings: Settings,
    /// What waits. Public to those who fill it from the store.
    pub backlog: Backlog,
    lanes: Lanes,
    endpoints: Vec<Endpoint>,
    by_name: HashMap<EndpointName, u32>,
    runnable: VecDeque<u32>,
    wakes: BTreeSet<(u64, u32)>,
    flights: HashMap<LaneId, Flight>,
    to_bury: VecDeque<(LaneId, u32, DeathReason)>,
    /// Events that are to be given up, from the head of each such lane.
    burying: HashMap<LaneId, u32>,
    clock: ToldClock,
    clock_at: u64,
    events: u64,
}

impl Schedule {
    /// An empty schedule.
    #[must_use]
    pub fn new(settings: Settings) -> Schedule {
        Schedule {
            settings,
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
        let id = self.endpoint_id(name);
        let clock = self.clock.clone();
        if let Some(endpoint) = self.endpoint_mut(id) {
            endpoint.set_limits(limits, &clock);
        }
        self.touch(id, now);
    }

    /// Goes by other rules from now on.
    pub fn set_settings(&mut self, settings: Settings) {
        self.settings = settings;
    }

    /// Pauses an endpoint or lets it go on.
    pub fn set_pauses(&mut self, name: EndpointName, pauses: Pauses, now: u64) {
        let id = self.endpoint_id(name);
        if let Some(endpoint) = self.endpoint_mut(id) {
            endpoint.pauses = pauses;
        }
        self.touch(id, now);
    }

    /// Makes all lanes of an endpoint due, and its next probe if it is down; what a 429 or 503 asked for is forgotten.
    pub fn retry_now(&mut self, name: EndpointName, now: u64) {
        let Some(id) = self.by_name.get(&name).copied() else { return };
        let Some(endpoint) = self.endpoint_mut(id) else { return };
        endpoint.held_until = 0;
        if let Some(down) = endpoint.down.as_mut() {
            down.due = now;
        }
        let timers = std::mem::take(&mut endpoint.timers);
        self.requeue(id, timers.into_sorted_vec());
        self.touch(id, now);
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

    /// Gives up what waits in a lane, or only its first event. What is in flight is given up if the attempt fails.
    /// Answers how many events that is at most.
    pub fn bury(&mut self, lane_id: LaneId, first_only: bool) -> u32 {
        let Some(lane) = self.lanes.get(lane_id).copied() else { return 0 };
        let count = if first_only { lane.len.min(1) } else { lane.len };
        match lane.state {
            State::Free | State::Burying => 0,
            State::Ready | State::Waiting => {
                self.begin_burying(lane_id, count, DeathReason::Buried);
                count
            }
            State::Flying => match self.flights.get_mut(&lane_id) {
                Some(flight) if !flight.is_withdrawn => {
                    flight.bury = flight.bury.max(count);
                    count
                }
                Some(_) | None => 0,
            },
        }
    }

    /// Whether anything is being given up.
    #[must_use]
    pub fn is_burying(&self) -> bool {
        !self.burying.is_empty() || self.flights.values().any(|flight| flight.bury > 0)
    }

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
                retry: self.lanes.retry(id).copied(),
            })
        })
    }

    /// Takes an endpoint away: what waits for it is given up as `endpoint_removed`.
    pub fn remove_endpoint(&mut self, name: EndpointName) {
        let id = self.endpoint_id(name);
        let Some(endpoint) = self.endpoint_mut(id) else { return };
        endpoint.limits = None;
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

    /// At start: events of a lane that had ended before. They are its first ones.
    pub fn settled_before(&mut self, key: LaneKey, events: &[Handle], now: u64) {
        for event in events {
            self.backlog.settle(*event);
        }
        let Some(lane_id) = self.lanes.find(key) else { return };
        let Some(lane) = self.lanes.get(lane_id).copied() else { return };
        let ended =
            self.chain(lane.head, lane.len).into_iter().take_while(|event| self.backlog.is_settled(*event)).count();
        self.pop(lane_id, ended as u32);
        if lane.state == State::Waiting {
            self.make_ready(lane_id, now);
        }
    }

    /// Puts back what a lane's head was waiting with before a restart. Ignored unless `head` is its head.
    pub fn restore(&mut self, key: LaneKey, head: Handle, retry: Retry, wait: Duration, now: u64) {
        let Some(lane_id) = self.lanes.find(key) else { return };
        let Some(lane) = self.lanes.get_mut(lane_id).filter(|lane| lane.head == head && lane.state == State::Ready)
        else {
            return;
        };
        lane.state = State::Waiting;
        let endpoint = lane.endpoint;
        let due = now.saturating_add(micros(wait.min(self.settings.delays.longest())));
        let retry = Retry { fixed: retry.fixed.min(lane.len), due, ..retry };
        self.lanes.set_retry(lane_id, Some(retry));
        if let Some(endpoint) = self.endpoint_mut(endpoint) {
            // Its entry among the fresh ones is stale now, and skipped when it comes up.
            endpoint.timers.push(Reverse((due, lane_id)));
        }
        self.touch(endpoint, now);
    }

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
        while self.flights.len() < self.settings.max_in_flight as usize {
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

    /// Takes the report on an attempt, with how many of the offered events it carried.
    pub fn reported(&mut self, lane_id: LaneId, taken: u32, verdict: Verdict, moment: Moment) -> Outcome {
        let Some(flight) = self.flights.remove(&lane_id) else { return Outcome::default() };
        let Some(lane) = self.lanes.get(lane_id).copied() else { return Outcome::default() };
        let mut outcome = Outcome { lane: Some(lane.key), ..Outcome::default() };
        outcome.breaker = self.note_verdict(&lane, &flight, verdict, moment);
        let retry = self.lanes.retry(lane_id).copied();
        if flight.is_withdrawn {
            // Settled and uncounted already, when they were withdrawn.
            outcome.delivered_late = self.unlink(lane_id, flight.offered);
            outcome.delivered_late.truncate(if verdict == Verdict::Delivered { taken as usize } else { 0 });
            outcome.withdrawn_late = flight.offered - outcome.delivered_late.len() as u32;
            outcome.retry_is_over = retry.is_some();
            self.lanes.set_retry(lane_id, None);
            self.make_ready(lane_id, moment.now);
        } else {
            match verdict {
                Verdict::Again => {
                    // It may have been seen: the same body and `webhook-id` go again.
                    if taken > 0 && retry.is_none_or(|retry| retry.fixed == 0) {
                        let first = Retry { mark: flight.mark, ..Retry::default() };
                        let retry = Retry { fixed: taken, ..retry.unwrap_or(first) };
                        self.lanes.set_retry(lane_id, Some(retry));
                    }
                    self.make_ready(lane_id, moment.now);
                }
                Verdict::Delivered => self.delivered(lane_id, taken, &mut outcome, moment.now),
                Verdict::Gone
                | Verdict::Rejected
                | Verdict::Refused
                | Verdict::Throttled(_)
                | Verdict::Failed { .. }
                | Verdict::Damaged => {
                    self.not_delivered(lane_id, taken, verdict, &flight, &mut outcome, moment);
                }
            }
        }
        if flight.bury > 0 && !flight.is_withdrawn {
            let left = flight.bury.saturating_sub(outcome.delivered.len() as u32);
            let is_waiting = |lane: &lanes::Lane| matches!(lane.state, State::Ready | State::Waiting);
            if left > 0 && self.lanes.get(lane_id).is_some_and(is_waiting) {
                outcome.deferred = None;
                outcome.retry_is_over = true;
                self.begin_burying(lane_id, left, DeathReason::Buried);
            }
        }
        self.touch(lane.endpoint, moment.now);
        outcome
    }

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

    /// The next events to be given up.
    pub fn next_bury(&mut self) -> Option<Burial> {
        let (lane_id, count, reason) = self.to_bury.pop_front()?;
        let lane = self.lanes.get(lane_id).copied()?;
        let endpoint = self.endpoints.get(lane.endpoint as usize)?.name;
        let events = self.chain(lane.head, count.min(BURY_EVENTS_MAX));
        let attempts = self.lanes.retry(lane_id).map_or(0, |retry| retry.tries.max(retry.attempts));
        Some(Burial { lane: lane_id, endpoint, events, reason, attempts })
    }

    /// The events of a [`Burial`] are dead letters now.
    pub fn buried(&mut self, burial: &Burial, now: u64) {
        let count = burial.events.len() as u32;
        for event in self.pop(burial.lane, count) {
            self.backlog.settle(event);
        }
        let left = self.burying.remove(&burial.lane).unwrap_or(0).saturating_sub(count);
        if left > 0 {
            self.burying.insert(burial.lane, left);
            return self.to_bury.push_back((burial.lane, left, burial.reason));
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
        let count = self.burying.get(&burial.lane).copied().unwrap_or(0);
        self.to_bury.push_back((burial.lane, count, burial.reason));
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

    /// Every endpoint that ever was.
    pub fn endpoints(&self) -> impl Iterator<Item = EndpointView> {
        self.endpoints.iter().map(|endpoint| EndpointView {
            name: endpoint.name,
            events: endpoint.events,
            in_flight: endpoint.in_flight,
            is_up: endpoint.down.is_none(),
            is_paused: endpoint.pauses.is_paused(),
            window: endpoint.window,
            oldest: endpoint.ages.oldest(),
            rate_limited: endpoint.rate_limited,
        })
    }

    // ---- reports ----

    /// What a report says of the endpoint.
    fn note_verdict(
        &mut self,
        lane: &lanes::Lane,
        flight: &Flight,
        verdict: Verdict,
        moment: Moment,
    ) -> Option<Breaker> {
        let settings = self.settings.clone();
        let endpoint = self.endpoint_mut(lane.endpoint)?;
        endpoint.in_flight = endpoint.in_flight.saturating_sub(1);
        if let Some(down) = endpoint.down.as_mut().filter(|_| flight.is_probe) {
            down.is_probing = false;
        }
        let hold = |wait: Duration| moment.now.saturating_add(micros(wait));
        match verdict {
            Verdict::Again | Verdict::Damaged => None,
            Verdict::Delivered => {
                let came_up = endpoint.succeeded(moment.now);
                if came_up {
                    let due = std::mem::take(&mut endpoint.timers);
                    self.requeue(lane.endpoint, due.into_sorted_vec());
                }
                came_up.then_some(Breaker::CameUp)
            }
            Verdict::Throttled(wait) => {
                endpoint.throttles = endpoint.throttles.saturating_add(1);
                let wait = wait.unwrap_or_else(|| settings.delays.delay(endpoint.throttles, moment.dice));
                endpoint.held_until = endpoint.held_until.max(hold(wait));
                None
            }
            Verdict::Gone | Verdict::Rejected | Verdict::Refused | Verdict::Failed { .. } => {
                if let Verdict::Failed { hold: wait, halves } = verdict {
                    if halves {
                        endpoint.window = (endpoint.window / 2).max(1);
                    }
                    endpoint.held_until = endpoint.held_until.max(wait.map_or(0, hold));
                }
                if let Some(down) = endpoint.down.as_mut() {
                    if flight.is_probe {
                        down.probes = down.probes.saturating_add(1);
                        down.due = hold(settings.delays.delay(down.probes + 1, moment.dice));
                        self.expire_ready(lane.endpoint, moment.second);
                    }
                    return None;
                }
                if !endpoint.failed(lane.key, settings.breaker_failures) {
                    return None;
                }
                let due = hold(settings.delays.delay(1, moment.dice));
                endpoint.down = Some(Down { probes: 0, due, is_probing: false });
                let timers = std::mem::take(&mut endpoint.timers);
                self.requeue(lane.endpoint, timers.into_sorted_vec());
                Some(Breaker::WentDown)
            }
        }
    }

    fn delivered(&mut self, lane_id: LaneId, taken: u32, outcome: &mut Outcome, now: u64) {
        let retry = self.lanes.retry(lane_id).copied();
        outcome.delivered = self.pop(lane_id, taken);
        for event in &outcome.delivered {
            self.backlog.settle(*event);
        }
        let after = retry.and_then(|retry| after_singles(&retry, taken, 1));
        outcome.retry_is_over = retry.is_some() && after.is_none();
        if let (Some(retry), Some(lane)) = (after, self.lanes.get(lane_id)) {
            outcome.deferred = Some(Deferred { head: lane.head, retry, wait: Duration::ZERO });
        }
        self.lanes.set_retry(lane_id, after);
        self.make_ready(lane_id, now);
    }

    fn not_delivered(
        &mut self,
        lane_id: LaneId,
        taken: u32,
        verdict: Verdict,
        flight: &Flight,
        outcome: &mut Outcome,
        moment: Moment,
    ) {
        let Some(lane) = self.lanes.get(lane_id).copied() else { return };
        let Some(endpoint) = self.endpoints.get(lane.endpoint as usize) else { return };
        let (successes, is_down) = (endpoint.successes, endpoint.down.is_some());
        let first = Retry { mark: flight.mark, ..Retry::default() };
        let mut retry = self.lanes.retry(lane_id).copied().unwrap_or(first);
        retry.tries = retry.tries.saturating_add(1);
        retry.fixed = taken;
        if !matches!(verdict, Verdict::Throttled(_)) && !flight.is_probe {
            retry.attempts = retry.attempts.saturating_add(1);
        }
        let others_succeeded = successes.saturating_sub(retry.mark) > retry.own;
        if verdict == Verdict::Refused && others_succeeded {
            retry.refusals = retry.refusals.saturating_add(1);
        }
        let failures = retry.tries.max(retry.attempts);
        let max_attempts = self.settings.max_attempts;
        let is_refused = verdict == Verdict::Refused && taken == 1 && retry.refusals >= self.settings.max_refusals;
        let death = if endpoint.limits.is_none() {
            Some((u32::MAX, DeathReason::EndpointRemoved))
        } else if verdict == Verdict::Damaged {
            Some((1, DeathReason::Damaged))
        } else if verdict == Verdict::Gone {
            Some((taken, DeathReason::Gone))
        } else if verdict == Verdict::Rejected || is_refused {
            Some((taken, DeathReason::Refused))
        } else if max_attempts > 0 && retry.attempts >= max_attempts {
            Some((taken, DeathReason::Attempts))
        } else {
            let expired = self.expired(lane.endpoint, lane.head, taken, moment.second);
            (expired > 0).then_some((expired, DeathReason::Expired))
        };
        if let Some((count, reason)) = death {
            self.lanes.set_retry(lane_id, Some(retry));
            outcome.retry_is_over = true;
            self.begin_burying(lane_id, count, reason);
            return;
        }
        if verdict == Verdict::Refused && taken > 1 {
            retry.singles = taken;
            retry.singles_attempts = retry.attempts;
            retry.singles_refusals = retry.refusals;
            retry.fixed = 0;
            retry.tries = 0;
        }
        let wait = if is_down { Duration::ZERO } else { self.settings.delays.delay(failures, moment.dice) };
        retry.due = moment.now.saturating_add(micros(wait));
        outcome.deferred = Some(Deferred { head: lane.head, retry, wait });
        self.lanes.set_retry(lane_id, Some(retry));
        let state = if is_down { State::Ready } else { State::Waiting };
        if let Some(lane) = self.lanes.get_mut(lane_id) {
            lane.state = state;
        }
        if let Some(endpoint) = self.endpoint_mut(lane.endpoint) {
            if is_down {
                endpoint.tried.push_back(lane_id);
            } else {
                endpoint.timers.push(Reverse((retry.due, lane_id)));
            }
        }
    }

    // ---- giving up ----

    fn begin_burying(&mut self, lane_id: LaneId, count: u32, reason: DeathReason) {
        if let Some(lane) = self.lanes.get_mut(lane_id) {
            lane.state = State::Burying;
            let count = count.min(lane.len);
            self.burying.insert(lane_id, count);
            self.to_bury.push_back((lane_id, count, reason));
        }
    }

    /// How many of a lane's first `most` events are too old.
    fn expired(&self, endpoint: u32, head: Handle, most: u32, second: u64) -> u32 {
        let Some(endpoint) = self.endpoints.get(endpoint as usize) else { return 0 };
        let age = |event: &Handle| endpoint.pauses.age(u64::from(self.backlog.second(*event)), second);
        let too_old = |event: &Handle| age(event) >= self.settings.max_age_s;
        self.chain(head, most).iter().take_while(|event| too_old(event)).count() as u32
    }

    /// After a failed probe: gives up what is too old in the lanes that had no attempt of their own.
    fn expire_ready(&mut self, id: u32, second: u64) {
        let max_age_s = self.settings.max_age_s;
        let Some(endpoint) = self.endpoint_mut(id) else { return };
        if endpoint.ages.oldest().is_none_or(|oldest| endpoint.pauses.age(u64::from(oldest), second) < max_age_s) {
            return;
        }
        for is_tried in [false, true] {
            let Some(endpoint) = self.endpoint_mut(id) else { return };
            let queue = std::mem::take(if is_tried { &mut endpoint.tried } else { &mut endpoint.fresh });
            let mut kept = VecDeque::with_capacity(queue.len());
            for lane_id in queue {
                let is_here = |lane: &&lanes::Lane| lane.endpoint == id && lane.state == State::Ready;
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

    // ---- chains ----

    /// The first `most` events from `head`.
    fn chain(&self, head: Handle, most: u32) -> Vec<Handle> {
        let mut events = Vec::new();
        let mut at = head;
        while events.len() < most as usize && at != Handle::NONE {
            events.push(at);
            at = self.backlog.next(at);
        }
        events
    }

    /// Takes the first events off a lane and out of the counts.
    fn pop(&mut self, lane_id: LaneId, count: u32) -> Vec<Handle> {
        let events = self.unlink(lane_id, count);
        if let Some(endpoint) = self.lanes.get(lane_id).map(|lane| lane.endpoint) {
            self.uncount(endpoint, &events);
        }
        events
    }

    /// Takes the first events off a lane.
    fn unlink(&mut self, lane_id: LaneId, count: u32) -> Vec<Handle> {
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
    fn cut(&mut self, lane_id: LaneId, keep: u32) -> Vec<Handle> {
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

    fn uncount(&mut self, endpoint: u32, events: &[Handle]) {
        self.events = self.events.saturating_sub(events.len() as u64);
        for event in events {
            let second = self.backlog.second(*event);
            if let Some(endpoint) = self.endpoint_mut(endpoint) {
                endpoint.events = endpoint.events.saturating_sub(1);
                endpoint.ages.remove(second);
            }
        }
    }

    // ---- queues ----

    fn endpoint_id(&mut self, name: EndpointName) -> u32 {
        *self.by_name.entry(name).or_insert_with(|| {
            self.endpoints.push(Endpoint::new(name));
            (self.endpoints.len() - 1) as u32
        })
    }

    fn endpoint_mut(&mut self, id: u32) -> Option<&mut Endpoint> {
        self.endpoints.get_mut(id as usize)
    }

    /// Puts a lane that is in no queue where it belongs: into a queue, to the graves, or out of the table.
    fn make_ready(&mut self, lane_id: LaneId, now: u64) {
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
    fn requeue(&mut self, id: u32, timers: Vec<Reverse<(u64, LaneId)>>) {
        for Reverse((due, lane_id)) in timers.into_iter().rev() {
            self.timer_fired(id, due, lane_id);
        }
    }

    fn timer_fired(&mut self, id: u32, due: u64, lane_id: LaneId) {
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
    fn touch(&mut self, id: u32, now: u64) {
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

    fn set_wake(&mut self, id: u32, now: u64) {
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

    fn is_crowded(&self) -> bool {
        self.flights.len() > self.settings.max_in_flight as usize / 2
    }

    fn try_start(&mut self, id: u32, now: u64) -> Option<Start> {
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
            (0, 0) => self.settings.events_per_push,
            (0, _) => 1,
            (fixed, _) => fixed,
        };
        let events = self.chain(lane.head, most.min(lane.len));
        if let Some(lane) = self.lanes.get_mut(lane_id) {
            lane.state = State::Flying;
        }
        let flight = Flight { offered: events.len() as u32, bury: 0, is_probe, is_withdrawn: false, mark };
        self.flights.insert(lane_id, flight);
        Some(Start { lane: lane_id, endpoint: name, events, is_fixed: retry.fixed > 0, attempt: retry.tries + 1 })
    }

    fn advance_clock(&mut self, now: u64) {
        if let Some(passed) = now.checked_sub(self.clock_at).filter(|passed| *passed > 0) {
            self.clock.advance(Duration::from_micros(passed));
            self.clock_at = now;
        }
    }
}

/// What is left to be sent singly after `count` events are settled, `own` of them delivered.
fn after_singles(retry: &Retry, count: u32, own: u64) -> Option<Retry> {
    let singles = retry.singles.saturating_sub(count);
    (singles > 0).then_some(Retry {
        tries: 0,
        attempts: retry.singles_attempts,
        refusals: retry.singles_refusals,
        fixed: 0,
        singles,
        due: 0,
        own: retry.own + own,
        ..*retry
    })
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
