//! The config file: as it is written, and as the rest of the program needs it.
//!
//! What is wrong is said with its line and column, and with its key where the file is read as far as that.

mod endpoint;
mod files;
mod local;
mod open_api;
mod problem;
mod values;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use rustls::pki_types::CertificateDer;
use serde::Deserialize;

use self::endpoint::EndpointWritten;
pub use self::endpoint::{ClientCert, Defaults, Endpoint, Endpoints, Entry, Source, UrlRule};
use self::files::{Files, expand};
pub use self::local::Local;
use self::local::{BODY_BYTES_MAX, check_apart};
use self::open_api::OpenApiWritten;
pub use self::open_api::{Account, OpenApi, ServerTls};
use self::values::{EndpointKey, Positive, Size, Time};
pub use self::values::{Listen, PushUrl, Secret};
use crate::domain::address::AddressRule;
use crate::domain::endpoint::EndpointName;
use crate::domain::retry::Backoff;

macro_rules! table {
    ($(#[$doc:meta])* $name:ident { $($key:ident: $kind:ty),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Deserialize, Default)]
        #[serde(deny_unknown_fields, default)]
        struct $name { $($key: Option<$kind>,)* }
    };
}

table!(FileWritten {
    data_dir: PathBuf,
    shutdown_timeout: Time,
    local: LocalWritten,
    metrics: MetricsWritten,
    outbox: OutboxWritten,
    gate: GateWritten,
    defaults: DefaultsWritten,
    endpoints: BTreeMap<EndpointKey, EndpointWritten>,
    push: PushWritten,
    backoff: BackoffWritten,
    breaker: BreakerWritten,
    dead_letters: DeadLettersWritten,
    tls: TlsWritten,
    im_server: ImServerWritten,
    open_api: OpenApiWritten,
    log: LogWritten,
});
table!(LocalWritten {
    listen: Listen,
    token: String,
    token_file: PathBuf,
    allowed_hosts: Vec<String>,
    socket_mode: String,
    socket_group: String,
    max_body_bytes: Size,
    max_connections: NonZeroU32,
});
table!(MetricsWritten { listen: SocketAddr, max_endpoints: usize });
table!(OutboxWritten {
    max_events: u64,
    max_event_bytes: Size,
    min_free_disk: Size,
    dedupe_window: Time,
    dedupe_max: usize,
});
table!(GateWritten { require_h5push: bool, forget_after: Time });
table!(DefaultsWritten { max_events: u64, rate_per_second: Positive, burst: NonZeroU32, concurrency: NonZeroU32 });
table!(ImServerWritten { survey_url: PushUrl });
table!(PushWritten {
    timeout: Time,
    max_messages: NonZeroU32,
    max_bytes: Size,
    max_age: Time,
    max_attempts: u32,
    max_refusals: NonZeroU32,
    max_in_flight: NonZeroU32,
    allow_http: bool,
    allow_networks: Vec<IpNet>,
});
table!(BackoffWritten { initial: Time, multiplier: Positive, max: Time, randomization: f64 });
table!(BreakerWritten { failures: NonZeroU32 });
table!(DeadLettersWritten { keep: Time, max: u64 });
table!(TlsWritten { extra_ca_file: PathBuf });
table!(LogWritten { level: String, format: LogFormat, attempts: bool });

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// journald under systemd, text on a terminal, JSON otherwise.
    #[default]
    Auto,
    /// For people.
    Text,
    /// One object a line.
    Json,
    /// With journald's fields.
    Journald,
}

/// Why a config is no good.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("{}: {error}", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// It is not what it should be; says where.
    #[error("{}: {problem}", .path.display())]
    Wrong {
        /// The file.
        path: PathBuf,
        /// What, with line and column where there are some.
        problem: String,
    },
}

