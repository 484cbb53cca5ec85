//! kill -9 under load: every 202 is delivered, in order, and at most what was in flight goes twice.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::load::*;
use super::support::*;

#[test]
fn nothing_acknowledged_is_lost_or_reordered_over_kills_under_load() {
    let rounds = number_of("H5PUSH_CRASH_ROUNDS", 12);
    let seed = number_of("H5PUSH_SEED", fastrand::u64(..));
    println!("seed {seed}, {rounds} kills");
    let mut rng = fastrand::Rng::with_seed(seed);
    let receiver = Receiver::start();
    let text = config(receiver.address, "[backoff]\ninitial = \"50ms\"\nmax = \"200ms\"\n");
    let mut dir = Arc::new(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
    let counters = Counters::default();
    for round in 0..rounds {
        receive_like(round, &receiver);
        let relay = Relay::start_in(dir, &text);
        let load = Load::start(relay.local, &counters);
        std::thread::sleep(Duration::from_millis(rng.u64(20..900)));
        dir = relay.kill();
        load.stop();
    }
    let relay = Relay::start_in(dir, &text);
    let repeated = check_delivered(&relay, &receiver, &counters);
    check_undamaged(&relay);
    // At most what was in flight: a push of each lane, with up to 50 events.
    assert!(repeated <= rounds as usize * LANES * 50, "{repeated} repeated");
}

/// A file system in a file, mounted on a directory of its own.
struct Image {
    file: PathBuf,
    dir: Arc<tempfile::TempDir>,
}

impl Image {
    /// `None` where it cannot be mounted.
    fn mount(file: PathBuf) -> Option<Image> {
        let dir = Arc::new(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
        // What was not synced stays where a power cut takes it.
        let mut mount = Command::new("mount");
        mount.args(["-o", "loop,commit=3600"]).arg(&file).arg(dir.path());
        mount.output().is_ok_and(|output| output.status.success()).then_some(Image { file, dir })
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(self.dir.path()).status());
        drop(std::fs::remove_file(&self.file));
    }
}

/// `H5PUSH_POWER_ROUNDS`: how often the power is cut.
#[test]
fn nothing_acknowledged_is_lost_over_power_cuts_on_a_file_system() {
    let rounds = number_of("H5PUSH_POWER_ROUNDS", 3);
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = |round: u64| work.path().join(format!("image-{round}"));
    let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(image(0)).arg("600M").status();
    let mounted = made.is_ok_and(|status| status.success()).then(|| Image::mount(image(0))).flatten();
    let Some(mut disk) = mounted else {
        return println!("SKIPPED: power cuts on a file system: no ext4 image can be mounted here (that needs root)");
    };
    let receiver = Receiver::start();
    let text = config(receiver.address, "[backoff]\ninitial = \"50ms\"\nmax = \"200ms\"\n");
    let counters = Counters::default();
    for round in 0..rounds {
        receive_like(round, &receiver);
        let relay = Relay::start_in(Arc::clone(&disk.dir), &text);
        let load = Load::start(relay.local, &counters);
        std::thread::sleep(Duration::from_millis(fastrand::u64(500..1_500)));
        // What has reached the disk by now is what the power cut leaves.
        relay.signal("STOP");
        let copied = Command::new("cp").arg("--sparse=always").args([image(round), image(round + 1)]).status();
        assert!(copied.unwrap().success());
        drop(relay.kill());
        load.stop();
        disk = Image::mount(image(round + 1)).unwrap();
    }
    let relay = Relay::start_in(Arc::clone(&disk.dir), &text);
    println!("{rounds} power cuts");
    check_delivered(&relay, &receiver, &counters);
    check_undamaged(&relay);
}

#[test]
fn a_stop_loses_and_repeats_nothing_and_keeps_its_promises_to_callers() {
    let receiver = Receiver::start();
    receiver.answer(|_| Answer::After(Duration::from_millis(50), 200));
    let text = config(receiver.address, "");
    let mut dir = Arc::new(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
    let counters: Arc<Mutex<HashMap<usize, usize>>> = Arc::default();
    for _ in 0..4 {
        let relay = Relay::start_in(dir, &text);
        let stop = Arc::new(AtomicBool::new(false));
        let (all, to) = (Arc::clone(&counters), relay.local);
        let stopped = Arc::clone(&stop);
        let poster = std::thread::spawn(move || post_until_stop(to, &all, &stopped));
        std::thread::sleep(Duration::from_millis(300));
        dir = relay.stop();
        stop.store(true, Ordering::SeqCst);
        poster.join().unwrap();
    }
    let relay = Relay::start_in(dir, &text);
    relay.wait_metric("h5push_outbox_events", &[("endpoint", "12")], |count| count == 0.0);
    let mut delivered = receiver.delivered_ids();
    let count = delivered.len();
    delivered.sort();
    delivered.dedup();
    assert_eq!(delivered.len(), count, "something was repeated");
    let accepted: usize = counters.lock().unwrap().values().sum();
    assert_eq!(count, accepted);
    assert!(accepted > 20);
}

/// Posts on a connection for each event, so that a stop shows as a refused connection or a 503, never as a lost answer.
fn post_until_stop(to: SocketAddr, counters: &Mutex<HashMap<usize, usize>>, stop: &AtomicBool) {
    while !stop.load(Ordering::SeqCst) {
        let number = counters.lock().unwrap().get(&0).copied().unwrap_or(0);
        let body = event("lane0", &format!("0-{number:06}")).to_string();
        let Ok(mut stream) = TcpStream::connect(to) else { continue };
        let head = format!(
            "POST /v1/events HTTP/1.1\r\nhost: {to}\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + &body).as_bytes()).ok();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).ok();
        if answer.starts_with(b"HTTP/1.1 202") {
            counters.lock().unwrap().insert(0, number + 1);
        }
    }
}

#[test]
fn a_queue_directory_that_is_gone_or_broken_is_built_anew_from_the_journal() {
    let receiver = Receiver::start();
    receiver.answer_status(500);
    let text = config(receiver.address, "[backoff]\ninitial = \"200ms\"\nmax = \"400ms\"\n");
    let mut dir = Arc::new(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
    let mut expected = Vec::new();
    for (round, harm) in ["removed", "emptied", "flipped", "garbage", "older"].into_iter().enumerate() {
        let relay = Relay::start_in(dir, &text);
        for number in 0..20 {
            let id = format!("r{round}-{number:02}");
            relay.queue(&event("a", &id));
            expected.push(id);
        }
        relay.put_customer(&serde_json::json!({ "web_token": format!("off{round}"), "im_web_plugin_id": 12, "h5push": true, "toggle": "off" }));
        // A checkpoint, so that the journal alone does not say everything.
        let data = relay.data_dir();
        dir = if round % 2 == 0 { relay.stop() } else { relay.kill() };
        let (queue, db) = (data.join("queue"), data.join("queue/db"));
        let older = dir.path().join("older");
        match harm {
            "removed" => std::fs::remove_dir_all(&queue).unwrap(),
            "emptied" => std::fs::write(&db, b"").unwrap(),
            "flipped" => {
                let mut bytes = std::fs::read(&db).unwrap();
                for at in (0..bytes.len()).step_by(97) {
                    bytes[at] ^= 0x10;
                }
                std::fs::write(&db, bytes).unwrap();
            }
            "garbage" => std::fs::write(&db, vec![0xa5; 100_000]).unwrap(),
            _ => {
                std::fs::remove_dir_all(&queue).unwrap();
                std::fs::rename(&older, &queue).unwrap();
            }
        }
        // From before what comes in the last round.
        if harm == "garbage" {
            dir = Relay::start_in(dir, &text).stop();
            assert!(Command::new("cp").arg("-r").args([&queue, &older]).status().unwrap().success());
        }
    }
    receiver.answer_status(200);
    let relay = Relay::start_in(dir, &text);
    assert_eq!(receiver.wait_delivered(expected.len()), expected);
    for round in 0..5 {
        assert_eq!(
            relay.toggle(&format!("web_token=off{round}&im_web_plugin_id=12"))["status_code"],
            0,
            "round {round}"
        );
        assert_eq!(relay.post(&event("a", &format!("r{round}-03"))).json()["outcome"], "duplicate");
    }
    assert!(relay.log().contains("built anew"));
}

#[test]
fn a_second_relay_on_the_same_data_is_kept_out() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, ""));
    let mut second = Relay::spawn(Arc::clone(&relay.dir), &config(receiver.address, ""));
    assert_eq!(second.wait().code(), Some(1));
    assert!(second.log().contains("another h5push-relay is running on this data directory"));
    relay.queue(&event("a", "m"));
    receiver.wait_delivered(1);
}

#[test]
fn what_was_delivered_after_a_start_without_new_events_is_not_delivered_again() {
    let receiver = Receiver::start();
    receiver.answer_status(500);
    let text = config(receiver.address, "[backoff]\ninitial = \"20ms\"\nmax = \"50ms\"\n");
    let relay = Relay::start(&text);
    for number in 0..20 {
        relay.queue(&event(&format!("c{number}"), &format!("m{number}")));
    }
    let dir = relay.kill();
    receiver.answer_status(200);
    let relay = Relay::start_in(dir, &text);
    receiver.wait_delivered(20);
    relay.wait_metric("h5push_messages_delivered_total", &[], |count| count == 20.0);
    // That it was delivered is written down right after it is counted.
    std::thread::sleep(Duration::from_millis(100));
    let relay = Relay::start_in(relay.kill(), &text);
    relay.queue(&event("last", "last"));
    receiver.wait("the last", |pushes| pushes.iter().any(|push| push.message_ids() == ["last"]));
    assert_eq!(receiver.delivered_ids().len(), 21);
}

#[test]
fn what_operators_set_before_a_replay_holds_over_a_kill_right_after_it() {
    let receiver = Receiver::start();
    receiver.answer_status(410);
    let text = config(receiver.address, "");
    let mut relay = Relay::start(&text);
    for round in 0..4 {
        let id = format!("m{round}");
        relay.queue(&event("a", &id));
        relay.wait_metric("h5push_dead_letters", &[("endpoint", "12")], |count| count == 1.0);
        relay.done("POST", "/v1/endpoints/12/pause", &serde_json::Value::Null);
        relay.done(
            "PUT",
            "/v1/endpoints/77",
            &serde_json::json!({ "url": format!("http://{}/{round}", receiver.address) }),
        );
        let replayed = relay.done("POST", "/v1/dead-letters/replay", &serde_json::json!({ "endpoint": "12" }));
        assert_eq!(replayed["replayed"], 1);
        relay = Relay::start_in(relay.kill(), &text);
        assert_eq!(relay.endpoint("12")["state"], "paused", "round {round}");
        let set = relay.done("GET", "/v1/endpoints/77", &serde_json::Value::Null);
        assert!(set.to_string().contains(&format!("/{round}\"")), "round {round}: {set}");
        assert_eq!(relay.post(&event("a", &id)).json()["outcome"], "duplicate", "round {round}");
        // It dies again, and goes for good.
        relay.done("POST", "/v1/endpoints/12/resume", &serde_json::Value::Null);
        relay.wait_metric("h5push_dead_letters", &[("endpoint", "12")], |count| count == 1.0);
        relay.done("DELETE", "/v1/dead-letters", &serde_json::json!({ "endpoint": "12" }));
    }
}
