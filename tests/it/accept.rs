//! `POST /v1/events`: every form, outcome and error of contract §3.

use std::os::unix::fs::PermissionsExt as _;

use serde_json::{Value, json};

use super::support::*;

fn start() -> (Receiver, Relay) {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, ""));
    (receiver, relay)
}

#[test]
fn an_event_is_pushed_as_it_was_posted() {
    let (receiver, relay) = start();
    let messages =
        r#"[ {"type":"message", "message_id":"m\u0031","im_sub_session_id":3001,"x":1.50,"y":[ ],"emoji":"🚚"} ]"#;
    let body = format!(r#"{{"web_token":"王 \"x\"","im_web_plugin_id":12,"h5push":true,"messages":{messages}}}"#);
    let response = relay.post_text("application/json; charset=utf-8", &body);
    assert_eq!(response.status, 202);
    assert_eq!(response.json()["outcome"], "queued");
    assert!(!response.json()["event_id"].as_str().unwrap().is_empty());
    let push = &receiver.wait_pushes(1)[0];
    let text = String::from_utf8(push.body.clone()).unwrap();
    let inner = messages.trim_matches(['[', ']']).trim();
    assert_eq!(text, format!(r#"{{"web_token":"王 \"x\"","im_web_plugin_id":12,"messages":[{inner}]}}"#));
    assert_eq!(push.path, "/push");
    assert_eq!(push.header("content-type"), "application/json");
    assert_eq!(push.header("user-agent"), concat!("h5push-relay/", env!("CARGO_PKG_VERSION")));
    assert_eq!(push.header("h5push-attempt"), "1");
    assert!(push.header("webhook-id").starts_with("msg_"));
    assert!(push.header("webhook-timestamp").parse::<u64>().is_ok());
    assert_eq!(push.header("host"), receiver.address.to_string());
}

#[test]
fn the_plugin_is_in_the_push_only_when_the_event_had_one() {
    let receiver = Receiver::start();
    let relay = Relay::start(&format!("[endpoints.default]\nurl = \"http://{}/d\"", receiver.address));
    for (number, plugin) in [Value::Null, json!(0), json!(77)].into_iter().enumerate() {
        let mut event = event("a", &format!("m{number}"));
        event["im_web_plugin_id"] = plugin;
        relay.queue(&event);
        receiver.wait_pushes(number + 1);
    }
    let plugins: Vec<Option<u64>> =
        receiver.pushes().iter().map(|push| push.json().get("im_web_plugin_id").and_then(Value::as_u64)).collect();
    assert_eq!(plugins, [None, None, Some(77)]);
}

#[test]
fn arrays_and_ndjson_answer_for_each_event_in_order() {
    let (receiver, relay) = start();
    let mut robot = event("a", "m2");
    robot["assign_type"] = json!("robot");
    let items = [
        event("a", "m1").to_string(),
        robot.to_string(),
        r#"{"web_token":"a","messages":[]}"#.to_owned(),
        event("a", "m1").to_string(),
        event("b", "m3").to_string(),
    ];
    let expected = ["queued", "suppressed", "rejected", "duplicate", "queued"];
    let outcomes = |response: &Response| -> Vec<String> {
        assert_eq!(response.status, 202, "{response:?}");
        let results = response.json()["results"].as_array().unwrap().clone();
        results.iter().map(|result| result["outcome"].as_str().unwrap().to_owned()).collect()
    };
    let response = relay.post_text("application/json", &format!("[{}]", items.join(",")));
    assert_eq!(outcomes(&response), expected);
    let results = response.json()["results"].clone();
    assert_eq!(results[1]["reason"], "not_agent");
    assert_eq!(results[2]["error"]["code"], "invalid_event");
    assert!(results[2]["error"]["message"].as_str().unwrap().starts_with("messages:"));
    let lines = format!("\n{}\r\n\n not json\n{}\n", items[0], event("c", "m4"));
    let response = relay.post_text("application/x-ndjson", &lines);
    assert_eq!(outcomes(&response), ["duplicate", "rejected", "queued"]);
    assert_eq!(receiver.wait_delivered(3).len(), 3);
}

#[test]
fn the_example_conversation_has_the_outcomes_that_it_says() {
    let receiver = Receiver::start();
    let relay =
        Relay::start(&config(receiver.address, &format!("[endpoints.77]\nurl = \"http://{}/77\"", receiver.address)));
    let response = relay.post_text("application/x-ndjson", include_str!("conversation.ndjson"));
    let results = response.json()["results"].as_array().unwrap().clone();
    let words: Vec<&str> =
        results.iter().map(|result| result.get("reason").unwrap_or(&result["outcome"]).as_str().unwrap()).collect();
    let count = |word: &str| words.iter().filter(|other| **other == word).count();
    assert_eq!(
        (count("queued"), count("customer_online"), count("not_agent"), count("h5push_not_enabled")),
        (8, 1, 2, 1),
        "{words:?}"
    );
    let ids = receiver.wait_delivered(10);
    assert_eq!(ids.len(), 10);
}

#[test]
fn suppressed_events_say_why_in_the_contracts_order() {
    let (_receiver, relay) = start();
    let reason = |event: &Value| relay.post(event).json()["reason"].as_str().map(str::to_owned);
    let mut event = event("a", "m1");
    event["im_web_plugin_id"] = json!(99);
    assert_eq!(reason(&event).as_deref(), Some("no_push_address"));
    event["im_web_plugin_id"] = json!(12);
    event["assign_type"] = json!("urobot");
    assert_eq!(reason(&event).as_deref(), Some("not_agent"));
    event["assign_type"] = json!("agent");
    event["messages"][0]["im_sub_session_id"] = json!(0);
    assert_eq!(reason(&event).as_deref(), Some("no_session"));
    event["messages"][0]["im_sub_session_id"] = json!("3001");
    event["h5push"] = json!(false);
    assert_eq!(reason(&event).as_deref(), Some("h5push_not_enabled"));
    event["h5push"] = json!(true);
    relay.put_customer(&json!({ "web_token": "a", "im_web_plugin_id": 12, "toggle": "off" }));
    assert_eq!(reason(&event).as_deref(), Some("toggled_off"));
    relay.put_customer(&json!({ "web_token": "a", "im_web_plugin_id": 12, "toggle": "auto" }));
    event["offline"] = json!(false);
    assert_eq!(reason(&event).as_deref(), Some("customer_online"));
    event["messages"][0]["type"] = json!("close");
    assert_eq!(reason(&event), None, "a close is pushed to whoever is pushed to");
    for (name, count) in [("customer_online", 1.0), ("no_push_address", 1.0), ("toggled_off", 1.0)] {
        let labels = [("outcome", "suppressed"), ("reason", name)];
        assert_eq!(relay.metric("h5push_events_total", &labels), count, "{name}");
    }
}

#[test]
fn h5push_is_remembered_whatever_the_outcome() {
    let (receiver, relay) = start();
    let mut opening = event("a", "m1");
    opening["offline"] = json!(false);
    assert_eq!(relay.post(&opening).json()["reason"], "customer_online");
    let mut later = event("a", "m2");
    later.as_object_mut().unwrap().remove("h5push");
    relay.queue(&later);
    receiver.wait_delivered(1);
    // Not of an event that has nowhere to go.
    let mut elsewhere = event("b", "m3");
    elsewhere["im_web_plugin_id"] = json!(5);
    assert_eq!(relay.post(&elsewhere).json()["reason"], "no_push_address");
    assert_eq!(get(relay.local, "/v1/customers?web_token=b&im_web_plugin_id=5").status, 404);
}

#[test]
fn duplicates_are_known_by_event_id_or_by_message_ids_within_a_plugin() {
    let receiver = Receiver::start();
    let relay =
        Relay::start(&config(receiver.address, &format!("[endpoints.13]\nurl = \"http://{}/13\"", receiver.address)));
    let outcome = |event: &Value| relay.post(event).json()["outcome"].as_str().unwrap().to_owned();
    let mut given = event("a", "m1");
    given["event_id"] = json!("e1");
    assert_eq!(outcome(&given), "queued");
    given["messages"][0]["message_id"] = json!("m2");
    assert_eq!(outcome(&given), "duplicate");
    given["im_web_plugin_id"] = json!(13);
    assert_eq!(outcome(&given), "queued", "another plugin");
    assert_eq!(outcome(&event("a", "m1")), "queued", "a derived key is never a given one");
    assert_eq!(outcome(&event("a", "m1")), "duplicate");
    assert_eq!(outcome(&event("b", "m1")), "queued");
    let mut anonymous = event("a", "m1");
    anonymous["messages"][0].as_object_mut().unwrap().remove("message_id");
    assert_eq!(outcome(&anonymous), "queued");
    assert_eq!(outcome(&anonymous), "queued", "nothing to know it by");
    // Also after it was delivered, and after a restart.
    receiver.wait_delivered(6);
    let dir = relay.stop();
    let relay = Relay::start_in(dir, &config(receiver.address, ""));
    assert_eq!(relay.post(&event("a", "m1")).json()["outcome"], "duplicate");
    relay.done("PUT", "/v1/endpoints/12", &json!({ "url": null }));
    assert_eq!(relay.post(&event("a", "m1")).json()["outcome"], "duplicate", "before the gate");
}

#[test]
fn wrong_requests_get_the_contracts_error_and_store_nothing() {
    let (receiver, relay) = start();
    let ok = event("a", "m1").to_string();
    let json_type = ("content-type", "application/json");
    let post = |headers: &[(&str, &str)], body: &[u8]| request(relay.local, "POST", "/v1/events", headers, body);
    let nested = format!(r#"{{"web_token":"a","messages":[{{"x":{}1{}}}]}}"#, "[".repeat(200), "]".repeat(200));
    let large = format!(r#"{{"web_token":"a","messages":[{{"x":"{}"}}]}}"#, "y".repeat(256 << 10));
    let many = format!("[{}]", vec![ok.as_str(); 1_001].join(","));
    let cases: Vec<(u16, &str, Response)> = vec![
        (400, "invalid_event", post(&[json_type], b"{\"web_token\":1}")),
        (400, "invalid_event", post(&[json_type], b"{")),
        (400, "invalid_event", post(&[json_type], b"")),
        (400, "invalid_request", post(&[json_type], b"[")),
        (400, "invalid_request", post(&[json_type], b"[]")),
        (400, "invalid_request", post(&[json_type], b"\xff\xfe")),
        (400, "invalid_request", post(&[json_type], many.as_bytes())),
        (400, "invalid_request", post(&[("content-type", "application/x-ndjson")], b"\n \n")),
        (400, "invalid_event", post(&[json_type], nested.as_bytes())),
        (413, "too_large", post(&[json_type], large.as_bytes())),
        (413, "too_large", post(&[json_type], &vec![b' '; (8 << 20) + 1])),
        (415, "unsupported_media_type", post(&[], ok.as_bytes())),
        (415, "unsupported_media_type", post(&[("content-type", "text/plain")], ok.as_bytes())),
        (415, "unsupported_media_type", post(&[("content-type", "application/json; charset=gbk")], ok.as_bytes())),
        (415, "unsupported_media_type", post(&[("content-type", "application/x-www-form-urlencoded")], b"a=b")),
        (403, "forbidden", post(&[json_type, ("host", "evil.example")], ok.as_bytes())),
        (403, "forbidden", post(&[json_type, ("origin", "http://evil.example")], ok.as_bytes())),
        (403, "forbidden", post(&[json_type, ("sec-fetch-site", "cross-site")], ok.as_bytes())),
        (404, "not_found", request(relay.local, "POST", "/v1/nothing", &[json_type], ok.as_bytes())),
        (405, "method_not_allowed", request(relay.local, "PUT", "/v1/events", &[json_type], ok.as_bytes())),
        (405, "method_not_allowed", get(relay.local, "/open_api_v1/im/h5push")),
    ];
    for (number, (status, code, response)) in cases.iter().enumerate() {
        assert_eq!((response.status, response.code().as_str()), (*status, *code), "case {number}: {response:?}");
        assert_eq!(response.header("content-type").as_deref(), Some("application/json"));
    }
    assert_eq!(request(relay.local, "PUT", "/v1/events", &[json_type], b"").header("allow").as_deref(), Some("POST"));
    assert_eq!(relay.metric("h5push_events_total", &[("outcome", "queued")]), 0.0);
    assert_eq!(get(relay.local, "/v1/customers?web_token=a&im_web_plugin_id=12").status, 404);
    assert!(receiver.pushes().is_empty());
}

#[test]
fn an_item_too_large_is_rejected_and_the_others_stand() {
    let (receiver, relay) = start();
    let mut large = event("a", "m1");
    large["messages"][0]["x"] = json!("y".repeat(256 << 10));
    let body = json!([large, event("a", "m2")]).to_string();
    let results = relay.post_text("application/json", &body).json()["results"].clone();
    assert_eq!(
        (results[0]["outcome"].as_str(), results[0]["error"]["code"].as_str()),
        (Some("rejected"), Some("too_large"))
    );
    assert_eq!(results[1]["outcome"], "queued");
    assert_eq!(receiver.wait_delivered(1), ["m2"]);
}

#[test]
fn a_token_is_asked_for_when_one_is_configured() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, "[local]\ntoken = \"s3cret\""));
    let body = event("a", "m1").to_string();
    let with = |headers: &[(&str, &str)]| {
        let all = [&[("content-type", "application/json")], headers].concat();
        request(relay.local, "POST", "/v1/events", &all, body.as_bytes())
    };
    for headers in [&[][..], &[("authorization", "Bearer wrong")], &[("authorization", "s3cret")]] {
        let response = with(headers);
        assert_eq!((response.status, response.code().as_str()), (401, "unauthorized"));
    }
    assert_eq!(with(&[("authorization", "Bearer s3cret")]).status, 202);
    assert_eq!(get(relay.local, "/healthz").status, 200);
    assert_eq!(get(relay.local, "/v1/nothing").status, 401);
    assert!(!relay.log().contains("s3cret"));
}

/// Only the relay's own user reads what customers were told.
#[test]
fn the_data_directory_is_closed_to_others() {
    let (_receiver, relay) = start();
    let mode = std::fs::metadata(relay.data_dir()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
}

/// Also where somebody else has created it.
#[test]
fn what_is_stored_is_closed_to_others() {
    let receiver = Receiver::start();
    let dir = std::sync::Arc::new(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
    std::fs::create_dir(dir.path().join("data")).unwrap();
    std::fs::set_permissions(dir.path().join("data"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let relay = Relay::start_in(dir, &config(receiver.address, ""));
    relay.queue(&event("a", "m0"));
    receiver.wait_delivered(1);
    let stopped = relay.stop();
    let mut dirs = vec![stopped.path().join("data")];
    let mut seen = 0;
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
            let metadata = entry.metadata().unwrap();
            let mode = metadata.permissions().mode();
            assert_eq!(mode & 0o077, 0, "{}: {mode:o}", entry.path().display());
            seen += 1;
            dirs.extend(metadata.is_dir().then(|| entry.path()));
        }
    }
    assert!(seen > 8, "{seen}");
}

/// A page in a browser can send a form anywhere: it must do nothing here, also where no body is asked for.
#[test]
fn a_form_changes_nothing_where_no_body_is_read() {
    let (_receiver, relay) = start();
    for media_type in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"] {
        let answer = request(relay.local, "POST", "/v1/endpoints/12/pause", &[("content-type", media_type)], b"a=b");
        assert_eq!((answer.status, answer.code().as_str()), (415, "unsupported_media_type"), "{media_type}");
    }
    assert_eq!(relay.done("GET", "/v1/status", &Value::Null)["endpoints"][0]["state"], "up");
    relay.done("POST", "/v1/endpoints/12/pause", &Value::Null);
    assert_eq!(relay.done("GET", "/v1/status", &Value::Null)["endpoints"][0]["state"], "paused");
}

#[test]
fn a_unix_socket_serves_like_tcp() {
    use std::io::{Read, Write};
    use std::os::unix::fs::PermissionsExt;
    let receiver = Receiver::start();
    let dir = std::sync::Arc::new(tempfile::tempdir().unwrap());
    let path = dir.path().join("local.sock");
    let text = config(receiver.address, "");
    let listen = format!("{text}[local]\nsocket_mode = \"0600\"\n");
    let relay = Relay::spawn(std::sync::Arc::clone(&dir), &listen);
    drop(relay);
    // The same config, with the socket in place of the port.
    let file = dir.path().join("config.toml");
    let config = std::fs::read_to_string(&file).unwrap();
    let at = config.find("[local]\nlisten = ").unwrap() + "[local]\n".len();
    let end = at + config[at..].find('\n').unwrap();
    let config = format!("{}listen = \"unix:{}\"{}", &config[..at], path.display(), &config[end..]);
    std::fs::write(&file, config).unwrap();
    let mut child =
        std::process::Command::new(env!("CARGO_BIN_EXE_h5push-relay")).arg("--config").arg(&file).spawn().unwrap();
    wait_until("the socket", || std::os::unix::net::UnixStream::connect(&path).is_ok());
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let body = event("a", "m1").to_string();
    let mut stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
    let head = format!(
        "POST /v1/events HTTP/1.1\r\nhost: relay\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert_eq!(parse(&answer).status, 202);
    assert_eq!(receiver.wait_delivered(1), ["m1"]);
    child.kill().unwrap();
    child.wait().unwrap();
}