/// The config as needed.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the data is.
    pub data_dir: PathBuf,
    /// How long a stop may take.
    pub shutdown_timeout: Duration,
    /// `[local]`
    pub local: Local,
    /// `metrics.listen`
    pub metrics_listen: SocketAddr,
    /// `metrics.max_endpoints`
    pub metrics_max_endpoints: usize,
    /// `outbox.max_events`
    pub max_events: u64,
    /// `outbox.max_event_bytes`
    pub max_event_bytes: usize,
    /// `outbox.min_free_disk`
    pub min_free_disk: u64,
    /// `outbox.dedupe_window`
    pub dedupe_window: Duration,
    /// `outbox.dedupe_max`
    pub dedupe_max: usize,
    /// `gate.require_h5push`
    pub require_h5push: bool,
    /// `gate.forget_after`
    pub forget_after: Duration,
    /// What endpoints have where they say nothing themselves.
    pub defaults: Defaults,
    /// Every endpoint of the file, with the one that surveys go to.
    pub endpoints: BTreeMap<EndpointName, Endpoint>,
    /// `push.timeout`
    pub timeout: Duration,
    /// `push.max_messages`
    pub max_messages: u32,
    /// `push.max_bytes`
    pub max_bytes: usize,
    /// `push.max_age`
    pub max_age: Duration,
    /// `push.max_attempts`
    pub max_attempts: u32,
    /// `push.max_refusals`
    pub max_refusals: u32,
    /// `push.max_in_flight`
    pub max_in_flight: u32,
    /// `push.allow_http`, `push.allow_networks`
    pub url_rule: UrlRule,
    /// `[backoff]`
    pub backoff: Backoff,
    /// `breaker.failures`
    pub breaker_failures: u32,
    /// `dead_letters.keep`
    pub dead_keep: Duration,
    /// `dead_letters.max`
    pub dead_max: u64,
    /// What `tls.extra_ca_file` has.
    pub extra_ca: Vec<CertificateDer<'static>>,
    /// `[open_api]`
    pub open_api: OpenApi,
    /// Whether nothing stands in the file, not even a comment.
    pub is_empty: bool,
    /// What is not wrong, but not as it should be.
    pub warnings: Vec<String>,
    /// `log.level`
    pub log_level: String,
    /// `log.format`
    pub log_format: LogFormat,
    /// `log.attempts`
    pub log_attempts: bool,
}

