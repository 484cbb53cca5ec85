//! Everything at once, for as long as is asked: load, kills, outages, toggles, reloads, replays, a slow disk.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::json;

use super::disk::Faulty;
use super::load::*;
use super::support::*;

/// How the receiver is.
const WELL: u8 = 0;
const FAILING: u8 = 1;
const BROKEN: u8 = 2;
const HANGING: u8 = 3;

/// Longest an attempt may take, by the config.
const ATTEMPT: Duration = Duration::from_secs(1);

/// What came, customer by customer.
#[derive(Default)]
struct Watch {
    mood: AtomicU8,
    /// Those of plugin 13 are told never to come again.
    is_gone: AtomicBool,
    /// Of each lane, the number that comes next.
    next: Mutex<HashMap<String, usize>>,
    /// Messages of plugin 13.
    of_gone: Mutex<HashSet<String>>,
    /// When the switched customer got something last.
    switched_at: Mutex<Option<Instant>>,
    pushes: AtomicUsize,
    repeated: AtomicUsize,
    problems: Mutex<Vec<String>>,
}

impl Watch {
    fn receive(&self, push: &Push) -> Answer {
        let customer = push.customer();
        if customer == "switched" {
            *self.switched_at.lock().unwrap() = Some(push.at);
        }
        if customer == "gone" && self.is_gone.load(Ordering::SeqCst) {
            return Answer::Status(410);
        }
        match self.mood.load(Ordering::SeqCst) {
            FAILING if fastrand::u8(0..4) == 0 => return Answer::Status(503),
            BROKEN => return Answer::Status(500),
            HANGING => return Answer::After(2 * ATTEMPT, 503),
            _ => {}
        }
        self.pushes.fetch_add(1, Ordering::SeqCst);
        if customer == "gone" {
            self.of_gone.lock().unwrap().extend(push.message_ids());
        } else if customer.starts_with("lane") {
            let mut lanes = self.next.lock().unwrap();
            let next = lanes.entry(customer.clone()).or_default();
            for id in push.message_ids() {
                let number: usize = id.rsplit('-').next().unwrap().parse().unwrap();
                if number == *next {
                    *next += 1;
                } else if number < *next {
                    self.repeated.fetch_add(1, Ordering::SeqCst);
                } else {
                    self.problem(format!("{customer}: {number} came where {next} was due"));
                }
            }
        }
        Answer::Status(200)
    }

    fn problem(&self, what: String) {
        println!("{what}");
        self.problems.lock().unwrap().push(what);
    }
}

/// What the process and its disk take.
#[derive(Clone, Copy, Debug, Default)]
struct Taken {
    memory_kib: u64,
    files: u64,
    disk: u64,
}

impl Taken {
    fn by(relay: &Relay) -> Taken {
        let status = std::fs::read_to_string(format!("/proc/{}/status", relay.pid())).unwrap();
        let memory = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()).unwrap();
        Taken {
            memory_kib: memory.parse().unwrap(),
            files: std::fs::read_dir(format!("/proc/{}/fd", relay.pid())).unwrap().count() as u64,
            disk: bytes_below(&relay.data_dir()),
        }
    }

    fn max(self, other: Taken) -> Taken {
        Taken {
            memory_kib: self.memory_kib.max(other.memory_kib),
            files: self.files.max(other.files),
            disk: self.disk.max(other.disk),
        }
    }
}

/// One run.
struct Run {
    disk: Faulty,
    text: String,
    receiver: Receiver,
    watch: Arc<Watch>,
    counters: Counters,
    /// Messages of plugin 13 that were acknowledged.
    for_gone: HashSet<String>,
    posted: usize,
    happened: u8,
    kills: usize,
    toggles: usize,
    replayed: u64,
}

impl Run {
    fn start(&self) -> (Relay, Load) {
        let relay = self.disk.start(&self.text);
        let load = Load::start(relay.local, &self.counters);
        (relay, load)
    }

    /// One thing that happens. Answers with the relay that runs then.
    fn happen(&mut self, relay: Relay, load: Load) -> (Relay, Load) {
        // Each once, then by chance.
        let what = if self.happened < 10 { self.happened } else { fastrand::u8(0..12) };
        self.happened = self.happened.saturating_add(1);
        match what {
            0 => {
                drop(relay.kill());
                load.stop();
                self.kills += 1;
                return self.start();
            }
            what @ 1..=3 => {
                self.watch.mood.store(what, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(fastrand::u64(100..3_000)));
                self.watch.mood.store(WELL, Ordering::SeqCst);
            }
            4..=5 => {
                self.disk.fails(&format!("slow {}", fastrand::u32(5..200)));
                std::thread::sleep(Duration::from_millis(fastrand::u64(100..2_000)));
                self.disk.works();
            }
            6 => relay.signal("HUP"),
            7 => self.toggle(&relay),
            8 => {
                let all = relay.done("POST", "/v1/dead-letters/replay", &json!({ "endpoint": "13" }));
                self.replayed += all["replayed"].as_u64().unwrap();
            }
            9 => self.watch.is_gone.store(fastrand::bool(), Ordering::SeqCst),
            _ => self.post_more(&relay),
        }
        std::thread::sleep(Duration::from_millis(fastrand::u64(10..500)));
        (relay, load)
    }

