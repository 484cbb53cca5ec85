//! The process: config, signals, demo, receiver, metrics.

use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::support::*;

fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_h5push-relay")).args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn check_config_prints_what_comes_of_it_and_says_where_it_is_wrong() {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/config.example.toml");
    let (code, out, _) = run(&["check-config", "--config", example]);
    assert_eq!(code, Some(0));
    assert!(out.contains("1s, 2s, 4s, 8s") && out.contains("No push address"), "{out}");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("relay.toml");
    let path = path.to_str().unwrap();
    std::fs::write(path, "[endpoints.12]\nurl = \"http://a.example/p?key=planted\"\nrate_per_second = 7").unwrap();
    let (code, out, _) = run(&["check-config", "--config", path]);
    assert_eq!(code, Some(0));
    assert!(out.contains("http://a.example/p") && out.contains(" 7 ") && !out.contains("planted"), "{out}");
    std::fs::write(path, "[push]\n\ntimeuot = \"1s\"").unwrap();
    for arguments in [&["check-config", "--config", path][..], &["--config", path]] {
        let (code, out, error) = run(arguments);
        assert_eq!((code, out.as_str()), (Some(78), ""));
        assert!(error.contains(path) && error.contains("line 3, column 1") && error.contains("timeuot"), "{error}");
    }
    let long = format!("[local]\nlisten = \"unix:/{}\"", "x".repeat(107));
    for wrong in [&long, "[tls]\nextra_ca_file = \"/nowhere.pem\"", "[local]\nsocket_group = \"nobody-of-that-name\""] {
        std::fs::write(path, wrong).unwrap();
        assert_eq!(run(&["check-config", "--config", path]).0, Some(78), "{wrong}");
        assert_eq!(run(&["--config", path]).0, Some(78), "{wrong}");
    }
    let unreachable = "[push]\nallow_networks = []\n[endpoints.12]\nurl = \"http://127.0.0.1:9000/\"";
    std::fs::write(path, unreachable).unwrap();
    assert!(run(&["check-config", "--config", path]).1.contains("no push will reach it"));
    assert_eq!(run(&["--config", "/nowhere.toml"]).0, Some(78));
    assert_eq!(run(&["--no-such-flag"]).0, Some(2));
}

#[test]
fn the_demo_shows_a_conversation_come_through() {
    let (code, out, error) = run(&["demo"]);
    assert_eq!(code, Some(0), "{out}\n{error}");
    assert!(
        out.contains("All 9 messages that were accepted came through, once each and in order, and the rating too."),
        "{out}"
    );
    assert!(out.contains("attempts have failed") && out.contains("推送中") && out.contains("toggled_off"), "{out}");
}

#[test]
fn the_receiver_prints_pushes_and_checks_signatures() {
    let secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    let address = free_address();
    let mut child = Command::new(env!("CARGO_BIN_EXE_h5push-relay"))
        .args(["receiver", "--listen", &address.to_string(), "--secret", secret])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.next().unwrap().contains(&address.to_string()));
    let text = format!(
        "[endpoints.12]\nurl = \"http://{address}/push\"\nsecret = \"{secret}\"\nheaders = {{ x-tenant = \"t1\" }}\n\
         [endpoints.13]\nurl = \"http://{address}/unsigned\"\n"
    );
    let relay = Relay::start(&text);
    relay.queue(&event("wang", "m0"));
    let line = lines.next().unwrap();
    assert!(line.contains("/push") && line.contains("attempt 1") && line.contains("signature valid"), "{line}");
    assert!(lines.next().unwrap().contains("\"wang\"  plugin 12"));
    assert!(lines.next().unwrap().contains("\"message_id\":\"m0\""));
    let mut unsigned = event("wang", "m1");
    unsigned["im_web_plugin_id"] = serde_json::json!(13);
    relay.queue(&unsigned);
    assert!(lines.next().unwrap().contains("NOT SIGNED"));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn sigterm_and_sigint_end_it_well_and_tell_systemd() {
    for name in ["TERM", "INT"] {
        let receiver = Receiver::start();
        let dir = std::sync::Arc::new(tempfile::tempdir().unwrap());
        let socket = std::os::unix::net::UnixDatagram::bind(dir.path().join("notify")).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let plain = Relay::start_in(std::sync::Arc::clone(&dir), &config(receiver.address, ""));
        drop(plain);
        let mut child = Command::new(env!("CARGO_BIN_EXE_h5push-relay"))
            .arg("--config")
            .arg(dir.path().join("config.toml"))
            .env("NOTIFY_SOCKET", dir.path().join("notify"))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let told = || {
            let mut bytes = [0; 4_096];
            let read = socket.recv(&mut bytes).unwrap();
            String::from_utf8(bytes[..read].to_vec()).unwrap()
        };
        assert!(told().contains("READY=1"));
        Command::new("kill").args([format!("-{name}"), child.id().to_string()]).status().unwrap();
        assert!(told().contains("STOPPING=1"));
        assert_eq!(child.wait().unwrap().code(), Some(0), "{name}");
    }
}

