//! The schedule in virtual time: seeded runs of outages, refusals, toggles and restarts, every step checked.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::Duration;

use super::*;
use crate::domain::endpoint::Plugin;
use crate::domain::retry::Backoff;

pub(super) const SECOND: u64 = 1_000_000;

pub(super) fn rules() -> Rules {
    Rules {
        delays: Delays::new(&Backoff {
            initial: Duration::from_secs(1),
            multiplier: 2.0,
            max: Duration::from_secs(60),
            randomization: 0.5,
        }),
        max_age_s: 86_400,
        max_attempts: 0,
        max_refusals: 3,
        breaker_failures: 6,
        max_in_flight: 24,
        events_per_push: 5,
    }
}

pub(super) fn limits() -> Limits {
    Limits { rate_per_second: 20.0, burst: 4, concurrency: 6 }
}

pub(super) fn name(endpoint: usize) -> EndpointName {
    EndpointName::of(Plugin::new(endpoint as u64 + 1).unwrap())
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Fate {
    Waiting,
    Delivered,
    Withdrawn,
    Buried,
}

pub(super) struct SimEvent {
    pub(super) lane: usize,
    pub(super) fate: Fate,
    pub(super) second: u32,
    pub(super) is_poison: bool,
}

/// How an endpoint's receiver behaves for a while.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Mood {
    Well,
    Broken,
    Hanging,
    Throttling,
}

pub(super) struct Sim {
    pub(super) rng: fastrand::Rng,
    pub(super) schedule: Schedule,
    pub(super) now: u64,
    pub(super) events: Vec<SimEvent>,
    pub(super) by_handle: HashMap<Handle, usize>,
    pub(super) lanes: usize,
    pub(super) endpoints: usize,
    pub(super) moods: Vec<(Mood, u64)>,
    /// (when it reports, start) of attempts in flight.
    pub(super) flights: VecDeque<(u64, Start)>,
    /// Lanes whose attempt goes to a receiver of before.
    pub(super) outdated: HashSet<LaneId>,
    /// What a restart would find: the last recorded state of a lane's head.
    pub(super) recorded: BTreeMap<usize, (usize, Retry, u64)>,
    pub(super) starts: Vec<VecDeque<u64>>,
    /// Not before this, unless the endpoint's breaker moved since.
    pub(super) due: HashMap<usize, u64>,
    /// Events withdrawn while in flight: may still be delivered, once.
    pub(super) withdrawn_in_flight: Vec<usize>,
    pub(super) pauses: Vec<Pauses>,
    /// Events that an operator gave up; a crash forgets that.
    pub(super) given_up: HashSet<usize>,
    /// (when it is done, what) of burials that were handed out.
    pub(super) burials: Vec<(u64, Burial)>,
    /// Lanes to be withdrawn again when their burial is done, and the events that must never start any more.
    pub(super) withdraw_again: HashMap<usize, (Vec<usize>, u64)>,
    /// Endpoints that are not configured just now, and the events that their removal gave up.
    pub(super) removed: Vec<bool>,
    pub(super) orphans: HashSet<usize>,
    /// Events that a receiver wants no more (410).
    pub(super) unwanted: HashSet<usize>,
    pub(super) is_healed: bool,
    pub(super) slot: u16,
}

impl Sim {
    fn new(seed: u64) -> Sim {
        let mut rng = fastrand::Rng::with_seed(seed);
        let endpoints = rng.usize(1..4);
        let lanes = rng.usize(1..12);
        let mut sim = Sim {
            rng,
            schedule: Schedule::new(rules()),
            now: 0,
            events: Vec::new(),
            by_handle: HashMap::new(),
            lanes,
            endpoints,
            moods: vec![(Mood::Well, 0); endpoints],
            flights: VecDeque::new(),
            outdated: HashSet::new(),
            recorded: BTreeMap::new(),
            starts: vec![VecDeque::new(); endpoints],
            due: HashMap::new(),
            withdrawn_in_flight: Vec::new(),
            pauses: vec![Pauses::default(); endpoints],
            given_up: HashSet::new(),
            burials: Vec::new(),
            withdraw_again: HashMap::new(),
            removed: vec![false; endpoints],
            orphans: HashSet::new(),
            unwanted: HashSet::new(),
            is_healed: false,
            slot: 0,
        };
        sim.configure();
        sim
    }

    fn configure(&mut self) {
        self.schedule.backlog.open(self.slot, u64::from(self.slot));
        for endpoint in 0..self.endpoints {
            if self.removed[endpoint] {
                self.orphan(endpoint);
            } else {
                self.schedule.put_endpoint(name(endpoint), limits(), self.now);
            }
            self.schedule.set_pauses(name(endpoint), self.pauses[endpoint].clone(), self.now);
        }
    }

    pub(super) fn endpoint_of(&self, lane: usize) -> usize {
        lane % self.endpoints
    }

    fn key(lane: usize) -> LaneKey {
        LaneKey(lane as u64 * 1_000_003)
    }

