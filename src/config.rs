//! The config file: as it is written, and as the rest of the program needs it.
//!
//! Every value is checked where it is read, so that an error has its line and column.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use hyper::Uri;
use hyper::header::{HeaderName, HeaderValue};
use ipnet::IpNet;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use crate::domain::endpoint::{EndpointName, Limits};
use crate::domain::retry::Backoff;
use crate::domain::signature::SigningKeys;

/// A text that is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The text, for the one who uses it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Where a listener listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A unix socket.
    Unix(PathBuf),
}

/// A push address.
#[derive(Clone, PartialEq, Eq)]
pub struct PushUrl(Uri);

impl PushUrl {
    /// The whole.
    #[must_use]
    pub fn uri(&self) -> &Uri {
        &self.0
    }

    /// Whether it is `https`.
    #[must_use]
    pub fn is_https(&self) -> bool {
        self.0.scheme() == Some(&hyper::http::uri::Scheme::HTTPS)
    }

    /// For people and logs: without the query.
    #[must_use]
    pub fn shown(&self) -> String {
        let authority = self.0.authority().map_or("", |authority| authority.as_str());
        format!("{}://{authority}{}", self.0.scheme_str().unwrap_or(""), self.0.path())
    }
}

impl fmt::Debug for PushUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown())
    }
}

impl FromStr for PushUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<PushUrl, String> {
        let uri: Uri = text.parse().map_err(|error| format!("not a URL: {error}"))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err("a push address begins with https:// or http://".to_owned());
        }
        if text.contains('#') {
            return Err("a push address has no fragment (`#`)".to_owned());
        }
        match uri.authority() {
            Some(authority) if authority.as_str().contains('@') => {
                Err("a push address has no user name or password: use `headers`".to_owned())
            }
            Some(authority) if !authority.host().is_empty() => Ok(PushUrl(uri)),
            _ => Err("a push address needs a host".to_owned()),
        }
    }
}

fn from_text<'de, D: Deserializer<'de>, T: FromStr>(deserializer: D) -> Result<T, D::Error>
where
    T::Err: fmt::Display,
{
    String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
}

impl<'de> Deserialize<'de> for PushUrl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        from_text(deserializer)
    }
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Listen, String> {
        match text.strip_prefix("unix:") {
            Some(path) if path.starts_with('/') => Ok(Listen::Unix(path.into())),
            Some(_) => Err("the path of a unix socket begins with /".to_owned()),
            None => {
                let address = text.parse();
                address.map(Listen::Tcp).map_err(|_| "not an address: 127.0.0.1:8460, [::1]:8460 or unix:/path".into())
            }
        }
    }
}

impl<'de> Deserialize<'de> for Listen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        from_text(deserializer)
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listen::Tcp(address) => write!(f, "{address}"),
            Listen::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A duration as `"10s"`, `"15m"`, `"24h"`, `"180days"`.
#[derive(Clone, Copy)]
struct Time(Duration);

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let time = humantime::parse_duration(&text)
            .map_err(|error| D::Error::custom(format!("not a duration like \"10s\" or \"24h\": {error}")))?;
        Ok(Time(time))
    }
}

/// A size as `"256KiB"` or a number of bytes.
#[derive(Clone, Copy)]
struct Size(u64);

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Bytes(u64),
            Text(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Bytes(bytes) => Ok(Size(bytes)),
            Written::Text(text) => text
                .parse::<bytesize::ByteSize>()
                .map(|size| Size(size.as_u64()))
                .map_err(|_| D::Error::custom("not a size like \"256KiB\" or a number of bytes")),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct EndpointKey(EndpointName);

impl<'de> Deserialize<'de> for EndpointKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        from_text::<D, EndpointName>(deserializer).map(EndpointKey)
    }
}

/// Rates and other factors: a finite number above 0.
#[derive(Clone, Copy)]
struct Positive(f64);

impl<'de> Deserialize<'de> for Positive {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = f64::deserialize(deserializer)?;
        if number.is_finite() && number > 0.0 {
            Ok(Positive(number))
        } else {
            Err(D::Error::custom("must be a number above 0"))
        }
    }
}

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
table!(EndpointWritten {
    url: PushUrl,
    secret: String,
    secret_file: PathBuf,
    max_events: u64,
    rate_per_second: Positive,
    burst: NonZeroU32,
    concurrency: NonZeroU32,
    headers: BTreeMap<String, String>,
});
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

