//! A relay as a process, a receiver that records, a client. Waiting is always for something, with a deadline.

use std::convert::Infallible;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::service::service_fn;
use hyper::{Request, Response as HyperResponse};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};

/// How long anything may take that is waited for.
pub const PATIENCE: Duration = Duration::from_secs(30);

// ---- the relay ----

pub struct Relay {
    child: Child,
    pub local: SocketAddr,
    pub metrics: SocketAddr,
    pub dir: Arc<tempfile::TempDir>,
}

/// Tables of a config; `listen` and `data_dir` are added.
pub fn config(receiver: SocketAddr, more: &str) -> String {
    format!("[endpoints.12]\nurl = \"http://{receiver}/push\"\nrate_per_second = 100000\n{more}\n")
}

impl Relay {
    pub fn start(config: &str) -> Relay {
        Relay::start_in(Arc::new(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()), config)
    }

    pub fn start_in(dir: Arc<tempfile::TempDir>, config: &str) -> Relay {
        Relay::spawn(dir, config).ready()
    }

    /// Waits until it is ready.
    pub fn ready(mut self) -> Relay {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("the relay ended with {status}: {}", self.log());
            }
            if TcpStream::connect(self.metrics).is_ok() && get(self.metrics, "/readyz").status == 200 {
                return self;
            }
            assert!(Instant::now() < deadline, "not ready: {}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Starts the process without waiting for it.
    pub fn spawn(dir: Arc<tempfile::TempDir>, config: &str) -> Relay {
        Relay::spawn_with(dir, config, &[])
    }

    /// Starts the process in an environment.
    pub fn spawn_with(dir: Arc<tempfile::TempDir>, config: &str, environment: &[(&str, PathBuf)]) -> Relay {
        let (local, metrics) = (free_address(), free_address());
        let path = dir.path().join("config.toml");
        let local_table = if config.contains("[local]") {
            config.replace("[local]", &format!("[local]\nlisten = \"{local}\""))
        } else {
            format!("{config}\n[local]\nlisten = \"{local}\"\n")
        };
        // Receivers of tests are on loopback.
        let local_table = match local_table.split_once("[push]\n") {
            _ if config.contains("allow_networks") => local_table,
            Some((before, after)) => format!("{before}[push]\nallow_networks = [\"127.0.0.0/8\"]\n{after}"),
            None => format!("{local_table}\n[push]\nallow_networks = [\"127.0.0.0/8\"]\n"),
        };
        let outbox = if config.contains("[outbox]") { "" } else { "[outbox]\nmin_free_disk = 0\n" };
        let log = if config.contains("[log]") { "" } else { "[log]\nformat = \"text\"\n" };
        let text = format!(
            "data_dir = {:?}\n{local_table}\n[metrics]\nlisten = \"{metrics}\"\n{outbox}{log}",
            dir.path().join("data")
        );
        std::fs::write(&path, text).unwrap();
        let log = std::fs::File::options().create(true).append(true).open(dir.path().join("log")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_h5push-relay"))
            .arg("--config")
            .arg(&path)
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Relay { child, local, metrics, dir }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    pub fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub fn signal(&self, name: &str) {
        let done = Command::new("kill").args([format!("-{name}"), self.pid().to_string()]).status().unwrap();
        assert!(done.success());
    }

    /// SIGKILL. Answers with the directory, for another start.
    pub fn kill(mut self) -> Arc<tempfile::TempDir> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        Arc::clone(&self.dir)
    }

    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the relay does not end: {}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// SIGTERM. Answers with the directory, for another start.
    pub fn stop(mut self) -> Arc<tempfile::TempDir> {
        self.signal("TERM");
        let status = self.wait();
        assert_eq!(status.code(), Some(0), "{}", self.log());
        Arc::clone(&self.dir)
    }

    pub fn post(&self, event: &Value) -> Response {
        self.post_text("application/json", &event.to_string())
    }

    pub fn post_text(&self, content_type: &str, body: &str) -> Response {
        request(self.local, "POST", "/v1/events", &[("content-type", content_type)], body.as_bytes())
    }

    /// Posts an event that must be queued.
    pub fn queue(&self, event: &Value) {
        let response = self.post(event);
        assert_eq!((response.status, response.json()["outcome"].as_str()), (202, Some("queued")), "{response:?}");
    }

    /// A call of the local API with a JSON body, or none.
    pub fn call(&self, method: &str, path: &str, body: &Value) -> Response {
        let text = if body.is_null() { String::new() } else { body.to_string() };
        request(self.local, method, path, &[("content-type", "application/json")], text.as_bytes())
    }

    /// The same, which must succeed.
    pub fn done(&self, method: &str, path: &str, body: &Value) -> Value {
        let response = self.call(method, path, body);
        assert_eq!(response.status, 200, "{method} {path}: {response:?}");
        response.json()
    }

    /// What `/v1/status` says of an endpoint.
    pub fn endpoint(&self, name: &str) -> Value {
        let status = self.done("GET", "/v1/status", &Value::Null);
        let all = status["endpoints"].as_array().unwrap().clone();
        all.into_iter().find(|endpoint| endpoint["name"] == name).unwrap_or(Value::Null)
    }

    pub fn toggle(&self, query: &str) -> Value {
        request(self.local, "POST", &format!("/open_api_v1/im/h5push?{query}"), &[], b"").json()
    }

    pub fn put_customer(&self, body: &Value) -> Response {
        let headers = [("content-type", "application/json")];
        request(self.local, "PUT", "/v1/customers", &headers, body.to_string().as_bytes())
    }

    /// A metric's value, read by a parser that is not ours. `labels`: those that matter.
    pub fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let text = get(self.metrics, "/metrics").text();
        let scrape = prometheus_parse::Scrape::parse(text.lines().map(|line| Ok(line.to_owned()))).unwrap();
        let found = scrape.samples.iter().find(|sample| {
            sample.metric == name && labels.iter().all(|(label, value)| sample.labels.get(label) == Some(value))
        });
        match found.unwrap_or_else(|| panic!("no {name} {labels:?} in\n{text}")).value {
            prometheus_parse::Value::Counter(value)
            | prometheus_parse::Value::Gauge(value)
            | prometheus_parse::Value::Untyped(value) => value,
            ref other => panic!("{other:?}"),
        }
    }

    /// Waits until a metric is what it should be.
    pub fn wait_metric(&self, name: &str, labels: &[(&str, &str)], is_right: impl Fn(f64) -> bool) {
        wait_until(&format!("{name} {labels:?}: {}", self.log()), || is_right(self.metric(name, labels)));
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        if std::thread::panicking() {
            eprintln!("the relay's log:\n{}", self.log());
        }
    }
}

pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// An event of plugin 12 that is queued when posted.
pub fn event(customer: &str, message: &str) -> Value {
    json!({
        "web_token": customer,
        "im_web_plugin_id": 12,
        "h5push": true,
        "messages": [{ "type": "message", "message_id": message, "im_sub_session_id": 3001 }],
    })
}

// ---- the client ----

#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Response {
    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub fn code(&self) -> String {
        self.json()["error"]["code"].as_str().unwrap_or_else(|| panic!("no error code: {self:?}")).to_owned()
    }

