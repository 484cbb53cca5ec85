//! From a URL to a connection: resolve, filter, connect to the very address that was checked.
//!
//! hyper-util's connector with a filtering resolver would not do: it does not ask the resolver about literals. Here
//! every address passes the rule, wherever it came from, so that a name whose answer changes has nothing to win.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use hyper::Uri;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::{OnceCell, Semaphore};
use tower_service::Service;

use crate::clock;
use crate::config::UrlRule;

/// Look-ups at once: they hold a thread each and cannot be cancelled.
const LOOKUPS_MAX: usize = 32;
/// How long a look-up may take.
const LOOKUP_LIMIT: Duration = Duration::from_secs(5);
/// How long an answer, and a failure, is good for.
const KNOWN_FOR: Duration = Duration::from_secs(30);
const UNKNOWN_FOR: Duration = Duration::from_secs(5);
/// Names beyond which old answers are looked through.
const NAMES_MAX: usize = 4_096;
/// How long one of several addresses may take before the next has its turn.
const ADDRESS_LIMIT: Duration = Duration::from_secs(3);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    #[error("the URL has no host")]
    NoHost,
    #[error("http is not allowed (push.allow_http = false)")]
    HttpForbidden,
    #[error("{0} is no public address, nor in push.allow_networks")]
    Forbidden(IpAddr),
    #[error("looking the host up: {0}")]
    Lookup(String),
    #[error("connecting: {0}")]
    Connect(io::Error),
}

impl DialError {
    /// Whether a rule of ours is in the way, not the network.
    pub(super) fn is_blocked(&self) -> bool {
        match self {
            DialError::HttpForbidden | DialError::Forbidden(_) => true,
            DialError::NoHost | DialError::Lookup(_) | DialError::Connect(_) => false,
        }
    }
}

type Looked = Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send>>;

/// Resolves names: one look-up at a time for each, a few in all, the answers kept for a while.
pub(super) struct Resolver {
    look_up: Box<dyn Fn(String) -> Looked + Send + Sync>,
    permits: Semaphore,
    names: Mutex<HashMap<String, Arc<OnceCell<Answer>>>>,
}

struct Answer {
    at: Instant,
    addresses: Result<Vec<IpAddr>, String>,
}

impl Answer {
    fn is_old(&self) -> bool {
        let limit = if self.addresses.is_ok() { KNOWN_FOR } else { UNKNOWN_FOR };
        self.at.elapsed() >= limit
    }
}

impl Resolver {
    /// As this host resolves names.
    pub(super) fn system() -> Resolver {
        Resolver::new(|host| {
            Box::pin(async move {
                let found = tokio::net::lookup_host((host, 0)).await?;
                Ok(found.map(|address| address.ip()).collect())
            })
        })
    }

    fn new(look_up: impl Fn(String) -> Looked + Send + Sync + 'static) -> Resolver {
        let (look_up, names) = (Box::new(look_up), Mutex::new(HashMap::new()));
        Resolver { look_up, permits: Semaphore::new(LOOKUPS_MAX), names }
    }

    async fn resolve(&self, host: &str) -> Result<Vec<IpAddr>, DialError> {
        if let Ok(address) = host.parse() {
            return Ok(vec![address]);
        }
        let cell = self.cell(host);
        let answer = cell.get_or_init(|| self.ask(host)).await;
        answer.addresses.clone().map_err(DialError::Lookup)
    }

    fn cell(&self, host: &str) -> Arc<OnceCell<Answer>> {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        if names.len() >= NAMES_MAX {
            names.retain(|_, cell| cell.get().is_none_or(|answer| !answer.is_old()));
        }
        let cell = names.entry(host.to_owned()).or_default();
        if cell.get().is_some_and(Answer::is_old) {
            *cell = Arc::default();
        }
        Arc::clone(cell)
    }

    async fn ask(&self, host: &str) -> Answer {
        let look_up = async {
            let _permit = self.permits.acquire().await.map_err(io::Error::other)?;
            (self.look_up)(host.to_owned()).await
        };
        let addresses = match tokio::time::timeout(LOOKUP_LIMIT, look_up).await {
            Ok(Ok(addresses)) if addresses.is_empty() => Err("the host has no address".to_owned()),
            Ok(found) => found.map_err(|error| error.to_string()),
            Err(_) => Err(format!("no answer within {} s", LOOKUP_LIMIT.as_secs())),
        };
        Answer { at: clock::now(), addresses }
    }
}

/// Connects to the addresses of a host that the rule permits.
#[derive(Clone)]
pub(super) struct Dialer {
    pub resolver: Arc<Resolver>,
    pub rule: Arc<UrlRule>,
}

impl Dialer {
    async fn dial(self, uri: Uri) -> Result<TcpStream, DialError> {
        let host = uri.host().ok_or(DialError::NoHost)?;
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let is_https = uri.scheme_str() == Some("https");
        if !is_https && !self.rule.allow_http {
            return Err(DialError::HttpForbidden);
        }
        let port = uri.port_u16().unwrap_or(if is_https { 443 } else { 80 });
        let found = self.resolver.resolve(host).await?;
        let (permitted, forbidden): (Vec<IpAddr>, Vec<IpAddr>) =
            found.into_iter().partition(|address| self.rule.addresses.permits(*address));
        let Some((last, others)) = permitted.split_last() else {
            return Err(forbidden.first().copied().map_or(DialError::NoHost, DialError::Forbidden));
        };
        for address in others {
            let connecting = TcpStream::connect(SocketAddr::new(*address, port));
            if let Ok(Ok(stream)) = tokio::time::timeout(ADDRESS_LIMIT, connecting).await {
                return Ok(stream);
            }
        }
        TcpStream::connect(SocketAddr::new(*last, port)).await.map_err(DialError::Connect)
    }
}

