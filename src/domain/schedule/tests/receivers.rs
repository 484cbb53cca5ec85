//! What is seen of a receiver, what it asks for, and when it is another one.

use super::*;

#[test]
fn a_wave_of_429_holds_the_endpoint_for_one_delay() {
    let mut schedule = one_endpoint(rules(), Limits { rate_per_second: 1e6, burst: 1_000, concurrency: 6 });
    for lane in 0..20 {
        append(&mut schedule, lane, 0, 0, 0);
    }
    let mut now = 0;
    // The delays are 1, 2 and 4 s here: each wave is one try of the endpoint.
    for wave in 0..3 {
        let starts: Vec<Start> = std::iter::from_fn(|| schedule.next(now)).collect();
        assert_eq!(starts.len(), 2);
        for start in &starts {
            schedule.reported(start.lane, 1, Verdict::Throttled(None), at(now));
        }
        let until = now + (SECOND << wave);
        assert!(schedule.next(until - 1).is_none(), "wave {wave}");
        now = until;
    }
    assert!(schedule.next(now).is_some());
}

#[test]
fn another_receiver_at_the_same_name_begins_anew() {
    let mut schedule = one_endpoint(rules(), Limits { rate_per_second: 1e6, burst: 1_000, concurrency: 6 });
    for lane in 0..20 {
        append(&mut schedule, lane, 0, 0, 0);
    }
    let mut is_down = false;
    while let Some(start) = schedule.next(0) {
        is_down |= schedule.reported(start.lane, 1, FAILED, at(0)).breaker.is_some();
    }
    assert!(is_down);
    schedule.hold(name(0), Duration::from_secs(3_000), 0);
    assert!(schedule.next(SECOND).is_none());
    schedule.forget_failures(name(0), SECOND);
    assert_eq!(std::iter::from_fn(|| schedule.next(SECOND)).count(), 2);
    assert!(schedule.endpoints(0).all(|view| view.is_up));
}

#[test]
fn what_comes_of_attempts_at_an_old_address_is_not_held_against_the_new_one() {
    let limits = Limits { rate_per_second: 1e6, burst: 1_000, concurrency: 6 };
    let late = [
        FAILED,
        Verdict::Gone,
        Verdict::Refused,
        Verdict::Throttled(Some(Duration::from_secs(3_600))),
        Verdict::Failed { hold: Some(Duration::from_secs(3_600)), halves: true },
    ];
    let mut schedule = one_endpoint(rules(), limits);
    for lane in 0..30 {
        append(&mut schedule, lane, 0, 0, 0);
    }
    let mut old: Vec<Start> = std::iter::from_fn(|| schedule.next(0)).collect();
    while old.len() < 6 {
        let start = old.pop().unwrap();
        schedule.reported(start.lane, 1, Verdict::Delivered, at(0));
        old.extend(std::iter::from_fn(|| schedule.next(0)));
    }
    schedule.forget_failures(name(0), 0);
    let new: Vec<Start> = std::iter::from_fn(|| schedule.next(0)).collect();
    assert_eq!(new.len(), 2, "none of the old ones takes its room");
    for (start, verdict) in old.iter().zip(late.iter().cycle()) {
        let outcome = schedule.reported(start.lane, 1, *verdict, at(0));
        let delayed = outcome.deferred.filter(|deferred| !deferred.wait.is_zero());
        assert_eq!((outcome.breaker, outcome.held, delayed), (None, None, None), "{verdict:?}");
    }
    assert!(schedule.next_bury().is_none());
    for start in new {
        schedule.reported(start.lane, 1, Verdict::Delivered, at(0));
    }
    // Those that failed are due at once.
    let again: Vec<Start> = std::iter::from_fn(|| schedule.next(0)).collect();
    assert_eq!(again.len(), 4);
    assert!(again.iter().any(|start| start.is_fixed && start.attempt == 1));
}

#[test]
fn what_another_receiver_took_gives_nothing_up_at_one_that_refuses_all() {
    let mut schedule = one_endpoint(rules(), Limits { rate_per_second: 1e6, burst: 1_000, concurrency: 6 });
    append(&mut schedule, 1, 0, 0, 0);
    let start = schedule.next(0).unwrap();
    schedule.reported(start.lane, 1, FAILED, at(0));
    for lane in 2..9 {
        append(&mut schedule, lane, 0, 0, 0);
        let start = schedule.next(0).unwrap();
        schedule.reported(start.lane, 1, Verdict::Delivered, at(0));
    }
    schedule.forget_failures(name(0), 0);
    let mut now = 0;
    for _ in 0..2 * rules().max_refusals {
        let start = schedule.next(now).unwrap();
        schedule.reported(start.lane, 1, Verdict::Refused, at(now));
        assert!(schedule.next_bury().is_none(), "it has taken nothing yet");
        now = schedule.wake_at().unwrap_or(now);
    }
}

#[test]
fn a_wait_of_nothing_is_none() {
    let mut schedule = one_endpoint(rules(), limits());
    append(&mut schedule, 1, 0, 0, 0);
    let start = schedule.next(0).unwrap();
    let outcome = schedule.reported(start.lane, 1, Verdict::Throttled(Some(Duration::ZERO)), at(0));
    assert!(outcome.held.is_some_and(|held| !held.is_zero()));
}

#[test]
fn an_attempt_under_way_when_its_endpoint_goes_is_counted() {
    let mut schedule = one_endpoint(rules(), limits());
    append(&mut schedule, 1, 0, 0, 0);
    let start = schedule.next(0).unwrap();
    schedule.remove_endpoint(name(0));
    assert!(schedule.next_bury().is_none(), "it may be delivered yet");
    schedule.reported(start.lane, 1, FAILED, at(0));
    let burial = schedule.next_bury().unwrap();
    assert_eq!((burial.reason, burial.attempts), (DeathReason::EndpointRemoved, 1));
}

#[test]
fn time_of_the_rate_is_counted_as_it_passes() {
    let mut schedule = one_endpoint(rules(), Limits { rate_per_second: 0.1, burst: 1, concurrency: 6 });
    append(&mut schedule, 1, 0, 0, 0);
    append(&mut schedule, 2, 0, 0, 0);
    let seen = |schedule: &Schedule, now| schedule.endpoints(now).next().unwrap().rate_limited;
    assert!(schedule.next(0).is_some() && schedule.next(0).is_none());
    assert_eq!((seen(&schedule, 0), seen(&schedule, SECOND)), (0, SECOND));
    // Others who ask for the rate meanwhile wait for the same.
    assert!(schedule.take_permit(name(0), 4 * SECOND).is_err());
    assert_eq!(seen(&schedule, 6 * SECOND), 6 * SECOND);
    assert!(seen(&schedule, 60 * SECOND) <= 10 * SECOND + 2, "not while nothing is due");
    schedule.put_endpoint(name(0), limits(), 7 * SECOND);
    assert_eq!(seen(&schedule, 60 * SECOND), 7 * SECOND);
}

#[test]
fn an_endpoint_is_left_alone_for_the_longest_that_it_asked_for() {
    let mut schedule = one_endpoint(rules(), limits());
    append(&mut schedule, 1, 0, 0, 0);
    assert!(schedule.hold(name(0), Duration::from_secs(100), 0));
    assert!(!schedule.hold(name(0), Duration::from_secs(5), SECOND), "that is over before");
    assert!(schedule.next(100 * SECOND - 1).is_none() && schedule.next(100 * SECOND).is_some());
}
