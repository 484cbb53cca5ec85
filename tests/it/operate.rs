//! What operators see and do (contract §6), and the look-up of one event (§3).

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::*;

const FAST: &str = "[backoff]\ninitial = \"50ms\"\nmax = \"200ms\"\n";
const NOTHING: Value = Value::Null;

/// A relay whose endpoint has answered 410 to some customers' messages.
fn with_dead_letters(receiver: &Receiver, customers: &[&str]) -> Relay {
    receiver.answer_status(410);
    let relay = Relay::start(&config(receiver.address, FAST));
    for (number, customer) in customers.iter().enumerate() {
        relay.queue(&event(customer, &format!("m{number}")));
        relay.wait_metric("h5push_dead_letters", &[("endpoint", "12")], |count| count == (number + 1) as f64);
    }
    relay
}

fn letters(relay: &Relay, query: &str) -> Vec<Value> {
    let list = relay.done("GET", &format!("/v1/dead-letters?{query}"), &NOTHING);
    list["dead_letters"].as_array().unwrap().clone()
}

#[test]
fn the_status_says_how_everything_stands() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, FAST));
    let status = relay.done("GET", "/v1/status", &NOTHING);
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(status["outbox"]["events"], 0);
    assert_eq!(relay.endpoint("12")["state"], "up");
    assert_eq!(relay.endpoint("12")["last_error"], NOTHING);
    assert!(status["disk"]["free_bytes"].as_u64().unwrap() > 0 && status["uptime_seconds"].is_u64());
    receiver.answer_status(500);
    relay.queue(&event("a", "m0"));
    wait_until("the error shows", || relay.endpoint("12")["last_error"] == "status 500");
    let status = relay.done("GET", "/v1/status", &NOTHING);
    assert_eq!(status["outbox"]["events"], 1);
    assert!(status["outbox"]["bytes"].as_u64().unwrap() > 100);
    assert!(relay.endpoint("12")["oldest_age_seconds"].is_number());
    receiver.answer_status(200);
    receiver.wait_delivered(1);
    wait_until("the error is over", || relay.endpoint("12")["last_error"].is_null());
}

#[test]
fn an_event_is_looked_up_by_its_id() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, FAST));
    let state = |relay: &Relay, id: &str| {
        let shown = relay.call("GET", &format!("/v1/events/{id}?im_web_plugin_id=12"), &NOTHING);
        if shown.status == 200 { shown.json() } else { json!({ "state": shown.status }) }
    };
    assert_eq!(state(&relay, "e-1")["state"], 404);
    receiver.answer_status(500);
    let mut first = event("a", "m0");
    first["event_id"] = json!("e/1 ä");
    relay.queue(&first);
    let escaped = "e%2F1%20%C3%A4";
    assert_eq!(state(&relay, escaped)["state"], "queued");
    assert_eq!(state(&relay, escaped)["settled_at"], NOTHING);
    receiver.answer_status(200);
    receiver.wait_delivered(1);
    wait_until("it shows as delivered", || state(&relay, escaped)["state"] == "delivered");
    assert!(state(&relay, escaped)["settled_at"].as_str().unwrap().ends_with('Z'));
    // A derived id says its own key.
    let posted = relay.post(&event("a", "m1")).json();
    receiver.wait_delivered(2);
    let derived = posted["event_id"].as_str().unwrap().to_owned();
    wait_until("the derived one too", || state(&relay, &derived)["state"] == "delivered");
    receiver.answer_status(410);
    let mut dying = event("b", "m2");
    dying["event_id"] = json!("dying");
    relay.queue(&dying);
    wait_until("it died", || state(&relay, "dying")["state"] == "dead_letter");
    receiver.answer_status(500);
    let mut leaving = event("c", "m3");
    leaving["event_id"] = json!("leaving");
    relay.queue(&leaving);
    relay.toggle("web_token=c&im_web_plugin_id=12&h5push=false");
    wait_until("it was withdrawn", || state(&relay, "leaving")["state"] == "withdrawn");
    // The same after a crash, and after a stop.
    let relay = Relay::start_in(relay.kill(), &config(receiver.address, FAST));
    for (id, expected) in [(escaped, "delivered"), ("dying", "dead_letter"), ("leaving", "withdrawn")] {
        assert_eq!(state(&relay, id)["state"], expected, "{id}");
    }
    let relay = Relay::start_in(relay.stop(), &config(receiver.address, FAST));
    assert_eq!(state(&relay, escaped)["state"], "delivered");
    assert_eq!(relay.call("GET", "/v1/events/e?im_web_plugin_id=x", &NOTHING).status, 400);
}