/// `[local]`.
#[derive(Clone, Debug)]
pub struct Local {
    /// Where it listens.
    pub listen: Listen,
    /// What a caller must know.
    pub token: Option<Secret>,
    /// Host names, beside the loopback ones, under which it answers.
    pub allowed_hosts: Vec<String>,
    /// Mode of a unix socket.
    pub socket_mode: u32,
    /// Group of a unix socket.
    pub socket_group: Option<String>,
    /// Largest request, bytes.
    pub max_body_bytes: usize,
    /// Most connections at once.
    pub max_connections: u32,
}

/// One endpoint.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Its name.
    pub name: EndpointName,
    /// Its address.
    pub url: PushUrl,
    /// Keys that its pushes are signed with.
    pub signing: Option<SigningKeys>,
    /// Rate, burst, concurrency.
    pub limits: Limits,
    /// Most events that wait for it.
    pub max_events: u64,
    /// Headers of its own.
    pub headers: Vec<(HeaderName, HeaderValue)>,
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
    /// Every endpoint.
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
    /// `push.allow_networks`
    pub allow_networks: Vec<IpNet>,
    /// `[backoff]`
    pub backoff: Backoff,
    /// `breaker.failures`
    pub breaker_failures: u32,
    /// `dead_letters.keep`
    pub dead_keep: Duration,
    /// `dead_letters.max`
    pub dead_max: u64,
    /// `tls.extra_ca_file`
    pub extra_ca_file: Option<PathBuf>,
    /// `log.level`
    pub log_level: String,
    /// `log.format`
    pub log_format: LogFormat,
    /// `log.attempts`
    pub log_attempts: bool,
}

const HOUR: Duration = Duration::from_secs(3_600);
/// Largest `local.max_body_bytes`: a request's records go into one segment.
const BODY_BYTES_MAX: u64 = 32 << 20;

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// It cannot be read, or is wrong.
    pub fn read(path: &Path) -> Result<Config, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|error| ConfigError::Unreadable { path: path.to_owned(), error })?;
        Config::parse(&text, path)
    }

    /// Checks a text. `path` is for messages.
    ///
    /// # Errors
    /// It is wrong.
    pub fn parse(text: &str, path: &Path) -> Result<Config, ConfigError> {
        let wrong = |problem: String| ConfigError::Wrong { path: path.to_owned(), problem };
        let file: FileWritten = toml::from_str(text).map_err(|error| wrong(error.to_string()))?;
        file.check().map_err(wrong)
    }
}

