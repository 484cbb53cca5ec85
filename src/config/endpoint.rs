//! One endpoint: as the config file or a call writes it, and as the relay uses it.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hyper::header::{HeaderName, HeaderValue};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use serde::{Deserialize, Deserializer, Serialize};

use super::values::{Positive, PushUrl};
use super::{DefaultsWritten, Files, expand};
use crate::domain::address::{self, AddressRule};
use crate::domain::endpoint::{EndpointName, Limits};
use crate::domain::signature::SigningKeys;

/// Every endpoint by name; `None`: an API entry says that there is no push for this plugin, whatever the default is.
pub type Endpoints = BTreeMap<EndpointName, Option<Endpoint>>;

/// Who defined an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The config file.
    Config,
    /// `PUT /v1/endpoints/{name}`.
    Api,
}

/// One endpoint.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Its name.
    pub name: EndpointName,
    /// Its address.
    pub url: PushUrl,
    /// Who defined it.
    pub source: Source,
    /// Keys that its pushes are signed with.
    pub signing: Option<SigningKeys>,
    /// Rate, burst, concurrency.
    pub limits: Limits,
    /// Most events that wait for it.
    pub max_events: u64,
    /// Headers of its own.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// What it shows of itself in TLS.
    pub client_cert: Option<ClientCert>,
}

impl Endpoint {
    /// Whether its pushes go to the same address as the other's, and are the same in all that goes with them.
    #[must_use]
    pub fn is_same_receiver(&self, other: &Endpoint) -> bool {
        // Keys are not to be looked at: the same ones sign the same.
        let signed = |endpoint: &Endpoint| endpoint.signing.as_ref().map(|keys| keys.sign("", 0, b""));
        let cert = |endpoint: &Endpoint| endpoint.client_cert.as_ref().map(|cert| Arc::as_ptr(&cert.0));
        self.url == other.url
            && self.headers == other.headers
            && signed(self) == signed(other)
            && cert(self) == cert(other)
    }
}

/// A client certificate with its key.
#[derive(Clone)]
pub struct ClientCert(pub Arc<CertifiedKey>);

impl fmt::Debug for ClientCert {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientCert(…)")
    }
}

/// What an endpoint has where it says nothing itself (`[defaults]`).
#[derive(Clone, Debug, PartialEq)]
pub struct Defaults {
    rate_per_second: f64,
    burst: Option<u32>,
    concurrency: u32,
    max_events: u64,
}

impl Defaults {
    pub(super) fn new(written: &DefaultsWritten) -> Defaults {
        Defaults {
            rate_per_second: written.rate_per_second.map_or(100.0, |rate| rate.0),
            burst: written.burst.map(NonZeroU32::get),
            concurrency: written.concurrency.map_or(32, NonZeroU32::get),
            max_events: written.max_events.unwrap_or(1_000_000),
        }
    }

    fn limits(&self, rate: Option<f64>, burst: Option<u32>, concurrency: Option<u32>) -> Limits {
        let rate_per_second = rate.unwrap_or(self.rate_per_second);
        let burst = burst.or(self.burst).unwrap_or((rate_per_second / 10.0) as u32).max(1);
        Limits { rate_per_second, burst, concurrency: concurrency.unwrap_or(self.concurrency) }
    }

    /// The endpoint that surveys go to.
    pub(super) fn survey(&self, url: PushUrl) -> Endpoint {
        Endpoint {
            name: EndpointName::SURVEY,
            url,
            source: Source::Config,
            signing: None,
            limits: self.limits(None, None, None),
            max_events: self.max_events,
            headers: Vec::new(),
            client_cert: None,
        }
    }
}

/// `[endpoints.NAME]` as written.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct EndpointWritten {
    url: Option<PushUrl>,
    secret: Option<String>,
    secret_file: Option<PathBuf>,
    max_events: Option<u64>,
    rate_per_second: Option<Positive>,
    burst: Option<NonZeroU32>,
    concurrency: Option<NonZeroU32>,
    headers: Option<BTreeMap<String, String>>,
    client_cert_file: Option<PathBuf>,
    client_key_file: Option<PathBuf>,
}

