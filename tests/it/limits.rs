//! What is full, refused, and given back.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::support::*;

#[test]
fn a_full_outbox_refuses_the_whole_request_and_the_toggle_still_works() {
    let receiver = Receiver::start();
    receiver.answer_status(500);
    let relay = Relay::start(&config(receiver.address, "[outbox]\nmax_events = 3\nmin_free_disk = 0"));
    for number in 0..3 {
        relay.queue(&event("a", &format!("m{number}")));
    }
    let response = relay.post(&event("a", "m3"));
    assert_eq!((response.status, response.code().as_str()), (503, "outbox_full"));
    assert!(response.header("retry-after").is_some());
    let array = json!([event("b", "b0"), event("c", "c0")]).to_string();
    assert_eq!(relay.post_text("application/json", &array).code(), "outbox_full");
    assert_eq!(get(relay.local, "/v1/customers?web_token=b&im_web_plugin_id=12").status, 404, "nothing is stored");
    assert_eq!(relay.post(&event("a", "m0")).json()["outcome"], "duplicate");
    assert_eq!(relay.toggle("web_token=a&im_web_plugin_id=12&h5push=false")["code"], 1000);
    relay.wait_metric("h5push_outbox_events", &[("endpoint", "12")], |count| count == 0.0);
    relay.queue(&event("b", "b0"));
    assert_eq!(relay.metric("h5push_outbox_capacity_events", &[]), 3.0);
}