impl FileWritten {
    fn check(self) -> Result<Config, String> {
        let push = self.push.unwrap_or_default();
        let outbox = self.outbox.unwrap_or_default();
        let gate = self.gate.unwrap_or_default();
        let backoff = self.backoff.unwrap_or_default();
        let dead_letters = self.dead_letters.unwrap_or_default();
        let metrics = self.metrics.unwrap_or_default();
        let log = self.log.unwrap_or_default();
        let allow_http = push.allow_http.unwrap_or(true);
        let defaults = self.defaults.unwrap_or_default();
        let mut endpoints = BTreeMap::new();
        for (EndpointKey(name), written) in self.endpoints.unwrap_or_default() {
            let endpoint = written.check(name, &defaults, allow_http);
            let endpoint = endpoint.map_err(|problem| format!("endpoints.{name}: {problem}"))?;
            endpoints.insert(name, endpoint);
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
        if log_level.parse::<tracing_subscriber::filter::Targets>().is_err() {
            return Err("log.level: must be error, warn, info, debug or trace".to_owned());
        }
        Ok(Config {
            data_dir: self.data_dir.unwrap_or_else(|| "/var/lib/h5push-relay".into()),
            shutdown_timeout: time(self.shutdown_timeout, Duration::from_secs(15)),
            local: self.local.unwrap_or_default().check()?,
            metrics_listen: metrics.listen.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 9_860))),
            metrics_max_endpoints: metrics.max_endpoints.unwrap_or(1_000),
            max_events: outbox.max_events.unwrap_or(10_000_000),
            max_event_bytes: max_event_bytes as usize,
            min_free_disk: outbox.min_free_disk.map_or(1 << 30, |size| size.0),
            dedupe_window: time(outbox.dedupe_window, 24 * HOUR),
            dedupe_max: outbox.dedupe_max.unwrap_or(1_000_000),
            require_h5push: gate.require_h5push.unwrap_or(true),
            forget_after: positive("gate.forget_after", time(gate.forget_after, 180 * 24 * HOUR))?,
            endpoints,
            timeout: positive("push.timeout", time(push.timeout, Duration::from_secs(10)))?,
            max_messages: push.max_messages.map_or(50, NonZeroU32::get),
            max_bytes: push.max_bytes.map_or(256 << 10, |size| size.0) as usize,
            max_age: time(push.max_age, 24 * HOUR),
            max_attempts: push.max_attempts.unwrap_or(0),
            max_refusals: push.max_refusals.map_or(5, NonZeroU32::get),
            max_in_flight: push.max_in_flight.map_or(4_096, NonZeroU32::get),
            allow_networks: push.allow_networks.unwrap_or_default(),
            backoff: Backoff {
                initial: positive("backoff.initial", time(backoff.initial, Duration::from_secs(1)))?,
                multiplier,
                max: positive("backoff.max", time(backoff.max, Duration::from_secs(300)))?,
                randomization,
            },
            breaker_failures: self.breaker.unwrap_or_default().failures.map_or(10, NonZeroU32::get),
            dead_keep: positive("dead_letters.keep", time(dead_letters.keep, 14 * 24 * HOUR))?,
            dead_max: dead_letters.max.unwrap_or(0),
            extra_ca_file: self.tls.unwrap_or_default().extra_ca_file.map(|path| expand(&path)),
            log_level,
            log_format: log.format.unwrap_or_default(),
            log_attempts: log.attempts.unwrap_or(false),
        })
    }
}

impl LocalWritten {
    fn check(self) -> Result<Local, String> {
        let listen = self.listen.unwrap_or(Listen::Tcp(SocketAddr::from(([127, 0, 0, 1], 8_460))));
        let token = secret("local.token", self.token, self.token_file)?;
        if let Some(token) = &token
            && (token.0.is_empty() || !token.0.bytes().all(|byte| byte.is_ascii_graphic()))
        {
            return Err("local.token: must be visible ASCII characters without spaces".to_owned());
        }
        if let Listen::Tcp(address) = &listen
            && !address.ip().is_loopback()
            && token.is_none()
        {
            return Err(format!("local.listen: {address} is beyond loopback: that needs local.token_file"));
        }
        let mode = self.socket_mode.unwrap_or_else(|| "0660".to_owned());
        let socket_mode = u32::from_str_radix(&mode, 8).ok().filter(|mode| *mode <= 0o777);
        let body = self.max_body_bytes.map_or(8 << 20, |size| size.0);
        if !(1..=BODY_BYTES_MAX).contains(&body) {
            return Err("local.max_body_bytes: must be from 1 to 32MiB".to_owned());
        }
        Ok(Local {
            listen,
            token,
            allowed_hosts: self.allowed_hosts.unwrap_or_default(),
            socket_mode: socket_mode.ok_or("local.socket_mode: must be octal, like \"0660\"")?,
            socket_group: self.socket_group,
            max_body_bytes: body as usize,
            max_connections: self.max_connections.map_or(1_024, NonZeroU32::get),
        })
    }
}

