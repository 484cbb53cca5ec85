//! A relay as a process, a receiver that records, a client. Waiting is always for something, with a deadline.

mod client;
mod receiver;

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

pub use self::client::*;
pub use self::receiver::*;

/// How long anything may take that is waited for.
pub const PATIENCE: Duration = Duration::from_secs(30);

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

/// Compiles what is to stand between the relay and the C library. `None`, said aloud, where it cannot.
pub fn preload(source: &str, dir: &Path) -> Option<PathBuf> {
    let library = dir.join(Path::new(source).with_extension("so"));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it").join(source);
    let compiler =
        Command::new("cc").args(["-O1", "-shared", "-fPIC", "-o"]).arg(&library).arg(path).arg("-ldl").status();
    if !compiler.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: what needs {source}: no C compiler");
        return None;
    }
    Some(library)
}

/// An address that nothing listens on. Not of the ports that the kernel hands out: until it is used, somebody's outgoing
/// connection might get it.
pub fn free_address() -> SocketAddr {
    loop {
        let address = SocketAddr::from(([127, 0, 0, 1], fastrand::u16(10_000..32_000)));
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
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
