//! Pushes: order, retries, refusals, limits of one endpoint and their isolation (contract §5).

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::support::*;

const QUICK: &str = "[backoff]\ninitial = \"100ms\"\nmax = \"400ms\"\n";

#[test]
fn an_event_that_breaks_every_connection_is_tried_again_like_any_failure() {
    let receiver = Receiver::start();
    receiver.answer(|push| match push.customer().as_str() {
        "poison" => Answer::Break,
        _ => Answer::After(Duration::from_millis(2), 200),
    });
    let text = config(receiver.address, "[backoff]\ninitial = \"300ms\"\nmax = \"1s\"\n");
    let relay = Relay::start(&text);
    relay.queue(&event("well", "first"));
    receiver.wait_delivered(1);
    relay.call("POST", "/v1/endpoints/12/pause", &Value::Null);
    relay.queue(&event("poison", "m"));
    for number in 0..1_500 {
        relay.queue(&event(&format!("c{number}"), &format!("m{number}")));
    }
    // With all of them ready, connections that work come back all the time, to be taken.
    relay.call("POST", "/v1/endpoints/12/resume", &Value::Null);
    receiver.wait_delivered(1_501);
    // On a connection that was kept, and then on a new one: what breaks that is a failure.
    let mut tries: HashMap<String, usize> = HashMap::new();
    for push in receiver.pushes().iter().filter(|push| push.customer() == "poison") {
        *tries.entry(push.header("h5push-attempt").to_owned()).or_default() += 1;
    }
    assert!(!tries.is_empty() && tries.values().all(|times| *times <= 2), "{tries:?}");
}

#[test]
fn retry_after_holds_over_a_restart() {
    let receiver = Receiver::start();
    receiver.answer(|_| Answer::With(429, "retry-after", "4"));
    let text = config(receiver.address, "");
    let relay = Relay::start(&text);
    relay.queue(&event("a", "m"));
    let first = receiver.wait_pushes(1)[0].at;
    relay.wait_metric("h5push_push_attempts_total", &[("endpoint", "12"), ("result", "error_status")], |count| {
        count == 1.0
    });
    let mut dir = relay.kill();
    dir = Relay::start_in(dir, &text).stop();
    receiver.answer_status(200);
    let relay = Relay::start_in(dir, &text);
    receiver.wait_delivered(1);
    let waited = receiver.delivered()[0].at - first;
    assert!(waited >= Duration::from_millis(3_900), "{waited:?}");
    // Who is at another address has asked for nothing.
    receiver.answer(|_| Answer::With(429, "retry-after", "600"));
    relay.queue(&event("a", "m2"));
    receiver.wait_pushes(3);
    relay.wait_metric("h5push_push_attempts_total", &[("endpoint", "12"), ("result", "error_status")], |count| {
        count == 1.0
    });
    let other = Receiver::start();
    let relay = Relay::start_in(relay.stop(), &config(other.address, ""));
    relay.queue(&event("b", "m3"));
    other.wait_pushes(1);
}

#[test]
fn waiting_events_of_a_customer_go_together_within_the_bounds() {
    let receiver = Receiver::start();
    let more = format!("{QUICK}[push]\nmax_messages = 4\nmax_bytes = \"1KiB\"");
    let relay = Relay::start(&config(receiver.address, &more));
    receiver.answer_status(500);
    relay.queue(&event("a", "m0"));
    receiver.wait_pushes(1);
    for number in 1..10 {
        relay.queue(&event("a", &format!("m{number}")));
    }
    let mut large = event("a", "large");
    large["messages"][0]["x"] = serde_json::json!("y".repeat(3_000));
    relay.queue(&large);
    receiver.answer_status(200);
    let ids = receiver.wait_delivered(11);
    let expected: Vec<String> = (0..10).map(|number| format!("m{number}")).chain(["large".to_owned()]).collect();
    assert_eq!(ids, expected);
    let sizes: Vec<usize> = receiver.delivered().iter().map(|push| push.message_ids().len()).collect();
    assert_eq!(sizes[0], 1, "fixed at its first attempt");
    assert!(sizes.iter().all(|size| *size <= 4));
    assert!(sizes.contains(&4) && sizes.len() <= 6, "{sizes:?}");
    assert_eq!(receiver.delivered().last().unwrap().message_ids(), ["large"]);
}

