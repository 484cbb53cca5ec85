//! A small client and a small server on loopback, for the subcommands that try things out.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue};
use hyper::service::service_fn;
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream, UnixStream};

use crate::config::{Listen, Secret};

/// Largest body that is read, bytes.
const BODY_MAX: usize = 64 << 20;
/// How long an answer may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Where a listener is that is called.
#[derive(Clone, Debug)]
pub(super) struct Client {
    /// Where it listens.
    pub listen: Listen,
    /// What it wants to know.
    pub token: Option<Secret>,
    /// How long an answer may take.
    pub patience: Duration,
}

impl Client {
    /// One that listens on TCP and asks for no token.
    pub(super) fn of(address: SocketAddr) -> Client {
        Client { listen: Listen::Tcp(address), token: None, patience: ANSWER_LIMIT }
    }

    /// Sends one request and reads the answer.
    pub(super) async fn call(
        &self,
        method: Method,
        path: &str,
        content_type: &'static str,
        body: String,
    ) -> anyhow::Result<(StatusCode, Bytes)> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            // Whatever it listens on, a loopback name is taken.
            .header(HOST, "localhost")
            .header(CONTENT_TYPE, content_type)
            .body(Full::new(Bytes::from(body)))?;
        if let Some(token) = &self.token {
            let mut value = HeaderValue::try_from(format!("Bearer {}", token.expose()))?;
            value.set_sensitive(true);
            request.headers_mut().insert(AUTHORIZATION, value);
        }
        let connected = async {
            match &self.listen {
                Listen::Tcp(address) => {
                    let stream = TcpStream::connect(address).await?;
                    Ok::<_, io::Error>(send(TokioIo::new(stream), request).await)
                }
                Listen::Unix(path) => Ok(send(TokioIo::new(UnixStream::connect(path).await?), request).await),
            }
        };
        let answered = tokio::time::timeout(self.patience, connected).await;
        answered.with_context(|| format!("{} does not answer", self.listen))?.with_context(|| {
            format!(
                "nobody listens on {}. Is the relay running (systemctl status h5push-relay), and is this its config \
                 (--config FILE)?",
                self.listen
            )
        })?
    }
}

async fn send<I>(io: I, request: Request<Full<Bytes>>) -> anyhow::Result<(StatusCode, Bytes)>
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await?;
    tokio::spawn(connection);
    let response = sender.send_request(request).await?;
    let status = response.status();
    Ok((status, read(response.into_body()).await?))
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
