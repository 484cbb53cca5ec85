//! The status page in a real browser: an outage and its recovery, a dead letter replayed, no error.

use std::process::{Command, Stdio};

use serde_json::json;

use crate::support::*;

#[test]
fn the_page_shows_an_outage_and_its_recovery_and_replays_a_dead_letter() {
    let runs = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(program);
        command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    let has_socket = "process.exit(typeof WebSocket === 'function' ? 0 : 1)";
    if !runs("chromium", &["--version"]) || !runs("node", &["--experimental-websocket", "-e", has_socket]) {
        println!("SKIPPED: needs chromium, and node 20.10 or later");
        return;
    }
    let receiver = Receiver::start();
    let relay = Relay::start(&config(
        receiver.address,
        "[backoff]\ninitial = \"200ms\"\nmax = \"300ms\"\n[local]\ntoken = \"s3cret\"\n",
    ));
    let authorized = [("authorization", "Bearer s3cret"), ("content-type", "application/json")];
    let post = |customer: &str, id: &str| {
        let text = event(customer, id).to_string();
        assert_eq!(request(relay.local, "POST", "/v1/events", &authorized, text.as_bytes()).status, 202);
    };
    receiver.answer_status(410);
    post("王小明", "m0");
    relay.wait_metric("h5push_dead_letters", &[("endpoint", "12")], |count| count == 1.0);
    receiver.answer_status(500);
    post("a", "m1");
    let outage = "document.getElementById('verdict').textContent === '1 endpoint is in trouble'";
    let steps = json!([
        ["it asks for the token", "!document.getElementById('login').hidden"],
        [
            "a wrong token is sent",
            "document.getElementById('token').value = 'wrong', document.querySelector('#login button').click(), true"
        ],
        ["a wrong token is refused", "document.getElementById('problem').textContent === 'That is not the token.'"],
        [
            "the right one opens it",
            "document.getElementById('board').hidden === false || (document.getElementById('token').value = 's3cret', document.querySelector('#login button').click(), false)"
        ],
        [
            "it shows the outage",
            format!("{outage} && document.querySelector('#endpoints').innerText.includes('status 500')")
        ],
        ["it shows the dead letter: screenshot", "document.querySelector('#dead').innerText.includes('王小明')"],
        ["a purge asks first", "document.getElementById('purgeall').click(), document.getElementById('ask').open"],
        [
            "and can be cancelled",
            "document.getElementById('no').click(), !document.getElementById('ask').open && document.querySelectorAll('#dead tr').length === 1"
        ],
        ["the receiver recovers", "fetch('/healthz').then(() => 0), true"],
        ["it shows the recovery without a reload", "document.getElementById('verdict').textContent === 'All is well'"],
        ["a replay asks first", "document.querySelector('#dead button').click(), document.getElementById('ask').open"],
        ["it is said", "document.getElementById('yes').click(), true"],
        ["it replays the dead letter", "document.querySelectorAll('#dead tr').length === 0"],
    ]);
    let shot = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("status-page.png");
    let child = Command::new("node")
        .arg("--experimental-websocket")
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/page.js"))
        .args(["chromium", &format!("http://{}/", relay.local)])
        .arg(&shot)
        .arg(steps.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // When the page has seen the outage, the receiver recovers.
    let mut child = child;
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut seen = String::new();
    while std::io::BufRead::read_line(&mut out, &mut seen).unwrap() > 0 {
        if seen.ends_with("and can be cancelled\n") {
            receiver.answer_status(200);
        }
    }
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success(), "{seen}{}", String::from_utf8_lossy(&done.stderr));
    let mut delivered = receiver.wait_delivered(2);
    delivered.sort();
    assert_eq!(delivered, ["m0", "m1"]);
    assert!(std::fs::metadata(&shot).unwrap().len() > 10_000);
}