#[test]
fn a_paused_endpoint_accepts_and_pushes_nothing_until_it_is_resumed_also_over_a_start() {
    let receiver = Receiver::start();
    let config = config(receiver.address, "[push]\nmax_age = \"1s\"\n");
    let relay = Relay::start(&config);
    let shown = relay.done("POST", "/v1/endpoints/12/pause", &NOTHING);
    assert_eq!(shown["state"], "paused");
    relay.queue(&event("a", "m0"));
    let relay = Relay::start_in(relay.kill(), &config);
    assert_eq!(relay.endpoint("12")["state"], "paused");
    relay.queue(&event("a", "m1"));
    std::thread::sleep(Duration::from_millis(1_500));
    assert_eq!(receiver.pushes().len(), 0);
    // The pause does not count as age: a failure now buries nothing.
    receiver.answer(|push| Answer::Status(if push.header("h5push-attempt") == "1" { 500 } else { 200 }));
    assert_eq!(relay.done("POST", "/v1/endpoints/12/resume", &NOTHING)["state"], "up");
    relay.done("POST", "/v1/endpoints/12/resume", &NOTHING);
    receiver.wait_pushes(1);
    relay.done("POST", "/v1/endpoints/12/retry", &NOTHING);
    assert_eq!(receiver.wait_delivered(2), ["m0", "m1"]);
    assert_eq!(letters(&relay, "").len(), 0);
    for action in ["pause", "resume", "retry", "test"] {
        assert_eq!(relay.call("POST", &format!("/v1/endpoints/99/{action}"), &NOTHING).status, 404, "{action}");
    }
    assert_eq!(relay.call("POST", "/v1/endpoints/12/explode", &NOTHING).status, 404);
    assert_eq!(relay.call("GET", "/v1/endpoints/12/pause", &NOTHING).status, 405);
}

#[test]
fn what_another_address_failed_with_is_not_shown_as_this_ones() {
    let receiver = Receiver::start();
    receiver.answer_status(500);
    let relay = Relay::start(&config(receiver.address, ""));
    relay.queue(&event("a", "m0"));
    wait_until("the error", || relay.endpoint("12")["last_error"] == "status 500");
    relay.done("POST", "/v1/endpoints/12/pause", &NOTHING);
    let other = Receiver::start();
    relay.done("PUT", "/v1/endpoints/12", &json!({ "url": format!("http://{}/", other.address) }));
    assert_eq!(relay.endpoint("12")["last_error"], Value::Null);
}

#[test]
fn what_a_withdrawn_customers_push_failed_with_is_not_shown_as_anothers() {
    let receiver = Receiver::start();
    receiver.answer(|_| Answer::After(Duration::from_millis(300), 500));
    let relay = Relay::start(&config(receiver.address, ""));
    relay.queue(&event("a", "m0"));
    receiver.wait_open();
    relay.done("POST", "/v1/endpoints/12/pause", &NOTHING);
    relay.done("DELETE", "/v1/customers?web_token=a&im_web_plugin_id=12", &NOTHING);
    wait_until("the error", || relay.endpoint("12")["last_error"] == "status 500");
    relay.queue(&event("b", "m0"));
    let lane = || relay.done("GET", "/v1/lanes?web_token=b", &NOTHING)["lanes"][0].clone();
    wait_until("its event", || lane()["events"] == 1);
    assert_eq!(lane()["last_error"], NOTHING);
}

#[test]
fn retry_makes_every_lane_due_at_once() {
    let receiver = Receiver::start();
    receiver.answer_status(500);
    let relay = Relay::start(&config(receiver.address, "[backoff]\ninitial = \"1h\"\nmax = \"1h\"\n"));
    for customer in ["a", "b"] {
        relay.queue(&event(customer, &format!("{customer}0")));
    }
    receiver.wait_pushes(2);
    receiver.answer_status(200);
    wait_until("both wait", || {
        let lanes = relay.done("GET", "/v1/lanes", &NOTHING)["lanes"].as_array().unwrap().clone();
        lanes.len() == 2 && lanes.iter().all(|lane| lane["next_attempt_at"].is_string())
    });
    relay.done("POST", "/v1/endpoints/12/retry", &NOTHING);
    receiver.wait_delivered(2);
}

