//! The least that any relay does: it takes a request and posts its body on, with the same HTTP library and nothing else.
//! One kind stores nothing and answers when it was answered. The other appends the body to a file, answers after an
//! fdatasync for all that wait, and then posts it on. Both read nothing, promise nothing more and keep no order; what the
//! relay takes beyond them is what its promise costs.

use std::convert::Infallible;
use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, mpsc};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::load::{self, connect};

/// A forwarder as a process of its own, as the relay is.
pub struct Forwarder {
    child: Child,
    pub address: SocketAddr,
    _dir: tempfile::TempDir,
}

impl Forwarder {
    pub async fn start(sink: SocketAddr, stores: bool) -> Forwarder {
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["forward", &address.to_string(), &sink.to_string()])
            .args(stores.then(|| dir.path().join("log")))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        while tokio::net::TcpStream::connect(address).await.is_err() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        Forwarder { child, address, _dir: dir }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Forwards until it is killed; with a file, what is in it.
pub async fn serve(address: SocketAddr, sink: SocketAddr, log: Option<PathBuf>) {
    let listener = TcpListener::bind(address).await.unwrap();
    let way = Arc::new(Way { sink, idle: Mutex::default(), log: log.map(|path| Log::start(&path)) });
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        let way = Arc::clone(&way);
        tokio::spawn(async move {
            let service = service_fn(move |request| answer(Arc::clone(&way), request));
            let http = hyper::server::conn::http1::Builder::new();
            drop(http.serve_connection(TokioIo::new(stream), service).await);
        });
    }
}

/// The way to the sink.
struct Way {
    sink: SocketAddr,
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
    log: Option<Log>,
}

async fn answer(way: Arc<Way>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let body = request.into_body().collect().await.unwrap().to_bytes();
    if let Some(log) = &way.log {
        log.store(body.clone()).await;
        tokio::spawn(async move { way.forward(body).await });
    } else {
        way.forward(body).await;
    }
    Ok(Response::new(Full::new(Bytes::new())))
}

impl Way {
    async fn forward(&self, body: Bytes) {
        let kept = self.idle.lock().unwrap().pop();
        let mut sender = match kept {
            Some(sender) => sender,
            None => connect(self.sink).await,
        };
        load::request(&mut sender, self.sink, "POST", "/push", "application/json", body).await;
        self.idle.lock().unwrap().push(sender);
    }
}

/// A file whose thread writes and syncs what waits, and tells who waits.
struct Log(mpsc::Sender<(Bytes, oneshot::Sender<()>)>);

impl Log {
    fn start(path: &Path) -> Log {
        let (sender, receiver) = mpsc::channel::<(Bytes, oneshot::Sender<()>)>();
        let mut file = File::create(path).unwrap();
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 64 << 20).unwrap();
        std::thread::spawn(move || {
            while let Ok(first) = receiver.recv() {
                let group: Vec<_> = std::iter::once(first).chain(receiver.try_iter()).collect();
                file.write_all(&group.iter().flat_map(|(body, _)| body.iter().copied()).collect::<Vec<u8>>()).unwrap();
                file.sync_data().unwrap();
                group.into_iter().for_each(|(_, done)| done.send(()).unwrap());
            }
        });
        Log(sender)
    }

    async fn store(&self, body: Bytes) {
        let (done, stored) = oneshot::channel();
        self.0.send((body, done)).unwrap();
        stored.await.unwrap();
    }
}
