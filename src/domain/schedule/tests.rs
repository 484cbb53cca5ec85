//! Single rules of the schedule.

mod burials;
mod receivers;

use std::collections::VecDeque;
use std::time::Duration;

use super::sim::{SECOND, limits, name, rules};
use super::*;
use crate::domain::backlog::PLACES_MAX;
use crate::domain::verdict::Verdict;

fn one_endpoint(rules: Rules, limits: Limits) -> Schedule {
    let mut schedule = Schedule::new(rules);
    schedule.backlog.open(0, 0);
    schedule.put_endpoint(name(0), limits, 0);
    schedule
}

fn append(schedule: &mut Schedule, lane: u64, endpoint: usize, second: u32, now: u64) -> Handle {
    let handle = schedule.backlog.append(0, None, 0, second, 100).unwrap();
    schedule.appended(handle, LaneKey(lane), name(endpoint), now);
    handle
}

fn at(now: u64) -> Moment {
    Moment { now, second: now / SECOND, dice: 0.5 }
}

const FAILED: Verdict = Verdict::Failed { hold: None, halves: false };

#[test]
fn concurrency_is_earned_from_two_and_halved_by_timeouts() {
    let mut schedule = one_endpoint(rules(), Limits { rate_per_second: 1e6, burst: 1_000, concurrency: 6 });
    for lane in 0..100 {
        append(&mut schedule, lane, 0, 0, 0);
    }
    let mut flying: Vec<Start> = Vec::new();
    let mut seen = Vec::new();
    for round in 0..6 {
        flying.extend(std::iter::from_fn(|| schedule.next(0)));
        seen.push(flying.len());
        let start = flying.remove(0);
        let verdict = if round == 5 { Verdict::Failed { hold: None, halves: true } } else { Verdict::Delivered };
        schedule.reported(start.lane, 1, verdict, at(0));
    }
    assert_eq!(seen, [2, 3, 4, 5, 6, 6]);
    assert!(schedule.next(0).is_none(), "five in flight are more than the halved three");
}

#[test]
fn other_limits_open_no_second_burst() {
    let limits = |rate_per_second, burst| Limits { rate_per_second, burst, concurrency: 1_000 };
    let mut schedule = one_endpoint(rules(), limits(1.0, 50));
    for lane in 0..400 {
        append(&mut schedule, lane, 0, 0, 0);
    }
    let start_all = |schedule: &mut Schedule, now| {
        let starts = std::iter::from_fn(|| {
            let start = schedule.next(now)?;
            schedule.reported(start.lane, 1, Verdict::Delivered, at(now));
            Some(())
        });
        starts.count()
    };
    let mut begun = start_all(&mut schedule, 0);
    assert_eq!(begun, 50);
    for (step, (rate, burst)) in [(2.0, 50), (2.0, 40), (3.0, 40), (9.0, 100), (10.0, 100)].into_iter().enumerate() {
        let now = (step as u64 + 1) * SECOND / 10;
        schedule.put_endpoint(name(0), limits(rate, burst), now);
        begun += start_all(&mut schedule, now);
    }
    assert!(begun <= 52, "{begun} within a second");
    // What the new burst has more than the old one comes with the rate.
    assert_eq!(start_all(&mut schedule, 20 * SECOND), 100);
    // And what is at hand stays at hand, as far as there is room.
    schedule.put_endpoint(name(0), limits(1.0, 100), 40 * SECOND);
    schedule.put_endpoint(name(0), limits(2.0, 30), 40 * SECOND);
    assert_eq!(start_all(&mut schedule, 40 * SECOND), 30);
}

