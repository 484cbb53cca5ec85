//! One attempt: connect or take a pooled connection, post, read the head, say what was seen.
//!
//! hyper with hyper-rustls, HTTP/1.1, no proxy, no redirects. One deadline covers connecting, TLS, the request and the
//! head of the answer; the body is drained in the background within what is left of it, so that the connection can be
//! used again.

use std::error::Error as _;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::http1::SendRequest;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::rt::Write as _;
use hyper::{Request, Response};
use tower_service::Service;

use super::dialer::dial_error;
use super::target::Target;
use crate::clock;
use crate::domain::endpoint::EndpointName;
use crate::domain::verdict::{self, Report};

/// An answer's body is read up to this, then its connection is dropped.
const BODY_MAX: usize = 64 << 10;
/// A connection may take so long to close.
const GOODBYE_LIMIT: Duration = Duration::from_secs(1);
/// Largest head of an answer, bytes.
const HEAD_MAX: usize = 64 << 10;

static WEBHOOK_ID: HeaderName = HeaderName::from_static("webhook-id");
static WEBHOOK_TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
static WEBHOOK_SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");
static H5PUSH_ATTEMPT: HeaderName = HeaderName::from_static("h5push-attempt");
static USER_AGENT: HeaderValue = HeaderValue::from_static(concat!("h5push-relay/", env!("CARGO_PKG_VERSION")));
/// Headers of a push beside the endpoint's own: these, `host`, `content-type`, `user-agent`, hyper's `content-length`.
const OWN_HEADERS: usize = 8;

/// What was seen of an attempt, and what there is to say of a failure, for people.
#[derive(Debug)]
pub(super) struct Seen {
    /// For the rules.
    pub report: Report,
    /// Never content, a secret, or a URL's query.
    pub detail: Option<String>,
}

impl From<Report> for Seen {
    fn from(report: Report) -> Seen {
        Seen { report, detail: None }
    }
}

/// Which connection an attempt takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Connection {
    /// One that is idle, if there is one.
    Any,
    /// A new one: what breaks that is no accident of a connection kept for long.
    New,
}

/// What is posted.
#[derive(Clone, Debug)]
pub(super) struct Push {
    /// `webhook-id`
    pub id: String,
    /// `h5push-attempt`
    pub attempt: u32,
    /// The body.
    pub body: Bytes,
}

/// Makes one attempt. `may_send` is asked right before the first byte; `None` if it says no. The body is held only
/// until it is written.
pub(super) async fn attempt(
    target: &Arc<Target>,
    push: Push,
    connection: Connection,
    timeout: Duration,
    may_send: impl FnOnce() -> bool,
) -> Option<Seen> {
    let deadline = tokio::time::Instant::now() + timeout;
    let exchange = exchange(target, push, connection, may_send);
    let (response, sender) = match tokio::time::timeout_at(deadline, exchange).await {
        Err(_) => return Some(Report::Timeout.into()),
        Ok(Err(seen)) => return seen,
        Ok(Ok(answered)) => answered,
    };
    let code = response.status().as_u16();
    if target.endpoint.name == EndpointName::SURVEY && response.status().is_success() {
        return Some(survey_answer(target, response, sender, deadline).await);
    }
    let retry_after = response
        .headers()
        .get(header::RETRY_AFTER)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| verdict::retry_after(value, clock::wall()));
    recycle(Arc::clone(target), response, sender, deadline);
    Some(Report::Status { code, retry_after }.into())
}

async fn exchange(
    target: &Target,
    push: Push,
    connection: Connection,
    may_send: impl FnOnce() -> bool,
) -> Result<(Response<Incoming>, SendRequest<Full<Bytes>>), Option<Seen>> {
    let idle = if connection == Connection::Any { target.take_idle() } else { None };
    let (mut sender, is_reused) = match idle {
        Some(sender) => (sender, true),
        None => (connect(target).await.map_err(Some)?, false),
    };
    let request = request(target, push).map_err(|report| Some(report.into()))?;
    if !may_send() {
        target.give_back(sender);
        return Err(None);
    }
    match sender.send_request(request).await {
        Ok(response) => Ok((response, sender)),
        // Closed by the receiver while it was idle: nothing came of an answer.
        Err(error) if is_reused && !error.is_parse() => {
            target.forget_idle();
            Err(Some(Report::StaleConnection.into()))
        }
        Err(error) => Err(Some(broken(&error))),
    }
}

