//! Alerts, dashboard and metrics against promtool, a running relay, and a real Prometheus.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::support::*;

fn monitoring(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("monitoring").join(name)
}

/// Whether a tool is there; says loudly what is skipped where not. `.ci/run` installs it.
fn has(tool: &str) -> bool {
    let is_there = Command::new(tool).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !is_there {
        println!("SKIPPED: there is no {tool} (Debian: apt-get install prometheus)");
    }
    is_there
}

fn promtool(arguments: &[&str], input: &[u8]) {
    use std::io::Write as _;
    let mut child = Command::new("promtool")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let done = child.wait_with_output().unwrap();
    let said = String::from_utf8([done.stdout, done.stderr].concat()).unwrap();
    assert!(done.status.success(), "promtool {arguments:?}: {said}");
}

/// Every expression of the dashboard, its variables filled in.
fn expressions() -> Vec<String> {
    let dashboard: Value =
        serde_json::from_str(&std::fs::read_to_string(monitoring("dashboard.json")).unwrap()).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().cloned().unwrap_or_default());
    let filled = |target: Value| {
        let text = target["expr"].as_str().unwrap().replace("$__rate_interval", "5m");
        ["job", "instance", "endpoint"].iter().fold(text, |text, name| text.replace(&format!("${name}"), ".*"))
    };
    targets.map(filled).collect()
}

#[test]
fn every_alert_fires_when_it_should_and_only_then() {
    if has("promtool") {
        promtool(&["check", "rules", monitoring("alerts.yml").to_str().unwrap()], b"");
        promtool(&["test", "rules", monitoring("alerts_test.yml").to_str().unwrap()], b"");
    }
}

#[test]
fn every_query_of_the_dashboard_is_one() {
    let expressions = expressions();
    assert!(expressions.len() > 20);
    if has("promtool") {
        let rule = |(number, text): (usize, &String)| format!("      - record: q:{number}\n        expr: {text:?}\n");
        let rules: String = expressions.iter().enumerate().map(rule).collect();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("queries.yml");
        std::fs::write(&path, format!("groups:\n  - name: dashboard\n    rules:\n{rules}")).unwrap();
        promtool(&["check", "rules", path.to_str().unwrap()], b"");
    }
}

#[test]
fn the_local_listener_has_the_metrics_too() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, ""));
    let [local, own] = [relay.local, relay.metrics].map(|listener| get(listener, "/metrics"));
    assert_eq!((local.status, local.header("content-type")), (200, own.header("content-type")));
    let names = |text: String| -> Vec<String> {
        text.lines().filter(|line| line.starts_with("# TYPE")).map(str::to_owned).collect()
    };
    assert_eq!(names(local.text()), names(own.text()));
}

#[test]
fn every_metric_of_alerts_and_dashboard_is_exported_from_the_start() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, ""));
    let response = get(relay.metrics, "/metrics");
    assert_eq!(response.header("content-type").as_deref(), Some("text/plain; version=0.0.4"));
    let exposed = response.text();
    let alerts = std::fs::read_to_string(monitoring("alerts.yml")).unwrap();
    let text = expressions().join("\n") + &alerts;
    let names: BTreeSet<&str> = text
        .split(|char: char| !char.is_ascii_alphanumeric() && char != '_')
        .filter(|word| word.starts_with("h5push_") || word.starts_with("process_"))
        .collect();
    assert!(names.len() > 20, "{names:?}");
    for name in names {
        let is_there =
            exposed.lines().any(|line| line.starts_with(&format!("{name}{{")) || line.starts_with(&format!("{name} ")));
        assert!(is_there, "{name} is not exported");
    }
    if has("promtool") {
        promtool(&["check", "metrics"], exposed.as_bytes());
    }
}

#[test]
fn a_real_prometheus_scrapes_the_relay_and_answers_queries() {
    if !has("prometheus") {
        return;
    }
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, ""));
    relay.queue(&event("a", "m0"));
    receiver.wait_delivered(1);
    let dir = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(monitoring("prometheus.yml")).unwrap();
    let text = text
        .replace("127.0.0.1:9860", &relay.metrics.to_string())
        .replace("[alerts.yml]", &format!("[{:?}]", monitoring("alerts.yml")))
        .replace("scrape_interval: 15s", "scrape_interval: 1s\n    scrape_timeout: 1s");
    std::fs::write(dir.path().join("prometheus.yml"), text).unwrap();
    let listen = free_address();
    let mut prometheus = Command::new("prometheus")
        .arg(format!("--config.file={}", dir.path().join("prometheus.yml").display()))
        .arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()))
        .arg(format!("--web.listen-address={listen}"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let query = |text: &str| {
        let encoded: String = form_urlencoded::byte_serialize(text.as_bytes()).collect();
        let response = get(listen, &format!("/api/v1/query?query={encoded}"));
        // While it starts it answers 503.
        let answer = if response.status == 200 { response.json() } else { Value::Null };
        answer["data"]["result"][0]["value"][1].as_str().unwrap_or("").to_owned()
    };
    wait_until("prometheus listens", || std::net::TcpStream::connect(listen).is_ok());
    wait_until("the relay is scraped", || query("up{job=\"h5push-relay\"}") == "1");
    let delivered = "sum(h5push_messages_delivered_total{endpoint=\"12\"})";
    wait_until("the counter shows", || query(delivered) == "1");
    assert_eq!(query("h5push_endpoint_up{endpoint=\"12\"}"), "1");
    prometheus.kill().unwrap();
    prometheus.wait().unwrap();
}
