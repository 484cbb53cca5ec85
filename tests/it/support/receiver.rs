//! A receiver that records.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::service::service_fn;
use hyper::{Request, Response as HyperResponse};
use hyper_util::rt::TokioIo;
use serde_json::Value;

use super::PATIENCE;

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
    /// The connection is closed without an answer.
    Break,
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
    open: AtomicUsize,
    open_at_most: AtomicUsize,
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
            open: AtomicUsize::new(0),
            open_at_most: AtomicUsize::new(0),
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

    /// Waits until a push is read and not yet answered.
    pub fn wait_open(&self) {
        super::wait_until("a push is under way", || self.state.open.load(Ordering::SeqCst) > 0);
    }

    /// Most pushes that were read and not yet answered at any time.
    pub fn open_at_most(&self) -> usize {
        self.state.open_at_most.load(Ordering::SeqCst)
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
            let delivered = pushes.iter().filter(|push| (200..300).contains(&push.status));
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
) -> std::io::Result<HyperResponse<Full<Bytes>>> {
    let at = Instant::now();
    let open = state.open.fetch_add(1, Ordering::SeqCst) + 1;
    state.open_at_most.fetch_max(open, Ordering::SeqCst);
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
        Answer::Break => (0, Duration::ZERO),
    };
    tokio::time::sleep(wait).await;
    state.open.fetch_sub(1, Ordering::SeqCst);
    push.status = status;
    if state.keeps.load(Ordering::SeqCst) {
        state.pushes.lock().unwrap().push(push);
    }
    state.changed.notify_all();
    if status == 0 {
        return Err(std::io::ErrorKind::ConnectionReset.into());
    }
    *response.status_mut() = hyper::StatusCode::from_u16(status).unwrap();
    Ok(response)
}
