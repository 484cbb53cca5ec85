//! An operator tests an address (contract §6).

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::*;

const NOTHING: Value = Value::Null;

#[test]
fn a_test_push_is_made_at_once_and_signed() {
    let receiver = Receiver::start();
    let secret = "secret = \"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\"\n";
    let relay = Relay::start(&config(receiver.address, secret));
    let outcome = relay.done("POST", "/v1/endpoints/12/test", &NOTHING);
    assert_eq!((&outcome["result"], &outcome["status"]), (&json!("ok"), &json!(200)));
    assert!(outcome["duration_ms"].as_f64().unwrap() > 0.0);
    let push = receiver.wait_pushes(1).remove(0);
    assert_eq!(push.json()["web_token"], "h5push-relay-test");
    assert_eq!(push.json()["messages"][0]["type"], "test");
    assert!(push.header("webhook-signature").starts_with("v1,"));
    receiver.answer_status(500);
    let outcome = relay.done("POST", "/v1/endpoints/12/test", &NOTHING);
    assert_eq!((&outcome["result"], &outcome["status"]), (&json!("error_status"), &json!(500)));
    relay.wait_metric("h5push_push_attempts_total", &[("endpoint", "12"), ("result", "ok")], |count| count == 1.0);
}

#[test]
fn a_test_is_one_attempt_also_where_connections_that_are_kept_break() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, ""));
    relay.queue(&event("a", "m0"));
    receiver.wait_delivered(1);
    receiver.answer(|_| Answer::Break);
    let outcome = relay.done("POST", "/v1/endpoints/12/test", &NOTHING);
    assert_eq!((&outcome["result"], &outcome["status"]), (&json!("io"), &NOTHING));
    assert_eq!(receiver.pushes().len(), 2);
    let attempts = |result| relay.metric("h5push_push_attempts_total", &[("endpoint", "12"), ("result", result)]);
    assert_eq!((attempts("ok"), attempts("io")), (1.0, 1.0));
    assert_eq!(relay.metric("h5push_push_duration_seconds_count", &[]), 2.0);
}

#[test]
fn what_a_receiver_asks_for_in_answer_to_a_test_holds() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, ""));
    receiver.answer(|_| Answer::With(503, "retry-after", "2"));
    let begun = Instant::now();
    relay.done("POST", "/v1/endpoints/12/test", &NOTHING);
    receiver.answer_status(200);
    relay.queue(&event("a", "m0"));
    assert_eq!(relay.endpoint("12")["waits_for"], "receiver");
    receiver.wait_delivered(1);
    assert!(begun.elapsed() >= Duration::from_secs(2), "{:?}", begun.elapsed());
}

#[test]
fn a_stop_waits_for_a_test_that_is_under_way_and_then_gives_it_up() {
    for (wait, status) in [(Duration::from_millis(500), 200), (PATIENCE, 503)] {
        let receiver = Receiver::start();
        let mut relay = Relay::start(&format!("shutdown_timeout = \"2s\"\n{}", config(receiver.address, "")));
        receiver.answer(move |_| Answer::After(wait, 200));
        let local = relay.local;
        let caller = std::thread::spawn(move || request(local, "POST", "/v1/endpoints/12/test", &[], b""));
        receiver.wait_open();
        relay.signal("TERM");
        assert_eq!(caller.join().unwrap().status, status);
        assert_eq!(relay.wait().code(), Some(0));
    }
}