const HOUR: Duration = Duration::from_secs(3_600);

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// It cannot be read, or is wrong.
    pub fn read(path: &Path) -> Result<Config, ConfigError> {
        Config::parse(&read_text(path)?, path)
    }

    /// Checks a text. `path` is for messages.
    ///
    /// # Errors
    /// It is wrong.
    pub fn parse(text: &str, path: &Path) -> Result<Config, ConfigError> {
        let wrong = |problem: String| ConfigError::Wrong { path: path.to_owned(), problem };
        let file: FileWritten = toml::from_str(text).map_err(|error| wrong(problem::describe(text, &error)))?;
        let config = file.check().map_err(|problem| wrong(problem::locate(text, &problem)))?;
        Ok(Config { is_empty: text.trim().is_empty(), ..config })
    }

    /// Reads `[local]` alone: who speaks with a relay that runs can do so whatever else is wrong with the file by now.
    ///
    /// # Errors
    /// It cannot be read, or that table is wrong.
    pub fn read_local(path: &Path) -> Result<Local, ConfigError> {
        #[derive(serde::Deserialize)]
        struct LocalOnly {
            #[serde(default)]
            local: LocalWritten,
        }
        let text = read_text(path)?;
        let wrong = |problem: String| ConfigError::Wrong { path: path.to_owned(), problem };
        let file: LocalOnly = toml::from_str(&text).map_err(|error| wrong(problem::describe(&text, &error)))?;
        file.local.check(&mut Files::default()).map_err(|problem| wrong(problem::locate(&text, &problem)))
    }

    /// Which keys differ from those of the config that runs, and are read at the start only.
    #[must_use]
    pub fn needs_restart(&self, started: &Config) -> Vec<&'static str> {
        let (local, was) = (&self.local, &started.local);
        let all = [
            ("data_dir", self.data_dir != started.data_dir),
            ("shutdown_timeout", self.shutdown_timeout != started.shutdown_timeout),
            ("local.listen", local.listen != was.listen),
            ("local.socket_mode", local.socket_mode != was.socket_mode),
            ("local.socket_group", local.socket_group != was.socket_group),
            ("local.max_connections", local.max_connections != was.max_connections),
            ("metrics.listen", self.metrics_listen != started.metrics_listen),
            ("metrics.max_endpoints", self.metrics_max_endpoints != started.metrics_max_endpoints),
            ("outbox.dedupe_window", self.dedupe_window != started.dedupe_window),
            ("outbox.dedupe_max", self.dedupe_max != started.dedupe_max),
            ("gate.forget_after", self.forget_after != started.forget_after),
            ("open_api.listen", self.open_api.listen != started.open_api.listen),
            ("open_api.max_connections", self.open_api.max_connections != started.open_api.max_connections),
            ("dead_letters.keep", self.dead_keep != started.dead_keep),
            ("dead_letters.max", self.dead_max != started.dead_max),
            ("log.format", self.log_format != started.log_format),
        ];
        all.into_iter().filter(|(_, has_changed)| *has_changed).map(|(key, _)| key).collect()
    }

    /// The endpoints that are in effect: those of the file, and over them what calls have set.
    #[must_use]
    pub fn effective(&self, entries: &BTreeMap<EndpointName, Entry>) -> Endpoints {
        let mut all: Endpoints =
            self.endpoints.iter().map(|(name, endpoint)| (*name, Some(endpoint.clone()))).collect();
        for (name, entry) in entries {
            match entry.endpoint(*name, &self.defaults, self.endpoints.get(name)) {
                Ok(endpoint) => drop(all.insert(*name, endpoint)),
                Err(problem) => {
                    tracing::error!(endpoint = %name, problem, "a stored endpoint is of no use: nothing is pushed to it");
                    // Not the file's entry, nor `default`: that may be somebody else's server.
                    all.insert(*name, None);
                }
            }
        }
        all
    }
}

fn read_text(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|error| ConfigError::Unreadable { path: path.to_owned(), error })
}