#[test]
fn a_stop_waits_for_attempts_in_flight_within_its_limit() {
    let receiver = Receiver::start();
    receiver.answer(|_| Answer::After(Duration::from_millis(700), 200));
    let relay = Relay::start(&config(receiver.address, ""));
    relay.queue(&event("a", "m0"));
    relay.wait_metric("h5push_in_flight", &[("endpoint", "12")], |count| count == 1.0);
    let dir = relay.stop();
    assert_eq!(receiver.delivered_ids(), ["m0"]);
    let hasty =
        format!("shutdown_timeout = \"500ms\"\n{}", config(receiver.address, "[backoff]\ninitial = \"50ms\"\n"));
    let relay = Relay::start_in(dir, &hasty);
    relay.queue(&event("a", "m1"));
    assert_eq!(receiver.wait_delivered(2), ["m0", "m1"], "not repeated");
    // One that takes too long is given up, and made again after the next start: as another attempt at the same push.
    receiver.answer(|_| Answer::After(Duration::from_secs(5), 200));
    relay.queue(&event("a", "m2"));
    relay.wait_metric("h5push_in_flight", &[("endpoint", "12")], |count| count == 1.0);
    std::thread::sleep(Duration::from_millis(300));
    let dir = relay.stop();
    receiver.answer_status(200);
    let _relay = Relay::start_in(dir, &hasty);
    assert_eq!(receiver.wait_pushes(3)[2].header("h5push-attempt"), "2");
}

#[test]
fn the_metrics_listener_serves_three_paths_and_nothing_else() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, ""));
    let response = get(relay.metrics, "/metrics");
    assert_eq!(response.status, 200);
    assert_eq!(response.header("content-type").as_deref(), Some("text/plain; version=0.0.4"));
    assert_eq!(get(relay.metrics, "/healthz").status, 200);
    assert_eq!(get(relay.metrics, "/readyz").status, 200);
    assert_eq!(get(relay.metrics, "/v1/events").status, 404);
    let posted = request(relay.metrics, "POST", "/metrics", &[], b"");
    assert_eq!((posted.status, posted.header("allow").as_deref()), (405, Some("GET, HEAD")));
    // Every metric of contract §7 that this version feeds, there from the start.
    let text = response.text();
    for name in [
        "h5push_events_total",
        "h5push_push_attempts_total",
        "h5push_messages_delivered_total",
        "h5push_push_duration_seconds_count",
        "h5push_delivery_latency_seconds_count",
        "h5push_accept_duration_seconds_count",
        "h5push_outbox_events",
        "h5push_outbox_bytes",
        "h5push_outbox_oldest_age_seconds",
        "h5push_in_flight",
        "h5push_endpoint_up",
        "h5push_rate_limited_seconds_total",
        "h5push_dead_letters",
        "h5push_dead_letters_dropped_total",
        "h5push_outbox_capacity_events",
        "h5push_store_free_bytes",
        "h5push_store_free_floor_bytes",
        "h5push_dead_letters_total",
        "h5push_withdrawn_total",
        "h5push_toggles_total",
        "h5push_store_sync_duration_seconds_count",
        "h5push_store_bytes",
        "h5push_store_errors_total",
        "h5push_store_damage_total",
        "h5push_config_last_reload_successful",
        "h5push_build_info",
        "process_start_time_seconds",
    ] {
        assert!(text.lines().any(|line| line.starts_with(name)), "{name}");
    }
    relay.queue(&event("a", "m0"));
    receiver.wait_delivered(1);
    relay.wait_metric("h5push_messages_delivered_total", &[("endpoint", "12")], |count| count == 1.0);
    assert_eq!(relay.metric("h5push_push_attempts_total", &[("endpoint", "12"), ("result", "ok")]), 1.0);
    assert_eq!(relay.metric("h5push_local_requests_total", &[("path", "/v1/events"), ("code", "202")]), 1.0);
    get(relay.local, "/secret-planted-path");
    assert!(!get(relay.metrics, "/metrics").text().contains("planted"));
}