#[test]
fn lanes_are_listed_in_pages_and_given_up() {
    let receiver = Receiver::start();
    receiver.answer_status(500);
    let relay = Relay::start(&config(receiver.address, "[backoff]\ninitial = \"1h\"\nmax = \"1h\"\n"));
    for customer in 0..5 {
        for message in 0..3 {
            relay.queue(&event(&format!("c{customer}"), &format!("c{customer}-{message}")));
        }
    }
    wait_until("all have failed", || {
        let lanes = relay.done("GET", "/v1/lanes", &NOTHING)["lanes"].as_array().unwrap().clone();
        lanes.len() == 5 && lanes.iter().all(|lane| lane["attempts"] == 1 && lane["last_error"] == "status 500")
    });
    let (mut seen, mut after) = (Vec::new(), String::new());
    loop {
        let page = relay.done("GET", &format!("/v1/lanes?endpoint=12&limit=2&after={after}"), &NOTHING);
        seen.extend(
            page["lanes"].as_array().unwrap().iter().map(|lane| lane["web_token"].as_str().unwrap().to_owned()),
        );
        match page["next"].as_str() {
            Some(next) => after = next.to_owned(),
            None => break,
        }
    }
    seen.sort();
    assert_eq!(seen, ["c0", "c1", "c2", "c3", "c4"]);
    let lane = relay.done("GET", "/v1/lanes?web_token=c3", &NOTHING)["lanes"][0].clone();
    assert_eq!((&lane["endpoint"], &lane["events"]), (&json!("12"), &json!(3)));
    assert_eq!(relay.done("GET", "/v1/lanes?endpoint=default", &NOTHING)["lanes"], json!([]));

    let bury = |body: Value| relay.done("POST", "/v1/lanes/bury", &body)["buried"].clone();
    assert_eq!(bury(json!({ "endpoint": "12", "web_token": "c3", "first_only": true })), 1);
    assert_eq!(bury(json!({ "endpoint": "12", "web_token": "c4" })), 3);
    assert_eq!(bury(json!({ "endpoint": "12", "web_token": "nobody" })), 0);
    let dead = letters(&relay, "endpoint=12");
    assert_eq!(dead.len(), 4);
    assert!(dead.iter().all(|letter| letter["reason"] == "buried" && letter["last_error"] == "status 500"));
    assert_eq!(relay.done("GET", "/v1/lanes?web_token=c3", &NOTHING)["lanes"][0]["events"], 2);
    assert_eq!(bury(json!({ "endpoint": "12" })), 11);
    assert_eq!(relay.endpoint("12")["events"], 0);
    for body in [json!({}), json!({ "endpoint": "x" }), json!({ "endpoint": "12", "what": 1 })] {
        assert_eq!(relay.call("POST", "/v1/lanes/bury", &body).status, 400, "{body}");
    }
}

#[test]
fn what_is_buried_while_its_push_is_in_flight_is_given_up_if_that_fails() {
    let receiver = Receiver::start();
    receiver.answer(|_| Answer::After(Duration::from_millis(500), 500));
    let relay = Relay::start(&config(receiver.address, "[backoff]\ninitial = \"1h\"\nmax = \"1h\"\n"));
    relay.queue(&event("a", "m0"));
    relay.wait_metric("h5push_in_flight", &[("endpoint", "12")], |count| count == 1.0);
    relay.queue(&event("a", "m1"));
    assert_eq!(relay.done("POST", "/v1/lanes/bury", &json!({ "endpoint": "12", "web_token": "a" }))["buried"], 2);
    assert_eq!(letters(&relay, "").len(), 2);
    assert_eq!(receiver.pushes().len(), 1);
}

