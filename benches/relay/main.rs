//! The relay against the direct way, in one run on loopback. `cargo bench` prints a table; compare ratios, not machines.
//!
//! The same load generator and the same sink serve the ceiling (generator posts straight to the sink) and the relay
//! (generator posts to the relay, the relay pushes to the sink).
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a bench measures time, prints, and fails by panicking"
)]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::SendRequest;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};

const CONNECTIONS: usize = 64;
const CUSTOMERS: u64 = 20_000;
const EVENTS: u64 = 100_000;
const BATCH: u64 = 200;
const ROUNDS: u64 = 3;
const PACED_PER_SECOND: u64 = 1_000;
const PACED_SECONDS: u64 = 10;

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    // `cargo bench -- scale 10000000 1000000`: a backlog of so many events and customers instead.
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.iter().position(|argument| argument == "scale") {
        Some(at) => {
            let events = arguments.get(at + 1).and_then(|count| count.parse().ok()).unwrap_or(1_000_000);
            let customers = arguments.get(at + 2).and_then(|count| count.parse().ok()).unwrap_or(events / 10);
            runtime.block_on(scale(events, customers.max(1)));
        }
        None => runtime.block_on(run()),
    }
}

/// A backlog of many events for an endpoint that is down: memory, disk, and how long a start takes with it.
async fn scale(events: u64, customers: u64) {
    let dead = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut relay = Relay::start(dead);
    println!("{events} waiting events of {customers} customers");
    let took = post_all(relay.address, "/v1/events", (events, customers), 500, 0).await;
    println!("accepted                                   {:>12.0} /s", events as f64 / took.as_secs_f64());
    tokio::time::sleep(Duration::from_secs(6)).await;
    println!("peak memory                                {:>12.1} MiB", status_kb(relay.child.id(), "VmHWM:") / 1024.0);
    println!(
        "disk for one event                         {:>12.0} bytes",
        bytes_below(relay.dir.path()) as f64 / events as f64
    );
    println!("payload of one event                       {:>12} bytes", event(events - 1, customers).len());
    for (how, signal) in [("kill -9", "-KILL"), ("a clean stop", "-TERM")] {
        Command::new("kill").args([signal, &relay.child.id().to_string()]).status().unwrap();
        relay.child.wait().unwrap();
        let begun = Instant::now();
        relay = relay.again();
        println!("start after {how:<28} {:>14.2} s", begun.elapsed().as_secs_f64());
        println!(
            "  peak memory of the start                 {:>12.0} MiB",
            status_kb(relay.child.id(), "VmHWM:") / 1024.0
        );
        println!(
            "  memory then                              {:>12.0} MiB",
            status_kb(relay.child.id(), "VmRSS:") / 1024.0
        );
    }
}

