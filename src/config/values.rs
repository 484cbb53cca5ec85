//! The kinds of values in a config file, each checked where it is read.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use hyper::Uri;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use crate::domain::address;
use crate::domain::endpoint::EndpointName;

/// A text that is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub(super) fn new(text: String) -> Secret {
        Secret(text)
    }

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
            Some(authority) => check_host(authority.as_str(), uri.scheme_str() == Some("https")).map(|()| PushUrl(uri)),
            None => Err("a push address needs a host".to_owned()),
        }
    }
}

/// Host and port as they are connected to: hyper takes a port that is none for the scheme's own.
fn check_host(authority: &str, is_https: bool) -> Result<(), String> {
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (authority, None),
    };
    let is_port =
        |port: &str| port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0);
    if port.is_some_and(|port| !is_port(port)) {
        return Err("a push address has a port from 1 to 65535, or none".to_owned());
    }
    if host.is_empty() {
        return Err("a push address needs a host".to_owned());
    }
    if let Some(address) = host.strip_prefix('[') {
        let address = address.strip_suffix(']').and_then(|address| address.parse::<Ipv6Addr>().ok());
        return address.map(drop).ok_or_else(|| "a push address has no such IPv6 address".to_owned());
    }
    let name = host.strip_suffix('.').unwrap_or(host);
    let labels = || name.split('.');
    // A last label of digits makes it an address (RFC 3696 §2).
    let is_address = labels().next_back().is_some_and(is_number);
    if is_address {
        // TLS knows addresses in their plain form only.
        let address = address::literal(host).filter(|_| !is_https || host.parse::<Ipv4Addr>().is_ok());
        return address.map(drop).ok_or_else(|| "a push address has no such IPv4 address".to_owned());
    }
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    if name.len() > 253 || !labels().all(is_label) {
        return Err("a push address has no such host name".to_owned());
    }
    Ok(())
}

/// As an old resolver reads numbers: decimal, octal, hexadecimal.
fn is_number(label: &str) -> bool {
    let hex = label.strip_prefix("0x").or_else(|| label.strip_prefix("0X"));
    match hex {
        Some(digits) => digits.bytes().all(|byte| byte.is_ascii_hexdigit()),
        None => label.bytes().all(|byte| byte.is_ascii_digit()),
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
            Some(path) if path.len() > UNIX_PATH_MAX => {
                Err(format!("the path of a unix socket has at most {UNIX_PATH_MAX} bytes"))
            }
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

/// Longest path of a unix socket (unix(7)), bytes.
const UNIX_PATH_MAX: usize = 107;
/// Longest duration: what is added to now must still be a time.
const TIME_MAX: Duration = Duration::from_secs(100 * 365 * 24 * 3_600);

/// A duration as `"10s"`, `"15m"`, `"24h"`, `"180days"`.
#[derive(Clone, Copy)]
pub(super) struct Time(pub Duration);

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let time = humantime::parse_duration(&text)
            .map_err(|error| D::Error::custom(format!("not a duration like \"10s\" or \"24h\": {error}")))?;
        if time > TIME_MAX {
            return Err(D::Error::custom("a duration is at most 100 years"));
        }
        Ok(Time(time))
    }
}

/// A size as `"256KiB"` or a number of bytes.
#[derive(Clone, Copy)]
pub(super) struct Size(pub u64);

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
pub(super) struct EndpointKey(pub EndpointName);

impl<'de> Deserialize<'de> for EndpointKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        from_text::<D, EndpointName>(deserializer).map(EndpointKey)
    }
}

/// Rates and other factors: a finite number above 0.
#[derive(Clone, Copy)]
pub(super) struct Positive(pub f64);

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