    fn append(&mut self, event: usize) {
        let (lane, second) = (self.events[event].lane, self.events[event].second);
        let handle = self.schedule.backlog.append(self.slot, None, event as u32, second, 100).unwrap();
        self.by_handle.insert(handle, event);
        self.schedule.appended(handle, Self::key(lane), name(self.endpoint_of(lane)), self.now);
    }

    fn post(&mut self) {
        let lane = self.rng.usize(0..self.lanes);
        if self.removed[self.endpoint_of(lane)] {
            return;
        }
        self.events.push(SimEvent {
            lane,
            fate: Fate::Waiting,
            second: (self.now / SECOND) as u32,
            is_poison: self.rng.u8(0..20) == 0,
        });
        self.append(self.events.len() - 1);
    }

    /// A crash: everything in memory is gone, attempts in flight are unheard of.
    fn restart(&mut self) {
        self.schedule = Schedule::new(rules());
        self.flights.clear();
        self.by_handle.clear();
        self.due.clear();
        self.withdrawn_in_flight.clear();
        self.outdated.clear();
        self.burials.clear();
        self.withdraw_again.clear();
        self.starts.iter_mut().for_each(VecDeque::clear);
        self.slot += 1;
        self.configure();
        // Either the last checkpoint says what had ended, or what was noted after it.
        let is_noted = self.rng.bool();
        for event in 0..self.events.len() {
            if is_noted || self.events[event].fate == Fate::Waiting {
                self.append(event);
            }
        }
        for lane in 0..self.lanes {
            let ended = |event: &usize| self.events[*event].lane == lane && self.events[*event].fate != Fate::Waiting;
            let ended: Vec<Handle> =
                (0..self.events.len()).filter(ended).filter_map(|event| self.handle(event)).collect();
            for handles in ended.chunks(3) {
                self.schedule.settled_before(Self::key(lane), handles, self.now);
            }
        }
        for (lane, (head, retry, due)) in self.recorded.clone() {
            if let Some(handle) = self.handle(head) {
                let wait = Duration::from_micros(due.saturating_sub(self.now));
                self.schedule.restore(Self::key(lane), handle, retry, wait, self.now);
            }
        }
    }

    fn handle(&self, event: usize) -> Option<Handle> {
        self.by_handle.iter().find(|(_, other)| **other == event).map(|(handle, _)| *handle)
    }

    /// What waits at an endpoint that is not there will be given up.
    fn orphan(&mut self, endpoint: usize) {
        let endpoints = self.endpoints;
        for lane in (0..self.lanes).filter(|lane| lane % endpoints == endpoint) {
            self.orphans.extend(self.waiting_in(lane));
        }
        self.due.retain(|lane, _| lane % endpoints != endpoint);
    }

    fn turn_endpoint(&mut self) {
        let endpoint = self.rng.usize(0..self.endpoints);
        self.removed[endpoint] = !self.removed[endpoint];
        if self.removed[endpoint] {
            self.schedule.remove_endpoint(name(endpoint));
            self.orphan(endpoint);
        } else {
            self.schedule.put_endpoint(name(endpoint), limits(), self.now);
        }
    }

    pub(super) fn withdraw_lane(&mut self, lane: usize, until: u64) {
        let withdrawn = self.schedule.withdraw(Self::key(lane), until, self.now);
        for handle in withdrawn.events {
            let event = self.by_handle[&handle];
            assert_eq!(self.events[event].fate, Fate::Waiting);
            self.events[event].fate = Fate::Withdrawn;
            if self.flights.iter().any(|(_, start)| start.events.contains(&handle)) {
                self.withdrawn_in_flight.push(event);
            }
        }
        self.recorded.remove(&lane);
        self.due.remove(&lane);
        if let Some(until) = withdrawn.burying_until {
            let left = self.waiting_in(lane);
            let burial =
                self.burials.iter().find(|(_, burial)| self.events[self.by_handle[&burial.events[0]]].lane == lane);
            assert_eq!(left.len(), burial.unwrap().1.events.len(), "all but what was handed out");
            self.withdraw_again.insert(lane, (left, until));
        }
    }

    pub(super) fn waiting_in(&self, lane: usize) -> Vec<usize> {
        let is_it = |event: &usize| self.events[*event].lane == lane && self.events[*event].fate == Fate::Waiting;
        (0..self.events.len()).filter(is_it).collect()
    }

    fn turn_pause(&mut self) {
        let endpoint = self.rng.usize(0..self.endpoints);
        let now_s = self.now / SECOND;
        match self.pauses[endpoint].is_paused() {
            true => self.pauses[endpoint].end(now_s),
            false => self.pauses[endpoint].begin(now_s, 0),
        }
        self.schedule.set_pauses(name(endpoint), self.pauses[endpoint].clone(), self.now);
    }

