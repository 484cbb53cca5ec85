//! Listeners and connections: limits on how many, how slow and how large, and how they end.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper::Request;
use hyper::body::Incoming;
use hyper::rt::{Read, Write};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpSocket, UnixListener};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use super::answer::Answer;
use super::seats::{GRACE, Seat, Seats};
use super::{Shared, local, metrics, open_api};
use crate::config::{Listen, Local};
use crate::metrics::EVENTS;

/// A head, and an idle connection, may take so long.
const HEAD_LIMIT: Duration = Duration::from_secs(30);
/// A TLS handshake may take so long.
const TLS_LIMIT: Duration = Duration::from_secs(10);
/// The last answer of a connection that is to make room may take so long.
const LAST_ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// When all is to end, a connection without a request has so long to finish the head of one.
const LAST_GRACE: Duration = Duration::from_millis(250);
/// Largest head of a request, bytes.
const HEAD_MAX: usize = 64 << 10;
/// Connections that the kernel holds until they are accepted.
const BACKLOG: u32 = 1_024;
/// Connections for monitoring.
const METRICS_CONNECTIONS_MAX: usize = 64;
/// After an error of accept(2), which is mostly a want of descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Tells all connections to end.
pub type Shutdown = watch::Receiver<bool>;

/// Why nothing listens.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {listen}: {error}")]
pub struct ListenError {
    listen: String,
    error: io::Error,
}

/// A bound listener.
#[derive(Debug)]
pub enum Bound {
    /// TCP.
    Tcp(TcpListener),
    /// A unix socket, and where it is if it is ours to remove.
    Unix(UnixListener, Option<PathBuf>),
}

/// The sockets that systemd hands over, by the name of the table that they are for.
#[derive(Debug, Default)]
pub struct Inherited(Vec<(String, Bound)>);

impl Inherited {
    /// Takes them over. Call it once.
    ///
    /// # Errors
    /// One of them is no listening socket.
    pub fn take() -> Result<Inherited, ListenError> {
        let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
        let mut sockets = listenfd::ListenFd::from_env();
        let error = |error| ListenError { listen: "a socket of systemd's".to_owned(), error };
        let mut all = Vec::new();
        for (at, name) in names.split(':').enumerate().take(sockets.len()) {
            let bound = match sockets.take_tcp_listener(at) {
                Ok(Some(listener)) => {
                    listener.set_nonblocking(true).map_err(error)?;
                    Bound::Tcp(TcpListener::from_std(listener).map_err(error)?)
                }
                _ => {
                    let listener = sockets.take_unix_listener(at).map_err(error)?;
                    let Some(listener) = listener else { continue };
                    listener.set_nonblocking(true).map_err(error)?;
                    Bound::Unix(UnixListener::from_std(listener).map_err(error)?, None)
                }
            };
            all.push((name.to_owned(), bound));
        }
        Ok(Inherited(all))
    }

    /// The socket for a table, if there is one.
    pub fn of(&mut self, table: &str) -> Option<Bound> {
        let at = self.0.iter().position(|(name, _)| name == table)?;
        Some(self.0.swap_remove(at).1)
    }

    /// Closes those that nothing asked for, and says so.
    pub fn end(self) {
        for (name, _) in self.0 {
            tracing::warn!(name, "a socket of systemd's for nothing: FileDescriptorName is local, metrics or open_api");
        }
    }
}

impl Bound {
    /// The address, for TCP.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        match self {
            Bound::Tcp(listener) => listener.local_addr().ok(),
            Bound::Unix(..) => None,
        }
    }
}

/// Binds `[local]`.
///
/// # Errors
/// The address is in use or may not be used.
pub fn bind_local(local: &Local) -> Result<Bound, ListenError> {
    let error = |error| ListenError { listen: local.listen.to_string(), error };
    match &local.listen {
        Listen::Tcp(address) => bind_tcp(*address).map(Bound::Tcp).map_err(error),
        Listen::Unix(path) => bind_unix(path, local).map_err(error),
    }
}

/// Binds `[metrics]` or `[open_api]`.
///
/// # Errors
/// The address is in use or may not be used.
pub fn bind_tcp_at(address: SocketAddr) -> Result<Bound, ListenError> {
    bind_tcp(address).map(Bound::Tcp).map_err(|error| ListenError { listen: address.to_string(), error })
}

fn bind_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

fn is_socket(path: &Path) -> io::Result<bool> {
    Ok(std::fs::symlink_metadata(path)?.file_type().is_socket())
}

fn bind_unix(path: &Path, local: &Local) -> io::Result<Bound> {
    // A socket that a crash left behind; one that somebody answers on is in use.
    if path.exists() {
        match std::os::unix::net::UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && is_socket(path)? => {
                std::fs::remove_file(path)?;
            }
            Ok(_) | Err(_) => return Err(io::ErrorKind::AddrInUse.into()),
        }
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(local.socket_mode))?;
    if let Some(group) = local.socket_group {
        std::os::unix::fs::chown(path, None, Some(group))?;
    }
    Ok(Bound::Unix(listener, Some(path.to_owned())))
}

/// Serves `[local]` until told to stop, then ends what is open.
pub async fn serve_local(bound: Bound, api: Shared, shutdown: Shutdown) {
    let seats = Seats::new(api.config.load().local.max_connections as usize);
    let is_tcp = matches!(bound, Bound::Tcp(_));
    let handler = move |request: Request<Incoming>| {
        let api = Arc::clone(&api);
        async move {
            // An event is stored or not, whoever listens to the answer. Everything else is carried to its end in a task of
            // its own: a caller who goes must not leave half of a change.
            if request.uri().path() == EVENTS {
                local::answer(&api, request, is_tcp).await
            } else {
                carried_out(async move { local::answer(&api, request, is_tcp).await }).await
            }
        }
    };
    serve(bound, seats, || None, handler, shutdown).await;
}

