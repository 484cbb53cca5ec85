//! One attempt: connect or take a pooled connection, post, read the head, say what was seen.
//!
//! hyper with hyper-rustls, HTTP/1.1, no proxy, no redirects. One deadline covers connecting, TLS, the request and the
//! head of the answer; the body is drained in the background within what is left of it, so that the connection can be
//! used again.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::http1::SendRequest;
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Request, Response, Uri};
use hyper_rustls::HttpsConnector;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tower_service::Service;

use crate::clock;
use crate::config::Endpoint;
use crate::domain::outcome::{self, Report};

/// How long a connection is kept idle: receivers commonly close them after 60 s or more.
const IDLE_LIMIT: Duration = Duration::from_secs(30);
/// An answer's body is read up to this, then its connection is dropped.
const BODY_MAX: usize = 64 << 10;
/// Most headers of an answer.
const HEADERS_MAX: usize = 64;
/// Largest head of an answer, bytes.
const HEAD_MAX: usize = 64 << 10;
/// Look-ups of host names at once: they hold a thread each and cannot be cancelled.
const LOOKUPS_MAX: usize = 32;

/// An endpoint as the deliverer uses it: its config and its idle connections, which go with it.
#[derive(Debug)]
pub struct Target {
    /// As configured.
    pub endpoint: Endpoint,
    host: Option<HeaderValue>,
    idle: Mutex<Vec<Idle>>,
}

#[derive(Debug)]
struct Idle {
    sender: SendRequest<Full<Bytes>>,
    since: Instant,
}

impl Target {
    /// A target without connections.
    #[must_use]
    pub fn new(endpoint: Endpoint) -> Target {
        let authority = endpoint.url.uri().authority().map(|authority| authority.as_str().to_owned());
        let host = authority.and_then(|authority| HeaderValue::try_from(authority).ok());
        Target { endpoint, host, idle: Mutex::new(Vec::new()) }
    }

    fn take_idle(&self) -> Option<SendRequest<Full<Bytes>>> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(found) = idle.pop() {
            if found.sender.is_ready() && found.since.elapsed() < IDLE_LIMIT {
                return Some(found.sender);
            }
        }
        None
    }

    fn give_back(&self, sender: SendRequest<Full<Bytes>>) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < self.endpoint.limits.concurrency as usize && !sender.is_closed() {
            idle.push(Idle { sender, since: clock::now() });
        }
    }

    /// Closes connections that have been idle for long. Says whether any is left.
    pub fn reap(&self) -> bool {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|idle| !idle.sender.is_closed() && idle.since.elapsed() < IDLE_LIMIT);
        !idle.is_empty()
    }

    fn forget_idle(&self) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// The sender of pushes.
#[derive(Clone)]
pub struct Deliverer {
    connector: HttpsConnector<Dialer>,
    user_agent: HeaderValue,
}

impl std::fmt::Debug for Deliverer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Deliverer")
    }
}

/// What is posted.
#[derive(Debug)]
pub struct Push {
    /// `webhook-id`
    pub id: String,
    /// `h5push-attempt`
    pub attempt: u32,
    /// The body.
    pub body: Bytes,
}