impl EndpointWritten {
    pub(super) fn check(
        self,
        name: EndpointName,
        defaults: &Defaults,
        rule: &UrlRule,
        files: &mut Files,
    ) -> Result<Endpoint, String> {
        let url = self.url.ok_or("url is required")?;
        rule.check_scheme(&url)?;
        let signing = files.secret("secret", self.secret, self.secret_file)?;
        let signing = signing.map(|secret| signing_keys(secret.expose())).transpose()?;
        let client_cert = match (self.client_cert_file, self.client_key_file) {
            (Some(cert), Some(key)) => Some(client_cert(&expand(&cert), &expand(&key), files)?),
            (None, None) => None,
            _ => return Err("client_cert_file and client_key_file go together".to_owned()),
        };
        let rate = self.rate_per_second.map(|rate| rate.0);
        Ok(Endpoint {
            name,
            url,
            source: Source::Config,
            signing,
            limits: defaults.limits(rate, self.burst.map(NonZeroU32::get), self.concurrency.map(NonZeroU32::get)),
            max_events: self.max_events.unwrap_or(defaults.max_events),
            headers: self.headers.unwrap_or_default().iter().map(header).collect::<Result<_, _>>()?,
            client_cert,
        })
    }
}

/// An entry of `PUT /v1/endpoints/{name}`, as it is stored.
#[derive(Clone, Default, Serialize, Deserialize)]
pub struct Entry {
    url: Option<String>,
    /// `None`: that of the config file, if there is one; `Some(None)`: none.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    secret: Option<Option<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rate_per_second: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    burst: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    concurrency: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    headers: Option<BTreeMap<String, String>>,
}

/// The call's body: `None` is absent, `Some(None)` is null.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Put {
    #[serde(default, deserialize_with = "given")]
    url: Option<Option<String>>,
    #[serde(default, deserialize_with = "given")]
    secret: Option<Option<String>>,
    rate_per_second: Option<f64>,
    burst: Option<u32>,
    concurrency: Option<u32>,
    headers: Option<BTreeMap<String, String>>,
}

fn given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<String>>, D::Error> {
    Option::<String>::deserialize(deserializer).map(Some)
}

impl Entry {
    /// Reads the body of a call. A `secret` that is left out is the one of the entry before, or of the config file.
    ///
    /// # Errors
    /// What is wrong, beginning with the field.
    pub fn put(
        body: &[u8],
        before: Option<&Entry>,
        name: EndpointName,
        defaults: &Defaults,
        rule: &UrlRule,
    ) -> Result<Entry, String> {
        let put: Put = crate::json::object(body)?;
        let url = put.url.ok_or("url: is required; null means no push for this plugin")?;
        let kept = before.and_then(|before| before.secret.clone());
        let entry = Entry {
            url,
            secret: put.secret.or(kept),
            rate_per_second: put.rate_per_second,
            burst: put.burst,
            concurrency: put.concurrency,
            headers: put.headers,
        };
        if let Some(endpoint) = entry.endpoint(name, defaults, None)? {
            rule.check(&endpoint.url)?;
        }
        Ok(entry)
    }

    /// What it comes to over the config file's endpoint of that name: an endpoint, or no push.
    ///
    /// # Errors
    /// What is wrong, beginning with the field.
    pub fn endpoint(
        &self,
        name: EndpointName,
        defaults: &Defaults,
        file: Option<&Endpoint>,
    ) -> Result<Option<Endpoint>, String> {
        let rate = self.rate_per_second;
        if rate.is_some_and(|rate| !rate.is_finite() || rate <= 0.0) {
            return Err("rate_per_second: must be a number above 0".to_owned());
        }
        if self.burst == Some(0) {
            return Err("burst: must be at least 1".to_owned());
        }
        if self.concurrency == Some(0) {
            return Err("concurrency: must be at least 1".to_owned());
        }
        let signing = match &self.secret {
            Some(secret) => secret.as_deref().map(signing_keys).transpose()?,
            None => file.and_then(|file| file.signing.clone()),
        };
        let headers = self.headers.iter().flatten().map(header).collect::<Result<_, _>>()?;
        let Some(url) = &self.url else { return Ok(None) };
        Ok(Some(Endpoint {
            name,
            url: url.parse().map_err(|problem| format!("url: {problem}"))?,
            source: Source::Api,
            signing,
            limits: defaults.limits(rate, self.burst, self.concurrency),
            max_events: defaults.max_events,
            headers,
            client_cert: None,
        }))
    }

