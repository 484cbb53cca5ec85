//! What came of attempts: recorded, counted, told to the schedule.

use std::sync::Arc;

use super::attempt::Done;
use super::{LANE_ERRORS_MAX, Relay};
use crate::clock;
use crate::domain::endpoint::EndpointName;
use crate::domain::schedule::{Breaker, LaneId, Moment};
use crate::domain::verdict::{AttemptResult, Verdict};
use crate::store::{Ending, Note};

impl Relay {
    pub(super) fn take_report(&mut self, done: Done) {
        self.stages.remove(&done.lane);
        let metrics = self.metrics_of(done.endpoint);
        if let Some(result) = done.result {
            metrics.attempt(result);
            self.metrics.push_seconds.observe(done.seconds);
        }
        // What an address does that is no longer the endpoint's says nothing of it.
        let is_outdated = self.schedule.is_outdated(done.lane);
        if done.result.is_some() && !is_outdated {
            self.seen.took(done.endpoint, done.seconds);
        }
        let delivered = done.verdict == Verdict::Delivered;
        if delivered {
            metrics.delivered(u64::from(done.messages));
            let now_ms = clock::wall_ms();
            for accepted_ms in &done.accepted_ms {
                let seconds = now_ms.saturating_sub(*accepted_ms) as f64 / 1_000.0;
                self.metrics.delivery_seconds.observe(seconds);
            }
        }
        if done.verdict == Verdict::Again && done.result.is_some() {
            self.broken.insert(done.lane);
        }
        if !is_outdated {
            self.note_error(done.lane, done.endpoint, done.result, done.detail);
        } else if delivered {
            self.lane_errors.remove(&done.lane);
        } else if let Some(problem) = done.detail
            && !self.targets.contains_key(&done.endpoint)
        {
            // The last that there is to say of what is given up now.
            self.note_lane_error(done.lane, problem.into());
        }
        self.report(done.lane, done.taken, done.verdict);
    }

    /// Keeps what a lane and its endpoint fail with. What only an operator or the endpoint's owner can mend is logged
    /// when it changes.
    fn note_error(
        &mut self,
        lane: LaneId,
        endpoint: EndpointName,
        result: Option<AttemptResult>,
        detail: Option<String>,
    ) {
        let Some(problem) = detail else {
            if result == Some(AttemptResult::Ok) {
                self.seen.last_errors.remove(&endpoint);
                self.lane_errors.remove(&lane);
            }
            return;
        };
        let known = self.seen.last_errors.get(&endpoint).filter(|known| ***known == *problem).cloned();
        let problem = known.clone().unwrap_or_else(|| problem.into());
        if known.is_none()
            && let Some(result @ (AttemptResult::Tls | AttemptResult::BlockedAddress)) = result
        {
            tracing::warn!(%endpoint, result = result.as_str(), %problem, "no push can be sent");
        }
        self.seen.last_errors.insert(endpoint, Arc::clone(&problem));
        self.note_lane_error(lane, problem);
    }

    fn note_lane_error(&mut self, lane: LaneId, problem: Arc<str>) {
        if self.lane_errors.len() < LANE_ERRORS_MAX || self.lane_errors.contains_key(&lane) {
            self.lane_errors.insert(lane, problem);
        }
    }

    pub(super) fn report(&mut self, lane: u32, taken: u32, verdict: Verdict) {
        let second = clock::wall_ms() / 1_000;
        let moment = Moment { now: clock::micros(), second, dice: clock::dice() };
        let endpoint = self.schedule.endpoint_of(lane);
        let outcome = self.schedule.reported(lane, taken, verdict, moment);
        let (Some(key), Some(endpoint)) = (outcome.lane, endpoint) else { return };
        if !self.lane_errors.is_empty() && self.schedule.waiting(key) == 0 {
            // Its place in the table may be another's next.
            self.lane_errors.remove(&lane);
        }
        self.count_buried(lane, 0);
        self.metrics.withdrawn.inc_by(u64::from(outcome.withdrawn_late));
        if !outcome.delivered_late.is_empty() {
            // Recorded as withdrawn before: whoever asks for such an event is told that it was pushed.
            let seqs = outcome.delivered_late;
            self.notes.push(Note::Settled { lane: key, ending: Ending::Delivered, retry_is_over: false, seqs });
        }
        if let Some(wait) = outcome.held {
            self.keep_hold(endpoint, wait);
        }
        match outcome.breaker {
            Some(Breaker::WentDown) => tracing::warn!(%endpoint, "the endpoint is down: probing it"),
            Some(Breaker::CameUp) => tracing::info!(%endpoint, "the endpoint is up again"),
            None => {}
        }
        if !outcome.delivered.is_empty() || outcome.retry_is_over {
            *self.ended.entry(endpoint).or_default() += outcome.delivered.len() as u64;
            let seqs = self.seqs(&outcome.delivered);
            self.notes.push(Note::Settled {
                lane: key,
                ending: Ending::Delivered,
                retry_is_over: outcome.retry_is_over,
                seqs,
            });
        }
        if let Some(deferred) = outcome.deferred {
            let wait_ms = u64::try_from(deferred.wait.as_millis()).unwrap_or(u64::MAX);
            self.notes.push(Note::Deferred {
                lane: key,
                head: self.schedule.backlog.seq(deferred.head),
                retry: deferred.retry,
                due_ms: clock::wall_ms().saturating_add(wait_ms),
            });
        }
    }
}