    fn retry_now(&mut self) {
        let endpoint = self.rng.usize(0..self.endpoints);
        if self.rng.bool() {
            self.schedule.retry_now(name(endpoint), self.now);
        } else {
            self.schedule.forget_failures(name(endpoint), self.now);
            let of_it = self.flights.iter().filter(|(_, start)| start.endpoint == name(endpoint));
            self.outdated.extend(of_it.map(|(_, start)| start.lane));
        }
        let endpoints = self.endpoints;
        self.due.retain(|lane, _| lane % endpoints != endpoint);
    }

    fn bury(&mut self) {
        let lane = self.rng.usize(0..self.lanes);
        let first_only = self.rng.bool();
        let Some(id) = self.schedule.lane_id(Self::key(lane)) else { return };
        let count = self.schedule.bury(id, first_only) as usize;
        let meant: Vec<usize> = self.waiting_in(lane).into_iter().take(count).collect();
        assert_eq!(meant.len(), count);
        self.given_up.extend(meant);
        if count > 0 {
            self.due.remove(&lane);
        }
    }

    fn turn_moods(&mut self) {
        for endpoint in 0..self.endpoints {
            if self.moods[endpoint].1 <= self.now {
                let mood = match self.rng.u8(0..8) {
                    _ if self.is_healed => Mood::Well,
                    0 => Mood::Broken,
                    1 => Mood::Hanging,
                    2 => Mood::Throttling,
                    _ => Mood::Well,
                };
                self.moods[endpoint] = (mood, self.now + self.rng.u64(SECOND..120 * SECOND));
            }
        }
    }

    /// Goes on to the next moment at which something happens, `limit` at the latest.
    fn step(&mut self, limit: u64) {
        self.turn_moods();
        self.start_all();
        let ends = self.flights.iter().map(|(at, _)| *at).chain(self.burials.iter().map(|(at, _)| *at));
        let end = ends.min();
        let next = end.into_iter().chain(self.schedule.wake_at()).min();
        let next = next.unwrap_or(limit).clamp(self.now, limit);
        assert!(next > self.now || end.is_some_and(|at| at <= self.now) || next == limit);
        self.now = next;
        while let Some(at) = self.burials.iter().position(|(at, _)| *at <= self.now) {
            self.end_burial(at);
        }
        while let Some(at) = self.flights.iter().position(|(at, _)| *at <= self.now) {
            self.report(at);
        }
    }
}

fn run(seed: u64) {
    let mut sim = Sim::new(seed);
    let posts = sim.rng.usize(1..60);
    for _ in 0..posts {
        sim.post();
        match sim.rng.u8(0..28) {
            0 => sim.withdraw_lane(sim.events.len() % sim.lanes, u64::MAX),
            1 => sim.restart(),
            2 => sim.turn_pause(),
            3 => sim.retry_now(),
            4 => sim.bury(),
            5 => sim.turn_endpoint(),
            _ => {}
        }
        let pause = sim.now + sim.rng.u64(0..2 * SECOND);
        for _ in 0..40 {
            if sim.now >= pause {
                break;
            }
            sim.step(pause);
        }
        sim.check_counts();
    }
    // Everything gets well, and everything ends.
    sim.is_healed = true;
    for endpoint in 0..sim.endpoints {
        if std::mem::take(&mut sim.removed[endpoint]) {
            sim.schedule.put_endpoint(name(endpoint), limits(), sim.now);
        }
        sim.pauses[endpoint].end(sim.now / SECOND);
        sim.schedule.set_pauses(name(endpoint), sim.pauses[endpoint].clone(), sim.now);
    }
    let deadline = sim.now + 3_600 * SECOND;
    while sim.events.iter().any(|event| event.fate == Fate::Waiting) {
        assert!(sim.now < deadline, "stuck");
        // A refusal counts only while others succeed: a lane of its own keeps succeeding.
        if sim.schedule.wake_at().is_some() && sim.flights.is_empty() {
            for endpoint in 0..sim.endpoints {
                let lane = sim.lanes + sim.endpoints - (sim.lanes % sim.endpoints) + endpoint;
                let second = (sim.now / SECOND) as u32;
                sim.events.push(SimEvent { lane, fate: Fate::Waiting, second, is_poison: false });
                sim.append(sim.events.len() - 1);
            }
        }
        sim.step(deadline);
    }
    while !sim.flights.is_empty() || !sim.burials.is_empty() {
        sim.step(deadline);
    }
    sim.check_counts();
    // A lane that was emptied by a withdrawal leaves its queue when its turn comes.
    while sim.schedule.lanes() > 0 && sim.now < deadline {
        sim.step(deadline);
    }
    assert_eq!(sim.schedule.lanes(), 0, "a lane is left behind");
    assert_eq!(sim.schedule.in_flight(), 0);
    assert!(sim.withdrawn_in_flight.is_empty());
}

#[test]
fn ten_thousand_runs_of_outages_toggles_pauses_and_restarts_hold_the_invariants() {
    for seed in 0..10_000 {
        let result = std::panic::catch_unwind(|| run(seed));
        assert!(result.is_ok(), "seed {seed}");
    }
}