impl Service<Uri> for Dialer {
    type Response = TokioIo<TcpStream>;
    type Error = DialError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, DialError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), DialError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let dialer = self.clone();
        Box::pin(async move {
            let stream = dialer.dial(uri).await?;
            stream.set_nodelay(true).map_err(DialError::Connect)?;
            Ok(TokioIo::new(stream))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::domain::address::AddressRule;

    fn dialer(
        allowed: &[&str],
        look_up: impl Fn(usize) -> io::Result<Vec<IpAddr>> + Send + Sync + 'static,
    ) -> (Dialer, Arc<AtomicUsize>) {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let resolver = Resolver::new(move |_| {
            let answer = look_up(count.fetch_add(1, Ordering::SeqCst));
            Box::pin(async move { answer })
        });
        let allowed = allowed.iter().map(|net| net.parse().unwrap()).collect();
        let rule = UrlRule { allow_http: true, addresses: AddressRule { allowed } };
        (Dialer { resolver: Arc::new(resolver), rule: Arc::new(rule) }, asked)
    }

    async fn accepted(listener: &tokio::net::TcpListener) -> bool {
        tokio::time::timeout(Duration::from_millis(50), listener.accept()).await.is_ok()
    }

    #[tokio::test]
    async fn a_name_that_comes_to_mean_a_forbidden_address_gets_no_packet_there() {
        let forbidden = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = forbidden.local_addr().unwrap().port();
        // 127.0.0.2 is the allowed one here; nothing listens there.
        let answers = ["127.0.0.2", "127.0.0.1", "127.0.0.2"];
        let (dialer, asked) =
            dialer(&["127.0.0.2/32"], move |count| Ok(vec![answers[count % answers.len()].parse().unwrap()]));
        let uri: Uri = format!("http://rebinding.test:{port}/").parse().unwrap();
        for _ in 0..6 {
            dialer.resolver.names.lock().unwrap().clear();
            dialer.clone().dial(uri.clone()).await.unwrap_err();
        }
        assert_eq!(asked.load(Ordering::SeqCst), 6);
        assert!(!accepted(&forbidden).await, "a connection was made to the forbidden address");
    }

    #[tokio::test]
    async fn of_mixed_answers_only_the_permitted_are_connected_to() {
        let forbidden = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = forbidden.local_addr().unwrap().port();
        let permitted = tokio::net::TcpListener::bind(("127.0.0.3", port)).await.unwrap();
        let both = || Ok(["127.0.0.1", "127.0.0.3"].iter().map(|text| text.parse().unwrap()).collect());
        let (dialer, _) = dialer(&["127.0.0.3/32"], move |_| both());
        let uri: Uri = format!("http://mixed.test:{port}/").parse().unwrap();
        let stream = dialer.dial(uri).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap().ip(), "127.0.0.3".parse::<IpAddr>().unwrap());
        assert!(accepted(&permitted).await && !accepted(&forbidden).await);
    }

    #[tokio::test]
    async fn literals_and_their_disguises_are_filtered_too() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let dialer = Dialer {
            resolver: Arc::new(Resolver::system()),
            rule: Arc::new(UrlRule { allow_http: true, addresses: AddressRule::default() }),
        };
        for host in ["127.0.0.1", "127.1", "2130706433", "0x7f.1", "017700000001", "[::ffff:127.0.0.1]", "localhost"] {
            let uri: Uri = format!("http://{host}:{port}/").parse().unwrap();
            let error = dialer.clone().dial(uri).await.unwrap_err();
            assert!(error.is_blocked(), "{host}: {error}");
        }
        assert!(!accepted(&listener).await);
    }

    #[tokio::test]
    async fn a_name_is_looked_up_once_for_many_and_again_when_it_failed() {
        let (dialer, asked) = dialer(&[], |count| match count {
            0 => Err(io::Error::other("no such name")),
            _ => Ok(vec!["127.0.0.1".parse().unwrap()]),
        });
        let resolver = Arc::clone(&dialer.resolver);
        let (one, two) = tokio::join!(resolver.resolve("a.test"), resolver.resolve("a.test"));
        assert!(matches!((one, two), (Err(DialError::Lookup(_)), Err(DialError::Lookup(_)))));
        assert_eq!(asked.load(Ordering::SeqCst), 1, "one look-up for both, and the failure is kept");
        resolver.names.lock().unwrap().clear();
        assert!(resolver.resolve("a.test").await.is_ok() && resolver.resolve("a.test").await.is_ok());
        assert_eq!(asked.load(Ordering::SeqCst), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_resolver_that_hangs_costs_five_seconds_and_no_more() {
        let resolver = Resolver::new(|_| Box::pin(std::future::pending()));
        let begun = tokio::time::Instant::now();
        assert!(matches!(resolver.resolve("a.test").await, Err(DialError::Lookup(_))));
        assert_eq!(begun.elapsed(), LOOKUP_LIMIT);
    }
}
