//! Ten days of traffic in virtual time: nothing that the schedule holds grows from day to day.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use super::*;
use crate::domain::endpoint::Plugin;
use crate::domain::retry::Backoff;
use crate::domain::verdict::Verdict;

const SECOND: u64 = 1_000_000;
const DAY: u64 = 86_400 * SECOND;
const EVENTS_A_DAY: u64 = 20_000;
const ENDPOINTS: u64 = 20;
/// Events of a segment.
const SEGMENT_EVENTS: u32 = 3_000;

impl Schedule {
    /// How much room everything takes that could grow.
    fn sizes(&self) -> Vec<(&'static str, usize)> {
        let of_endpoints = |size: fn(&Endpoint) -> usize| self.endpoints.iter().map(size).sum();
        let mut sizes = vec![
            ("endpoints", self.endpoints.capacity()),
            ("runnable", self.runnable.capacity()),
            ("wakes", self.wakes.len()),
            ("flights", self.flights.capacity()),
            ("to bury", self.to_bury.capacity()),
            ("burying", self.burying.capacity()),
            ("fresh lanes", of_endpoints(|endpoint| endpoint.fresh.capacity())),
            ("tried lanes", of_endpoints(|endpoint| endpoint.tried.capacity())),
            ("lanes to bury", of_endpoints(|endpoint| endpoint.to_bury.capacity())),
            ("timers", of_endpoints(|endpoint| endpoint.timers.capacity())),
            ("ages", of_endpoints(|endpoint| endpoint.ages.buckets())),
            ("segments", self.backlog.groups().count()),
        ];
        sizes.extend(self.lanes.sizes());
        sizes
    }
}

struct Days {
    rng: fastrand::Rng,
    schedule: Schedule,
    now: u64,
    slot: u16,
    segment: u64,
    in_segment: u32,
    /// When each attempt in flight reports: (time, lane, events, endpoint).
    flights: BinaryHeap<Reverse<(u64, LaneId, u32, u64)>>,
    ended: u64,
}

fn name(endpoint: u64) -> EndpointName {
    EndpointName::of(Plugin::new(endpoint + 1).unwrap())
}

impl Days {
    fn open_segment(&mut self) {
        // As the store does: a segment goes when nothing of it waits, and its slot is used again.
        let empty: Vec<u16> =
            self.schedule.backlog.groups().filter(|(_, group)| group.live() == 0).map(|(slot, _)| slot).collect();
        empty.into_iter().for_each(|slot| self.schedule.backlog.close(slot));
        self.slot = (0..).find(|slot| self.schedule.backlog.group(*slot).is_none()).unwrap();
        self.segment += 1;
        self.in_segment = 0;
        self.schedule.backlog.open(self.slot, self.segment);
    }

    fn post(&mut self) {
        if self.in_segment == SEGMENT_EVENTS {
            self.schedule.backlog.seal(self.slot);
            self.open_segment();
        }
        self.in_segment += 1;
        // Half of them are customers of this day.
        let day = self.now / DAY;
        let customer =
            if self.rng.bool() { self.rng.u64(0..1_000) } else { 10_000 * (day + 1) + self.rng.u64(0..2_000) };
        let key = LaneKey(customer.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        if self.rng.u8(0..50) == 0 {
            self.ended += self.schedule.withdraw(key, u64::MAX, self.now).events.len() as u64;
        }
        let second = (self.now / SECOND) as u32;
        let handle = self.schedule.backlog.append(self.slot, None, self.in_segment * 100, second, 100).unwrap();
        self.schedule.appended(handle, key, name(customer % ENDPOINTS), self.now);
    }

    /// A quarter of the endpoints is in trouble for an hour, each hour others.
    fn verdict(&mut self, endpoint: EndpointName, is_well: bool) -> (u64, Verdict) {
        let hour = self.now / (3_600 * SECOND);
        let trouble = (endpoint.number() * 7 + hour * 3) % 16;
        match trouble {
            0..=2 if !is_well => (SECOND / 10, Verdict::Failed { hold: None, halves: false }),
            3 if !is_well => (10 * SECOND, Verdict::Failed { hold: None, halves: true }),
            _ => (SECOND / 20, Verdict::Delivered),
        }
    }

    fn run_until(&mut self, until: u64, is_well: bool) {
        loop {
            while let Some(start) = self.schedule.next(self.now) {
                let (takes, _) = self.verdict(start.endpoint, is_well);
                let count = start.events.len() as u32;
                self.flights.push(Reverse((self.now + takes, start.lane, count, start.endpoint.number())));
            }
            while let Some(burial) = self.schedule.next_bury() {
                self.ended += burial.events.len() as u64;
                self.schedule.buried(&burial, self.now);
            }
            let report = self.flights.peek().map(|Reverse((at, ..))| *at);
            let next = report.into_iter().chain(self.schedule.wake_at()).min().unwrap_or(until).max(self.now);
            if next >= until {
                self.now = until;
                return;
            }
            self.now = next;
            while let Some(Reverse((_, lane, count, endpoint))) =
                self.flights.peek().copied().filter(|Reverse((at, ..))| *at <= next)
            {
                self.flights.pop();
                let (_, verdict) = self.verdict(EndpointName::from_number(endpoint), is_well);
                let moment = Moment { now: next, second: next / SECOND, dice: self.rng.f64() };
                let outcome = self.schedule.reported(lane, count, verdict, moment);
                self.ended += outcome.delivered.len() as u64;
            }
        }
    }
}

#[test]
fn ten_days_of_traffic_leave_nothing_behind() {
    let backoff =
        Backoff { initial: Duration::from_secs(1), multiplier: 2.0, max: Duration::from_secs(300), randomization: 0.5 };
    let rules = Rules {
        delays: Delays::new(&backoff),
        max_age_s: 3_600,
        max_attempts: 0,
        max_refusals: 5,
        breaker_failures: 10,
        max_in_flight: 256,
        events_per_push: 50,
    };
    let mut days = Days {
        rng: fastrand::Rng::with_seed(10),
        schedule: Schedule::new(rules),
        now: 0,
        slot: 0,
        segment: 0,
        in_segment: 0,
        flights: BinaryHeap::new(),
        ended: 0,
    };
    days.open_segment();
    for endpoint in 0..ENDPOINTS {
        days.schedule.put_endpoint(name(endpoint), Limits { rate_per_second: 20.0, burst: 5, concurrency: 8 }, 0);
    }
    let mut second_day = Vec::new();
    for day in 0..10 {
        for event in 0..EVENTS_A_DAY {
            let due = day * DAY + event * (DAY - 3_600 * SECOND) / EVENTS_A_DAY;
            days.run_until(due, false);
            days.post();
        }
        // The day ends quietly.
        days.run_until((day + 1) * DAY, true);
        assert_eq!((days.schedule.events(), days.schedule.in_flight()), (0, 0), "day {day}");
        let sizes = days.schedule.sizes();
        println!("day {day}: {sizes:?}");
        if day == 1 {
            second_day = sizes;
        } else if day == 9 {
            for ((what, then), (_, now)) in second_day.iter().zip(&sizes) {
                assert!(*now <= 2 * then + 16, "{what}: {then} after two days, {now} after ten");
            }
        }
    }
    assert!(days.ended > 9 * EVENTS_A_DAY, "{}", days.ended);
}