#[test]
fn a_down_endpoint_is_probed_one_at_a_time_untried_lanes_first() {
    let mut schedule = one_endpoint(rules(), Limits { rate_per_second: 1e6, burst: 1_000, concurrency: 6 });
    for lane in 0..3 {
        append(&mut schedule, lane, 0, 0, 0);
    }
    let mut now = 0;
    let mut breaker = None;
    for _ in 0..20 {
        now = schedule.wake_at().map_or(now, |wake| wake.max(now));
        while let Some(start) = schedule.next(now) {
            breaker = breaker.or(schedule.reported(start.lane, 1, FAILED, at(now)).breaker);
        }
        if breaker.is_some() {
            break;
        }
    }
    assert_eq!(breaker, Some(Breaker::WentDown));
    append(&mut schedule, 77, 0, 0, now);
    let mut waits = Vec::new();
    let mut probed = Vec::new();
    for _ in 0..5 {
        let wake = schedule.wake_at().unwrap();
        assert!(schedule.next(wake - 1).is_none());
        let start = schedule.next(wake).unwrap();
        assert!(schedule.next(wake).is_none(), "a second probe");
        probed.push(start.lane);
        waits.push((wake - now) / SECOND);
        now = wake;
        schedule.reported(start.lane, 1, FAILED, at(now));
    }
    assert_eq!(waits, [1, 2, 4, 8, 16]);
    assert_eq!(probed[0], 3, "the untried lane goes first");
    let distinct: std::collections::HashSet<LaneId> = probed[..4].iter().copied().collect();
    assert_eq!((distinct.len(), probed[4]), (4, probed[0]), "then the lanes take turns");
    let wake = schedule.wake_at().unwrap();
    let start = schedule.next(wake).unwrap();
    assert_eq!(schedule.reported(start.lane, 1, Verdict::Delivered, at(wake)).breaker, Some(Breaker::CameUp));
    assert!(schedule.next(wake).is_some(), "all lanes are due");
}

#[test]
fn retry_after_holds_the_whole_endpoint_and_counts_as_no_attempt() {
    let one = Rules { max_attempts: 1, ..rules() };
    let mut schedule = one_endpoint(one, limits());
    for lane in 0..2 {
        append(&mut schedule, lane, 0, 0, 0);
    }
    let start = schedule.next(0).unwrap();
    let throttled = Verdict::Throttled(Some(Duration::from_secs(30)));
    let outcome = schedule.reported(start.lane, 1, throttled, at(0));
    assert_eq!(outcome.deferred.map(|deferred| deferred.retry.attempts), Some(0));
    assert!(schedule.next(30 * SECOND - 1).is_none());
    assert!(schedule.next(30 * SECOND).is_some());
}

#[test]
fn what_had_ended_before_a_crash_is_not_given_up_with_its_endpoint() {
    let mut schedule = Schedule::new(rules());
    schedule.backlog.open(0, 0);
    let all = append(&mut schedule, 1, 0, 0, 0);
    let some: Vec<Handle> = (0..3).map(|_| append(&mut schedule, 2, 0, 0, 0)).collect();
    schedule.settled_before(LaneKey(1), &[all], 0);
    schedule.settled_before(LaneKey(2), &some[..2], 0);
    let burial = schedule.next_bury().unwrap();
    assert_eq!(burial.events, some[2..]);
    schedule.buried(&burial, 0);
    assert_eq!(schedule.next_bury(), None);
    assert_eq!((schedule.lanes(), schedule.events()), (0, 0));
}

#[test]
fn a_journal_that_cannot_be_read_just_now_changes_nothing_of_a_push_but_when_it_goes() {
    let one = Rules { max_attempts: 1, ..rules() };
    let mut schedule = one_endpoint(one, limits());
    let events: Vec<Handle> = (0..2).map(|_| append(&mut schedule, 1, 0, 0, 0)).collect();
    let start = schedule.next(0).unwrap();
    // It was sent, and nobody knows what came of it: both go again together, and only they.
    let outcome = schedule.reported(start.lane, 2, Verdict::Again, at(0));
    let kept = outcome.deferred.map(|deferred| (deferred.retry.fixed, deferred.retry.tries, deferred.wait));
    assert_eq!(kept, Some((2, 1, Duration::ZERO)), "also after a restart");
    append(&mut schedule, 1, 0, 0, 0);
    let mut now = 0;
    for _ in 0..3 {
        let start = schedule.next(now).unwrap();
        assert_eq!((start.events, start.is_fixed, start.attempt), (events.clone(), true, 2));
        let outcome = schedule.reported(start.lane, 0, Verdict::Unread, at(now));
        assert!(outcome.delivered.is_empty() && outcome.breaker.is_none());
        assert!(schedule.next(now).is_none(), "it waits before it tries again");
        now = schedule.wake_at().unwrap();
    }
    let start = schedule.next(now).unwrap();
    assert_eq!(schedule.reported(start.lane, 2, Verdict::Delivered, at(now)).delivered, events);
}

