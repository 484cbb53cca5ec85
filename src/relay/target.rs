//! An endpoint as the deliverer uses it: its config, how to connect to it, and its idle connections, which go with it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::Uri;
use hyper::client::conn::http1::SendRequest;
use hyper::header::HeaderValue;
use hyper_rustls::HttpsConnector;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::dialer::Dialer;
use crate::clock;
use crate::config::{Endpoint, UrlRule};

/// How long a connection is kept idle: receivers commonly close them after 60 s or more.
const IDLE_LIMIT: Duration = Duration::from_secs(30);

/// The endpoint.
pub struct Target {
    /// As configured.
    pub endpoint: Endpoint,
    pub(super) rule: Arc<UrlRule>,
    pub(super) connector: HttpsConnector<Dialer>,
    pub(super) host: Option<HeaderValue>,
    /// Path and query of its URL.
    pub(super) path: Uri,
    pub(super) idle: Mutex<Vec<Idle>>,
    /// For connections that are kept: of this endpoint, and of all.
    pub(super) may_keep: [Arc<Semaphore>; 2],
}

#[derive(Debug)]
pub(super) struct Idle {
    sender: SendRequest<Full<Bytes>>,
    since: Instant,
    _permits: Permits,
}

/// The right to keep a connection after its attempt.
pub(super) type Permits = [OwnedSemaphorePermit; 2];

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Target({})", self.endpoint.name)
    }
}

impl Target {
    /// What a connection is kept by. Over all endpoints they are bounded too: descriptors are left for attempts and
    /// callers.
    pub(super) fn permits(&self) -> Option<Permits> {
        let [own, all] = &self.may_keep;
        Some([Arc::clone(own).try_acquire_owned().ok()?, Arc::clone(all).try_acquire_owned().ok()?])
    }

    pub(super) fn take_idle(&self) -> Option<SendRequest<Full<Bytes>>> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(found) = idle.pop() {
            if found.sender.is_ready() && found.since.elapsed() < IDLE_LIMIT {
                return Some(found.sender);
            }
        }
        None
    }

    pub(super) fn give_back(&self, sender: SendRequest<Full<Bytes>>) {
        if let Some(permits) = self.permits() {
            self.keep(sender, permits);
        }
    }

    pub(super) fn keep(&self, sender: SendRequest<Full<Bytes>>, permits: Permits) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if !sender.is_closed() {
            idle.push(Idle { sender, since: clock::now(), _permits: permits });
        }
    }

    /// Closes connections that have been idle for long. Says whether any is left.
    pub fn reap(&self) -> bool {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|idle| !idle.sender.is_closed() && idle.since.elapsed() < IDLE_LIMIT);
        !idle.is_empty()
    }

    pub(super) fn forget_idle(&self) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}