#[test]
fn dead_letters_are_listed_shown_replayed_and_purged() {
    let receiver = Receiver::start();
    let relay = with_dead_letters(&receiver, &["a", "b", "a", "c"]);
    let all = letters(&relay, "");
    assert_eq!(all.len(), 4);
    let page = relay.done("GET", "/v1/dead-letters?limit=3", &NOTHING);
    let rest = letters(&relay, &format!("after={}", page["next"].as_str().unwrap()));
    assert_eq!(rest, all[3..]);
    let of_a = letters(&relay, "web_token=a&endpoint=12");
    assert_eq!(of_a.len(), 2);
    let id = of_a[0]["id"].as_str().unwrap().to_owned();
    let shown = relay.done("GET", &format!("/v1/dead-letters/{id}"), &NOTHING);
    assert_eq!(shown["messages"][0]["message_id"], "m0");
    assert_eq!((&shown["reason"], &shown["attempts"]), (&json!("gone"), &json!(1)));
    assert_eq!(shown["last_error"], "status 410");
    assert!(shown["buried_at"].as_str().unwrap().ends_with('Z'));

    // Replayed behind what waits, once, with everything anew.
    receiver.answer_status(500);
    relay.queue(&event("a", "m9"));
    relay.wait_metric("h5push_outbox_events", &[("endpoint", "12")], |count| count == 1.0);
    let ids: Vec<&str> = of_a.iter().map(|letter| letter["id"].as_str().unwrap()).collect();
    let replayed = relay.done("POST", "/v1/dead-letters/replay", &json!({ "ids": [ids[0], ids[1], ids[0], "99-0"] }));
    assert_eq!(replayed, json!({ "replayed": 2, "skipped": 2 }));
    assert_eq!(relay.done("POST", "/v1/dead-letters/replay", &json!({ "ids": ids }))["replayed"], 0);
    assert_eq!(relay.call("GET", &format!("/v1/dead-letters/{id}"), &NOTHING).status, 404);
    assert_eq!(relay.endpoint("12")["events"], 3);
    // Gone is gone, also after a crash, and what was replayed is there.
    let relay = Relay::start_in(relay.kill(), &config(receiver.address, FAST));
    assert_eq!(letters(&relay, "").len(), 2);
    receiver.answer_status(200);
    assert_eq!(receiver.wait_delivered(3), ["m9", "m0", "m2"]);

    // A customer who is switched off keeps the letter; the other one goes.
    relay.toggle("web_token=b&im_web_plugin_id=12&h5push=false");
    let replayed = relay.done("POST", "/v1/dead-letters/replay", &json!({ "all": true }));
    assert_eq!(replayed, json!({ "replayed": 1, "skipped": 1 }));
    assert_eq!(receiver.wait_delivered(4)[3], "m3");
    assert_eq!(relay.done("DELETE", "/v1/dead-letters", &json!({ "endpoint": "12" })), json!({ "purged": 1 }));
    assert_eq!(letters(&relay, "").len(), 0);
    assert_eq!(relay.call("DELETE", "/v1/dead-letters", &json!({})).status, 400);
    assert_eq!(relay.call("GET", "/v1/dead-letters/nonsense", &NOTHING).status, 404);
    relay.wait_metric("h5push_dead_letters", &[("endpoint", "12")], |count| count == 0.0);
}

#[test]
fn a_body_that_is_needed_and_missing_is_a_wrong_request() {
    let relay = Relay::start("");
    for (method, path) in [
        ("DELETE", "/v1/dead-letters"),
        ("POST", "/v1/dead-letters/replay"),
        ("POST", "/v1/lanes/bury"),
        ("PUT", "/v1/customers"),
    ] {
        let answer = request(relay.local, method, path, &[], b"");
        assert_eq!((answer.status, answer.code().as_str()), (400, "invalid_request"), "{method} {path}");
    }
}

#[test]
fn two_callers_never_replay_a_letter_twice() {
    let receiver = Receiver::start();
    let customers: Vec<String> = (0..20).map(|number| format!("c{number}")).collect();
    let names: Vec<&str> = customers.iter().map(String::as_str).collect();
    let relay = with_dead_letters(&receiver, &names);
    receiver.answer_status(200);
    let before = receiver.pushes().len();
    let replay = || {
        let done = relay.done("POST", "/v1/dead-letters/replay", &json!({ "all": true }));
        done["replayed"].as_u64().unwrap()
    };
    let replayed: u64 = std::thread::scope(|scope| {
        let callers: Vec<_> = (0..4).map(|_| scope.spawn(replay)).collect();
        callers.into_iter().map(|caller| caller.join().unwrap()).sum()
    });
    assert_eq!(replayed, 20);
    receiver.wait_delivered(20);
    assert_eq!(receiver.pushes().len() - before, 20);
}