/// What a connection broke with. With TLS 1.3 a receiver says only after the handshake that it wants a certificate.
fn broken(error: &hyper::Error) -> Seen {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<io::Error>());
    let is_tls = cause.and_then(io::Error::get_ref).is_some_and(|inner| inner.is::<rustls::Error>());
    let report = if is_tls { Report::Tls } else { Report::Io };
    let detail = cause.map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"));
    Seen { report, detail: Some(detail) }
}

fn request(target: &Target, push: Push) -> Result<Request<Full<Bytes>>, Report> {
    let endpoint = &target.endpoint;
    let timestamp = clock::wall().as_secs();
    let mut headers = HeaderMap::with_capacity(OWN_HEADERS + endpoint.headers.len());
    let text = |text: String| HeaderValue::try_from(text).map_err(|_| Report::Io);
    if let Some(host) = &target.host {
        headers.insert(header::HOST, host.clone());
    }
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::USER_AGENT, USER_AGENT.clone());
    for (name, value) in &endpoint.headers {
        headers.insert(name, value.clone());
    }
    headers.insert(&WEBHOOK_TIMESTAMP, HeaderValue::from(timestamp));
    if let Some(keys) = &endpoint.signing {
        headers.insert(&WEBHOOK_SIGNATURE, text(keys.sign(&push.id, timestamp, &push.body))?);
    }
    headers.insert(&WEBHOOK_ID, text(push.id)?);
    headers.insert(&H5PUSH_ATTEMPT, HeaderValue::from(push.attempt));
    let mut request = Request::new(Full::new(push.body));
    *request.method_mut() = hyper::Method::POST;
    *request.uri_mut() = target.path.clone();
    *request.headers_mut() = headers;
    Ok(request)
}

async fn connect(target: &Target) -> Result<SendRequest<Full<Bytes>>, Seen> {
    let mut connector = target.connector.clone();
    let stream = connector.call(target.endpoint.url.uri().clone()).await.map_err(|error| {
        let report = match dial_error(&*error) {
            Some(dial) if dial.is_blocked() => Report::BlockedAddress,
            Some(_) => Report::Connect,
            None => Report::Tls,
        };
        Seen { report, detail: Some(error.to_string()) }
    })?;
    let (sender, mut connection) = hyper::client::conn::http1::Builder::new()
        .max_buf_size(HEAD_MAX)
        .handshake(stream)
        .await
        .map_err(|error| Seen { report: Report::Io, detail: Some(error.to_string()) })?;
    // Ends when the sender is dropped or the peer closes. A peer that reads nothing keeps no connection: what is left to
    // be written, TLS's good-bye too, is given a moment.
    tokio::spawn(async move {
        // In its place: a connection with TLS is large, and `without_shutdown` would keep room for it twice.
        if poll_fn(|context| connection.poll_without_shutdown(context)).await.is_ok() {
            let mut stream = connection.into_parts().io;
            let goodbye = poll_fn(|context| Pin::new(&mut stream).poll_shutdown(context));
            drop(tokio::time::timeout(GOODBYE_LIMIT, goodbye).await);
        }
    });
    Ok(sender)
}

/// What the IM server says to a survey: its body has a code.
async fn survey_answer(
    target: &Arc<Target>,
    response: Response<Incoming>,
    mut sender: SendRequest<Full<Bytes>>,
    deadline: tokio::time::Instant,
) -> Seen {
    let status = response.status().as_u16();
    let mut body = response.into_body();
    let mut text = Vec::new();
    let read = tokio::time::timeout_at(deadline, async {
        // A body that is longer has no code.
        while text.len() <= BODY_MAX {
            match body.frame().await {
                Some(Ok(frame)) => text.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new())),
                Some(Err(error)) => return Err(error.to_string()),
                None => break,
            }
        }
        Ok(())
    });
    match read.await {
        Err(_) => return Report::Timeout.into(),
        Ok(Err(error)) => return Seen { report: Report::Io, detail: Some(error) },
        Ok(Ok(())) => {}
    }
    drop(body);
    // An IM server that answers before it has read the request may never read the rest.
    if let Ok(Ok(())) = tokio::time::timeout_at(deadline, sender.ready()).await {
        target.give_back(sender);
    }
    Report::survey(status, &text).into()
}

/// Drains the answer and keeps the connection, or drops both: where it may not be kept, at once.
fn recycle(
    target: Arc<Target>,
    response: Response<Incoming>,
    sender: SendRequest<Full<Bytes>>,
    deadline: tokio::time::Instant,
) {
    if response.body().is_end_stream() && sender.is_ready() {
        return target.give_back(sender);
    }
    let Some(permits) = target.permits() else { return };
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
            target.keep(sender, permits);
        }
    });
}
