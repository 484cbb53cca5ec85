//! What came of an attempt.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use super::endpoint::Down;
use super::lanes::{Lane, LaneId, Retry, State};
use super::starts::Flight;
use super::{Schedule, micros};
use crate::domain::backlog::Handle;
use crate::domain::keys::LaneKey;
use crate::domain::verdict::{DeathReason, Verdict};

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
pub struct ToRecord {
    /// The lane, for the record.
    pub lane: Option<LaneKey>,
    /// Events that are delivered and settled now.
    pub delivered: Vec<Handle>,
    /// Sequence numbers of events delivered although they were withdrawn in flight; settled before, and perhaps in no
    /// segment any more.
    pub delivered_late: Vec<u64>,
    /// Events withdrawn in flight that were not delivered; settled before.
    pub withdrawn_late: u32,
    /// What the lane's head waits with now.
    pub deferred: Option<Deferred>,
    /// Whether an earlier `deferred` of the lane is over.
    pub retry_is_over: bool,
    /// What the breaker did.
    pub breaker: Option<Breaker>,
    /// How long the endpoint is to be left alone from now on, if that is longer than before.
    pub held: Option<Duration>,
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

impl Schedule {
    /// Takes the report on an attempt, with how many of the offered events it carried.
    pub fn reported(&mut self, lane_id: LaneId, taken: u32, verdict: Verdict, moment: Moment) -> ToRecord {
        let Some(flight) = self.flights.remove(&lane_id) else { return ToRecord::default() };
        let Some(lane) = self.lanes.get(lane_id).copied() else { return ToRecord::default() };
        // Of another receiver's answer only this counts; the one that it is to go to now, if any, has not said a word.
        let is_gone = self.endpoints.get(lane.endpoint as usize).is_some_and(|endpoint| endpoint.limits.is_none());
        let is_heeded = is_gone || matches!(verdict, Verdict::Delivered | Verdict::Damaged | Verdict::Unread);
        let verdict = if flight.is_outdated && !is_heeded { Verdict::Again } else { verdict };
        let mut outcome = ToRecord { lane: Some(lane.key), ..ToRecord::default() };
        let held_until =
            |schedule: &Schedule| schedule.endpoints.get(lane.endpoint as usize).map_or(0, |it| it.held_until);
        let before = held_until(self);
        outcome.breaker = self.note_verdict(&lane, &flight, verdict, moment);
        let held = Some(held_until(self)).filter(|until| *until > before.max(moment.now));
        outcome.held = held.map(|until| Duration::from_micros(until - moment.now));
        let retry = self.lanes.retry(lane_id).copied();
        if let Some(seqs) = &flight.withdrawn {
            // Settled and uncounted already, when they were withdrawn.
            let delivered = if verdict == Verdict::Delivered { taken as usize } else { 0 };
            outcome.delivered_late = seqs.iter().copied().take(delivered).collect();
            outcome.withdrawn_late = (seqs.len() - outcome.delivered_late.len()) as u32;
            self.make_ready(lane_id, moment.now);
        } else {
            match verdict {
                Verdict::Again => {
                    // It may have been seen: the same body and `webhook-id` go again, as the next attempt at this receiver.
                    if taken > 0 {
                        let first = Retry { mark: flight.mark, ..Retry::default() };
                        let retry = retry.unwrap_or(first);
                        let fixed = if retry.fixed == 0 { taken } else { retry.fixed };
                        let tries = retry.tries.saturating_add(u32::from(!flight.is_outdated));
                        let retry = Retry { fixed, tries, ..retry };
                        self.lanes.set_retry(lane_id, Some(retry));
                        outcome.deferred = Some(Deferred { head: lane.head, retry, wait: Duration::ZERO });
                    }
                    self.make_ready(lane_id, moment.now);
                }
                Verdict::Unread => self.postpone(lane_id, &flight, moment),
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
        if flight.bury > 0 {
            let left = flight.bury.saturating_sub(outcome.delivered.len() as u32);
            let is_waiting = |lane: &Lane| matches!(lane.state, State::Ready | State::Waiting);
            // The attempt itself gave some up: the others go after them.
            if let Some(burying) = self.burying.get_mut(&lane_id) {
                burying.then = left.saturating_sub(burying.left);
            }
            if left > 0 && self.lanes.get(lane_id).is_some_and(is_waiting) {
                outcome.deferred = None;
                outcome.retry_is_over = true;
                self.begin_burying(lane_id, left, DeathReason::Buried);
            }
        }
        self.touch(lane.endpoint, moment.now);
        outcome
    }

    /// What a report says of the endpoint.
    pub(super) fn note_verdict(
        &mut self,
        lane: &Lane,
        flight: &Flight,
        verdict: Verdict,
        moment: Moment,
    ) -> Option<Breaker> {
        if flight.is_outdated {
            return None;
        }
        let rules = Arc::clone(&self.rules);
        let endpoint = self.endpoint_mut(lane.endpoint)?;
        endpoint.in_flight = endpoint.in_flight.saturating_sub(1);
        if let Some(down) = endpoint.down.as_mut().filter(|_| flight.is_probe) {
            down.is_probing = false;
        }
        let hold = |wait: Duration| moment.now.saturating_add(micros(wait));
        match verdict {
            Verdict::Again | Verdict::Damaged => None,
            Verdict::Unread => {
                if let Some(down) = endpoint.down.as_mut().filter(|_| flight.is_probe) {
                    down.due = hold(rules.delays.delay(1, moment.dice));
                }
                None
            }
            Verdict::Delivered => {
                let came_up = endpoint.succeeded(moment.now);
                if came_up {
                    let due = std::mem::take(&mut endpoint.timers);
                    self.requeue(lane.endpoint, due.into_sorted_vec());
                }
                came_up.then_some(Breaker::CameUp)
            }
            Verdict::Throttled(wait) => {
                // The others of a wave say what the first one said already.
                let is_first = endpoint.held_until <= moment.now;
                if is_first {
                    endpoint.throttles = endpoint.throttles.saturating_add(1);
                }
                let delay = || is_first.then(|| rules.delays.delay(endpoint.throttles, moment.dice));
                // A wait of nothing is none: what it is to end is a wave.
                if let Some(wait) = wait.filter(|wait| !wait.is_zero()).or_else(delay) {
                    endpoint.held_until = endpoint.held_until.max(hold(wait));
                }
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
                        down.due = hold(rules.delays.delay(down.probes + 1, moment.dice));
                        self.expire_ready(lane.endpoint, moment.second);
                    }
                    return None;
                }
                if !endpoint.failed(lane.key, rules.breaker_failures) {
                    return None;
                }
                let due = hold(rules.delays.delay(1, moment.dice));
                endpoint.down = Some(Down { probes: 0, due, is_probing: false });
                let timers = std::mem::take(&mut endpoint.timers);
                self.requeue(lane.endpoint, timers.into_sorted_vec());
                Some(Breaker::WentDown)
            }
        }
    }

