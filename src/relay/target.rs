//! An endpoint as delivery uses it: its config, how to connect to it, and its idle connections, which go with it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::Uri;
use hyper::client::conn::http1::SendRequest;
use hyper::header::HeaderValue;
use hyper_rustls::HttpsConnector;
use rustls::pki_types::CertificateDer;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::dialer::Dialer;
use super::resolver::Resolver;
use crate::clock;
use crate::config::{Endpoint, UrlRule};
use crate::domain::endpoint::EndpointName;

/// Most connections that are kept, over all endpoints: each takes some 40 KB.
const KEPT_MAX: usize = 1_024;
/// How long a connection is kept idle: receivers commonly close them after 60 s or more.
const IDLE_LIMIT: Duration = Duration::from_secs(30);

/// An endpoint to deliver to.
pub(super) struct Target {
    /// As configured.
    pub endpoint: Endpoint,
    pub(super) rule: Arc<UrlRule>,
    pub(super) connector: HttpsConnector<Dialer>,
    pub(super) host: Option<HeaderValue>,
    /// Path and query of its URL.
    pub(super) path: Uri,
    idle: Mutex<Vec<Idle>>,
    /// For connections that are kept: of this endpoint, and of all.
    may_keep: [Arc<Semaphore>; 2],
}

#[derive(Debug)]
struct Idle {
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
    pub(super) fn reap(&self) -> bool {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|idle| !idle.sender.is_closed() && idle.since.elapsed() < IDLE_LIMIT);
        !idle.is_empty()
    }

    pub(super) fn forget_idle(&self) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// What it takes to reach receivers, shared by all targets: trusted certificates, what is known of names, room for
/// connections that are kept.
pub struct Network {
    tls: Arc<rustls::ClientConfig>,
    resolver: Arc<Resolver>,
    may_keep: Arc<Semaphore>,
}

impl std::fmt::Debug for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Network")
    }
}

impl Network {
    /// Trusts the system's certificates and these. For later pushes at most as many connections are kept, over all
    /// targets, as attempts may be in flight, and no more than 1,024.
    ///
    /// # Errors
    /// A certificate is of no use.
    pub fn new(extra_ca: &[CertificateDer<'static>], max_in_flight: u32) -> Result<Network, rustls::Error> {
        let mut roots = rustls::RootCertStore::empty();
        let native = rustls_native_certs::load_native_certs();
        for error in &native.errors {
            tracing::warn!(%error, "a trusted certificate of the system cannot be read");
        }
        let (usable, unusable) = roots.add_parsable_certificates(native.certs);
        tracing::debug!(usable, unusable, "trusted certificates of the system");
        for cert in extra_ca {
            roots.add(cert.clone())?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let may_keep = Arc::new(Semaphore::new(KEPT_MAX.min(max_in_flight as usize)));
        Ok(Network { tls: Arc::new(tls), resolver: Arc::new(Resolver::system()), may_keep })
    }

    /// With what another one knows of names: a reload forgets no address, nor the look-ups that hang.
    #[must_use]
    pub(super) fn with_names_of(self, other: &Network) -> Network {
        Network { resolver: Arc::clone(&other.resolver), ..self }
    }

    /// A target without connections. Those of an old one go when it is dropped, and with them the rule they were made
    /// under.
    #[must_use]
    pub(super) fn target(&self, endpoint: Endpoint, rule: &Arc<UrlRule>) -> Target {
        let authority = endpoint.url.uri().authority().map(|authority| authority.as_str().to_owned());
        let host = authority.and_then(|authority| HeaderValue::try_from(authority).ok());
        let path = endpoint.url.uri().path_and_query().cloned().map_or_else(Uri::default, Uri::from);
        let mut tls = (*self.tls).clone();
        if let Some(cert) = &endpoint.client_cert {
            tls.client_auth_cert_resolver = Arc::new(rustls::sign::SingleCertAndKey::from(Arc::clone(&cert.0)));
            tls.resumption = rustls::client::Resumption::default();
        }
        // The IM server's own address is the operator's, wherever it is.
        let rule = if endpoint.name == EndpointName::SURVEY { Arc::new(UrlRule::any()) } else { Arc::clone(rule) };
        let connector = hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(Dialer { resolver: Arc::clone(&self.resolver), rule: Arc::clone(&rule) });
        let own = Arc::new(Semaphore::new(endpoint.limits.concurrency as usize));
        let may_keep = [own, Arc::clone(&self.may_keep)];
        Target { endpoint, rule, connector, host, path, idle: Mutex::new(Vec::new()), may_keep }
    }
}
