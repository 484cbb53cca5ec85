//! From a URL to a connection: resolve, filter, connect to the very address that was checked.
//!
//! hyper-util's connector with a filtering resolver would not do: it does not ask the resolver about literals. Here
//! every address passes the rule, wherever it came from, so that a name whose answer changes has nothing to win.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::Uri;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tower_service::Service;

use super::resolver::Resolver;
use crate::config::UrlRule;

/// How long one of several addresses may take at most before the next has its turn.
const ADDRESS_LIMIT: Duration = Duration::from_secs(3);
/// How long all but the last may take together: less than `push.timeout` is by default.
const OTHERS_LIMIT: Duration = Duration::from_secs(6);

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

/// The connector hands on what the dialer said, by itself or in an I/O error; anything else is of TLS.
pub(super) fn dial_error<'a>(error: &'a (dyn std::error::Error + Send + Sync + 'static)) -> Option<&'a DialError> {
    let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    error.downcast_ref().or_else(|| inner.and_then(|inner| inner.downcast_ref()))
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
        let found = self.resolver.resolve(host).await.map_err(DialError::Lookup)?;
        let (permitted, forbidden): (Vec<IpAddr>, Vec<IpAddr>) =
            found.into_iter().partition(|address| self.rule.addresses.permits(*address));
        let Some((last, others)) = permitted.split_last() else {
            return Err(forbidden.first().copied().map_or(DialError::NoHost, DialError::Forbidden));
        };
        let limit =
            OTHERS_LIMIT.checked_div(others.len() as u32).map_or(ADDRESS_LIMIT, |share| share.min(ADDRESS_LIMIT));
        for address in others {
            let connecting = TcpStream::connect(SocketAddr::new(*address, port));
            if let Ok(Ok(stream)) = tokio::time::timeout(limit, connecting).await {
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
            dialer.resolver.forget();
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
}
