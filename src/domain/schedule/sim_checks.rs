//! What the simulation holds the schedule to, whenever something starts or ends.

use std::time::Duration;

use super::sim::*;
use super::*;
use crate::domain::verdict::{Report, Verdict};

impl Sim {
    pub(super) fn start_all(&mut self) {
        while let Some(start) = self.schedule.next(self.now) {
            let lane = self.events[self.by_handle[&start.events[0]]].lane;
            let endpoint = self.endpoint_of(lane);
            assert_eq!(start.endpoint, name(endpoint));
            assert!(!self.pauses[endpoint].is_paused(), "it is paused");
            assert!(!self.removed[endpoint], "it is gone");
            assert!(!self.flights.iter().any(|(_, other)| other.lane == start.lane), "two pushes of a lane");
            let waiting = self.waiting_in(lane);
            let offered: Vec<usize> = start.events.iter().map(|handle| self.by_handle[handle]).collect();
            assert_eq!(offered, waiting[..offered.len()], "not the first of the lane, in order");
            let withdrawn = self.withdraw_again.get(&lane);
            assert!(
                withdrawn.is_none_or(|(events, _)| events.iter().all(|event| !offered.contains(event))),
                "was withdrawn"
            );
            assert!(self.due.remove(&lane).is_none_or(|due| due <= self.now), "before it was due");
            let starts = &mut self.starts[endpoint];
            starts.push_back(self.now);
            while starts.front().is_some_and(|at| at + SECOND <= self.now) {
                starts.pop_front();
            }
            let allowed = limits().rate_per_second as usize + limits().burst as usize;
            assert!(starts.len() <= allowed, "{} starts in a second", starts.len());
            let (mood, _) = self.moods[endpoint];
            let takes = match mood {
                Mood::Hanging => 10 * SECOND,
                Mood::Well | Mood::Broken | Mood::Throttling => self.rng.u64(1_000..SECOND),
            };
            self.flights.push_back((self.now + takes, start));
            let is_mine = |other: &Start| other.endpoint == name(endpoint) && !self.outdated.contains(&other.lane);
            let mine = self.flights.iter().filter(|(_, other)| is_mine(other)).count();
            assert!(mine <= limits().concurrency as usize, "beyond the endpoint's concurrency");
            assert!(self.flights.len() <= rules().max_in_flight as usize);
            assert_eq!(self.schedule.in_flight(), self.flights.len());
        }
        // One at a time, so that others wait for theirs.
        while self.burials.is_empty()
            && let Some(burial) = self.schedule.next_bury()
        {
            let is_twice = |(_, other): &(u64, Burial)| other.lane == burial.lane;
            assert!(!self.burials.iter().any(is_twice), "two burials of a lane");
            for handle in &burial.events {
                let event = self.by_handle[handle];
                assert_eq!(self.events[event].fate, Fate::Waiting);
                match burial.reason {
                    DeathReason::Refused => assert!(self.events[event].is_poison, "a good event was given up"),
                    DeathReason::Expired => {
                        let pauses = &self.pauses[self.endpoint_of(self.events[event].lane)];
                        let age = pauses.age(u64::from(self.events[event].second), self.now / SECOND);
                        assert!(age > rules().max_age_s, "{age} s is not too old");
                    }
                    DeathReason::Buried => assert!(self.given_up.contains(&event), "nobody gave it up"),
                    DeathReason::EndpointRemoved => assert!(self.orphans.contains(&event), "its endpoint is there"),
                    DeathReason::Gone => assert!(self.unwanted.contains(&event), "it was not refused for good"),
                    DeathReason::Attempts | DeathReason::Damaged => unreachable!("{:?}", burial.reason),
                }
            }
            let takes = self.rng.u64(0..2 * SECOND);
            self.burials.push((self.now + takes, burial));
        }
    }

