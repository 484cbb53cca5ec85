//! What is given up.

use super::*;

#[test]
fn what_an_operator_gives_up_in_flight_is_given_up_also_when_the_attempt_gives_its_own_up() {
    let mut schedule = one_endpoint(rules(), limits());
    let events: Vec<Handle> = (0..3).map(|_| append(&mut schedule, 1, 0, 0, 0)).collect();
    let start = schedule.next(0).unwrap();
    assert_eq!(schedule.bury(start.lane, false), 3);
    schedule.reported(start.lane, 1, Verdict::Gone, at(0));
    let mut buried = Vec::new();
    while let Some(burial) = schedule.next_bury() {
        schedule.buried(&burial, 0);
        buried.push((burial.events, burial.reason));
    }
    assert_eq!(buried, [(events[..1].to_vec(), DeathReason::Gone), (events[1..].to_vec(), DeathReason::Buried)]);
    assert!(!schedule.is_burying(start.lane) && schedule.next(0).is_none());
}

#[test]
fn a_lane_is_given_up_once_more_while_it_is_being_given_up() {
    let mut schedule = one_endpoint(rules(), Limits { rate_per_second: 1e6, burst: 1_000, concurrency: 6 });
    for _ in 0..3 {
        append(&mut schedule, 1, 0, 0, 0);
    }
    let lane = schedule.lane_id(LaneKey(1)).unwrap();
    assert_eq!(schedule.bury(lane, true), 1);
    let first = schedule.next_bury().unwrap();
    schedule.not_buried(&first);
    assert_eq!(schedule.bury(lane, true), 1, "it waits for the same one");
    append(&mut schedule, 1, 0, 0, 0);
    assert_eq!(schedule.bury(lane, false), 4);
    let mut buried = Vec::new();
    while let Some(burial) = schedule.next_bury() {
        buried.push(burial.events.len());
        schedule.buried(&burial, 0);
    }
    assert_eq!(buried, [1, 3]);
    assert!(!schedule.is_burying(lane) && schedule.waiting(LaneKey(1)) == 0);
}

#[test]
fn what_is_given_up_at_one_endpoint_does_not_wait_for_a_large_burial_at_another() {
    let mut schedule = one_endpoint(rules(), limits());
    schedule.put_endpoint(name(1), limits(), 0);
    for lane in 0..1_000 {
        append(&mut schedule, 10 + lane, 0, 0, 0);
    }
    schedule.remove_endpoint(name(0));
    let event = append(&mut schedule, 1, 1, 0, 0);
    let lane = schedule.lane_id(LaneKey(1)).unwrap();
    assert_eq!(schedule.bury(lane, false), 1);
    let first_two = [schedule.next_bury().unwrap(), schedule.next_bury().unwrap()];
    assert!(first_two.iter().any(|burial| burial.events == [event]));
}

#[test]
fn what_is_given_up_after_a_withdrawal_stays_so_when_that_is_repeated() {
    for is_handed_out in [true, false] {
        let mut schedule = one_endpoint(rules(), limits());
        let events: Vec<Handle> = (0..3).map(|_| append(&mut schedule, 1, 0, 0, 0)).collect();
        let until = schedule.backlog.seq(events[1]);
        let lane = schedule.lane_id(LaneKey(1)).unwrap();
        assert_eq!(schedule.bury(lane, true), 1);
        let first = schedule.next_bury().unwrap();
        assert_eq!(schedule.bury(lane, false), 3);
        if !is_handed_out {
            schedule.not_buried(&first);
        }
        let withdrawn = schedule.withdraw(LaneKey(1), until, 0);
        assert_eq!(withdrawn.events, events[usize::from(is_handed_out)..2]);
        if is_handed_out {
            schedule.buried(&first, 0);
        }
        let burial = schedule.next_bury().unwrap();
        assert_eq!(burial.events, events[2..], "handed out: {is_handed_out}");
        schedule.buried(&burial, 0);
        assert!(schedule.next_bury().is_none() && !schedule.is_burying(lane));
    }
}