#[test]
fn endpoints_beyond_the_label_limit_are_counted_together() {
    let receiver = Receiver::start();
    let mut text = String::new();
    for plugin in 1..=5 {
        text += &format!("[endpoints.{plugin}]\nurl = \"http://{}/\"\n", receiver.address);
    }
    let dir = std::sync::Arc::new(tempfile::tempdir().unwrap());
    drop(Relay::start_in(std::sync::Arc::clone(&dir), &text));
    let path = dir.path().join("config.toml");
    let config = std::fs::read_to_string(&path).unwrap().replace("[metrics]\n", "[metrics]\nmax_endpoints = 2\n");
    let metrics = config.split("[metrics]").nth(1).unwrap();
    let address = metrics.split('"').nth(1).unwrap().parse().unwrap();
    std::fs::write(&path, &config).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_h5push-relay"))
        .arg("--config")
        .arg(&path)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("the relay", || std::net::TcpStream::connect(address).is_ok() && get(address, "/readyz").status == 200);
    let text = get(address, "/metrics").text();
    let mut labels: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("h5push_outbox_events{endpoint=\"")?.split('"').next())
        .collect();
    labels.sort_unstable();
    assert_eq!(labels, ["1", "2", "other"]);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn what_needs_a_restart_is_named_until_there_was_one() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, ""));
    let path = relay.dir.path().join("config.toml");
    let first = std::fs::read_to_string(&path).unwrap();
    let changed = first.replace("[metrics]", "[metrics]\nmax_endpoints = 7");
    let rounds =
        [(&changed, vec!["metrics.max_endpoints"]), (&changed, vec!["metrics.max_endpoints"]), (&first, Vec::new())];
    for (round, (text, needed)) in rounds.into_iter().enumerate() {
        std::fs::write(&path, text).unwrap();
        relay.signal("HUP");
        wait_until("it is read", || relay.log().matches("read anew").count() == round + 1);
        let status = get(relay.local, "/v1/status").json();
        assert_eq!(status["config"]["needs_restart"], serde_json::json!(needed), "round {round}");
    }
}

#[test]
fn an_empty_file_changes_nothing() {
    let receiver = Receiver::start();
    receiver.answer_status(500);
    let relay = Relay::start(&config(receiver.address, ""));
    relay.queue(&event("a", "m0"));
    std::fs::write(relay.dir.path().join("config.toml"), "\n").unwrap();
    relay.signal("HUP");
    wait_until("it is refused", || relay.log().contains("the file is empty"));
    assert_eq!((&relay.endpoint("12")["configured"], &relay.endpoint("12")["events"]), (&true.into(), &1.into()));
}

#[test]
fn a_request_whose_head_has_begun_is_answered_at_a_stop() {
    let relay = Relay::start("");
    let mut stream = TcpStream::connect(relay.local).unwrap();
    stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: loc").unwrap();
    // Another one has been answered: the first is accepted.
    assert_eq!(get(relay.local, "/healthz").status, 200);
    relay.signal("TERM");
    std::thread::sleep(Duration::from_millis(60));
    stream.write_all(b"alhost\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[test]
fn completions_and_man_pages_are_written_or_it_fails() {
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    for shell in ["bash", "zsh", "fish"] {
        assert!(run(&["completions", shell]).1.contains("dead-letters"), "{shell}");
    }
    for arguments in [&["completions", "bash"][..], &["man"]] {
        assert!(run(arguments).1.contains("h5push-relay"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_h5push-relay"));
        let failed = command.args(arguments).stdout(full.try_clone().unwrap()).stderr(Stdio::null()).status().unwrap();
        assert_eq!(failed.code(), Some(1), "{arguments:?}");
    }
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(run(&["man", "--dir", dir.path().to_str().unwrap()]).0, Some(0));
    let page = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
    assert!(page("h5push-relay.8").contains("h5push\\-relay\\-dead\\-letters(8)"), "{}", page("h5push-relay.8"));
    assert!(page("h5push-relay-dead-letters-replay.8").contains("replay"));
}

#[test]
fn a_demo_that_is_interrupted_leaves_nothing_behind() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let left = || std::fs::read_dir(dir.path()).unwrap().count();
    for signal in ["-INT", "-TERM"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_h5push-relay"));
        let command = command.arg("demo").env("TMPDIR", dir.path()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        wait_until("it has begun", || left() == 1);
        std::thread::sleep(Duration::from_millis(300));
        Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(1));
        assert_eq!(left(), 0, "{signal}");
    }
}