#[test]
fn a_failed_push_is_repeated_with_the_same_body_and_id_and_holds_back_only_its_lane() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, QUICK));
    receiver.answer(|push| Answer::Status(if push.customer() == "a" { 503 } else { 200 }));
    relay.queue(&event("a", "a0"));
    receiver.wait_pushes(3);
    relay.queue(&event("a", "a1"));
    relay.queue(&event("b", "b0"));
    receiver.wait_delivered(1);
    receiver.answer_status(200);
    assert_eq!(receiver.wait_delivered(3), ["b0", "a0", "a1"]);
    let of_a0: Vec<Push> = receiver.pushes().into_iter().filter(|push| push.message_ids() == ["a0"]).collect();
    assert!(of_a0.len() >= 4);
    for (number, push) in of_a0.iter().enumerate() {
        assert_eq!(push.body, of_a0[0].body);
        assert_eq!(push.header("webhook-id"), of_a0[0].header("webhook-id"));
        assert_eq!(push.header("h5push-attempt"), (number + 1).to_string());
    }
    assert!(of_a0[1].at - of_a0[0].at >= Duration::from_millis(50), "it waits before it tries again");
}

#[test]
fn a_push_is_the_same_after_a_crash_between_its_attempts() {
    let receiver = Receiver::start();
    let text = config(receiver.address, "[backoff]\ninitial = \"300ms\"\nmax = \"500ms\"");
    let relay = Relay::start(&text);
    receiver.answer_status(500);
    relay.queue(&event("a", "a0"));
    let first = receiver.wait_pushes(1)[0].clone();
    relay.queue(&event("a", "a1"));
    // A kill during the first attempt may change the push (contract §5); one after it may not.
    receiver.wait_pushes(2);
    let dir = relay.kill();
    receiver.answer_status(200);
    let _relay = Relay::start_in(dir, &text);
    receiver.wait_delivered(2);
    let delivered = receiver.delivered();
    assert_eq!(delivered[0].body, first.body);
    assert_eq!(delivered[0].header("webhook-id"), first.header("webhook-id"));
    assert!(delivered[0].header("h5push-attempt").parse::<u32>().unwrap() >= 2);
    assert_eq!(delivered[1].message_ids(), ["a1"]);
}

#[test]
fn retry_after_holds_the_whole_endpoint() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, QUICK));
    receiver.answer(|push| {
        let is_first = push.header("h5push-attempt") == "1" && push.customer() == "a";
        if is_first { Answer::With(429, "retry-after", "2") } else { Answer::Status(200) }
    });
    relay.queue(&event("a", "a0"));
    let throttled = receiver.wait_pushes(1)[0].at;
    // The answer is on its way: what is sent before it comes is right.
    relay.wait_metric("h5push_push_attempts_total", &[("result", "error_status")], |count| count == 1.0);
    relay.queue(&event("b", "b0"));
    receiver.wait_delivered(2);
    for push in &receiver.pushes()[1..] {
        assert!(push.at - throttled >= Duration::from_millis(1_950), "{:?}", push.at - throttled);
    }
    // An absurd wait is clamped, and believed: a push that fails with it waits.
    receiver.answer(|_| Answer::With(503, "retry-after", "99999999999"));
    relay.queue(&event("c", "c0"));
    receiver.wait_pushes(4);
    relay.wait_metric("h5push_push_attempts_total", &[("result", "error_status")], |count| count == 2.0);
    receiver.answer_status(200);
    relay.queue(&event("d", "d0"));
    assert_eq!(get(relay.local, "/healthz").status, 200);
    assert_eq!(receiver.pushes().len(), 4);
}

#[test]
fn a_gone_endpoint_buries_at_once() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, QUICK));
    receiver.answer_status(410);
    relay.queue(&event("a", "a0"));
    relay.wait_metric("h5push_dead_letters_total", &[("endpoint", "12"), ("reason", "gone")], |count| count == 1.0);
    relay.wait_metric("h5push_outbox_events", &[("endpoint", "12")], |count| count == 0.0);
    assert_eq!(relay.metric("h5push_dead_letters", &[("endpoint", "12")]), 1.0);
    receiver.answer_status(200);
    relay.queue(&event("a", "a1"));
    receiver.wait_delivered(1);
    assert_eq!(receiver.pushes().len(), 2);
    // Kept over a restart.
    let dir = relay.kill();
    let relay = Relay::start_in(dir, &config(receiver.address, QUICK));
    assert_eq!(relay.metric("h5push_dead_letters", &[("endpoint", "12")]), 1.0);
}

