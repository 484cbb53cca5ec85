//! The subcommands for operators, as they are typed.

use std::process::{Command, Output};

use serde_json::Value;

use crate::support::*;

fn run(relay: &Relay, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_h5push-relay"))
        .args(arguments)
        .arg("--config")
        .arg(relay.dir.path().join("config.toml"))
        .output()
        .unwrap()
}

fn done(relay: &Relay, line: &str) -> String {
    let output = run(relay, &line.split(' ').collect::<Vec<_>>());
    assert!(output.status.success(), "{line}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn operators_see_and_do_everything_from_the_command_line() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(
        receiver.address,
        "[backoff]\ninitial = \"1h\"\nmax = \"1h\"\n[local]\ntoken = \"s3cret\"\n",
    ));
    let bearer = [("authorization", "Bearer s3cret"), ("content-type", "application/json")];
    let post = |text: &str| {
        assert_eq!(request(relay.local, "POST", "/v1/events", &bearer, text.as_bytes()).status, 202);
    };
    receiver.answer_status(500);
    post(&event("王小明", "m0").to_string());
    let odd = r#"{"z":1.10,"message_id":"m1","big":123456789012345678901234567890,"im_sub_session_id":1}"#;
    post(&format!(r#"{{"web_token":"b","im_web_plugin_id":12,"h5push":true,"messages":[{odd}]}}"#));
    receiver.wait_pushes(2);
    wait_until("both wait", || done(&relay, "lanes list").matches("status 500").count() == 2);
    let status = done(&relay, "status");
    assert!(status.contains("2 events wait") && status.contains("ENDPOINT"), "{status}");
    assert!(!status.contains('\u{1b}'), "no colours off a terminal");
    let json: Value = serde_json::from_str(&done(&relay, "status --json")).unwrap();
    assert_eq!(json["outbox"]["events"], 2);
    assert!(done(&relay, "lanes list --web-token b").lines().count() == 2);
    assert!(done(&relay, "lanes bury --endpoint 12 --web-token b").contains("1 events became dead letters"));
    assert!(done(&relay, "endpoints pause 12").contains("12 is paused"));
    assert!(done(&relay, "endpoints resume 12").contains("12 is up"));
    let letters = done(&relay, "dead-letters list");
    let id = letters.lines().nth(1).unwrap().split(' ').next().unwrap().to_owned();
    for how in ["", " --json"] {
        let shown = done(&relay, &format!("dead-letters show {id}{how}"));
        assert!(shown.contains(odd), "{shown}");
    }
    // Names come from anywhere, and move no cursor.
    done(&relay, "endpoints pause 12");
    post(&event("\u{1b}[31mred\n\u{202e}x", "m9").to_string());
    assert!(done(&relay, "lanes list").contains(r"\u{1b}[31mred\u{a}\u{202e}x"));
    assert!(done(&relay, "lanes list --json").contains('\u{202e}'), "nothing is changed for machines");
    done(&relay, "customers forget \u{1b}[31mred\n\u{202e}x");
    // Whatever JSON allows.
    let odder = r#"{"z":1e999,"\ud800":"\ud800","im_sub_session_id":1}"#;
    done(&relay, "endpoints pause 12");
    post(&format!(r#"{{"web_token":"c","im_web_plugin_id":12,"h5push":true,"messages":[{odder}]}}"#));
    assert!(done(&relay, "lanes bury --endpoint 12 --web-token c").contains("1 events became dead letters"));
    let letters = done(&relay, "dead-letters list --web-token c");
    let odd_id = letters.lines().nth(1).unwrap().split(' ').next().unwrap();
    for how in ["", " --json"] {
        assert!(done(&relay, &format!("dead-letters show {odd_id}{how}")).contains(odder));
    }
    assert!(done(&relay, &format!("dead-letters purge {odd_id}")).contains("1 dead letters are gone"));
    done(&relay, "endpoints resume 12");
    receiver.answer_status(200);
    assert!(done(&relay, "dead-letters replay --all").contains("1 dead letters are back"));
    done(&relay, "endpoints retry 12");
    receiver.wait_delivered(2);
    assert!(done(&relay, "endpoints test 12").contains("ok"));
    assert!(done(&relay, "toggle set --web-token b --plugin 12 off").contains("would not be pushed"));
    assert!(done(&relay, "toggle get --web-token b --plugin 12").contains("无推送"));
    assert!(done(&relay, "customers show b --plugin 12").contains("off"));
    assert!(done(&relay, "toggle set --web-token b --plugin 12 auto").contains("auto"));
    assert!(!done(&relay, "toggle get --web-token b --plugin 12").contains("无推送"));
    assert!(done(&relay, "customers forget b").contains("Forgotten"));
    let set = format!("endpoints set 13 --url http://{}/x --rate-per-second 5 --header x-key:1", receiver.address);
    assert!(done(&relay, &set).contains("x-key"));
    assert!(done(&relay, "endpoints list").contains("api"));
    done(&relay, "endpoints pause 13");
    post(&event("d", "m2").to_string().replace(":12,", ":13,"));
    assert!(done(&relay, "endpoints delete 13").contains("deleted"));
    wait_until("it is given up", || done(&relay, "dead-letters list").contains("endpoint_removed"));
    let status = done(&relay, "status");
    assert!(status.lines().any(|line| line.starts_with("13 ") && line.contains("removed")), "{status}");
    assert!(done(&relay, "dead-letters purge --all").contains("1 dead letters"));

    // What goes wrong has a status, and says what to do.
    let failed = run(&relay, &["customers", "show", "nobody"]);
    assert_eq!(failed.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&failed.stderr).contains("no such customer"));
    let toggle = ["toggle", "set", "--web-token", "nobody", "--plugin", "12", "off"];
    assert_eq!(run(&relay, &toggle).status.code(), Some(1), "nothing was stored");
    let toggle = ["toggle", "set", "--web-token", "nobody", "--plugin", "12", "auto"];
    assert_eq!(run(&relay, &toggle).status.code(), Some(1), "nothing was stored");
    assert!(done(&relay, "dead-letters replay 999-1").contains("1 stay: not found"));
    assert_eq!(run(&relay, &["dead-letters", "purge"]).status.code(), Some(2), "nothing is selected");
    assert_eq!(run(&relay, &["store", "stats"]).status.code(), Some(1), "the relay is running");
    let dir = relay.kill();
    let output = Command::new(env!("CARGO_BIN_EXE_h5push-relay"))
        .args(["status", "--config"])
        .arg(dir.path().join("config.toml"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("systemctl status h5push-relay"));
}

/// Whoever looks why nothing is pushed is told, also after a restart.
#[test]
fn what_is_waited_for_is_shown() {
    let receiver = Receiver::start();
    receiver.answer(|_| Answer::With(503, "retry-after", "3600"));
    let more = "[endpoints.13]\nurl = \"http://127.0.0.1:9/\"\nrate_per_second = 0.001\nburst = 1\n";
    let relay = Relay::start(&config(receiver.address, more));
    relay.queue(&event("held", "m0"));
    receiver.wait_pushes(1);
    wait_until("the answer came", || !relay.endpoint("12")["waits_for"].is_null());
    let dir = relay.stop();
    let relay = Relay::start_in(dir, &config(receiver.address, more));
    assert!(relay.log().contains("asked to be left alone"), "{}", relay.log());
    relay.queue(&event("fresh", "m1"));
    let endpoint = relay.endpoint("12");
    assert_eq!((&endpoint["state"], &endpoint["waits_for"]), (&"up".into(), &"receiver".into()), "{endpoint}");
    let status = done(&relay, "status");
    assert!(status.contains("receiver (429 or 503), in "), "{status}");
    let lanes = done(&relay, "lanes list");
    assert_eq!(lanes.matches("receiver (429 or 503), in ").count(), 2, "{lanes}");

    done(&relay, "endpoints pause 12");
    let lanes = get(relay.local, "/v1/lanes?web_token=fresh").json();
    let lane = &lanes["lanes"][0];
    assert_eq!((&lane["waits_for"], &lane["next_attempt_at"]), (&"resume".into(), &Value::Null), "{lane}");
    assert!(done(&relay, "lanes list").contains("resume (paused)"));
    done(&relay, "endpoints resume 12");
    receiver.answer_status(200);
    done(&relay, "endpoints retry 12");
    receiver.wait_delivered(2);
    assert_eq!(relay.endpoint("12")["waits_for"], Value::Null);

    for message in ["m2", "m3"] {
        let mut event = event("slow", message);
        event["im_web_plugin_id"] = 13.into();
        relay.queue(&event);
    }
    wait_until("the rate is what is waited for", || done(&relay, "status").contains("rate, in "));
}

#[test]
fn a_relay_is_spoken_with_while_its_config_is_wrong() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, ""));
    let path = relay.dir.path().join("config.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, format!("{text}\n[gate]\nrequire = 3\n")).unwrap();
    relay.signal("HUP");
    wait_until("it says so", || done(&relay, "status").contains("unknown field `require`"));
    assert!(done(&relay, "endpoints pause 12").contains("12 is paused"));
    assert_eq!(run(&relay, &["check-config"]).status.code(), Some(78));
    // Which keys wait for a restart is said as well.
    std::fs::write(&path, format!("shutdown_timeout = \"9s\"\n{text}")).unwrap();
    relay.signal("HUP");
    wait_until("it says so", || done(&relay, "status").contains("after a restart: shutdown_timeout"));
}

/// A wrong path is no empty outbox, and nothing is made there.
#[test]
fn a_directory_without_a_store_is_none() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, ""));
    let nowhere = relay.dir.path().join("nowhere");
    for call in ["verify", "stats", "export"] {
        let output = run(&relay, &["store", call, "--data-dir", nowhere.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("nowhere: no relay has stored"), "{output:?}");
    }
    assert!(!nowhere.exists());
    // Nor is a file a directory.
    std::fs::write(&nowhere, "").unwrap();
    let dir = relay.kill();
    let mut daemon = Command::new(env!("CARGO_BIN_EXE_h5push-relay"));
    let output =
        daemon.arg("--config").arg(dir.path().join("config.toml")).arg("--data-dir").arg(&nowhere).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("nowhere: is no directory"), "{output:?}");
}