#[test]
fn a_forgotten_customers_dead_letters_are_gone_too() {
    let receiver = Receiver::start();
    let relay = with_dead_letters(&receiver, &["a", "b"]);
    let forgotten = relay.done("DELETE", "/v1/customers?web_token=a", &NOTHING);
    assert_eq!(forgotten, json!({ "forgotten": 1, "withdrawn": 0, "dead_letters": 1 }));
    let left = letters(&relay, "");
    assert_eq!((left.len(), &left[0]["web_token"]), (1, &json!("b")));
}

#[test]
fn a_reload_takes_all_over_or_nothing() {
    let receiver = Receiver::start();
    let other = Receiver::start();
    let relay = Relay::start(&config(receiver.address, ""));
    let path = relay.dir.path().join("config.toml");
    let first = std::fs::read_to_string(&path).unwrap();
    relay.queue(&event("a", "m0"));
    receiver.wait_delivered(1);

    std::fs::write(&path, first.replace("rate_per_second", "rate_per_secnd")).unwrap();
    relay.signal("HUP");
    wait_until("the error shows", || relay.metric("h5push_config_last_reload_successful", &[]) == 0.0);
    let status = relay.done("GET", "/v1/status", &NOTHING);
    assert!(status["config"]["error"].as_str().unwrap().contains("rate_per_secnd"), "{status}");
    assert!(relay.log().contains("line "), "{}", relay.log());
    relay.queue(&event("a", "m1"));
    receiver.wait_delivered(2);

    let moved = first.replace(&receiver.address.to_string(), &other.address.to_string());
    let moved = moved.replace("[metrics]", "[metrics]\nmax_endpoints = 7");
    let moved = moved.replace("min_free_disk = 0", "min_free_disk = \"1KiB\"");
    std::fs::write(&path, moved).unwrap();
    relay.signal("HUP");
    wait_until("it is read", || relay.metric("h5push_config_last_reload_successful", &[]) == 1.0);
    relay.queue(&event("a", "m2"));
    assert_eq!(other.wait_delivered(1), ["m2"]);
    let status = relay.done("GET", "/v1/status", &NOTHING);
    assert_eq!(status["config"]["error"], NOTHING);
    assert_eq!(status["config"]["needs_restart"], json!(["metrics.max_endpoints"]));
    assert_eq!(status["disk"]["floor_bytes"], 1024, "the floor in effect");
    assert_eq!(receiver.delivered_ids(), ["m0", "m1"]);
}

#[test]
fn a_reload_under_load_loses_and_repeats_nothing() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, ""));
    let sent = std::thread::scope(|scope| {
        let poster = scope.spawn(|| {
            (0..400)
                .map(|number| {
                    let id = format!("m{number}");
                    relay.queue(&event(&format!("c{}", number % 7), &id));
                    id
                })
                .collect::<Vec<_>>()
        });
        while !poster.is_finished() {
            relay.signal("HUP");
            std::thread::sleep(Duration::from_millis(20));
        }
        poster.join().unwrap()
    });
    let mut delivered = receiver.wait_delivered(sent.len());
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(receiver.delivered_ids().len(), sent.len(), "something was pushed twice");
    let mut expected = sent;
    delivered.sort();
    expected.sort();
    assert_eq!(delivered, expected);
}

#[test]
fn the_page_runs_nothing_but_itself_and_asks_for_the_token() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, "[local]\ntoken = \"s3cret\"\n"));
    let page = get(relay.local, "/");
    assert_eq!(page.status, 200);
    let policy = page.header("content-security-policy").unwrap();
    assert!(policy.starts_with("default-src 'none'") && policy.contains("script-src 'sha256-"), "{policy}");
    let text = page.text();
    assert!(!text.contains("http://") || text.matches("http://").count() == text.matches("http://www.w3.org").count());
    assert!(!text.contains("https://") && !text.contains("s3cret"));
    assert_eq!(get(relay.local, "/v1/status").status, 401);
    let known = request(relay.local, "GET", "/v1/status", &[("authorization", "Bearer s3cret")], b"");
    assert_eq!(known.status, 200);
}