    pub(super) fn end_burial(&mut self, at: usize) {
        let (_, burial) = self.burials.remove(at);
        let lane = self.events[self.by_handle[&burial.events[0]]].lane;
        if self.rng.u8(0..10) == 0 {
            self.schedule.not_buried(&burial);
        } else {
            for handle in &burial.events {
                let event = self.by_handle[handle];
                assert_eq!(self.events[event].fate, Fate::Waiting);
                self.events[event].fate = Fate::Buried;
            }
            self.schedule.buried(&burial, self.now);
        }
        if let Some((meant, until)) = self.withdraw_again.remove(&lane) {
            let later: Vec<usize> = self.waiting_in(lane).into_iter().filter(|event| !meant.contains(event)).collect();
            self.withdraw_lane(lane, until);
            assert!(!self.withdraw_again.contains_key(&lane));
            assert_eq!(self.waiting_in(lane), later, "what was meant, and no more");
        }
    }

    pub(super) fn report(&mut self, at: usize) {
        let (_, start) = self.flights.remove(at).unwrap();
        let is_outdated = self.outdated.remove(&start.lane);
        let lane = self.events[self.by_handle[&start.events[0]]].lane;
        let taken = if start.is_fixed { start.events.len() } else { self.rng.usize(1..=start.events.len()) };
        let carried: Vec<usize> = start.events[..taken].iter().map(|handle| self.by_handle[handle]).collect();
        let report = match self.moods[self.endpoint_of(lane)].0 {
            Mood::Well if carried.iter().any(|event| self.events[*event].is_poison) => 400,
            Mood::Well => 200,
            Mood::Broken => *self.rng.choice(&[500u16, 503, 302]).unwrap(),
            Mood::Throttling => 429,
            Mood::Hanging => 0,
        };
        let retry_after = self.rng.bool().then(|| Duration::from_secs(self.rng.u64(0..20)));
        let report = if report == 0 { Report::Timeout } else { Report::Status { code: report, retry_after } };
        let (taken, verdict) = match self.rng.u8(0..40) {
            _ if self.is_healed => (taken, report.verdict()),
            // The connection was closed while it was idle; or nothing was sent, because the address changed.
            0 => (if self.rng.bool() { taken } else { 0 }, Verdict::Again),
            1 => (0, Verdict::Unread),
            2 => {
                self.unwanted.extend(carried);
                (taken, Verdict::Gone)
            }
            _ => (taken, report.verdict()),
        };
        let moment = Moment { now: self.now, second: self.now / SECOND, dice: self.rng.f64() };
        let outcome = self.schedule.reported(start.lane, taken as u32, verdict, moment);
        let is_delayed = outcome.deferred.is_some_and(|deferred| !deferred.wait.is_zero());
        assert!(
            !is_outdated
                || (outcome.breaker, outcome.held, is_delayed) == (None, None, false)
                || verdict == Verdict::Delivered
                || verdict == Verdict::Unread
        );
        for handle in &outcome.delivered {
            let event = self.by_handle[handle];
            assert_eq!(self.events[event].fate, Fate::Waiting);
            self.events[event].fate = Fate::Delivered;
        }
        let late = outcome.delivered_late.len() as u32 + outcome.withdrawn_late;
        if late > 0 {
            assert_eq!(late as usize, start.events.len());
            let count = self.withdrawn_in_flight.len();
            self.withdrawn_in_flight.retain(|event| self.events[*event].lane != lane);
            assert_eq!(count - self.withdrawn_in_flight.len(), late as usize);
        }
        if outcome.breaker.is_some() {
            self.due.clear();
        }
        if outcome.retry_is_over {
            self.recorded.remove(&lane);
        }
        if let Some(deferred) = outcome.deferred {
            let due = self.now + micros(deferred.wait);
            self.due.insert(lane, due);
            self.recorded.insert(lane, (self.by_handle[&deferred.head], deferred.retry, due));
            assert!(deferred.wait <= rules().delays.delay(deferred.retry.made(), 1.0));
        }
    }

    pub(super) fn check_counts(&self) {
        let waiting = self.events.iter().filter(|event| event.fate == Fate::Waiting).count() as u64;
        assert_eq!(self.schedule.events(), waiting);
        for view in self.schedule.endpoints(self.now) {
            let of_it =
                |event: &&SimEvent| event.fate == Fate::Waiting && name(event.lane % self.endpoints) == view.name;
            let oldest = self.events.iter().filter(of_it).map(|event| event.second).min();
            assert_eq!(view.oldest, oldest);
            assert_eq!(view.events, self.events.iter().filter(of_it).count() as u64);
        }
    }
}