    /// As it is stored.
    ///
    /// # Errors
    /// It is longer than a setting may be.
    pub fn to_text(&self) -> Result<String, String> {
        let text = serde_json::to_string(self).map_err(|error| error.to_string())?;
        let max = crate::domain::endpoint::ENTRY_BYTES_MAX;
        if text.len() > max { Err(format!("body: must be at most {max} bytes as stored")) } else { Ok(text) }
    }

    /// Reads what [`Entry::to_text`] wrote; `None` when it is nothing of that kind.
    #[must_use]
    pub fn from_text(text: &str) -> Option<Entry> {
        serde_json::from_str(text).ok()
    }
}

/// Which push addresses may be used at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UrlRule {
    /// `push.allow_http`
    pub allow_http: bool,
    /// Which addresses may be connected to.
    pub addresses: AddressRule,
}

impl UrlRule {
    /// For the operator's own addresses.
    #[must_use]
    pub fn any() -> UrlRule {
        UrlRule { allow_http: true, addresses: AddressRule::any() }
    }

    fn check_scheme(&self, url: &PushUrl) -> Result<(), String> {
        if self.allow_http || url.is_https() {
            return Ok(());
        }
        Err("url: http is not allowed (push.allow_http = false)".to_owned())
    }

    /// Whether a URL may be used, as far as it says itself: names are judged when they are resolved.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self, url: &PushUrl) -> Result<(), String> {
        self.check_scheme(url)?;
        match url.uri().host().and_then(address::literal) {
            Some(address) if !self.addresses.permits(address) => {
                Err(format!("url: {address} is no public address, nor in push.allow_networks"))
            }
            Some(_) | None => Ok(()),
        }
    }
}

fn signing_keys(text: &str) -> Result<SigningKeys, String> {
    SigningKeys::parse(text).map_err(|error| format!("secret: {error}"))
}

fn client_cert(cert: &Path, key: &Path, files: &mut Files) -> Result<ClientCert, String> {
    let (certs, key) = certificate("client_cert_file", cert, "client_key_file", key, files)?;
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let certified = CertifiedKey::from_der(certs, key, &provider);
    certified.map(|certified| ClientCert(Arc::new(certified))).map_err(|error| format!("client_key_file: {error}"))
}

/// Reads a certificate chain and its key.
pub(super) fn certificate(
    cert_name: &str,
    cert: &Path,
    key_name: &str,
    key: &Path,
    files: &mut Files,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), String> {
    let certs = certificates(cert_name, cert)?;
    files.note_mode(key);
    let key = PrivateKeyDer::from_pem_file(key).map_err(|error| format!("{key_name}: {}: {error}", key.display()))?;
    Ok((certs, key))
}

/// Reads certificates, at least one.
pub(super) fn certificates(name: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let wrong = |problem: String| format!("{name}: {}: {problem}", path.display());
    let certs = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| wrong(error.to_string()))?;
    if certs.is_empty() { Err(wrong("holds no certificate".to_owned())) } else { Ok(certs) }
}

/// Reads the certificates of authorities that are trusted.
pub(super) fn authorities(name: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let certs = certificates(name, path)?;
    let mut roots = rustls::RootCertStore::empty();
    for cert in &certs {
        roots.add(cert.clone()).map_err(|error| format!("{name}: {}: {error}", path.display()))?;
    }
    Ok(certs)
}

fn header((name, value): (&String, &String)) -> Result<(HeaderName, HeaderValue), String> {
    let lower = name.to_ascii_lowercase();
    let is_ours = ["host", "transfer-encoding", "connection"].contains(&lower.as_str())
        || lower.starts_with("content-")
        || lower.starts_with("webhook-");
    if is_ours {
        return Err(format!("headers: {name} is set by the relay"));
    }
    let name = HeaderName::try_from(&lower).map_err(|_| "headers: a name is no header name".to_owned())?;
    let mut value = HeaderValue::try_from(value).map_err(|_| format!("headers: the value of {name} is none"))?;
    value.set_sensitive(true);
    Ok((name, value))
}
