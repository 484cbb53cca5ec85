//! `[open_api]`: the listener that the app's own server calls over the network.

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;

use super::local::is_exposed;
use super::values::{Secret, Time};
use super::{Files, endpoint, expand};
use crate::domain::endpoint::Plugin;

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct OpenApiWritten {
    listen: Option<SocketAddr>,
    tls: Option<CertificateWritten>,
    behind_tls_proxy: Option<bool>,
    accounts: Option<Vec<AccountWritten>>,
    rate_limit_per_minute: Option<u32>,
    timestamp_tolerance: Option<Time>,
    max_connections: Option<NonZeroU32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CertificateWritten {
    cert_file: PathBuf,
    key_file: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AccountWritten {
    email: String,
    token: Option<String>,
    token_file: Option<PathBuf>,
    plugins: Option<Vec<u64>>,
}

/// `[open_api]`.
#[derive(Clone, Debug)]
pub struct OpenApi {
    /// Where it listens; off without one.
    pub listen: Option<SocketAddr>,
    /// Something in front of it speaks TLS.
    pub behind_tls_proxy: bool,
    /// Its certificate.
    pub tls: Option<ServerTls>,
    /// Who may call.
    pub accounts: Vec<Account>,
    /// Calls of an account a minute; 0: no limit.
    pub rate_limit_per_minute: u32,
    /// How far a timestamp may be away from now.
    pub timestamp_tolerance: Duration,
    /// Most connections at once.
    pub max_connections: u32,
}

/// A certificate with its key, ready to be served.
#[derive(Clone)]
pub struct ServerTls(pub Arc<rustls::ServerConfig>);

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServerTls(…)")
    }
}

/// Someone who may call.
#[derive(Clone, Debug)]
pub struct Account {
    /// Who.
    pub email: String,
    /// What the calls are signed with.
    pub token: Secret,
    /// The only plugins that the account may ask about; `None`: all.
    pub plugins: Option<Vec<Plugin>>,
}

/// Longest tolerance: nonces are kept for twice as long.
const TOLERANCE_MAX: Duration = Duration::from_secs(24 * 3_600);

impl OpenApiWritten {
    pub(super) fn check(self, files: &mut Files) -> Result<OpenApi, String> {
        let tls = self.tls.map(|written| written.check(files)).transpose()?;
        let mut accounts: Vec<Account> = Vec::new();
        for written in self.accounts.unwrap_or_default() {
            let account = written.check(files)?;
            if accounts.iter().any(|other| other.email == account.email) {
                return Err(format!("open_api.accounts: {} is there twice", account.email));
            }
            accounts.push(account);
        }
        let timestamp_tolerance = self.timestamp_tolerance.map_or(Duration::from_secs(15 * 60), |time| time.0);
        if timestamp_tolerance.is_zero() || timestamp_tolerance > TOLERANCE_MAX {
            return Err("open_api.timestamp_tolerance: must be longer than 0 and at most 24h".to_owned());
        }
        let open_api = OpenApi {
            listen: self.listen,
            behind_tls_proxy: self.behind_tls_proxy == Some(true),
            tls,
            accounts,
            rate_limit_per_minute: self.rate_limit_per_minute.unwrap_or(600),
            timestamp_tolerance,
            max_connections: self.max_connections.map_or(1_024, NonZeroU32::get),
        };
        if let Some(address) = open_api.listen {
            open_api.may_listen_on(address)?;
        }
        Ok(open_api)
    }
}

impl OpenApi {
    /// Whether this may be served at an address (contract §2), which may be another one than `listen`: systemd's.
    ///
    /// # Errors
    /// What it needs.
    pub fn may_listen_on(&self, address: SocketAddr) -> Result<(), String> {
        if is_exposed(address) && self.tls.is_none() && !self.behind_tls_proxy {
            return Err(format!(
                "open_api.listen: {address} is beyond loopback: that needs open_api.tls, \
                 or open_api.behind_tls_proxy = true"
            ));
        }
        Ok(())
    }
}

impl CertificateWritten {
    fn check(&self, files: &mut Files) -> Result<ServerTls, String> {
        let (cert, key) = (expand(&self.cert_file), expand(&self.key_file));
        let (certs, key) =
            endpoint::certificate("open_api.tls.cert_file", &cert, "open_api.tls.key_file", &key, files)?;
        let wrong = |error: rustls::Error| format!("open_api.tls: {error}");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(wrong)?
            .with_no_client_auth()
            .with_single_cert(certs, key)
            .map_err(wrong)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(ServerTls(Arc::new(config)))
    }
}

impl AccountWritten {
    fn check(self, files: &mut Files) -> Result<Account, String> {
        if self.email.is_empty() || self.email.contains('&') {
            return Err("open_api.accounts: email: must not be empty, nor contain &".to_owned());
        }
        let token = files.secret("open_api.accounts.token", self.token, self.token_file)?;
        let token =
            token.ok_or_else(|| format!("open_api.accounts: {}: token or token_file is required", self.email))?;
        if token.expose().is_empty() {
            return Err(format!("open_api.accounts: {}: the token is empty", self.email));
        }
        let plugins = self.plugins.map(|ids| {
            ids.into_iter()
                .map(|id| Plugin::new(id).ok_or_else(|| format!("open_api.accounts: {}: plugins: {id}", self.email)))
                .collect::<Result<Vec<_>, _>>()
        });
        Ok(Account { email: self.email.clone(), token, plugins: plugins.transpose()? })
    }
}
