//! One endpoint as the schedule sees it: who is ready, what its limits allow, whether it is down.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::num::NonZeroU32;
use std::time::Duration;

use governor::clock::{Clock, FakeRelativeClock};
use governor::middleware::NoOpMiddleware;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};

use super::lanes::LaneId;
use super::views::WaitsFor;
use crate::domain::ages::Ages;
use crate::domain::endpoint::{EndpointName, Limits};
use crate::domain::keys::LaneKey;

/// The governor's clock is told the time by the schedule, like everything here.
pub(super) type ToldClock = FakeRelativeClock;
type Limiter = RateLimiter<NotKeyed, InMemoryState, ToldClock, NoOpMiddleware<<ToldClock as Clock>::Instant>>;

/// Attempts in flight that an endpoint begins with.
const WINDOW_FIRST: u32 = 2;
/// Lanes that must have failed before an endpoint is down.
const DOWN_LANES_MIN: usize = 3;

/// An endpoint that is down: when the next probe goes.
#[derive(Debug)]
pub(super) struct Down {
    pub probes: u32,
    pub due: u64,
    pub is_probing: bool,
}

/// When an endpoint was paused, so that this time does not count as age (contract §5).
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Pauses {
    /// (from, until) in Unix seconds, oldest first; the last one lasts while it has no end.
    spans: Vec<(u64, Option<u64>)>,
}

/// Pauses beyond which the oldest are taken for one: an entry of the store is small.
const SPANS_MAX: usize = 64;

impl Pauses {
    /// Whether the endpoint is paused now.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.spans.last().is_some_and(|(_, until)| until.is_none())
    }

    /// Begins a pause, unless one lasts. What ended before `forget_before` is of no interest any more.
    pub fn begin(&mut self, now_s: u64, forget_before: u64) {
        self.spans.retain(|(_, until)| until.is_none_or(|until| until >= forget_before));
        if !self.is_paused() {
            self.spans.push((now_s, None));
        }
        if self.spans.len() > SPANS_MAX {
            let (_, until) = self.spans.remove(1);
            if let Some(first) = self.spans.first_mut() {
                first.1 = until;
            }
        }
    }

    /// Ends the pause that lasts.
    pub fn end(&mut self, now_s: u64) {
        if let Some((_, until @ None)) = self.spans.last_mut() {
            *until = Some(now_s);
        }
    }

    /// Whether nothing is remembered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Seconds from `since` to `now` in which the endpoint was not paused.
    #[must_use]
    pub fn age(&self, since: u64, now: u64) -> u64 {
        let paused = self.spans.iter().map(|(from, until)| {
            let (from, until) = (since.max(*from), now.min(until.unwrap_or(now)));
            until.saturating_sub(from)
        });
        now.saturating_sub(since).saturating_sub(paused.sum())
    }
}

/// Failed attempts in a row.
#[derive(Debug, Default)]
struct Streak {
    failures: u32,
    lanes: Vec<LaneKey>,
}

#[derive(Debug)]
pub(super) struct Endpoint {
    pub name: EndpointName,
    /// `None`: no longer configured.
    pub limits: Option<Limits>,
    pub pauses: Pauses,
    /// With the rate and the burst that it is for.
    limiter: Option<(f64, u32, Limiter)>,
    /// Lanes that have not failed.
    pub fresh: VecDeque<LaneId>,
    /// Lanes that have failed and are due again.
    pub tried: VecDeque<LaneId>,
    /// Lanes that wait, by when they are due. An entry may be stale: the lane says.
    pub timers: BinaryHeap<Reverse<(u64, LaneId)>>,
    /// Lanes whose first events are to be given up. An entry may be stale.
    pub to_bury: VecDeque<LaneId>,
    pub events: u64,
    /// But for those that are outdated.
    pub in_flight: u32,
    pub window: u32,
    pub successes: u64,
    /// How many there had been when it became another receiver.
    pub successes_elsewhere: u64,
    pub last_success: Option<u64>,
    pub held_until: u64,
    /// Since and until when the rate forbids another start.
    rate_limited_from: u64,
    pub rate_limited_until: u64,
    /// Time for which it had forbidden one before that, microseconds.
    rate_limited_before: u64,
    pub throttles: u32,
    pub down: Option<Down>,
    streak: Streak,
    pub ages: Ages,
    pub is_runnable: bool,
    pub wake: u64,
    takes_tried_next: bool,
}