/// Why there is no deliverer.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The file of a further CA cannot be used.
    #[error("tls.extra_ca_file: {path}: {problem}")]
    ExtraCa {
        /// The file.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The TLS library refuses its own settings.
    #[error("TLS: {0}")]
    Settings(#[from] rustls::Error),
}

impl Deliverer {
    /// Reads the certificates that are trusted: the system's, and those of a file.
    ///
    /// # Errors
    /// The file is of no use.
    pub fn new(extra_ca_file: Option<&Path>) -> Result<Deliverer, TlsError> {
        let mut roots = rustls::RootCertStore::empty();
        let native = rustls_native_certs::load_native_certs();
        for error in &native.errors {
            tracing::warn!(%error, "a trusted certificate of the system cannot be read");
        }
        let (usable, unusable) = roots.add_parsable_certificates(native.certs);
        tracing::debug!(usable, unusable, "trusted certificates of the system");
        if let Some(path) = extra_ca_file {
            let wrong = |problem: String| TlsError::ExtraCa { path: path.display().to_string(), problem };
            use rustls::pki_types::pem::PemObject as _;
            let certs = rustls::pki_types::CertificateDer::pem_file_iter(path)
                .and_then(Iterator::collect::<Result<Vec<_>, _>>)
                .map_err(|error| wrong(error.to_string()))?;
            if certs.is_empty() {
                return Err(wrong("holds no certificate".to_owned()));
            }
            for cert in certs {
                roots.add(cert).map_err(|error| wrong(error.to_string()))?;
            }
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let dialer = Dialer { lookups: Arc::new(Semaphore::new(LOOKUPS_MAX)) };
        let connector = hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(dialer);
        let user_agent = HeaderValue::from_static(concat!("h5push-relay/", env!("CARGO_PKG_VERSION")));
        Ok(Deliverer { connector, user_agent })
    }

    /// Makes one attempt. `may_send` is asked right before the first byte; `None` if it says no.
    pub async fn attempt(
        &self,
        target: &Arc<Target>,
        push: &Push,
        timeout: Duration,
        may_send: impl FnOnce() -> bool,
    ) -> Option<Report> {
        let deadline = tokio::time::Instant::now() + timeout;
        let exchange = self.exchange(target, push, may_send);
        let (response, sender) = match tokio::time::timeout_at(deadline, exchange).await {
            Err(_) => return Some(Report::Timeout),
            Ok(Err(report)) => return report,
            Ok(Ok(answered)) => answered,
        };
        let code = response.status().as_u16();
        let retry_after = response
            .headers()
            .get(header::RETRY_AFTER)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| outcome::retry_after(value, clock::wall()));
        recycle(Arc::clone(target), response, sender, deadline);
        Some(Report::Status { code, retry_after })
    }

    async fn exchange(
        &self,
        target: &Target,
        push: &Push,
        may_send: impl FnOnce() -> bool,
    ) -> Result<(Response<Incoming>, SendRequest<Full<Bytes>>), Option<Report>> {
        let (mut sender, is_reused) = match target.take_idle() {
            Some(sender) => (sender, true),
            None => (self.connect(target.endpoint.url.uri()).await.map_err(Some)?, false),
        };
        let request = self.request(target, push).map_err(Some)?;
        if !may_send() {
            target.give_back(sender);
            return Err(None);
        }
        match sender.send_request(request).await {
            Ok(response) => Ok((response, sender)),
            // Closed by the receiver while it was idle: nothing came of an answer.
            Err(error) if is_reused && !error.is_parse() => {
                target.forget_idle();
                Err(Some(Report::StaleConnection))
            }
            Err(_) => Err(Some(Report::Io)),
        }
    }

    async fn connect(&self, uri: &Uri) -> Result<SendRequest<Full<Bytes>>, Report> {
        let mut connector = self.connector.clone();
        let stream = connector.call(uri.clone()).await.map_err(|error| {
            let is_dial = error
                .downcast_ref::<io::Error>()
                .and_then(io::Error::get_ref)
                .is_some_and(|inner| inner.is::<DialError>())
                || error.is::<DialError>();
            if is_dial {
                Report::Connect
            } else {
                tracing::debug!(host = uri.host(), %error, "no TLS session");
                Report::Tls
            }
        })?;
        let (sender, connection) = hyper::client::conn::http1::Builder::new()
            .max_headers(HEADERS_MAX)
            .max_buf_size(HEAD_MAX)
            .handshake(stream)
            .await
            .map_err(|_| Report::Io)?;
        // Ends when the sender is dropped or the peer closes.
        tokio::spawn(connection);
        Ok(sender)
    }

    fn request(&self, target: &Target, push: &Push) -> Result<Request<Full<Bytes>>, Report> {
        let endpoint = &target.endpoint;
        let uri = endpoint.url.uri();
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let timestamp = clock::wall().as_secs();
        let mut headers = HeaderMap::new();
        let text = |text: String| HeaderValue::try_from(text).map_err(|_| Report::Io);
        if let Some(host) = &target.host {
            headers.insert(header::HOST, host.clone());
        }
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(header::USER_AGENT, self.user_agent.clone());
        headers.insert("webhook-id", text(push.id.clone())?);
        headers.insert("webhook-timestamp", HeaderValue::from(timestamp));
        if let Some(keys) = &endpoint.signing {
            headers.insert("webhook-signature", text(keys.sign(&push.id, timestamp, &push.body))?);
        }
        headers.insert("h5push-attempt", HeaderValue::from(push.attempt));
        for (name, value) in &endpoint.headers {
            headers.insert(name, value.clone());
        }
        let mut request = Request::new(Full::new(push.body.clone()));
        *request.method_mut() = hyper::Method::POST;
        *request.uri_mut() = path.parse().map_err(|_| Report::Io)?;
        *request.headers_mut() = headers;
        Ok(request)
    }
}

/// Drains the answer and keeps the connection, or drops both.
fn recycle(
    target: Arc<Target>,
    response: Response<Incoming>,
    sender: SendRequest<Full<Bytes>>,
    deadline: tokio::time::Instant,
) {
    if response.body().is_end_stream() && sender.is_ready() {
        return target.give_back(sender);
    }
    tokio::spawn(async move {
        let mut sender = sender;
        let mut body = Limited::new(response.into_body(), BODY_MAX);
        let drained = tokio::time::timeout_at(deadline, async {
            while let Some(frame) = body.frame().await {
                if frame.is_err() {
                    return false;
                }
            }
            sender.ready().await.is_ok()
        });
        if drained.await == Ok(true) {
            target.give_back(sender);
        }
    });
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
enum DialError {
    #[error("the URL has no host")]
    NoHost,
    #[error("the host has no address")]
    NoAddress,
    #[error("looking the host up: {0}")]
    Lookup(io::Error),
    #[error("connecting: {0}")]
    Connect(io::Error),
}

/// Resolves a host and connects to one of its addresses.
#[derive(Clone)]
struct Dialer {
    lookups: Arc<Semaphore>,
}

impl Service<Uri> for Dialer {
    type Response = TokioIo<TcpStream>;
    type Error = DialError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, DialError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), DialError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let lookups = Arc::clone(&self.lookups);
        Box::pin(async move {
            let host = uri.host().ok_or(DialError::NoHost)?;
            let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
            let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
            let addresses = resolve(host, port, &lookups).await?;
            let mut last = DialError::NoAddress;
            for address in addresses {
                match TcpStream::connect(address).await {
                    Ok(stream) => {
                        stream.set_nodelay(true).map_err(DialError::Connect)?;
                        return Ok(TokioIo::new(stream));
                    }
                    Err(error) => last = DialError::Connect(error),
                }
            }
            Err(last)
        })
    }
}

async fn resolve(host: &str, port: u16, lookups: &Semaphore) -> Result<Vec<SocketAddr>, DialError> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, port)]);
    }
    let _permit = lookups.acquire().await.map_err(|_| DialError::NoAddress)?;
    Ok(tokio::net::lookup_host((host, port)).await.map_err(DialError::Lookup)?.collect())
}
