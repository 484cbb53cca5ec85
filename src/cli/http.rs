//! A small client and a small server on loopback, for the subcommands that try things out.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::service::service_fn;
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};

/// Largest body that is read, bytes.
const BODY_MAX: usize = 64 << 20;
/// How long an answer may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Sends one request and reads the answer.
pub(super) async fn call(
    address: SocketAddr,
    method: Method,
    path: &str,
    content_type: &'static str,
    body: String,
) -> anyhow::Result<(StatusCode, Bytes)> {
    let exchange = async {
        let stream = TcpStream::connect(address).await.with_context(|| format!("connecting to {address}"))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, address.to_string())
            .header(CONTENT_TYPE, content_type)
            .body(Full::new(Bytes::from(body)))?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        anyhow::Ok((status, read(response.into_body()).await?))
    };
    tokio::time::timeout(ANSWER_LIMIT, exchange).await.context("no answer")?
}

/// What a receiver got.
#[derive(Debug)]
pub(super) struct Received {
    pub path: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Received {
    /// A header's text, empty where there is none.
    pub(super) fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("")
    }
}

/// Answers every request with the status that `answer` says, for ever.
pub(super) async fn receive(
    listener: TcpListener,
    answer: impl Fn(Received) -> StatusCode + Clone + Send + Sync + 'static,
) -> anyhow::Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        let answer = answer.clone();
        tokio::spawn(async move {
            let service = service_fn(|request: Request<hyper::body::Incoming>| {
                let answer = answer.clone();
                async move {
                    let path = request.uri().to_string();
                    let headers = request.headers().clone();
                    let status = match read(request.into_body()).await {
                        Ok(body) => answer(Received { path, headers, body }),
                        Err(_) => StatusCode::PAYLOAD_TOO_LARGE,
                    };
                    let mut response = Response::new(Full::new(Bytes::new()));
                    *response.status_mut() = status;
                    Ok::<_, Infallible>(response)
                }
            });
            let served = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            // A peer that breaks off is its own affair.
            drop(served.await);
        });
    }
}

async fn read(body: hyper::body::Incoming) -> anyhow::Result<Bytes> {
    #[expect(clippy::disallowed_methods, reason = "bounded in size; a tool for trying things out")]
    let whole = Limited::new(body, BODY_MAX).collect().await;
    Ok(whole.map_err(|error| anyhow::anyhow!(error))?.to_bytes())
}