    pub fn header(&self, name: &str) -> Option<String> {
        let line = self.head.lines().find(|line| line.to_lowercase().starts_with(&format!("{name}:")))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    }
}

pub fn get(to: SocketAddr, path: &str) -> Response {
    request(to, "GET", path, &[], b"")
}

/// One request on a connection of its own. A `host` among the headers replaces the usual one.
pub fn request(to: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
    let mut text = format!("{method} {path} HTTP/1.1\r\nconnection: close\r\n");
    if !headers.iter().any(|(name, _)| *name == "host") {
        text += &format!("host: {to}\r\n");
    }
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    if !body.is_empty() || matches!(method, "POST" | "PUT" | "DELETE") {
        text += &format!("content-length: {}\r\n", body.len());
    }
    exchange(to, &[text.as_bytes(), b"\r\n", body].concat())
}

/// Sends bytes as they are and reads to the end.
pub fn exchange(to: SocketAddr, bytes: &[u8]) -> Response {
    let mut stream = TcpStream::connect(to).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // The relay may answer and close before it has read all.
    stream.write_all(bytes).ok();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok();
    parse(&answer)
}

pub fn parse(answer: &[u8]) -> Response {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n");
    let end = end.unwrap_or_else(|| panic!("no answer: {:?}", String::from_utf8_lossy(answer)));
    let head = String::from_utf8(answer[..end].to_vec()).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Response { status, head, body: answer[end + 4..].to_vec() }
}

// ---- the receiver ----

#[derive(Clone, Debug)]
pub struct Push {
    pub at: Instant,
    pub path: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub status: u16,
}

impl Push {
    pub fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(other, _)| other == name).map_or("", |(_, value)| value)
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    pub fn customer(&self) -> String {
        self.json()["web_token"].as_str().unwrap().to_owned()
    }

    pub fn message_ids(&self) -> Vec<String> {
        let messages = self.json()["messages"].as_array().unwrap().clone();
        messages.iter().map(|message| message["message_id"].as_str().unwrap_or("").to_owned()).collect()
    }
}