#[test]
fn only_the_refused_event_dies_and_only_while_others_succeed() {
    let receiver = Receiver::start();
    let more = format!("{QUICK}[push]\nmax_refusals = 3");
    let relay = Relay::start(&config(receiver.address, &more));
    receiver.answer(|push| Answer::Status(if push.message_ids().contains(&"bad".to_owned()) { 422 } else { 200 }));
    // All three wait together, behind a first one.
    receiver.answer_status(500);
    relay.queue(&event("a", "first"));
    receiver.wait_pushes(1);
    for id in ["good1", "bad", "good2"] {
        relay.queue(&event("a", id));
    }
    receiver.answer(|push| Answer::Status(if push.message_ids().contains(&"bad".to_owned()) { 422 } else { 200 }));
    receiver
        .wait("the bad one alone", |pushes| pushes.iter().filter(|push| push.message_ids() == ["bad"]).count() >= 4);
    assert_eq!(relay.metric("h5push_dead_letters_total", &[("reason", "refused")]), 0.0, "nobody else succeeds");
    for number in 0..100 {
        relay.queue(&event("b", &format!("b{number}")));
        receiver.wait_delivered(2 + number + 1);
        if receiver.delivered_ids().contains(&"good2".to_owned()) {
            break;
        }
    }
    relay.wait_metric("h5push_dead_letters_total", &[("endpoint", "12"), ("reason", "refused")], |count| count == 1.0);
    receiver.wait("the rest", |pushes| pushes.iter().any(|push| push.message_ids() == ["good2"]));
    let of_a: Vec<String> = receiver.delivered_ids().into_iter().filter(|id| !id.starts_with('b')).collect();
    assert_eq!(of_a, ["first", "good1", "good2"]);
}

#[test]
fn attempts_and_age_are_limited_where_asked() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, &format!("{QUICK}[push]\nmax_attempts = 3")));
    receiver.answer_status(500);
    relay.queue(&event("a", "a0"));
    relay.wait_metric("h5push_dead_letters_total", &[("reason", "attempts")], |count| count == 1.0);
    assert_eq!(receiver.pushes().len(), 3);
    drop(relay);
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, &format!("{QUICK}[push]\nmax_age = \"2s\"")));
    receiver.answer_status(500);
    relay.queue(&event("a", "a0"));
    relay.wait_metric("h5push_dead_letters_total", &[("reason", "expired")], |count| count == 1.0);
    assert!(receiver.pushes().len() > 3);
}

#[test]
fn rate_and_burst_hold_in_every_second() {
    let receiver = Receiver::start();
    let text = format!(
        "[endpoints.12]\nurl = \"http://{}/push\"\nrate_per_second = 40\nburst = 5\nconcurrency = 64\n",
        receiver.address
    );
    let relay = Relay::start(&text);
    let lines: String =
        (0..120).map(|number| event(&format!("c{number}"), &format!("m{number}")).to_string() + "\n").collect();
    assert_eq!(relay.post_text("application/x-ndjson", &lines).status, 202);
    receiver.wait_delivered(120);
    let times: Vec<Instant> = receiver.pushes().iter().map(|push| push.at).collect();
    for (number, first) in times.iter().enumerate() {
        // A little less than a second: what is seen here began a little before.
        let within = times[number..].iter().filter(|at| **at - *first < Duration::from_millis(950)).count();
        assert!(within <= 45, "{within} in a second");
    }
    let took = *times.last().unwrap() - times[0];
    assert!(took < Duration::from_secs(6), "the rate is made use of: {took:?}");
    assert!(relay.metric("h5push_rate_limited_seconds_total", &[("endpoint", "12")]) > 1.0);
}

#[test]
fn concurrency_is_never_exceeded() {
    let receiver = Receiver::start();
    let text = format!(
        "[endpoints.12]\nurl = \"http://{}/push\"\nrate_per_second = 100000\nconcurrency = 3\n",
        receiver.address
    );
    let relay = Relay::start(&text);
    receiver.answer(|_| Answer::After(Duration::from_millis(30), 200));
    for number in 0..60 {
        relay.queue(&event(&format!("c{number}"), &format!("m{number}")));
    }
    receiver.wait_delivered(60);
    assert_eq!(receiver.open_at_most(), 3, "earned, and not exceeded");
}