impl Endpoint {
    pub(super) fn new(name: EndpointName) -> Endpoint {
        Endpoint {
            name,
            limits: None,
            pauses: Pauses::default(),
            limiter: None,
            fresh: VecDeque::new(),
            tried: VecDeque::new(),
            timers: BinaryHeap::new(),
            to_bury: VecDeque::new(),
            events: 0,
            in_flight: 0,
            window: WINDOW_FIRST,
            successes: 0,
            successes_elsewhere: 0,
            last_success: None,
            held_until: 0,
            rate_limited_from: 0,
            rate_limited_until: 0,
            rate_limited_before: 0,
            throttles: 0,
            down: None,
            streak: Streak::default(),
            ages: Ages::default(),
            is_runnable: false,
            wake: 0,
            takes_tried_next: false,
        }
    }

    /// Takes new limits. The limiter is kept where rate and burst stay, and another one has no more permits at hand than
    /// the last one had: neither a reload nor an endpoint that goes and comes opens a second burst.
    pub(super) fn set_limits(&mut self, limits: Limits, clock: &ToldClock, now: u64) {
        let (rate, burst) = (limits.rate_per_second, limits.burst);
        let is_same =
            self.limiter.as_ref().is_some_and(|(of_rate, of_burst, _)| (*of_rate, *of_burst) == (rate, burst));
        if !is_same {
            let cells = NonZeroU32::new(burst).unwrap_or(NonZeroU32::MIN);
            // governor counts in nanoseconds of 64 bits: a burst may not fill more than half of them.
            let period_max = Duration::from_nanos((1 << 62) / u64::from(cells.get()));
            let period = Duration::try_from_secs_f64(1.0 / rate).unwrap_or(period_max);
            let at_hand = self.limiter.take().map(|(_, burst, limiter)| permits(&limiter, burst));
            self.limiter = Quota::with_period(period.clamp(Duration::from_nanos(1), period_max))
                .map(|quota| (rate, burst, RateLimiter::direct_with_clock(quota.allow_burst(cells), clock.clone())));
            let used = at_hand.and_then(|at_hand| NonZeroU32::new(burst.saturating_sub(at_hand)));
            if let (Some((_, _, limiter)), Some(used)) = (&self.limiter, used) {
                // It has them all.
                drop(limiter.check_n(used));
            }
            self.end_rate_limit(now);
        }
        self.limits = Some(limits);
        self.window = self.window.min(limits.concurrency).max(1);
    }

    pub(super) fn has_ready(&self) -> bool {
        !self.fresh.is_empty() || !self.tried.is_empty()
    }

    /// When it may start something, if anything is ready.
    pub(super) fn open_at(&self) -> u64 {
        self.opens().1
    }

    /// What is in the way of a start for longest, and until when.
    pub(super) fn opens(&self) -> (WaitsFor, u64) {
        let probe = self.down.as_ref().map_or(0, |down| down.due);
        let others = [(WaitsFor::Probe, probe), (WaitsFor::Rate, self.rate_limited_until)];
        let later = |one: (WaitsFor, u64), other: (WaitsFor, u64)| if other.1 > one.1 { other } else { one };
        others.into_iter().fold((WaitsFor::Receiver, self.held_until), later)
    }

    /// Attempts that may be in flight. `is_crowded`: more than half of all that there may be are.
    pub(super) fn room(&self, now: u64, is_crowded: bool) -> u32 {
        let Some(limits) = self.limits else { return 0 };
        if self.pauses.is_paused() {
            return 0;
        }
        if self.down.as_ref().is_some_and(|down| down.is_probing) {
            return 0;
        }
        if self.down.is_some() {
            return self.in_flight + 1;
        }
        let is_proven = self.last_success.is_some_and(|at| now.saturating_sub(at) < 60_000_000);
        if is_crowded && !is_proven {
            return 1;
        }
        self.window.min(limits.concurrency)
    }

    /// The next ready lane: untried ones first while down, else both queues in turn.
    pub(super) fn take_ready(&mut self) -> Option<LaneId> {
        let tried_first = self.down.is_none() && self.takes_tried_next;
        self.takes_tried_next = !tried_first;
        let (first, second) =
            if tried_first { (&mut self.tried, &mut self.fresh) } else { (&mut self.fresh, &mut self.tried) };
        first.pop_front().or_else(|| second.pop_front())
    }

