//! A journal that the disk has harmed: what is harmed is noticed and counted, the rest is delivered in order.

use std::path::PathBuf;
use std::sync::Arc;

use serde_json::{Value, json};

use super::support::*;

const EVENTS: usize = 20;

/// The journal's segments, oldest first.
fn segments(relay: &Relay) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(relay.data_dir().join("journal")).unwrap();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "log"));
    paths.sort();
    paths
}

/// Of the events of three segments, those of the middle one that came after it was harmed.
fn delivered_after(harm: &str, is_clean: bool) -> Vec<String> {
    let receiver = Receiver::start();
    receiver.answer_status(500);
    let text = config(receiver.address, "[backoff]\ninitial = \"20ms\"\nmax = \"100ms\"\n");
    let mut dir = Arc::new(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
    let mut middle = PathBuf::new();
    for round in 0..3 {
        let relay = Relay::start_in(dir, &text);
        for number in 0..EVENTS {
            relay.queue(&event(&format!("c{}", number % 4), &format!("{round}-{number:02}")));
        }
        if round == 1 {
            middle = segments(&relay).pop().unwrap();
        }
        dir = if is_clean { relay.stop() } else { relay.kill() };
    }
    let mut bytes = std::fs::read(&middle).unwrap();
    let place = |text: &str| bytes.windows(text.len()).position(|window| window == text.as_bytes()).unwrap();
    match harm {
        "flipped" => {
            let at = place("\"1-07\"");
            bytes[at + 2] ^= 4;
            std::fs::write(&middle, bytes).unwrap();
        }
        "cut" => {
            let at = place("\"1-10\"");
            bytes.truncate(at);
            std::fs::write(&middle, bytes).unwrap();
        }
        "emptied" => std::fs::write(&middle, b"").unwrap(),
        "zeroed" => std::fs::write(&middle, vec![0; bytes.len()]).unwrap(),
        "missing" => std::fs::remove_file(&middle).unwrap(),
        // Under a number that is yet to come.
        _ => drop(std::fs::copy(&middle, middle.with_file_name(format!("{:016}.log", 900))).unwrap()),
    }
    receiver.answer_status(200);
    let relay = Relay::start_in(dir, &text);
    relay.queue(&event("last", "last"));
    relay.wait_metric("h5push_outbox_events", &[("endpoint", "12")], |count| count == 0.0);
    let what = format!("{harm}, after a {}", if is_clean { "stop" } else { "kill" });
    // A newest segment that is not its own is taken for one that was never written; nothing of it is missed.
    let (counted, said) = if harm == "doubled" { ("torn_tail", " WARN ") } else { ("journal", " ERROR ") };
    let damage = relay.metric("h5push_store_damage_total", &[("what", counted)]);
    if harm == "flipped" {
        assert_eq!(damage, 1.0, "{what}: one record");
    }
    assert!(damage > 0.0, "{what}: not counted: {}", relay.log());
    assert!(relay.log().contains(said), "{what}: not said: {}", relay.log());
    let delivered = receiver.delivered_ids();
    for customer in 0..4 {
        let of: Vec<&String> = delivered.iter().filter(|id| number(id) % 4 == customer && *id != "last").collect();
        assert!(of.windows(2).all(|two| two[0] < two[1]), "{what}: out of order or twice: {of:?}");
    }
    for round in [0, 2] {
        let of = delivered.iter().filter(|id| id.starts_with(&format!("{round}-"))).count();
        assert_eq!(of, EVENTS, "{what}: round {round} of {delivered:?}");
    }
    assert!(delivered.contains(&"last".to_owned()));
    // And the damage does no more of it.
    relay.queue(&event("c0", "after"));
    receiver.wait_delivered(delivered.len() + 1);
    drop(Relay::start_in(relay.stop(), &text));
    let mut middle: Vec<String> = delivered.into_iter().filter(|id| id.starts_with("1-")).collect();
    middle.sort();
    middle
}

fn number(id: &str) -> usize {
    id.rsplit('-').next().unwrap().parse().unwrap_or(0)
}

#[test]
fn a_harmed_segment_costs_what_was_harmed_in_it_and_no_more() {
    let whole: Vec<String> = (0..EVENTS).map(|number| format!("1-{number:02}")).collect();
    for is_clean in [true, false] {
        let mut one_less = whole.clone();
        one_less.remove(7);
        assert_eq!(delivered_after("flipped", is_clean), one_less);
        assert_eq!(delivered_after("cut", is_clean), whole[..10]);
        for harm in ["emptied", "zeroed", "missing"] {
            assert_eq!(delivered_after(harm, is_clean), Vec::<String>::new());
        }
        assert_eq!(delivered_after("doubled", is_clean), whole);
    }
}

#[test]
fn a_harmed_log_of_the_customers_is_counted_once_and_written_anew() {
    const CUSTOMERS: usize = 40;
    let receiver = Receiver::start();
    let text = config(receiver.address, "");
    let switch_off = |relay: &Relay, customer: &str| {
        let customer = json!({"web_token": customer, "im_web_plugin_id": 12, "toggle": "off"});
        assert_eq!(relay.put_customer(&customer).status, 200);
    };
    let relay = Relay::start(&text);
    for number in 0..CUSTOMERS {
        switch_off(&relay, &format!("c{number:02}"));
    }
    let mut dir = relay.stop();
    let log = dir.path().join("data/state-0.log");
    let bytes = std::fs::read(&log).unwrap();
    std::fs::write(&log, &bytes[..bytes.len() / 2]).unwrap();
    let shown = |relay: &Relay, number: usize| {
        let query = format!("/v1/customers?web_token=c{number:02}&im_web_plugin_id=12");
        relay.call("GET", &query, &Value::Null).json()["toggle"] == "off"
    };
    let mut kept = Vec::new();
    for (round, damage) in [(0, true), (1, false)] {
        std::fs::remove_dir_all(dir.path().join("data/queue")).unwrap();
        let relay = Relay::start_in(dir, &text);
        let counted = relay.metric("h5push_store_damage_total", &[("what", "state_log")]);
        assert_eq!(counted > 0.0, damage, "round {round}: {}", relay.log());
        kept.push((0..CUSTOMERS).map(|number| shown(&relay, number)).collect::<Vec<_>>());
        switch_off(&relay, "one more");
        dir = relay.stop();
    }
    let first = kept[0].iter().take_while(|is_off| **is_off).count();
    assert!((CUSTOMERS / 2 - 2..=CUSTOMERS / 2).contains(&first), "{kept:?}");
    assert!(kept[0][first..].iter().all(|is_off| !is_off), "{kept:?}");
    assert_eq!(kept[0], kept[1]);
}

#[test]
fn nothing_is_accepted_into_files_that_were_removed() {
    let receiver = Receiver::start();
    receiver.answer_status(500);
    let text = config(receiver.address, "[backoff]\ninitial = \"20ms\"\nmax = \"100ms\"\n");
    let relay = Relay::start(&text);
    relay.queue(&event("a", "gone"));
    for segment in segments(&relay) {
        std::fs::remove_file(segment).unwrap();
    }
    relay.queue(&event("a", "kept"));
    assert_eq!(relay.metric("h5push_store_errors_total", &[("op", "append")]), 1.0);
    let relay = Relay::start_in(relay.kill(), &text);
    receiver.answer_status(200);
    assert_eq!(receiver.wait_delivered(1), ["kept"]);
    // The relay may create a file in between.
    wait_until("it is removed", || std::fs::remove_dir_all(relay.data_dir()).is_ok() || !relay.data_dir().exists());
    let refused = relay.post(&event("a", "refused"));
    assert_eq!((refused.status, refused.code().as_str()), (503, "disk_low"));
    assert_eq!(get(relay.metrics, "/readyz").status, 503);
}

#[test]
fn a_queue_is_set_aside_over_whatever_was_before() {
    let receiver = Receiver::start();
    let text = config(receiver.address, "");
    let relay = Relay::start(&text);
    relay.queue(&event("a", "m0"));
    let mut dir = relay.stop();
    for harm in ["a file in its place", "a file of its own"] {
        let queue = dir.path().join("data/queue");
        if harm == "a file in its place" {
            std::fs::remove_dir_all(&queue).unwrap();
            std::fs::write(&queue, b"").unwrap();
        } else {
            std::fs::write(queue.join("db"), b"none of sled's").unwrap();
        }
        let relay = Relay::start_in(dir, &text);
        assert_eq!(relay.metric("h5push_store_damage_total", &[("what", "queue")]), 1.0, "{harm}");
        dir = relay.stop();
    }
}