fn bytes_below(dir: &Path) -> u64 {
    let size = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes_below(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    std::fs::read_dir(dir).unwrap().map(|entry| size(entry.unwrap())).sum()
}

/// What the sink has seen.
#[derive(Default)]
struct Sink {
    messages: AtomicU64,
    /// When a message was seen, by its number; only while latency is measured.
    seen: Mutex<Vec<(u64, Instant)>>,
    keeps: std::sync::atomic::AtomicBool,
}

async fn run() {
    let sink = Arc::new(Sink::default());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let sink_address = listener.local_addr().unwrap();
    tokio::spawn(serve(listener, Arc::clone(&sink)));

    println!(
        "h5push-relay bench: {CONNECTIONS} connections, {CUSTOMERS} customers, {EVENTS} events of about 300 bytes"
    );
    let sync = fdatasync_p50();
    println!("fdatasync of this disk, p50                {:>12.3} ms", sync.as_secs_f64() * 1e3);

    let mut ceilings = Vec::new();
    let mut relayed = Vec::new();
    let mut costs = Vec::new();
    for round in 0..ROUNDS {
        let before = cpu_ticks(std::process::id());
        let took = post_all(sink_address, "/", (EVENTS, CUSTOMERS), 1, round * EVENTS).await;
        let direct_ticks = cpu_ticks(std::process::id()) - before;
        ceilings.push(EVENTS as f64 / took.as_secs_f64());

        let relay = Relay::start(sink_address);
        sink.messages.store(0, Ordering::SeqCst);
        let begun = Instant::now();
        let accepted = post_all(relay.address, "/v1/events", (EVENTS, CUSTOMERS), 1, round * EVENTS).await;
        wait_for(&sink, EVENTS).await;
        let delivered = begun.elapsed();
        relayed.push(EVENTS as f64 / delivered.as_secs_f64());
        let relay_ticks = cpu_ticks(relay.child.id());
        costs.push(relay_ticks as f64 / direct_ticks as f64);
        println!(
            "round {round}: direct {:>8.0}/s   accepted {:>8.0}/s   accepted and delivered {:>8.0}/s   \
             CPU of an event: direct {:>3.0} µs, relay {:>3.0} µs",
            ceilings.last().unwrap(),
            EVENTS as f64 / accepted.as_secs_f64(),
            relayed.last().unwrap(),
            micros(direct_ticks),
            micros(relay_ticks),
        );
    }
    let (ceiling, relayed) = (median(ceilings), median(relayed));
    println!("one event a request: direct ceiling        {ceiling:>12.0} /s");
    println!("one event a request, durable and delivered {relayed:>12.0} /s   ratio {:.2}", relayed / ceiling);
    println!(
        "CPU of an event in the relay               {:>12.1} times the direct post's, client and server",
        median(costs)
    );

    let relay = Relay::start(sink_address);
    sink.messages.store(0, Ordering::SeqCst);
    let begun = Instant::now();
    let took = post_all(relay.address, "/v1/events", (5 * EVENTS, CUSTOMERS), BATCH, 10 * EVENTS).await;
    println!("accepted in requests of {BATCH}                {:>12.0} /s", 5.0 * EVENTS as f64 / took.as_secs_f64());
    wait_for(&sink, 5 * EVENTS).await;
    println!(
        "  … and delivered                          {:>12.0} /s",
        5.0 * EVENTS as f64 / begun.elapsed().as_secs_f64()
    );
    drop(relay);

    let relay = Relay::start(sink_address);
    sink.keeps.store(true, Ordering::SeqCst);
    let latencies = paced(&relay, &sink).await;
    sink.keeps.store(false, Ordering::SeqCst);
    for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
        let at = latencies[((latencies.len() - 1) as f64 * share) as usize];
        println!("end to end at {PACED_PER_SECOND}/s, {name}                  {:>12.2} ms", at.as_secs_f64() * 1e3);
    }

    let relay = Relay::start(sink_address);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let before = cpu_ticks(relay.child.id());
    tokio::time::sleep(Duration::from_secs(10)).await;
    let ticks = cpu_ticks(relay.child.id()) - before;
    println!("idle: resident                             {:>12.1} MiB", status_kb(relay.child.id(), "VmRSS:") / 1024.0);
    println!("idle: CPU of one core over 10 s            {:>12.2} %", ticks as f64 / 10.0);
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A relay of its own, on free ports and a throw-away directory on the disk of the build.
struct Relay {
    child: Child,
    address: SocketAddr,
    dir: Arc<tempfile::TempDir>,
}

impl Relay {
    fn start(sink: SocketAddr) -> Relay {
        let dir = Arc::new(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
        let free = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (address, metrics) = (free(), free());
        let config = dir.path().join("config.toml");
        let text = format!(
            "data_dir = {:?}\n[local]\nlisten = \"{address}\"\n[metrics]\nlisten = \"{metrics}\"\n\
             [endpoints.default]\nurl = \"http://{sink}/push\"\nrate_per_second = 1e6\nburst = 100000\nconcurrency = 64\nmax_events = 100000000\n\
             [outbox]\nmax_events = 100000000\n[log]\nlevel = \"info,h5push_relay::store::recover=debug\"\n[push]\nallow_networks = [\"127.0.0.0/8\"]\n",
            dir.path().join("data"),
        );
        std::fs::write(&config, text).unwrap();
        Relay::run(dir, address)
    }

    /// The same again, after it has ended.
    fn again(&self) -> Relay {
        Relay::run(Arc::clone(&self.dir), self.address)
    }

    fn run(dir: Arc<tempfile::TempDir>, address: SocketAddr) -> Relay {
        let child = Command::new(env!("CARGO_BIN_EXE_h5push-relay"))
            .arg("--config")
            .arg(dir.path().join("config.toml"))
            // As systemd/h5push-relay.service has it.
            .env("MALLOC_ARENA_MAX", "2")
            .stdin(Stdio::null())
            .stderr(std::fs::File::options().create(true).append(true).open(dir.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        let relay = Relay { child, address, dir };
        let deadline = Instant::now() + Duration::from_secs(60);
        while !relay.is_ready() {
            assert!(Instant::now() < deadline, "the relay does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        relay
    }

    fn is_ready(&self) -> bool {
        use std::io::{Read, Write};
        let Ok(mut stream) = std::net::TcpStream::connect(self.address) else { return false };
        let request = format!("GET /readyz HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n", self.address);
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).is_ok() && answer.starts_with("HTTP/1.1 200")
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn event(number: u64, customers: u64) -> String {
    let customer = number % customers;
    format!(
        concat!(
            r#"{{"web_token":"customer-{customer}","im_web_plugin_id":12,"h5push":true,"offline":true,"#,
            r#""messages":[{{"type":"message","message_id":"{number}","agent_id":3,"agent_name":"小雅","#,
            r#""agent_avatar":"https://im.example.com/avatars/3.png","im_sub_session_id":3001,"#,
            r#""message_created_at":"2026-11-22 09:54:00","data":{{"font":"","content":"Have you seen our new size chart?"}}}}]}}"#
        ),
        customer = customer,
        number = number
    )
}

/// Posts events from all connections, each the next as soon as the last is answered.
async fn post_all(
    to: SocketAddr,
    path: &'static str,
    (events, customers): (u64, u64),
    batch: u64,
    first: u64,
) -> Duration {
    let next = Arc::new(AtomicU64::new(0));
    let begun = Instant::now();
    let mut tasks = Vec::new();
    for _ in 0..CONNECTIONS {
        let next = Arc::clone(&next);
        tasks.push(tokio::spawn(async move {
            let mut sender = connect(to).await;
            loop {
                let from = next.fetch_add(batch, Ordering::Relaxed);
                if from >= events {
                    return;
                }
                let numbers = (from..(from + batch).min(events)).map(|number| event(first + number, customers));
                let (body, kind) = if batch == 1 {
                    (numbers.collect::<String>(), "application/json")
                } else {
                    (numbers.map(|event| event + "\n").collect::<String>(), "application/x-ndjson")
                };
                post(&mut sender, to, path, kind, body).await;
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    begun.elapsed()
}

async fn connect(to: SocketAddr) -> SendRequest<Full<Bytes>> {
    let stream = TcpStream::connect(to).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

async fn post(sender: &mut SendRequest<Full<Bytes>>, to: SocketAddr, path: &str, kind: &str, body: String) {
    let request = Request::post(path)
        .header("host", to.to_string())
        .header("content-type", kind)
        .body(Full::new(Bytes::from(body)))
        .unwrap();
    let mut response = sender.send_request(request).await.unwrap();
    assert!(response.status().is_success(), "{}", response.status());
    while response.body_mut().frame().await.is_some() {}
}

async fn serve(listener: TcpListener, sink: Arc<Sink>) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        let sink = Arc::clone(&sink);
        tokio::spawn(async move {
            let service = service_fn(move |mut request: Request<hyper::body::Incoming>| {
                let sink = Arc::clone(&sink);
                async move {
                    let mut body = Vec::new();
                    while let Some(Ok(frame)) = request.body_mut().frame().await {
                        body.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new()));
                    }
                    sink.take(&body);
                    let mut response = Response::new(Full::new(Bytes::new()));
                    *response.status_mut() = StatusCode::OK;
                    Ok::<_, Infallible>(response)
                }
            });
            let served =
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
            drop(served);
        });
    }
}

impl Sink {
    fn take(&self, body: &[u8]) {
        const MARK: &[u8] = br#""message_id":""#;
        let mut count = 0;
        let mut rest = body;
        while let Some(at) = rest.windows(MARK.len()).position(|window| window == MARK) {
            count += 1;
            rest = &rest[at + MARK.len()..];
            if self.keeps.load(Ordering::Relaxed) {
                let digits: String =
                    rest.iter().take_while(|byte| byte.is_ascii_digit()).map(|byte| *byte as char).collect();
                self.seen.lock().unwrap().push((digits.parse().unwrap(), Instant::now()));
            }
        }
        self.messages.fetch_add(count, Ordering::SeqCst);
    }
}

async fn wait_for(sink: &Sink, messages: u64) {
    let deadline = Instant::now() + Duration::from_secs(300);
    while sink.messages.load(Ordering::SeqCst) < messages {
        assert!(Instant::now() < deadline, "{} of {messages}", sink.messages.load(Ordering::SeqCst));
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Posts at a steady rate, whatever the answers; from the moment each was due to its arrival.
async fn paced(relay: &Relay, sink: &Arc<Sink>) -> Vec<Duration> {
    let total = PACED_PER_SECOND * PACED_SECONDS;
    let begun = Instant::now() + Duration::from_millis(100);
    let due = move |number: u64| begun + Duration::from_nanos(number * 1_000_000_000 / PACED_PER_SECOND);
    let to = relay.address;
    sink.messages.store(0, Ordering::SeqCst);
    let mut tasks = Vec::new();
    for lane in 0..16u64 {
        tasks.push(tokio::spawn(async move {
            let mut sender = connect(to).await;
            for number in (lane..total).step_by(16) {
                tokio::time::sleep_until(due(number).into()).await;
                post(&mut sender, to, "/v1/events", "application/json", event(100 * EVENTS + number, CUSTOMERS)).await;
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    wait_for(sink, total).await;
    let seen = sink.seen.lock().unwrap();
    let mut latencies: Vec<Duration> =
        seen.iter().map(|(number, at)| at.duration_since(due(number - 100 * EVENTS))).collect();
    latencies.sort();
    latencies
}

fn fdatasync_p50() -> Duration {
    use std::io::Write;
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut file = std::fs::File::create(Path::new(dir.path()).join("sync")).unwrap();
    let mut times: Vec<Duration> = (0..200)
        .map(|_| {
            file.write_all(&[7; 512]).unwrap();
            let begun = Instant::now();
            file.sync_data().unwrap();
            begun.elapsed()
        })
        .collect();
    times.sort();
    times[times.len() / 2]
}

/// CPU of one event, when all of a round took so many ticks of 10 ms.
fn micros(ticks: u64) -> f64 {
    ticks as f64 * 1e4 / EVENTS as f64
}

fn cpu_ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after = stat.rsplit_once(") ").unwrap().1;
    let fields: Vec<&str> = after.split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

fn status_kb(pid: u32, name: &str) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