    pub(super) fn delivered(&mut self, lane_id: LaneId, taken: u32, outcome: &mut ToRecord, now: u64) {
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

    /// Lets a lane wait for the shortest delay, as it is otherwise.
    fn postpone(&mut self, lane_id: LaneId, flight: &Flight, moment: Moment) {
        let Some(lane) = self.lanes.get(lane_id).copied() else { return };
        let Some(endpoint) = self.endpoints.get(lane.endpoint as usize) else { return };
        if endpoint.limits.is_none() || endpoint.down.is_some() {
            // It is given up, or waits for its turn as a probe.
            return self.make_ready(lane_id, moment.now);
        }
        let first = Retry { mark: flight.mark, ..Retry::default() };
        let mut retry = self.lanes.retry(lane_id).copied().unwrap_or(first);
        retry.due = moment.now.saturating_add(micros(self.rules.delays.delay(1, moment.dice)));
        self.lanes.set_retry(lane_id, Some(retry));
        self.wait_until(lane_id, lane.endpoint, retry.due);
    }

    fn wait_until(&mut self, lane_id: LaneId, endpoint: u32, due: u64) {
        if let Some(lane) = self.lanes.get_mut(lane_id) {
            lane.state = State::Waiting;
        }
        if let Some(endpoint) = self.endpoint_mut(endpoint) {
            endpoint.timers.push(Reverse((due, lane_id)));
        }
    }

    pub(super) fn not_delivered(
        &mut self,
        lane_id: LaneId,
        taken: u32,
        verdict: Verdict,
        flight: &Flight,
        outcome: &mut ToRecord,
        moment: Moment,
    ) {
        let Some(lane) = self.lanes.get(lane_id).copied() else { return };
        let Some(endpoint) = self.endpoints.get(lane.endpoint as usize) else { return };
        let (successes, elsewhere, is_down) =
            (endpoint.successes, endpoint.successes_elsewhere, endpoint.down.is_some());
        let first = Retry { mark: flight.mark, ..Retry::default() };
        let mut retry = self.lanes.retry(lane_id).copied().unwrap_or(first);
        if retry.mark < elsewhere {
            // What another receiver took and refused says nothing of this one.
            retry = Retry { mark: elsewhere, own: 0, refusals: 0, ..retry };
        }
        retry.tries = retry.tries.saturating_add(1);
        retry.fixed = taken;
        if !matches!(verdict, Verdict::Throttled(_)) && !flight.is_probe {
            retry.attempts = retry.attempts.saturating_add(1);
        }
        let others_succeeded = successes.saturating_sub(retry.mark) > retry.own;
        if verdict == Verdict::Refused && others_succeeded {
            retry.refusals = retry.refusals.saturating_add(1);
        }
        let max_attempts = self.rules.max_attempts;
        let is_refused = verdict == Verdict::Refused && taken == 1 && retry.refusals >= self.rules.max_refusals;
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
            // Until it is buried: at a stop that may come after the next start.
            outcome.deferred = Some(Deferred { head: lane.head, retry, wait: Duration::ZERO });
            self.lanes.set_retry(lane_id, Some(retry));
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
        let wait = if is_down { Duration::ZERO } else { self.rules.delays.delay(retry.made(), moment.dice) };
        retry.due = moment.now.saturating_add(micros(wait));
        outcome.deferred = Some(Deferred { head: lane.head, retry, wait });
        self.lanes.set_retry(lane_id, Some(retry));
        if is_down {
            self.make_ready(lane_id, moment.now);
        } else {
            self.wait_until(lane_id, lane.endpoint, retry.due);
        }
    }
}

/// What is left to be sent singly after `count` events are settled, `own` of them delivered.
pub(super) fn after_singles(retry: &Retry, count: u32, own: u64) -> Option<Retry> {
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