#[test]
fn events_withdrawn_in_flight_may_lose_their_segment_before_the_report() {
    for verdict in [Verdict::Delivered, FAILED, Verdict::Again, Verdict::Gone] {
        let mut schedule = one_endpoint(rules(), limits());
        let events: Vec<Handle> = (0..2).map(|_| append(&mut schedule, 1, 0, 0, 0)).collect();
        let start = schedule.next(0).unwrap();
        assert_eq!(start.events, events);
        let withdrawn = schedule.withdraw(LaneKey(1), u64::MAX, 0);
        assert_eq!((withdrawn.events, withdrawn.in_flight), (events, 2));
        schedule.backlog.seal(0);
        schedule.backlog.open(1, 1);
        schedule.backlog.close(0);
        let later = schedule.backlog.append(1, None, 0, 0, 100).unwrap();
        schedule.appended(later, LaneKey(1), name(0), 0);
        assert!(schedule.next(0).is_none(), "one attempt of a lane at a time");
        let outcome = schedule.reported(start.lane, 2, verdict, at(0));
        let late: &[u64] = if verdict == Verdict::Delivered { &[0, 1] } else { &[] };
        assert_eq!((outcome.delivered_late.as_slice(), outcome.withdrawn_late), (late, 2 - late.len() as u32));
        assert!(outcome.delivered.is_empty() && outcome.deferred.is_none());
        assert!(schedule.next_bury().is_none());
        assert_eq!(schedule.next(0).unwrap().events, [later], "{verdict:?}");
    }
}

#[test]
fn a_refused_push_is_sent_singly_and_only_the_refused_event_dies() {
    let mut schedule = one_endpoint(rules(), limits());
    let events: Vec<Handle> = (0..3).map(|_| append(&mut schedule, 1, 0, 0, 0)).collect();
    let mut now = 0;
    let mut buried = Vec::new();
    let mut delivered = Vec::new();
    let mut pushes = Vec::new();
    while schedule.events() > 0 {
        append(&mut schedule, 2, 0, 0, now);
        now = schedule.wake_at().map_or(now, |wake| wake.max(now)) + 1_000;
        while let Some(start) = schedule.next(now) {
            let is_mine = events.contains(&start.events[0]);
            let verdict = if start.events.contains(&events[1]) { Verdict::Refused } else { Verdict::Delivered };
            if is_mine {
                pushes.push((start.events.len(), start.attempt));
            }
            let outcome = schedule.reported(start.lane, start.events.len() as u32, verdict, at(now));
            delivered.extend(outcome.delivered.into_iter().filter(|event| events.contains(event)));
        }
        while let Some(burial) = schedule.next_bury() {
            assert_eq!(burial.reason, DeathReason::Refused);
            schedule.buried(&burial, now);
            buried.extend(burial.events);
        }
        assert!(now < 3_600 * SECOND);
        if delivered.len() == 2 {
            break;
        }
    }
    assert_eq!((delivered, buried), (vec![events[0], events[2]], vec![events[1]]));
    assert_eq!(pushes[0], (3, 1));
    assert_eq!(pushes[1], (1, 1), "a push of its own, so its attempts begin anew");
    assert!(pushes[1..].iter().all(|(events, _)| *events == 1));
}

#[test]
fn refusals_without_any_other_success_give_nothing_up() {
    let mut schedule = one_endpoint(rules(), limits());
    append(&mut schedule, 1, 0, 0, 0);
    let mut now = 0;
    for _ in 0..100 {
        now = schedule.wake_at().map_or(now, |wake| wake.max(now));
        let start = schedule.next(now).unwrap();
        schedule.reported(start.lane, 1, Verdict::Refused, at(now));
        assert!(schedule.next_bury().is_none());
    }
}