/// What the receiver answers.
#[derive(Clone, Debug)]
pub enum Answer {
    Status(u16),
    With(u16, &'static str, &'static str),
    After(Duration, u16),
    Body(u16, &'static str),
}

type Rule = Arc<dyn Fn(&Push) -> Answer + Send + Sync>;

/// A receiver that records every push and answers by a rule that can be changed.
pub struct Receiver {
    pub address: SocketAddr,
    state: Arc<State>,
    _runtime: tokio::runtime::Runtime,
}

struct State {
    rule: Mutex<Rule>,
    keeps: AtomicBool,
    pushes: Mutex<Vec<Push>>,
    changed: Condvar,
}

impl Receiver {
    pub fn start() -> Receiver {
        Receiver::start_on(SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    pub fn start_on(address: SocketAddr) -> Receiver {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind(address)).unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            rule: Mutex::new(Arc::new(|_| Answer::Status(200))),
            keeps: AtomicBool::new(true),
            pushes: Mutex::new(Vec::new()),
            changed: Condvar::new(),
        });
        runtime.spawn(serve(listener, Arc::clone(&state)));
        Receiver { address, state, _runtime: runtime }
    }

    pub fn answer(&self, rule: impl Fn(&Push) -> Answer + Send + Sync + 'static) {
        *self.state.rule.lock().unwrap() = Arc::new(rule);
    }

    pub fn answer_status(&self, status: u16) {
        self.answer(move |_| Answer::Status(status));
    }

    /// Records no pushes any more: for tests that make millions.
    pub fn forget(&self) {
        self.state.keeps.store(false, Ordering::SeqCst);
    }

    pub fn pushes(&self) -> Vec<Push> {
        self.state.pushes.lock().unwrap().clone()
    }

    /// Pushes that were answered with 2xx.
    pub fn delivered(&self) -> Vec<Push> {
        self.pushes().into_iter().filter(|push| (200..300).contains(&push.status)).collect()
    }

    pub fn delivered_ids(&self) -> Vec<String> {
        self.delivered().iter().flat_map(Push::message_ids).collect()
    }

    pub fn wait(&self, what: &str, is_so: impl Fn(&[Push]) -> bool) -> Vec<Push> {
        let deadline = Instant::now() + PATIENCE;
        let mut pushes = self.state.pushes.lock().unwrap();
        while !is_so(&pushes) {
            let left = deadline.saturating_duration_since(Instant::now());
            let summary = || {
                let show = |push: &Push| format!("{} {} {:?}", push.customer(), push.status, push.message_ids());
                pushes.iter().map(show).collect::<Vec<_>>()
            };
            assert!(!left.is_zero(), "waited in vain: {what}; got {:?}", summary());
            pushes = self.state.changed.wait_timeout(pushes, left).unwrap().0;
        }
        pushes.clone()
    }

    pub fn wait_pushes(&self, count: usize) -> Vec<Push> {
        self.wait(&format!("{count} pushes"), |pushes| pushes.len() >= count)
    }

    pub fn wait_delivered(&self, messages: usize) -> Vec<String> {
        self.wait(&format!("{messages} messages"), |pushes| {
            let delivered = pushes.iter().filter(|push| push.status < 300);
            delivered.map(|push| push.message_ids().len()).sum::<usize>() >= messages
        });
        self.delivered_ids()
    }
}

async fn serve(listener: tokio::net::TcpListener, state: Arc<State>) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let state = Arc::clone(&state);
        tokio::spawn(async move {
            let service = service_fn(move |request| record(Arc::clone(&state), request));
            let served =
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
            drop(served);
        });
    }
}

async fn record(
    state: Arc<State>,
    request: Request<hyper::body::Incoming>,
) -> Result<HyperResponse<Full<Bytes>>, Infallible> {
    let at = Instant::now();
    let path = request.uri().to_string();
    let text = |value: &hyper::header::HeaderValue| value.to_str().unwrap().to_owned();
    let headers = request.headers().iter().map(|(name, value)| (name.to_string(), text(value))).collect();
    let mut incoming = request.into_body();
    let mut body = Vec::new();
    while let Some(Ok(frame)) = incoming.frame().await {
        body.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new()));
    }
    let mut push = Push { at, path, headers, body, status: 0 };
    let rule = Arc::clone(&*state.rule.lock().unwrap());
    let answer = rule(&push);
    let mut response = HyperResponse::new(Full::new(Bytes::new()));
    let (status, wait) = match answer {
        Answer::Body(status, body) => {
            *response.body_mut() = Full::new(Bytes::from_static(body.as_bytes()));
            (status, Duration::ZERO)
        }
        Answer::Status(status) => (status, Duration::ZERO),
        Answer::With(status, name, value) => {
            response.headers_mut().insert(name, value.parse().unwrap());
            (status, Duration::ZERO)
        }
        Answer::After(wait, status) => (status, wait),
    };
    *response.status_mut() = hyper::StatusCode::from_u16(status).unwrap();
    tokio::time::sleep(wait).await;
    push.status = status;
    if state.keeps.load(Ordering::SeqCst) {
        state.pushes.lock().unwrap().push(push);
    }
    state.changed.notify_all();
    Ok(response)
}

/// Bytes of all files below a directory.
pub fn bytes_below(dir: &Path) -> u64 {
    std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => bytes_below(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .sum()
}
