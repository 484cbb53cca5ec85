//! The receiver of all endpoints: it counts messages, and holds the relay to the order of each customer.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

use crate::load::Shape;

/// Where a push is never answered.
pub const HANG: &str = "/hang";

/// What the sink has taken.
#[derive(Default)]
pub struct Sink {
    pub messages: AtomicU64,
    /// While latency is measured, when which message came.
    pub keeps: AtomicBool,
    pub seen: Mutex<Vec<(u64, Instant)>>,
    /// Of a scale run.
    lanes: Option<Lanes>,
}

/// What is watched of each customer and endpoint.
struct Lanes {
    shape: Shape,
    /// One more than the number of the last message of each customer.
    last: Mutex<Vec<u64>>,
    endpoints: Vec<AtomicU64>,
    /// The pushes of a tenth of each endpoint's customers fail.
    fails: AtomicBool,
}

impl Sink {
    pub fn watching(shape: Shape) -> Sink {
        let lanes = Lanes {
            shape,
            last: Mutex::new(vec![0; shape.customers as usize]),
            endpoints: (0..shape.endpoints).map(|_| AtomicU64::new(0)).collect(),
            fails: AtomicBool::new(true),
        };
        Sink { lanes: Some(lanes), ..Sink::default() }
    }

    /// No customer's pushes fail any more.
    pub fn mend(&self) {
        self.lanes.as_ref().unwrap().fails.store(false, Ordering::SeqCst);
    }

    /// Messages by endpoint.
    pub fn by_endpoint(&self) -> Vec<u64> {
        self.lanes.as_ref().unwrap().endpoints.iter().map(|count| count.load(Ordering::Relaxed)).collect()
    }

    fn take(&self, body: &[u8]) -> StatusCode {
        const MARK: &[u8] = br#""message_id":""#;
        let finder = memchr::memmem::Finder::new(MARK);
        let number = |at: usize| {
            let digits = body[at + MARK.len()..].iter().take_while(|byte| byte.is_ascii_digit());
            digits.fold(0, |number, digit| number * 10 + u64::from(digit - b'0'))
        };
        let numbers: Vec<u64> = finder.find_iter(body).map(number).collect();
        if let Some(lanes) = &self.lanes
            && !lanes.take(&numbers)
        {
            return StatusCode::INTERNAL_SERVER_ERROR;
        }
        if self.keeps.load(Ordering::Relaxed) {
            let now = Instant::now();
            self.seen.lock().unwrap().extend(numbers.iter().map(|number| (*number, now)));
        }
        self.messages.fetch_add(numbers.len() as u64, Ordering::SeqCst);
        StatusCode::OK
    }

    pub async fn wait_for(&self, messages: u64) {
        let (mut before, mut moved) = (0, Instant::now());
        loop {
            let now = self.messages.load(Ordering::SeqCst);
            if now >= messages {
                return;
            }
            if now != before {
                (before, moved) = (now, Instant::now());
            }
            assert!(moved.elapsed() < Duration::from_secs(60), "{now} of {messages}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Serves on an address, or on a free one.
    pub async fn serve_on(self: &Arc<Self>, address: Option<SocketAddr>) -> SocketAddr {
        let listener = TcpListener::bind(address.unwrap_or(([127, 0, 0, 1], 0).into())).await.unwrap();
        let address = listener.local_addr().unwrap();
        let sink = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                let sink = Arc::clone(&sink);
                tokio::spawn(async move {
                    let service = service_fn(move |request| answer(Arc::clone(&sink), request));
                    let http = hyper::server::conn::http1::Builder::new();
                    drop(http.serve_connection(TokioIo::new(stream), service).await);
                });
            }
        });
        address
    }
}

impl Lanes {
    /// Whether one customer's messages are taken.
    fn take(&self, numbers: &[u64]) -> bool {
        let Some(first) = numbers.first() else { return true };
        let customer = first % self.shape.customers;
        if self.shape.fails(customer) && self.fails.load(Ordering::Relaxed) {
            return false;
        }
        let mut last = self.last.lock().unwrap();
        for number in numbers {
            let before = &mut last[customer as usize];
            assert_eq!(number % self.shape.customers, customer, "another customer's message in a push");
            assert!(*number + 1 > *before, "message {number} of customer {customer} came after {}", *before - 1);
            *before = number + 1;
        }
        self.endpoints[(customer % self.shape.endpoints) as usize].fetch_add(numbers.len() as u64, Ordering::Relaxed);
        true
    }
}

async fn answer(
    sink: Arc<Sink>,
    mut request: Request<hyper::body::Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let mut body = Vec::new();
    while let Some(Ok(frame)) = request.body_mut().frame().await {
        body.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new()));
    }
    if request.uri().path() == HANG {
        std::future::pending::<()>().await;
    }
    let mut response = Response::new(Full::new(Bytes::new()));
    *response.status_mut() = sink.take(&body);
    Ok(response)
}