    /// Asks for a permit to begin an attempt.
    pub(super) fn take_permit(&mut self, clock: &ToldClock, now: u64) -> bool {
        let Some((_, _, limiter)) = &self.limiter else { return false };
        match limiter.check() {
            Ok(()) => true,
            Err(not_until) => {
                let wait = not_until.wait_time_from(clock.now());
                let wait = u64::try_from(wait.as_micros()).unwrap_or(u64::MAX).saturating_add(1);
                self.end_rate_limit(now);
                self.rate_limited_from = now;
                self.rate_limited_until = now.saturating_add(wait);
                false
            }
        }
    }

    /// Time for which the rate has forbidden a start, microseconds.
    pub(super) fn rate_limited(&self, now: u64) -> u64 {
        let lasts = now.min(self.rate_limited_until).saturating_sub(self.rate_limited_from);
        self.rate_limited_before.saturating_add(lasts)
    }

    fn end_rate_limit(&mut self, now: u64) {
        self.rate_limited_before = self.rate_limited(now);
        (self.rate_limited_from, self.rate_limited_until) = (0, 0);
    }

    /// Is as at the start, as far as that is the receiver's doing.
    pub(super) fn forget_failures(&mut self) {
        self.throttles = 0;
        self.down = None;
        self.streak = Streak::default();
        self.window = WINDOW_FIRST;
        self.last_success = None;
        self.in_flight = 0;
        self.successes_elsewhere = self.successes;
    }

    /// Notes a success. Says whether the endpoint was down and is up again.
    pub(super) fn succeeded(&mut self, now: u64) -> bool {
        self.successes += 1;
        self.last_success = Some(now);
        self.throttles = 0;
        self.streak = Streak::default();
        let concurrency = self.limits.map_or(1, |limits| limits.concurrency);
        self.window = self.window.saturating_add(1).min(concurrency);
        self.down.take().is_some()
    }

    /// Notes a failure of any kind but 429. Says whether that was the one too many.
    pub(super) fn failed(&mut self, lane: LaneKey, failures_max: u32) -> bool {
        self.streak.failures = self.streak.failures.saturating_add(1);
        if self.streak.lanes.len() < DOWN_LANES_MIN && !self.streak.lanes.contains(&lane) {
            self.streak.lanes.push(lane);
        }
        self.down.is_none() && self.streak.failures >= failures_max && self.streak.lanes.len() >= DOWN_LANES_MIN
    }
}

/// Takes all permits that a limiter has at hand, at most its burst, and says how many these were.
fn permits(limiter: &Limiter, burst: u32) -> u32 {
    let powers = (0..u32::BITS).rev().filter_map(|bit| NonZeroU32::new(1 << bit).filter(|count| count.get() <= burst));
    powers.filter(|count| matches!(limiter.check_n(*count), Ok(Ok(())))).map(NonZeroU32::get).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_at_the_ends_of_their_ranges_are_taken() {
        for rate_per_second in [f64::MIN_POSITIVE, 5e-324, 1e-9, 1.0, 1e12, f64::MAX] {
            for burst in [1, u32::MAX] {
                let mut endpoint = Endpoint::new(EndpointName::DEFAULT);
                let clock = ToldClock::default();
                endpoint.set_limits(Limits { rate_per_second, burst, concurrency: 1 }, &clock, 0);
                assert!(endpoint.take_permit(&clock, 0), "the first one is always free: {rate_per_second} {burst}");
                endpoint.take_permit(&clock, u64::MAX);
            }
        }
    }

    #[test]
    fn time_in_which_an_endpoint_was_paused_is_no_age() {
        let mut pauses = Pauses::default();
        assert_eq!(pauses.age(100, 160), 60);
        pauses.begin(110, 0);
        pauses.begin(115, 0);
        assert!(pauses.is_paused());
        assert_eq!(pauses.age(100, 160), 10, "it lasts");
        pauses.end(130);
        pauses.end(140);
        assert_eq!(
            (pauses.is_paused(), pauses.age(100, 160), pauses.age(120, 160), pauses.age(140, 160)),
            (false, 40, 30, 20)
        );
        for round in 0..200 {
            pauses.begin(1_000 + 10 * round, 0);
            pauses.end(1_005 + 10 * round);
        }
        assert!(serde_json::to_string(&pauses).unwrap().len() < 3_000);
        pauses.begin(100_000, 99_000);
        assert_eq!(pauses.spans.len(), 1, "what is long over is forgotten");
    }
}