impl EndpointWritten {
    fn check(self, name: EndpointName, defaults: &DefaultsWritten, allow_http: bool) -> Result<Endpoint, String> {
        let url = self.url.ok_or("url is required")?;
        if !allow_http && !url.is_https() {
            return Err("url: http is not allowed (push.allow_http = false)".to_owned());
        }
        let signing = secret("secret", self.secret, self.secret_file)?
            .map(|secret| SigningKeys::parse(secret.expose()).map_err(|error| format!("secret: {error}")))
            .transpose()?;
        let rate = self.rate_per_second.or(defaults.rate_per_second).map_or(100.0, |rate| rate.0);
        let burst = self.burst.or(defaults.burst).map_or((rate / 10.0) as u32, NonZeroU32::get).max(1);
        let concurrency = self.concurrency.or(defaults.concurrency).map_or(32, NonZeroU32::get);
        Ok(Endpoint {
            name,
            url,
            signing,
            limits: Limits { rate_per_second: rate, burst, concurrency },
            max_events: self.max_events.or(defaults.max_events).unwrap_or(1_000_000),
            headers: self.headers.unwrap_or_default().iter().map(header).collect::<Result<_, _>>()?,
        })
    }
}

fn header((name, value): (&String, &String)) -> Result<(HeaderName, HeaderValue), String> {
    let lower = name.to_ascii_lowercase();
    let is_ours = ["host", "transfer-encoding", "connection"].contains(&lower.as_str())
        || lower.starts_with("content-")
        || lower.starts_with("webhook-");
    if is_ours {
        return Err(format!("headers: {name} is set by the relay"));
    }
    let name = HeaderName::try_from(&lower).map_err(|_| format!("headers: {name:?} is no header name"))?;
    let mut value = HeaderValue::try_from(value).map_err(|_| format!("headers: the value of {name} is none"))?;
    value.set_sensitive(true);
    Ok((name, value))
}

/// A secret, inline or from a file, whose last line end does not count.
fn secret(key: &str, inline: Option<String>, file: Option<PathBuf>) -> Result<Option<Secret>, String> {
    match (inline, file) {
        (Some(_), Some(_)) => Err(format!("{key}: give either {key} or {key}_file")),
        (Some(text), None) => Ok(Some(Secret(text))),
        (None, Some(path)) => {
            let path = expand(&path);
            let text =
                std::fs::read_to_string(&path).map_err(|error| format!("{key}_file: {}: {error}", path.display()))?;
            Ok(Some(Secret(text.trim_end_matches(['\r', '\n']).to_owned())))
        }
        (None, None) => Ok(None),
    }
}