#[test]
fn too_old_events_die_after_a_failure_and_the_rest_of_the_push_goes_on() {
    let short = Rules { max_age_s: 10, ..rules() };
    let mut schedule = one_endpoint(short, limits());
    let old = append(&mut schedule, 1, 0, 0, 0);
    let young = append(&mut schedule, 1, 0, 5, 0);
    let start = schedule.next(12 * SECOND).unwrap();
    assert_eq!(start.events, [old, young], "no event dies before an attempt of this run has failed");
    schedule.reported(start.lane, 2, FAILED, at(12 * SECOND));
    let burial = schedule.next_bury().unwrap();
    assert_eq!((&burial.events, burial.reason), (&vec![old], DeathReason::Expired));
    schedule.buried(&burial, 12 * SECOND);
    assert_eq!(schedule.next(12 * SECOND).unwrap().events, [young]);
}

#[test]
fn a_removed_endpoint_gives_its_events_up_in_steps() {
    let mut schedule = one_endpoint(rules(), limits());
    for _ in 0..200 {
        append(&mut schedule, 1, 0, 0, 0);
    }
    schedule.remove_endpoint(name(0));
    let mut steps = Vec::new();
    while let Some(burial) = schedule.next_bury() {
        assert_eq!(burial.reason, DeathReason::EndpointRemoved);
        steps.push(burial.events.len());
        schedule.buried(&burial, 0);
    }
    assert_eq!(steps, [64, 64, 64, 8]);
    assert_eq!((schedule.events(), schedule.lanes()), (0, 0));
    append(&mut schedule, 2, 0, 0, 0);
    assert!(schedule.next(0).is_none() && schedule.next_bury().is_some());
}

#[test]
fn events_that_were_withdrawn_before_a_crash_do_not_come_back_with_those_before_them() {
    let mut schedule = one_endpoint(rules(), limits());
    let events: Vec<Handle> = (0..5).map(|_| append(&mut schedule, 1, 0, 0, 0)).collect();
    schedule.settled_before(LaneKey(1), &events[2..4], 0);
    assert_eq!(schedule.events_of(LaneKey(1)), [events[0], events[1], events[4]]);
    assert_eq!(schedule.events(), 3);
    schedule.settled_before(LaneKey(1), &[events[4]], 0);
    let last = append(&mut schedule, 1, 0, 0, 0);
    assert_eq!(schedule.next(0).unwrap().events, [events[0], events[1], last]);
}

#[test]
fn a_thousand_hanging_endpoints_leave_a_well_one_its_turn() {
    let mut schedule = Schedule::new(Rules { max_in_flight: 1_500, ..rules() });
    schedule.backlog.open(0, 0);
    for endpoint in 0..1_001 {
        schedule.put_endpoint(name(endpoint), limits(), 0);
        for lane in 0..20 {
            append(&mut schedule, (endpoint * 100 + lane) as u64, endpoint, 0, 0);
        }
    }
    let mut now = 0;
    let mut hanging: VecDeque<(u64, LaneId)> = VecDeque::new();
    let mut delivered = 0;
    while delivered < 20 && now < 40 * SECOND {
        while let Some(start) = schedule.next(now) {
            if start.endpoint == name(1_000) {
                schedule.reported(start.lane, 1, Verdict::Delivered, at(now));
                delivered += 1;
            } else {
                hanging.push_back((now + 10 * SECOND, start.lane));
            }
        }
        now += SECOND / 10;
        while hanging.front().is_some_and(|(end, _)| *end <= now) {
            let (_, lane) = hanging.pop_front().unwrap();
            schedule.reported(lane, 1, Verdict::Failed { hold: None, halves: true }, at(now));
        }
    }
    assert_eq!(delivered, 20, "by {} s", now / SECOND);
    assert!(now < 2 * SECOND, "the well endpoint waited {} s", now / SECOND);
}

#[test]
fn a_full_segment_takes_no_more() {
    let mut backlog = Backlog::default();
    backlog.open(0, 0);
    for _ in 0..PLACES_MAX - 1 {
        assert!(backlog.append(0, None, 0, 0, 1).is_some());
    }
    assert!(backlog.append(0, None, 0, 0, 1).is_none());
}