/// Serves `[open_api]` until told to stop; with the certificate of now, if there is one.
pub async fn serve_open_api(bound: Bound, api: Shared, shutdown: Shutdown) {
    let seats = Seats::new(api.config.load().open_api.max_connections as usize);
    let config = Arc::clone(&api);
    let tls = move || config.config.load().open_api.tls.as_ref().map(|tls| TlsAcceptor::from(Arc::clone(&tls.0)));
    let handler = move |request: Request<Incoming>| {
        let api = Arc::clone(&api);
        carried_out(async move { open_api::answer(&api, request).await })
    };
    serve(bound, seats, tls, handler, shutdown).await;
}

async fn carried_out(answer: impl Future<Output = Answer> + Send + 'static) -> Answer {
    // A panic ends the process.
    tokio::spawn(answer).await.unwrap_or_else(|_| super::answer::busy().into_answer())
}

/// Serves `[metrics]` until told to stop.
pub async fn serve_metrics(bound: Bound, api: Shared, shutdown: Shutdown) {
    let seats = Seats::new(METRICS_CONNECTIONS_MAX);
    let handler = move |request: Request<Incoming>| {
        let api = Arc::clone(&api);
        async move { metrics::answer(&api, request.method(), request.uri().path()).await }
    };
    serve(bound, seats, || None, handler, shutdown).await;
}

async fn serve<T, H, F>(bound: Bound, seats: Arc<Seats>, tls: T, handler: H, mut shutdown: Shutdown)
where
    T: Fn() -> Option<TlsAcceptor>,
    H: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Answer> + Send,
{
    let mut open = JoinSet::new();
    loop {
        let stream = tokio::select! {
            accepted = accept(&bound) => match accepted {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                    continue;
                }
            },
            () = ending(&mut shutdown) => break,
        };
        // Who was accepted is served, also when all is to end.
        let seat = tokio::select! {
            biased;
            seat = seats.take() => seat,
            () = ending(&mut shutdown) => match timeout(LAST_ANSWER_LIMIT, seats.take()).await {
                Ok(seat) => seat,
                Err(_) => break,
            },
        };
        let (handler, mut shutdown, tls) = (handler.clone(), shutdown.clone(), tls());
        open.spawn(async move {
            match stream {
                Stream::Tcp(stream) => match tls {
                    None => connection(TokioIo::new(stream), handler, shutdown, seat).await,
                    Some(tls) => {
                        let handshake = tokio::select! {
                            handshake = timeout(TLS_LIMIT, tls.accept(stream)) => handshake,
                            () = seat.wanted() => return,
                            () = ending(&mut shutdown) => return,
                        };
                        // A peer that is no TLS client is its own affair.
                        if let Ok(Ok(stream)) = handshake {
                            connection(TokioIo::new(stream), handler, shutdown, seat).await;
                        }
                    }
                },
                Stream::Unix(stream) => connection(TokioIo::new(stream), handler, shutdown, seat).await,
            }
        });
        while open.try_join_next().is_some() {}
    }
    if let Bound::Unix(_, Some(path)) = &bound {
        // The next start binds it anew.
        drop(std::fs::remove_file(path));
    }
    drop(bound);
    while open.join_next().await.is_some() {}
}

/// Waits until everything is to end.
async fn ending(shutdown: &mut Shutdown) {
    // Whoever tells has gone: that is an end too.
    drop(shutdown.wait_for(|is_ending| *is_ending).await);
}

enum Stream {
    Tcp(tokio::net::TcpStream),
    Unix(tokio::net::UnixStream),
}

async fn accept(bound: &Bound) -> io::Result<Stream> {
    match bound {
        Bound::Tcp(listener) => {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            Ok(Stream::Tcp(stream))
        }
        Bound::Unix(listener, _) => Ok(Stream::Unix(listener.accept().await?.0)),
    }
}

async fn connection<I, H, F>(io: I, handler: H, mut shutdown: Shutdown, seat: Seat)
where
    I: Read + Write + Unpin,
    H: Fn(Request<Incoming>) -> F,
    F: Future<Output = Answer>,
{
    let seat = &seat;
    let service = service_fn(|mut request: Request<Incoming>| {
        seat.begin();
        request.extensions_mut().insert(seat.sitting());
        let answer = handler(request);
        async move {
            let answer = answer.await;
            seat.end();
            Ok::<_, Infallible>(answer)
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .max_buf_size(HEAD_MAX)
        .serve_connection(io, service);
    let mut connection = std::pin::pin!(connection);
    let is_ending = tokio::select! {
        // A peer that breaks off or speaks no HTTP is its own affair.
        ended = connection.as_mut() => return drop(ended),
        () = seat.wanted() => false,
        () = ending(&mut shutdown) => true,
    };
    // A request may be on its way, or be there and not read yet: it is answered, as the last one.
    tokio::select! {
        // First what has come, when both are there.
        biased;
        ended = connection.as_mut() => return drop(ended),
        is_busy = seat.last_request(if is_ending { LAST_GRACE } else { GRACE }) => if !is_busy { return },
    }
    connection.as_mut().graceful_shutdown();
    if is_ending {
        return drop(connection.await);
    }
    // Somebody who does not read the answer keeps no seat.
    drop(timeout(LAST_ANSWER_LIMIT, connection).await);
}