/// Puts systemd's credentials directory in.
fn expand(path: &Path) -> PathBuf {
    const VARIABLE: &str = "$CREDENTIALS_DIRECTORY";
    match (path.strip_prefix(VARIABLE), std::env::var_os("CREDENTIALS_DIRECTORY")) {
        (Ok(rest), Some(dir)) => Path::new(&dir).join(rest),
        _ => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("test.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn the_example_shows_every_key_with_its_default() {
        let example = include_str!("../config.example.toml");
        let plain = parse("").unwrap();
        let shown = parse(example).unwrap();
        assert_eq!(format!("{plain:?}"), format!("{shown:?}"), "the example as it is");
        // With what is commented out switched on, it is complete and still right.
        let all: String = example
            .lines()
            .map(|line| line.strip_prefix("#: ").unwrap_or(line))
            .filter(|line| !line.contains("_file"))
            .fold(String::new(), |text, line| text + line + "\n");
        let all = parse(&all).unwrap();
        assert_eq!(all.endpoints.len(), 2);
        for key in KEYS {
            let (table, name) = key.rsplit_once('.').unwrap_or(("", key));
            let at = if table.is_empty() { Some(0) } else { example.find(&format!("[{table}]")) };
            let at = at.unwrap_or_else(|| panic!("no table {table}"));
            assert!(example[at..].contains(&format!("{name} = ")), "{key} is not in the example");
        }
    }

    const KEYS: [&str; 45] = [
        "data_dir",
        "shutdown_timeout",
        "local.listen",
        "local.token",
        "local.token_file",
        "local.allowed_hosts",
        "local.socket_mode",
        "local.socket_group",
        "local.max_body_bytes",
        "local.max_connections",
        "metrics.listen",
        "metrics.max_endpoints",
        "outbox.max_events",
        "outbox.max_event_bytes",
        "outbox.min_free_disk",
        "outbox.dedupe_window",
        "outbox.dedupe_max",
        "gate.require_h5push",
        "gate.forget_after",
        "defaults.max_events",
        "defaults.rate_per_second",
        "defaults.burst",
        "defaults.concurrency",
        "push.timeout",
        "push.max_messages",
        "push.max_bytes",
        "push.max_age",
        "push.max_attempts",
        "push.max_refusals",
        "push.max_in_flight",
        "push.allow_http",
        "push.allow_networks",
        "backoff.initial",
        "backoff.multiplier",
        "backoff.max",
        "backoff.randomization",
        "breaker.failures",
        "dead_letters.keep",
        "dead_letters.max",
        "tls.extra_ca_file",
        "log.level",
        "log.format",
        "log.attempts",
        "endpoints.default.url",
        "endpoints.12.secret",
    ];

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        let table = [
            ("[push]\ntimeot = \"1s\"", "line 2, column 1", "timeot"),
            ("[push]\ntimeout = \"soon\"", "line 2, column 11", "duration"),
            ("[push]\ntimeout = \"0s\"", "", "push.timeout"),
            ("[outbox]\nmin_free_disk = \"1 ton\"", "line 2, column 17", "size"),
            ("[endpoints.0]\nurl = \"http://a/\"", "line 1, column 12", "plugin id"),
            ("[endpoints.12]\nurl = \"ftp://a/\"", "line 2, column 7", "https://"),
            ("[endpoints.12]\nurl = \"http://u:p@a/\"", "line 2, column 7", "user name"),
            ("[endpoints.12]\nurl = \"http://a/#x\"", "line 2, column 7", "fragment"),
            ("[endpoints.12]\nurl = \"/x\"", "line 2, column 7", "https://"),
            ("[endpoints.12]\nrate_per_second = 1", "", "url is required"),
            ("[endpoints.12]\nurl = \"http://a/\"\nrate_per_second = 0", "line 3, column 19", "above 0"),
            ("[endpoints.12]\nurl = \"http://a/\"\nconcurrency = 0", "line 3, column 15", "nonzero"),
            ("[endpoints.12]\nurl = \"http://a/\"\nheaders = { Host = \"x\" }", "", "set by the relay"),
            ("[endpoints.12]\nurl = \"http://a/\"\nsecret = \"abc\"", "", "whsec_"),
            ("[local]\nlisten = \"0.0.0.0:80\"", "", "token_file"),
            ("[local]\nlisten = \"localhost\"", "line 2, column 10", "address"),
            ("[backoff]\nmultiplier = 0.5", "", "at least 1"),
            ("[push]\nallow_http = false\n[endpoints.1]\nurl = \"http://a/\"", "", "not allowed"),
            ("nonsense", "line 1", ""),
        ];
        for (text, place, problem) in table {
            let error = parse(text).unwrap_err();
            assert!(error.starts_with("test.toml: "), "{error}");
            assert!(error.contains(place) && error.contains(problem), "{text}: {error}");
        }
    }

    #[test]
    fn limits_fall_back_to_the_defaults_and_bursts_to_a_tenth_of_the_rate() {
        let config = parse(
            "[defaults]\nrate_per_second = 50\n[endpoints.default]\nurl = \"http://a/\"\n\
             [endpoints.12]\nurl = \"https://b/\"\nrate_per_second = 0.5\nmax_events = 3",
        )
        .unwrap();
        let limits = |name: &str| config.endpoints[&name.parse().unwrap()].limits;
        assert_eq!(limits("default"), Limits { rate_per_second: 50.0, burst: 5, concurrency: 32 });
        assert_eq!(limits("12"), Limits { rate_per_second: 0.5, burst: 1, concurrency: 32 });
        assert_eq!(config.endpoints[&"12".parse().unwrap()].max_events, 3);
    }

    #[test]
    fn secrets_come_from_files_and_are_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        std::fs::write(&path, "s3cret-planted\n").unwrap();
        let config = parse(&format!("[local]\ntoken_file = {path:?}")).unwrap();
        assert_eq!(config.local.token.as_ref().map(Secret::expose), Some("s3cret-planted"));
        assert!(!format!("{config:?}").contains("planted"));
        assert!(parse("[local]\ntoken = \"a\"\ntoken_file = \"/nowhere\"").unwrap_err().contains("either"));
        assert!(parse("[local]\ntoken_file = \"/nowhere\"").unwrap_err().contains("/nowhere"));
    }
}