impl FileWritten {
    fn check(self) -> Result<Config, String> {
        let mut files = Files::default();
        let push = self.push.unwrap_or_default();
        let outbox = self.outbox.unwrap_or_default();
        let gate = self.gate.unwrap_or_default();
        let backoff = self.backoff.unwrap_or_default();
        let dead_letters = self.dead_letters.unwrap_or_default();
        let metrics = self.metrics.unwrap_or_default();
        let log = self.log.unwrap_or_default();
        let allow_http = push.allow_http.unwrap_or(true);
        let defaults = Defaults::new(&self.defaults.unwrap_or_default());
        let url_rule =
            UrlRule { allow_http, addresses: AddressRule { allowed: push.allow_networks.unwrap_or_default() } };
        let mut endpoints = BTreeMap::new();
        for (EndpointKey(name), written) in self.endpoints.unwrap_or_default() {
            let endpoint = written.check(name, &defaults, &url_rule, &mut files);
            let endpoint = endpoint.map_err(|problem| format!("endpoints.{name}: {problem}"))?;
            if let Err(problem) = url_rule.check(&endpoint.url) {
                files.warnings.push(format!("endpoints.{name}: {problem}: no push will reach it"));
            }
            endpoints.insert(name, endpoint);
        }
        if let Some(url) = self.im_server.unwrap_or_default().survey_url {
            endpoints.insert(EndpointName::SURVEY, defaults.survey(url));
        }
        let extra_ca = self.tls.unwrap_or_default().extra_ca_file;
        let extra_ca = extra_ca.map(|path| endpoint::authorities("tls.extra_ca_file", &expand(&path))).transpose()?;
        let local = self.local.unwrap_or_default().check(&mut files)?;
        let open_api = self.open_api.unwrap_or_default().check(&mut files)?;
        let metrics_listen = metrics.listen.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 9_860)));
        check_apart(&local.listen, metrics_listen, open_api.listen)?;
        let data_dir = self.data_dir.unwrap_or_else(|| "/var/lib/h5push-relay".into());
        if data_dir.as_os_str().is_empty() {
            return Err("data_dir: must not be empty".to_owned());
        }
        let time = |written: Option<Time>, default: Duration| written.map_or(default, |time| time.0);
        let positive = |name: &str, time: Duration| {
            if time.is_zero() { Err(format!("{name}: must be longer than 0")) } else { Ok(time) }
        };
        let multiplier = backoff.multiplier.map_or(2.0, |factor| factor.0);
        if multiplier < 1.0 {
            return Err("backoff.multiplier: must be at least 1".to_owned());
        }
        let randomization = backoff.randomization.unwrap_or(0.5);
        if !(0.0..=1.0).contains(&randomization) {
            return Err("backoff.randomization: must be from 0 to 1".to_owned());
        }
        let max_event_bytes = outbox.max_event_bytes.map_or(256 << 10, |size| size.0);
        if !(1..=BODY_BYTES_MAX).contains(&max_event_bytes) {
            return Err("outbox.max_event_bytes: must be from 1 to 32MiB".to_owned());
        }
        let log_level = log.level.unwrap_or_else(|| "info".to_owned());
        if !matches!(log_level.as_str(), "error" | "warn" | "info" | "debug" | "trace") {
            return Err("log.level: must be error, warn, info, debug or trace".to_owned());
        }
        Ok(Config {
            data_dir,
            shutdown_timeout: time(self.shutdown_timeout, Duration::from_secs(15)),
            local,
            metrics_listen,
            metrics_max_endpoints: metrics.max_endpoints.unwrap_or(1_000),
            max_events: outbox.max_events.unwrap_or(10_000_000),
            max_event_bytes: max_event_bytes as usize,
            min_free_disk: outbox.min_free_disk.map_or(1 << 30, |size| size.0),
            dedupe_window: time(outbox.dedupe_window, 24 * HOUR),
            dedupe_max: outbox.dedupe_max.unwrap_or(1_000_000),
            require_h5push: gate.require_h5push.unwrap_or(true),
            forget_after: positive("gate.forget_after", time(gate.forget_after, 180 * 24 * HOUR))?,
            defaults,
            endpoints,
            timeout: positive("push.timeout", time(push.timeout, Duration::from_secs(10)))?,
            max_messages: push.max_messages.map_or(50, NonZeroU32::get),
            max_bytes: push.max_bytes.map_or(256 << 10, |size| size.0) as usize,
            max_age: time(push.max_age, 24 * HOUR),
            max_attempts: push.max_attempts.unwrap_or(0),
            max_refusals: push.max_refusals.map_or(5, NonZeroU32::get),
            max_in_flight: push.max_in_flight.map_or(4_096, NonZeroU32::get),
            url_rule,
            backoff: Backoff {
                initial: positive("backoff.initial", time(backoff.initial, Duration::from_secs(1)))?,
                multiplier,
                max: positive("backoff.max", time(backoff.max, Duration::from_secs(300)))?,
                randomization,
            },
            breaker_failures: self.breaker.unwrap_or_default().failures.map_or(10, NonZeroU32::get),
            dead_keep: positive("dead_letters.keep", time(dead_letters.keep, 14 * 24 * HOUR))?,
            dead_max: dead_letters.max.unwrap_or(0),
            extra_ca: extra_ca.unwrap_or_default(),
            open_api,
            is_empty: false,
            warnings: files.warnings,
            log_level,
            log_format: log.format.unwrap_or_default(),
            log_attempts: log.attempts.unwrap_or(false),
        })
    }
}

#[cfg(test)]
mod tests;
