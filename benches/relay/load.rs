//! The load: events, and connections that post them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

pub const CONNECTIONS: usize = 64;
/// Plugin of the first endpoint; the others count up from it.
pub const PLUGIN: u64 = 12;

/// Whose events these are.
#[derive(Clone, Copy)]
pub struct Shape {
    pub customers: u64,
    /// Endpoints, one for each plugin, that the customers are spread over.
    pub endpoints: u64,
}

impl Shape {
    /// Whether a customer is of the tenth of each endpoint's whose pushes fail at first.
    pub fn fails(self, customer: u64) -> bool {
        (customer / self.endpoints).is_multiple_of(10)
    }

    /// An event of about 300 bytes; its number is its message's id.
    pub fn event(self, number: u64) -> String {
        let customer = number % self.customers;
        format!(
            concat!(
                r#"{{"web_token":"customer-{customer}","im_web_plugin_id":{plugin},"h5push":true,"offline":true,"#,
                r#""messages":[{{"type":"message","message_id":"{number}","agent_id":3,"agent_name":"小雅","#,
                r#""agent_avatar":"https://im.example.com/avatars/3.png","im_sub_session_id":3001,"#,
                r#""message_created_at":"2026-11-22 09:54:00","data":{{"font":"","content":"Have you seen our new size chart?"}}}}]}}"#
            ),
            customer = customer,
            plugin = PLUGIN + customer % self.endpoints,
            number = number
        )
    }
}

/// Posts `events` events from all connections, `batch` to a request, each the next as soon as the last is answered.
pub async fn post_all(
    to: SocketAddr,
    path: &'static str,
    shape: Shape,
    events: u64,
    batch: u64,
    first: u64,
) -> Duration {
    from_all(to, "POST", events.div_ceil(batch), move |request| {
        let from = request * batch;
        let numbers = (from..(from + batch).min(events)).map(|number| shape.event(first + number));
        if batch == 1 {
            (path.to_owned(), "application/json", numbers.collect())
        } else {
            (path.to_owned(), "application/x-ndjson", numbers.map(|event| event + "\n").collect())
        }
    })
    .await
}

/// So many requests from all connections, each with its path, content type and body.
pub async fn from_all<F>(to: SocketAddr, method: &'static str, requests: u64, make: F) -> Duration
where
    F: Fn(u64) -> (String, &'static str, String) + Clone + Send + 'static,
{
    let next = Arc::new(AtomicU64::new(0));
    let begun = Instant::now();
    let mut tasks = Vec::new();
    for _ in 0..CONNECTIONS {
        let (next, make) = (Arc::clone(&next), make.clone());
        tasks.push(tokio::spawn(async move {
            let mut sender = connect(to).await;
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= requests {
                    return;
                }
                let (path, kind, body) = make(number);
                request(&mut sender, to, method, &path, kind, body).await;
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    begun.elapsed()
}

pub async fn connect(to: SocketAddr) -> SendRequest<Full<Bytes>> {
    let stream = TcpStream::connect(to).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

/// One request; its answer must say that it succeeded.
pub async fn request(
    sender: &mut SendRequest<Full<Bytes>>,
    to: SocketAddr,
    method: &str,
    path: &str,
    kind: &str,
    body: impl Into<Bytes>,
) {
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", to.to_string())
        .header("content-type", kind)
        .body(Full::new(body.into()))
        .unwrap();
    sender.ready().await.unwrap();
    let mut response = sender.send_request(request).await.unwrap();
    assert!(response.status().is_success(), "{}", response.status());
    while response.body_mut().frame().await.is_some() {}
}

/// Requests one after the other on one connection: how long each took, in ascending order.
pub async fn one_by_one(
    to: SocketAddr,
    method: &str,
    requests: impl Iterator<Item = (String, String)>,
) -> Vec<Duration> {
    let mut sender = connect(to).await;
    let mut times = Vec::new();
    for (path, body) in requests {
        let begun = Instant::now();
        request(&mut sender, to, method, &path, "application/json", body).await;
        times.push(begun.elapsed());
    }
    times.sort();
    times
}

/// Posts single events at a steady rate from 16 connections, whatever the answers. Says when the first was due.
pub async fn paced(to: SocketAddr, shape: Shape, per_second: u64, events: u64, first: u64) -> Instant {
    let begun = Instant::now() + Duration::from_millis(100);
    let mut tasks = Vec::new();
    for lane in 0..16u64 {
        tasks.push(tokio::spawn(async move {
            let mut sender = connect(to).await;
            for number in (lane..events).step_by(16) {
                tokio::time::sleep_until(due(begun, per_second, number).into()).await;
                request(&mut sender, to, "POST", "/v1/events", "application/json", shape.event(first + number)).await;
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    begun
}

/// When the event of that number was due.
pub fn due(begun: Instant, per_second: u64, number: u64) -> Instant {
    begun + Duration::from_nanos(number * 1_000_000_000 / per_second)
}

/// The value that a share of the ascending values does not exceed.
pub fn quantile(sorted: &[Duration], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3
}