    /// While the switch is off, nothing is begun.
    fn toggle(&mut self, relay: &Relay) {
        let switch = |to: &str| {
            let answer = relay.toggle(&format!("web_token=switched&im_web_plugin_id=12&h5push={to}"));
            assert_eq!(answer["code"], 1000, "{answer}");
        };
        switch("false");
        std::thread::sleep(ATTEMPT + Duration::from_millis(500));
        let quiet = Instant::now();
        self.post_more(relay);
        std::thread::sleep(Duration::from_millis(300));
        let last = *self.watch.switched_at.lock().unwrap();
        if last.is_some_and(|last| last > quiet) {
            self.watch.problem("a customer who had switched off got a push".to_owned());
        }
        switch("true");
        self.toggles += 1;
    }

    fn post_more(&mut self, relay: &Relay) {
        for _ in 0..10 {
            let id = format!("m{}", self.posted);
            self.posted += 1;
            let mut event = event("gone", &id);
            event["im_web_plugin_id"] = json!(13);
            if relay.post(&event).status == 202 {
                self.for_gone.insert(id.clone());
            }
            relay.post(&super::support::event("switched", &id));
        }
    }
}

/// `H5PUSH_ENDURANCE_SECONDS`: for how long.
#[test]
fn everything_at_once_loses_repeats_and_leaks_nothing() {
    let seconds = number_of("H5PUSH_ENDURANCE_SECONDS", 20);
    let Some(disk) = Faulty::new() else { return };
    let receiver = Receiver::start();
    receiver.forget();
    let watch = Arc::new(Watch::default());
    let watching = Arc::clone(&watch);
    receiver.answer(move |push| watching.receive(push));
    let more = format!(
        "[endpoints.13]\nurl = \"http://{}/13\"\n[push]\ntimeout = \"1s\"\n[backoff]\ninitial = \"50ms\"\nmax = \"500ms\"\n",
        receiver.address
    );
    let text = config(receiver.address, &more);
    let mut run = Run {
        disk,
        text,
        receiver,
        watch,
        counters: Counters::default(),
        for_gone: HashSet::new(),
        posted: 0,
        happened: 0,
        kills: 0,
        toggles: 0,
        replayed: 0,
    };
    let begun = Instant::now();
    let whole = Duration::from_secs(seconds);
    // The most that was taken in each sixth of the time.
    let mut taken = [Taken::default(); 6];
    let (mut relay, mut load) = run.start();
    run.post_more(&relay);
    while begun.elapsed() < whole && run.watch.problems.lock().unwrap().is_empty() {
        (relay, load) = run.happen(relay, load);
        let sixth = (begun.elapsed().as_secs_f64() / whole.as_secs_f64() * 6.0) as usize;
        if let Some(most) = taken.get_mut(sixth) {
            *most = most.max(Taken::by(&relay));
        }
    }
    // Over one more kill, and then until all has come.
    drop(relay.kill());
    load.stop();
    run.watch.is_gone.store(false, Ordering::SeqCst);
    let relay = Relay::start_in(Arc::clone(&run.disk.dir), &run.text);
    run.replayed +=
        relay.done("POST", "/v1/dead-letters/replay", &json!({ "endpoint": "13" }))["replayed"].as_u64().unwrap();
    for endpoint in ["12", "13"] {
        relay.wait_metric("h5push_outbox_events", &[("endpoint", endpoint)], |count| count == 0.0);
    }
    assert_eq!(*run.watch.problems.lock().unwrap(), Vec::<String>::new());
    let next = run.watch.next.lock().unwrap();
    let mut accepted = 0;
    for (lane, count) in run.counters.lock().unwrap().iter() {
        let came = next.get(&format!("lane{lane}")).copied().unwrap_or(0);
        assert!(came >= *count, "lane {lane}: {came} of {count}");
        accepted += count;
    }
    let of_gone = run.watch.of_gone.lock().unwrap();
    let lost: Vec<&String> = run.for_gone.difference(&of_gone).collect();
    assert!(lost.is_empty(), "never replayed: {lost:?}");
    check_undamaged(&relay);
    let (repeated, pushes) = (run.watch.repeated.load(Ordering::SeqCst), run.watch.pushes.load(Ordering::SeqCst));
    println!(
        "{:.0?}: {accepted} events of {LANES} customers in {pushes} pushes, {repeated} of them repeated; {} kills, {} toggles, \
         {} replayed; {} at {}",
        begun.elapsed(),
        run.kills,
        run.toggles,
        run.replayed,
        run.for_gone.len(),
        run.receiver.address,
    );
    println!("memory, descriptors and disk by sixths: {taken:?}");
    assert!(repeated <= (run.kills + 1) * LANES * 50, "{repeated} repeated");
    // Short runs are still filling their tables.
    if seconds >= 600 {
        let (early, late) = (taken[1].max(taken[2]), taken[4].max(taken[5]));
        assert!(late.memory_kib < early.memory_kib * 5 / 4 + (16 << 10), "memory grows: {early:?}, {late:?}");
        assert!(late.files < early.files * 5 / 4 + 20, "descriptors grow: {early:?}, {late:?}");
        assert!(late.disk < early.disk * 5 / 4 + (64 << 20), "disk grows: {early:?}, {late:?}");
    }
}
