//! Load from four connections that knows what was acknowledged, and the check that all of it came, each customer's in
//! order.

use std::collections::{HashMap, HashSet};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::support::*;

pub const LANES: usize = 24;

/// Posts events of its lanes one after another until told to stop or the relay is gone; keeps what was answered 202.
fn post_until(to: SocketAddr, lanes: Vec<usize>, counters: Arc<Mutex<HashMap<usize, usize>>>, stop: Arc<AtomicBool>) {
    let Ok(mut stream) = TcpStream::connect(to) else { return };
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    for lane in lanes.into_iter().cycle() {
        if stop.load(Ordering::SeqCst) {
            return;
        }
        let number = counters.lock().unwrap().get(&lane).copied().unwrap_or(0);
        let body = event(&format!("lane{lane}"), &format!("{lane}-{number:06}")).to_string();
        let head = format!(
            "POST /v1/events HTTP/1.1\r\nhost: {to}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        if stream.write_all((head + &body).as_bytes()).is_err() {
            return;
        }
        let mut answer = Vec::new();
        while !answer.windows(4).any(|window| window == b"\r\n\r\n") || !answer.ends_with(b"}") {
            let mut bytes = [0; 1_024];
            match stream.read(&mut bytes) {
                Ok(0) | Err(_) => return,
                Ok(read) => answer.extend_from_slice(&bytes[..read]),
            }
        }
        let text = String::from_utf8_lossy(&answer);
        if text.starts_with("HTTP/1.1 503") && text.contains("disk_low") {
            std::thread::sleep(Duration::from_millis(20));
            continue;
        }
        // `duplicate`: stored before the crash, and not answered then.
        assert!(text.starts_with("HTTP/1.1 202"), "{text:?}");
        counters.lock().unwrap().insert(lane, number + 1);
    }
}

/// Of each lane, how many of its events were acknowledged.
pub type Counters = Arc<Mutex<HashMap<usize, usize>>>;

/// What posts to a relay, from four connections.
pub struct Load {
    stop: Arc<AtomicBool>,
    posters: Vec<std::thread::JoinHandle<()>>,
}

impl Load {
    pub fn start(to: SocketAddr, counters: &Counters) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let posters = (0..4)
            .map(|poster| {
                let lanes = (0..LANES).filter(|lane| lane % 4 == poster).collect();
                let (counters, stop) = (Arc::clone(counters), Arc::clone(&stop));
                std::thread::spawn(move || post_until(to, lanes, counters, stop))
            })
            .collect();
        Load { stop, posters }
    }

    /// Ends it; the relay has gone.
    pub fn stop(self) {
        self.stop.store(true, Ordering::SeqCst);
        self.posters.into_iter().for_each(|poster| poster.join().unwrap());
    }
}

pub fn number_of(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().map_or(default, |text| text.parse().unwrap())
}

/// Well, failing now and then, or broken.
pub fn receive_like(round: u64, receiver: &Receiver) {
    match round % 3 {
        0 => receiver.answer_status(200),
        1 => receiver.answer(|_| Answer::Status(if fastrand::u8(0..4) == 0 { 503 } else { 200 })),
        _ => receiver.answer_status(500),
    }
}

/// Delivers what is left: all that was acknowledged came, each customer's in order. Says how much came twice.
pub fn check_delivered(relay: &Relay, receiver: &Receiver, counters: &Counters) -> usize {
    receiver.answer_status(200);
    relay.wait_metric("h5push_outbox_events", &[("endpoint", "12")], |count| count == 0.0);
    let mut by_lane: HashMap<String, Vec<String>> = HashMap::new();
    for push in receiver.delivered() {
        by_lane.entry(push.customer()).or_default().extend(push.message_ids());
    }
    let (mut repeated, mut delivered) = (0, 0);
    for (lane, count) in counters.lock().unwrap().iter() {
        let ids = by_lane.get(&format!("lane{lane}")).cloned().unwrap_or_default();
        let mut first_seen = Vec::new();
        let mut seen = HashSet::new();
        for id in &ids {
            if seen.insert(id) {
                first_seen.push(id);
            } else {
                repeated += 1;
            }
        }
        assert!(first_seen.is_sorted(), "lane {lane} out of order: {first_seen:?}");
        let lost: Vec<String> = (0..*count).map(|n| format!("{lane}-{n:06}")).filter(|id| !seen.contains(id)).collect();
        assert!(lost.is_empty(), "lost {lost:?}");
        delivered += first_seen.len();
    }
    let accepted: usize = counters.lock().unwrap().values().sum();
    println!("{accepted} accepted, {delivered} delivered, {repeated} of them repeated");
    assert!(accepted > 100 && delivered >= accepted);
    repeated
}

/// Nothing was found damaged since the start.
pub fn check_undamaged(relay: &Relay) {
    for what in ["journal", "queue", "checkpoint", "state_log", "dead_letters"] {
        assert_eq!(relay.metric("h5push_store_damage_total", &[("what", what)]), 0.0, "{what}: {}", relay.log());
    }
}