#[test]
fn a_down_endpoint_is_probed_and_comes_back_with_everything_in_order() {
    let receiver = Receiver::start();
    let more = format!("{QUICK}[breaker]\nfailures = 4");
    let relay = Relay::start(&config(receiver.address, &more));
    receiver.answer_status(500);
    for number in 0..40 {
        relay.queue(&event(&format!("c{}", number % 8), &format!("m{number:02}")));
    }
    relay.wait_metric("h5push_endpoint_up", &[("endpoint", "12")], |up| up == 0.0);
    assert!(relay.log().contains("the endpoint is down"));
    let before = receiver.pushes().len();
    let begun = Instant::now();
    receiver.wait_pushes(before + 4);
    assert!(begun.elapsed() > Duration::from_millis(300), "one at a time, on the backoff schedule");
    receiver.answer_status(200);
    let ids = receiver.wait_delivered(40);
    relay.wait_metric("h5push_endpoint_up", &[("endpoint", "12")], |up| up == 1.0);
    let mut by_customer: HashMap<usize, Vec<String>> = HashMap::new();
    for id in ids {
        let number: usize = id[1..].parse().unwrap();
        by_customer.entry(number % 8).or_default().push(id);
    }
    assert!(by_customer.values().all(|ids| ids.is_sorted() && ids.len() == 5), "{by_customer:?}");
}

#[test]
fn a_broken_endpoint_takes_nothing_from_another() {
    let (well, dead) = (Receiver::start(), free_address());
    let hanging = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let text = format!(
        "{}[endpoints.13]\nurl = \"http://{dead}/dead\"\n[endpoints.14]\nurl = \"http://{}/hanging\"\n",
        config(well.address, ""),
        hanging.local_addr().unwrap()
    );
    let relay = Relay::start(&text);
    for plugin in [13, 14] {
        for number in 0..200 {
            let mut event = event(&format!("c{number}"), &format!("p{plugin}-{number}"));
            event["im_web_plugin_id"] = serde_json::json!(plugin);
            relay.queue(&event);
        }
    }
    let begun = Instant::now();
    for number in 0..50 {
        relay.queue(&event(&format!("c{number}"), &format!("m{number}")));
    }
    well.wait_delivered(50);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert!(relay.metric("h5push_push_attempts_total", &[("endpoint", "13"), ("result", "connect")]) > 0.0);
    assert_eq!(relay.metric("h5push_outbox_events", &[("endpoint", "14")]), 200.0);
    assert!(relay.metric("h5push_outbox_oldest_age_seconds", &[("endpoint", "13")]) >= 0.0);
}

#[test]
fn events_of_an_endpoint_that_is_gone_from_the_config_become_dead_letters() {
    let receiver = Receiver::start();
    receiver.answer_status(500);
    let relay = Relay::start(&config(receiver.address, ""));
    for number in 0..150 {
        relay.queue(&event("a", &format!("m{number}")));
    }
    let dir = relay.kill();
    let relay = Relay::start_in(dir, &format!("[endpoints.13]\nurl = \"http://{}/\"", receiver.address));
    let labels = [("endpoint", "12"), ("reason", "endpoint_removed")];
    relay.wait_metric("h5push_dead_letters_total", &labels, |count| count == 150.0);
    assert_eq!(relay.metric("h5push_dead_letters", &[("endpoint", "12")]), 150.0);
    let configured = |name| relay.endpoint(name)["configured"].clone();
    assert_eq!((configured("12"), configured("13")), (false.into(), true.into()));
}

#[test]
fn a_push_that_breaks_on_a_connection_kept_from_before_goes_again_at_once_as_the_next_attempt() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, "[backoff]\ninitial = \"1h\"\nmax = \"1h\"\n"));
    relay.queue(&event("a", "m0"));
    receiver.wait_delivered(1);
    let breaks = |push: &Push| push.header("h5push-attempt") == "1";
    receiver.answer(move |push| if breaks(push) { Answer::Break } else { Answer::Status(200) });
    relay.queue(&event("b", "m1"));
    assert_eq!(receiver.wait_delivered(2), ["m0", "m1"]);
    let pushes = receiver.pushes();
    let seen: Vec<&str> = pushes[1..].iter().map(|push| push.header("h5push-attempt")).collect();
    assert_eq!(seen, ["1", "2"]);
    assert_eq!(pushes[1].header("webhook-id"), pushes[2].header("webhook-id"));
}