#[test]
fn a_full_endpoint_refuses_its_own_events_and_no_others() {
    let receiver = Receiver::start();
    let text = format!(
        "[endpoints.12]\nurl = \"http://{0}/12\"\nmax_events = 2\n[endpoints.13]\nurl = \"http://{0}/13\"\n\
         [endpoints.14]\nurl = \"http://{0}/14\"\nmax_events = 0\n",
        receiver.address
    );
    receiver.answer_status(500);
    let relay = Relay::start(&text);
    let mut shut = event("a", "y0");
    shut["im_web_plugin_id"] = json!(14);
    assert_eq!(relay.post(&shut).code(), "endpoint_full");
    relay.queue(&event("a", "m0"));
    let mut other = event("a", "x0");
    other["im_web_plugin_id"] = json!(13);
    let array = json!([event("a", "m1"), event("a", "m2"), other]).to_string();
    let results = relay.post_text("application/json", &array).json()["results"].clone();
    let outcomes: Vec<&str> =
        results.as_array().unwrap().iter().map(|result| result["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["queued", "refused", "queued"]);
    assert_eq!(results[1]["error"]["code"], "endpoint_full");
    let alone = relay.post(&event("a", "m2"));
    assert_eq!((alone.status, alone.code().as_str()), (503, "endpoint_full"));
    assert!(alone.header("retry-after").is_some());
    // What a refused item says of its customer is remembered (contract §3); what is answered 503 has stored nothing.
    let silent = |customer: &str| {
        let mut event = event(customer, &format!("of-{customer}"));
        event.as_object_mut().unwrap().remove("h5push");
        event
    };
    let array = json!([event("b", "m3"), silent("b")]).to_string();
    let results = relay.post_text("application/json", &array).json()["results"].clone();
    let outcomes: Vec<&Value> = results.as_array().unwrap().iter().map(|result| &result["outcome"]).collect();
    assert_eq!(outcomes, ["refused", "refused"], "{results}");
    assert_eq!(relay.post(&event("c", "m4")).status, 503);
    assert_eq!(relay.post(&silent("c")).json()["reason"], "h5push_not_enabled");
    // Posted again with the same id when there is room, it is no duplicate.
    receiver.answer_status(200);
    relay.wait_metric("h5push_outbox_events", &[("endpoint", "12")], |count| count == 0.0);
    relay.queue(&event("a", "m2"));
}

#[test]
fn a_disk_below_the_floor_refuses_events_and_is_not_ready() {
    let receiver = Receiver::start();
    let text = config(receiver.address, "[outbox]\nmin_free_disk = \"1000TiB\"");
    let relay = Relay::spawn(std::sync::Arc::new(tempfile::tempdir().unwrap()), &text);
    wait_until("the relay to listen", || std::net::TcpStream::connect(relay.metrics).is_ok());
    wait_until("the answer", || get(relay.metrics, "/readyz").status == 503);
    let response = relay.post(&event("a", "m0"));
    assert_eq!((response.status, response.code().as_str()), (503, "disk_low"));
    assert_eq!(get(relay.metrics, "/healthz").status, 200);
    let free = relay.metric("h5push_store_free_bytes", &[]);
    assert!(free > 0.0 && free < relay.metric("h5push_store_free_floor_bytes", &[]));
}

#[test]
fn a_disk_that_another_program_fills_loses_nothing_that_was_acknowledged() {
    // A file system of its own, small.
    let mount = tempfile::tempdir().unwrap();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=220m", "tmpfs"])
        .arg(mount.path())
        .status()
        .is_ok_and(|status| status.success());
    if !mounted {
        println!("SKIPPED: a file system cannot be mounted here (that needs root)");
        return;
    }
    let result = std::panic::catch_unwind(|| fill(mount.path()));
    std::process::Command::new("umount").arg("-l").arg(mount.path()).status().unwrap();
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

fn fill(mount: &std::path::Path) {
    let receiver = Receiver::start();
    receiver.answer_status(500);
    let dir = std::sync::Arc::new(tempfile::tempdir_in(mount).unwrap());
    let text =
        config(receiver.address, "[outbox]\nmin_free_disk = 0\n[backoff]\ninitial = \"100ms\"\nmax = \"300ms\"\n");
    let relay = Relay::start_in(dir, &text);
    relay.queue(&event("a", "first"));
    // Everything that is left goes to another program.
    let ballast = mount.join("ballast");
    let mut file = std::fs::File::create(&ballast).unwrap();
    let chunk = vec![1u8; 1 << 20];
    while std::io::Write::write_all(&mut file, &chunk).is_ok() {}
    let mut accepted = vec!["first".to_owned()];
    let mut refused = 0;
    for number in 0..1_200 {
        let id = format!("m{number:04}");
        let mut event = event("a", &id);
        event["messages"][0]["x"] = json!("y".repeat(200_000));
        let response = relay.post(&event);
        match response.status {
            202 => accepted.push(id),
            503 => {
                assert_eq!(response.code(), "disk_low");
                refused += 1;
                if refused > 20 {
                    break;
                }
            }
            status => panic!("{status}: {response:?}"),
        }
    }
    assert!(refused > 0, "the disk was never full");
    assert!(accepted.len() > 10, "preallocated room is made use of");
    drop(file);
    std::fs::remove_file(ballast).unwrap();
    wait_until("room again", || relay.post(&event("a", "after")).status == 202);
    accepted.push("after".to_owned());
    // Also over a crash in that state.
    let dir = relay.kill();
    receiver.answer_status(200);
    let relay = Relay::start_in(dir, &text);
    let delivered = receiver.wait_delivered(accepted.len());
    assert_eq!(delivered, accepted);
    drop(relay);
}

#[test]
fn disk_is_given_back_when_what_waited_is_delivered() {
    let receiver = Receiver::start();
    receiver.answer_status(500);
    let relay = Relay::start(&config(receiver.address, "[backoff]\ninitial = \"100ms\"\nmax = \"200ms\"\n"));
    let mut large = event("a", "");
    large["messages"][0]["x"] = json!("y".repeat(200_000));
    for batch in 0..30 {
        let lines: String = (0..30)
            .map(|number| {
                large["messages"][0]["message_id"] = json!(format!("m{batch}-{number}"));
                large["web_token"] = json!(format!("c{number}"));
                large.to_string() + "\n"
            })
            .collect();
        assert_eq!(relay.post_text("application/x-ndjson", &lines).status, 202);
    }
    let journal = relay.data_dir().join("journal");
    let full = bytes_below(&journal);
    assert!(full > 180 << 20, "{full}");
    receiver.answer_status(200);
    relay.wait_metric("h5push_outbox_events", &[("endpoint", "12")], |count| count == 0.0);
    // What remains is the segment that is being written and the one ahead.
    wait_until("the journal to shrink", || bytes_below(&journal) <= 3 * (64 << 20));
    assert_eq!(relay.metric("h5push_outbox_bytes", &[]), 0.0);
}

#[test]
fn a_thousand_endpoints_that_hang_take_nothing_from_another() {
    const HUNG: usize = 1_000;
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let most = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most }).unwrap();
    if most.is_some_and(|most| most < 20_000) {
        return eprintln!("SKIPPED: a thousand endpoints that hang: only {most:?} file descriptors");
    }
    let receiver = Receiver::start();
    let hung = Receiver::start();
    hung.answer(|_| Answer::After(Duration::from_secs(3_600), 200));
    let endpoints: String = (0..HUNG)
        .map(|number| format!("[endpoints.{}]\nurl = \"http://{}/\"\n", 1_000 + number, hung.address))
        .collect();
    let relay = Relay::start(&config(receiver.address, &format!("{endpoints}[push]\ntimeout = \"60s\"\n")));
    // How long 500 events of 100 customers take, from the first post to the last push.
    let relayed = |round: usize| {
        let begun = Instant::now();
        let events: Vec<Value> =
            (0..500).map(|number| event(&format!("c{}", number % 100), &format!("{round}-{number}"))).collect();
        let body: String = events.iter().map(|event| format!("{event}\n")).collect();
        assert_eq!(relay.post_text("application/x-ndjson", &body).status, 202);
        receiver.wait_delivered(500 * (round + 1));
        begun.elapsed()
    };
    let median = |mut times: Vec<Duration>| {
        times.sort();
        times[times.len() / 2]
    };
    let before = median((0..5).map(&relayed).collect());
    // Three customers wait for each endpoint that hangs.
    for first in (0..HUNG).step_by(100) {
        let events = (first..first + 100).flat_map(|number| {
            (0..3).map(move |customer| {
                let mut event = event(&format!("h{customer}"), &format!("h{number}-{customer}"));
                event["im_web_plugin_id"] = json!(1_000 + number);
                format!("{event}\n")
            })
        });
        assert_eq!(relay.post_text("application/x-ndjson", &events.collect::<String>()).status, 202);
    }
    // Two attempts of each, as many as an endpoint begins with.
    let in_flight = || {
        let text = get(relay.metrics, "/metrics").text();
        let samples = text.lines().filter(|line| line.starts_with("h5push_in_flight{"));
        samples.filter_map(|line| line.rsplit(' ').next()?.parse::<usize>().ok()).sum::<usize>()
    };
    wait_until("all to hang", || in_flight() >= 2 * HUNG);
    let during = median((5..14).map(&relayed).collect());
    let in_flight = in_flight();
    println!("500 events beside {in_flight} attempts that hang: {during:?}; alone {before:?}");
    assert!(in_flight >= HUNG, "{in_flight}");
    assert!(during < 3 * before + Duration::from_millis(200), "{during:?} beside {before:?}");
}

#[test]
fn idle_connections_are_bounded_over_all_endpoints() {
    const ENDPOINTS: u64 = 60;
    let receiver = Receiver::start();
    let endpoints: String = (0..ENDPOINTS)
        .map(|at| format!("[endpoints.{}]\nurl = \"http://{}/\"\n", 1_000 + at, receiver.address))
        .collect();
    let relay = Relay::start(&config(receiver.address, &format!("{endpoints}[push]\nmax_in_flight = 16\n")));
    let sockets = || {
        let files = std::fs::read_dir(format!("/proc/{}/fd", relay.pid())).unwrap();
        let targets = files.filter_map(|file| std::fs::read_link(file.unwrap().path()).ok());
        targets.filter(|target| target.to_string_lossy().starts_with("socket:")).count()
    };
    let before = sockets();
    for at in 0..ENDPOINTS {
        let mut event = event("a", &format!("m{at}"));
        event["im_web_plugin_id"] = json!(1_000 + at);
        relay.queue(&event);
    }
    receiver.wait_delivered(ENDPOINTS as usize);
    relay.wait_metric("h5push_in_flight", &[("endpoint", "1000")], |count| count == 0.0);
    wait_until("the others to be closed", || sockets() <= before + 16);
    // Those that are kept are used again.
    let kept = sockets() - before;
    assert!(kept >= 8, "{kept}");
}