#[test]
fn a_stopped_store_is_verified_counted_and_exported() {
    let receiver = Receiver::start();
    receiver.answer_status(500);
    let relay = Relay::start(&config(receiver.address, "[backoff]\ninitial = \"1h\"\nmax = \"1h\"\n"));
    for number in 0..5 {
        relay.queue(&event(&format!("c{}", number % 2), &format!("m{number}")));
    }
    let dir = relay.stop();
    let store = |call: &str| {
        Command::new(env!("CARGO_BIN_EXE_h5push-relay"))
            .args(["store", call, "--config"])
            .arg(dir.path().join("config.toml"))
            .output()
            .unwrap()
    };
    let text = |output: &Output| String::from_utf8(output.stdout.clone()).unwrap();
    assert!(text(&store("verify")).contains("whole"));
    assert!(text(&store("stats")).contains("12        5"), "{}", text(&store("stats")));
    let exported = text(&store("export"));
    let events: Vec<Value> = exported.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |customer: &str| -> Vec<&str> {
        let theirs = events.iter().filter(|event| event["web_token"] == customer);
        theirs.map(|event| event["messages"][0]["message_id"].as_str().unwrap()).collect()
    };
    assert_eq!((of("c0"), of("c1")), (vec!["m0", "m2", "m4"], vec!["m1", "m3"]));
    // Damage is said, with its place.
    let journal = dir.path().join("data/journal");
    let mut segments: Vec<_> = std::fs::read_dir(&journal).unwrap().map(|entry| entry.unwrap().path()).collect();
    segments.retain(|path| path.extension().is_some_and(|extension| extension == "log"));
    let m0 = |bytes: &[u8]| bytes.windows(4).position(|window| window == b"\"m0\"");
    let (path, whole, at) = segments
        .into_iter()
        .find_map(|path| {
            let bytes = std::fs::read(&path).unwrap();
            m0(&bytes).map(|at| (path, bytes, at))
        })
        .unwrap();
    let mut damaged = whole.clone();
    damaged[at] ^= 1;
    std::fs::write(&path, damaged).unwrap();
    let output = store("verify");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(text(&output).contains("DAMAGED"));
    std::fs::write(&path, whole).unwrap();
    // Looking changed nothing: the relay delivers all of it.
    receiver.answer_status(200);
    let relay = Relay::start_in(std::sync::Arc::clone(&dir), &config(receiver.address, ""));
    relay.call("POST", "/v1/endpoints/12/retry", &Value::Null);
    receiver.wait_delivered(5);
    drop(relay.stop());
}
