//! A disk that fails or is slow: what was acknowledged is kept, the rest is refused, and it comes back by itself.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::load::*;
use super::support::*;

/// A relay on a disk that fails on demand.
pub struct Faulty {
    pub dir: Arc<tempfile::TempDir>,
    how: PathBuf,
    environment: Vec<(&'static str, PathBuf)>,
}

impl Faulty {
    /// `None`, said aloud, where it cannot be compiled.
    pub fn new() -> Option<Faulty> {
        let dir = Arc::new(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
        let library = preload("faulty_disk.c", dir.path())?;
        let how = dir.path().join("how");
        let environment =
            vec![("LD_PRELOAD", library), ("FAULTY_DIR", dir.path().join("data")), ("FAULTY_HOW", how.clone())];
        Some(Faulty { dir, how, environment })
    }

    pub fn start(&self, config: &str) -> Relay {
        Relay::spawn_with(Arc::clone(&self.dir), config, &self.environment).ready()
    }

    pub fn fails(&self, how: &str) {
        std::fs::write(&self.how, how).unwrap();
    }

    pub fn works(&self) {
        std::fs::remove_file(&self.how).unwrap();
    }
}

/// Delivers what waits, after a kill, and says what came in which order.
fn delivered_after_a_kill(relay: Relay, receiver: &Receiver, text: &str, count: usize) -> Vec<String> {
    receiver.answer_status(200);
    let _relay = Relay::start_in(relay.kill(), text);
    receiver.wait_delivered(count);
    // Nothing comes after it.
    std::thread::sleep(Duration::from_millis(300));
    receiver.delivered_ids()
}

const QUICK: &str = "[backoff]\ninitial = \"50ms\"\nmax = \"100ms\"\n";

fn timed(act: impl FnOnce()) -> Duration {
    let begun = Instant::now();
    act();
    begun.elapsed()
}

#[test]
fn a_sync_that_fails_is_made_good_or_the_event_is_refused() {
    let Some(disk) = Faulty::new() else { return };
    let receiver = Receiver::start();
    receiver.answer_status(500);
    let text = config(receiver.address, QUICK);
    let relay = disk.start(&text);
    relay.queue(&event("a", "m0"));
    // Once: the group is written again, elsewhere, before anybody is told.
    disk.fails("sync 1");
    relay.queue(&event("a", "m1"));
    relay.queue(&event("a", "m2"));
    // For long: nobody is told that anything is stored, whatever it is.
    disk.fails("sync 1000000");
    let refused = relay.post(&event("a", "refused"));
    assert_eq!((refused.status, refused.code().as_str()), (503, "disk_low"));
    let customer = json!({ "web_token": "a", "im_web_plugin_id": 12, "toggle": "off" });
    assert_eq!(relay.put_customer(&customer).status, 503);
    assert_eq!(get(relay.metrics, "/healthz").status, 200);
    assert!(relay.metric("h5push_store_errors_total", &[("op", "sync")]) >= 2.0);
    assert_eq!(receiver.delivered_ids(), Vec::<String>::new());
    // It comes back by itself, and what was refused may be posted again.
    disk.works();
    wait_until("the disk is used again", || relay.post(&event("a", "m3")).status == 202);
    relay.queue(&event("a", "refused"));
    let expected = ["m0", "m1", "m2", "m3", "refused"];
    assert_eq!(delivered_after_a_kill(relay, &receiver, &text, 5), expected);
}

#[test]
fn a_disk_that_cannot_be_written_refuses_and_delivers_what_it_holds() {
    let Some(disk) = Faulty::new() else { return };
    let receiver = Receiver::start();
    receiver.answer_status(500);
    let text = config(receiver.address, QUICK);
    let relay = disk.start(&text);
    for number in 0..3 {
        relay.queue(&event("a", &format!("m{number}")));
    }
    disk.fails("write 1");
    let refused = relay.post(&event("a", "refused"));
    assert_eq!((refused.status, refused.code().as_str()), (503, "disk_low"));
    // What waits is delivered all the same; that it was is written down when the disk takes it.
    receiver.answer_status(200);
    assert_eq!(receiver.wait_delivered(3), ["m0", "m1", "m2"]);
    disk.works();
    wait_until("the disk is used again", || relay.post(&event("a", "m3")).status == 202);
    receiver.wait_delivered(4);
    relay.wait_metric("h5push_messages_delivered_total", &[], |count| count == 4.0);
    // What has been delivered is written down right after it is counted.
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(delivered_after_a_kill(relay, &receiver, &text, 4), ["m0", "m1", "m2", "m3"], "none twice");
}

#[test]
fn a_burial_that_cannot_be_stored_is_said_and_comes_later() {
    let Some(disk) = Faulty::new() else { return };
    let receiver = Receiver::start();
    receiver.answer_status(500);
    let relay = disk.start(&config(receiver.address, "[backoff]\ninitial = \"1h\"\nmax = \"1h\"\n"));
    for number in 0..2 {
        relay.queue(&event("a", &format!("m{number}")));
    }
    receiver.wait_pushes(1);
    let readiness = || get(relay.metrics, "/readyz").status;
    assert_eq!(readiness(), 200);
    disk.fails("write 1");
    let bury = |relay: &Relay| relay.call("POST", "/v1/lanes/bury", &json!({ "endpoint": "12" }));
    for _ in 0..2 {
        let refused = bury(&relay);
        assert_eq!((refused.status, refused.code().as_str()), (503, "disk_low"));
    }
    assert_eq!(relay.post(&event("a", "refused")).status, 503);
    assert_eq!(readiness(), 503);
    // The tick that tries the disk again finds it as it was.
    std::thread::sleep(Duration::from_millis(1_500));
    assert_eq!(readiness(), 503);
    disk.works();
    wait_until("the disk is used again", || readiness() == 200);
    assert_eq!(bury(&relay).status, 200);
    relay.wait_metric("h5push_dead_letters_total", &[("endpoint", "12"), ("reason", "buried")], |count| count == 2.0);
    assert_eq!(relay.endpoint("12")["events"], 0);
    // Each caller is told of what it gave up, though they meet in one lane.
    for number in 0..3 {
        relay.queue(&event("b", &format!("m{number}")));
    }
    receiver.wait_pushes(2);
    disk.fails("slow 700");
    std::thread::scope(|scope| {
        let first = scope.spawn(|| {
            relay.done("POST", "/v1/lanes/bury", &json!({ "endpoint": "12", "first_only": true }))["buried"].clone()
        });
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(bury(&relay).json()["buried"], 3);
        assert_eq!(first.join().unwrap(), 1);
    });
    // Nor does a stop wait for one.
    disk.works();
    relay.queue(&event("c", "m0"));
    disk.fails("write 1");
    assert_eq!(bury(&relay).status, 503);
    assert!(timed(|| drop(relay.stop())) < Duration::from_secs(5));
}

#[test]
fn a_disk_that_takes_seconds_a_sync_delays_the_202_and_nothing_else() {
    let Some(disk) = Faulty::new() else { return };
    let receiver = Receiver::start();
    receiver.answer_status(500);
    let relay = disk.start(&config(receiver.address, QUICK));
    relay.queue(&event("a", "m0"));
    disk.fails("slow 3000");
    let posted = std::thread::scope(|scope| {
        let posted = scope.spawn(|| {
            let begun = Instant::now();
            relay.queue(&event("b", "m1"));
            begun.elapsed()
        });
        std::thread::sleep(Duration::from_millis(200));
        let begun = Instant::now();
        receiver.answer_status(200);
        receiver.wait_delivered(1);
        assert_eq!(get(relay.metrics, "/metrics").status, 200);
        assert_eq!(get(relay.local, "/healthz").status, 200);
        let others = begun.elapsed();
        assert!(others < Duration::from_secs(2), "{others:?}");
        assert_eq!(receiver.delivered_ids(), ["m0"], "m1 is not stored yet");
        posted.join().unwrap()
    });
    assert!(posted > Duration::from_secs(2), "{posted:?}");
    disk.works();
    assert_eq!(receiver.wait_delivered(2), ["m0", "m1"]);
}

/// Of a backlog that memory no longer has, on a file system that can say so.
#[test]
fn a_disk_that_takes_seconds_a_read_delays_the_pushes_that_are_read_and_nothing_else() {
    let Some(disk) = Faulty::new() else { return };
    let receiver = Receiver::start();
    let relay = disk.start(&config(receiver.address, QUICK));
    // As many pushes are made at once as there were successes.
    for number in 0..16 {
        relay.queue(&event("known", &format!("before-{number}")));
    }
    receiver.wait_delivered(16);
    relay.done("POST", "/v1/endpoints/12/pause", &Value::Null);
    for number in 0..8 {
        relay.queue(&event(&format!("c{number}"), "m"));
    }
    for segment in std::fs::read_dir(relay.data_dir().join("journal")).unwrap() {
        let file = std::fs::File::open(segment.unwrap().path()).unwrap();
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    }
    disk.fails("read 3000");
    relay.done("POST", "/v1/endpoints/12/resume", &Value::Null);
    std::thread::sleep(Duration::from_millis(300));
    let others = timed(|| {
        relay.queue(&event("known", "m1"));
        assert_eq!(get(relay.local, "/healthz").status, 200);
    });
    let held_up = 8 - receiver.delivered().iter().filter(|push| push.customer() != "known").count();
    println!("{held_up} pushes wait for the disk, others are answered after {others:?}");
    if held_up == 0 {
        println!("SKIPPED: slow reads: this file system keeps all in memory");
    }
    assert!(others < Duration::from_secs(1), "{others:?}");
    disk.works();
    receiver.wait_delivered(16 + 8 + 1);
}

#[test]
fn who_says_what_is_on_its_way_already_waits_for_it_too() {
    let Some(disk) = Faulty::new() else { return };
    let receiver = Receiver::start();
    let relay = disk.start(&config(receiver.address, ""));
    relay.queue(&event("a", "m0"));
    disk.fails("slow 3000");
    let customer = json!({ "web_token": "a", "im_web_plugin_id": 12, "toggle": "on" });
    let mut suppressed = event("b", "m1");
    suppressed["h5push"] = json!(false);
    std::thread::scope(|scope| {
        let first = [scope.spawn(|| relay.put_customer(&customer)), scope.spawn(|| relay.post(&suppressed))];
        std::thread::sleep(Duration::from_millis(500));
        // Nothing is new in these, and nothing of it is on stable storage yet.
        let again = [
            scope.spawn(|| timed(|| drop(relay.put_customer(&customer)))),
            scope.spawn(|| timed(|| drop(relay.toggle("web_token=a&im_web_plugin_id=12&h5push=true")))),
            scope.spawn(|| timed(|| drop(relay.post(&suppressed)))),
        ];
        for again in again {
            let took = again.join().unwrap();
            assert!(took > Duration::from_secs(1), "{took:?}");
        }
        first.into_iter().for_each(|first| assert!(first.join().unwrap().status < 300));
    });
    disk.works();
}

/// A small file system in memory; `None`, said aloud, where it cannot be mounted.
struct Small(tempfile::TempDir);

impl Small {
    fn mount(size: &str) -> Option<Small> {
        let small = Small(tempfile::tempdir().unwrap());
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(small.0.path());
        if !mount.status().is_ok_and(|status| status.success()) {
            println!("SKIPPED: a file system cannot be mounted here (that needs root)");
            return None;
        }
        Some(small)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(self.0.path()).status());
    }
}

/// `H5PUSH_DISK_ROUNDS`: how often the disk is full.
#[test]
fn a_disk_that_another_program_fills_at_random_instants_loses_nothing() {
    let Some(small) = Small::mount("300m") else { return };
    let rounds = number_of("H5PUSH_DISK_ROUNDS", 8);
    let receiver = Receiver::start();
    let text =
        config(receiver.address, "[outbox]\nmin_free_disk = 0\n[backoff]\ninitial = \"50ms\"\nmax = \"200ms\"\n");
    // The log is elsewhere.
    let mut dir = Arc::new(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
    let data = small.0.path().join("data");
    std::fs::create_dir(&data).unwrap();
    std::os::unix::fs::symlink(&data, dir.path().join("data")).unwrap();
    let counters = Counters::default();
    let some_time = |most: u64| std::thread::sleep(Duration::from_millis(fastrand::u64(10..most)));
    let ballast = small.0.path().join("ballast");
    for round in 0..rounds {
        receive_like(round, &receiver);
        let relay = Relay::start_in(dir, &text);
        let load = Load::start(relay.local, &counters);
        some_time(500);
        let mut file = std::fs::File::create(&ballast).unwrap();
        while std::io::Write::write_all(&mut file, &[1; 1 << 16]).is_ok() {}
        drop(file);
        some_time(1_500);
        // Killed while it is full, or after.
        let is_killed_first = fastrand::bool();
        if is_killed_first {
            dir = relay.kill();
            std::fs::remove_file(&ballast).unwrap();
        } else {
            std::fs::remove_file(&ballast).unwrap();
            // It comes back by itself, also for customers whom it has yet to look up.
            let new = format!("new{round}");
            wait_until("an unknown customer's event", || relay.post(&event(&new, &format!("{new}-0"))).status == 202);
            some_time(1_500);
            dir = relay.kill();
        }
        load.stop();
    }
    let relay = Relay::start_in(dir, &text);
    check_delivered(&relay, &receiver, &counters);
    // sled may not bear it; the journal does.
    let log = relay.log();
    let [harmed, again] = ["the queue is set aside", "sled is open again"].map(|text| log.matches(text).count());
    println!("the disk was full {rounds} times, sled harmed {harmed} times, and opened again {again} times");
    assert!(!log.contains("damaged records"));
}

/// With no room for a whole segment, but above the floor.
#[test]
fn a_small_disk_takes_what_it_has_room_for_and_what_operators_say() {
    let Some(small) = Small::mount("150m") else { return };
    let receiver = Receiver::start();
    let text = config(receiver.address, "[outbox]\nmin_free_disk = \"10MiB\"\n");
    let dir = Arc::new(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
    std::os::unix::fs::symlink(small.0.path(), dir.path().join("data")).unwrap();
    let relay = Relay::start_in(dir, &text);
    relay.done("POST", "/v1/endpoints/12/pause", &Value::Null);
    let mut posted = 0;
    loop {
        let mut event = event("a", &format!("m{posted}"));
        event["messages"][0]["content"] = json!("x".repeat(200_000));
        match relay.post(&event).status {
            202 => posted += 1,
            status => break assert_eq!(status, 503),
        }
    }
    println!("{posted} events of 200 KB on 150 MiB");
    // An allocation that fails takes for a moment what events want to be written to.
    assert!(!relay.log().contains("allocate"), "{}", relay.log());
    relay.wait_metric("h5push_store_free_bytes", &[], |free| free < 15e6);
    let customer = json!({ "web_token": "b", "im_web_plugin_id": 12, "toggle": "off" });
    assert_eq!(relay.put_customer(&customer).status, 200);
    relay.done("POST", "/v1/endpoints/12/resume", &Value::Null);
    receiver.wait_delivered(posted);
    wait_until("room for an event", || relay.post(&event("new", "new")).status == 202);
}

/// What has been delivered makes the room that the rest needs, also where a kill came while the disk was full.
#[test]
fn a_disk_that_stays_full_is_freed_by_what_is_delivered() {
    let Some(small) = Small::mount("400m") else { return };
    let receiver = Receiver::start();
    receiver.answer_status(503);
    let text =
        config(receiver.address, "[outbox]\nmin_free_disk = 0\n[backoff]\ninitial = \"50ms\"\nmax = \"200ms\"\n");
    let dir = Arc::new(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
    let data = small.0.path().join("data");
    std::fs::create_dir(&data).unwrap();
    std::os::unix::fs::symlink(&data, dir.path().join("data")).unwrap();
    let relay = Relay::start_in(dir, &text);
    let mut events = 0;
    while bytes_below(&data.join("journal")) < 250 << 20 {
        let large = |n: usize| {
            let mut event = event(&format!("c{n}"), &format!("{events}-{n}"));
            event["messages"][0]["content"] = json!("x".repeat(100_000));
            format!("{event}\n")
        };
        let answer = relay.post_text("application/x-ndjson", &(0..16).map(large).collect::<String>());
        assert_eq!(answer.status, 202, "{}", answer.text());
        events += 16;
    }
    let dir = relay.kill();
    // Nor is there room for another segment.
    std::fs::remove_file(data.join("journal/spare")).unwrap();
    let mut ballast = std::fs::File::create(small.0.path().join("ballast")).unwrap();
    for size in [1 << 16, 1 << 12] {
        while std::io::Write::write_all(&mut ballast, &vec![1; size]).is_ok() {}
    }
    let relay = Relay::start_in(dir, &text);
    receiver.answer_status(200);
    relay.wait_metric("h5push_outbox_events", &[("endpoint", "12")], |count| count == 0.0);
    wait_until("room for an event", || relay.post(&event("new", "new")).status == 202);
    wait_until("the room of what was delivered", || bytes_below(&data.join("journal")) < 150 << 20);
}
