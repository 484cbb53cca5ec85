//! The least that any relay does: it takes a request and posts its body on, with the same HTTP library and nothing else.
//! It stores nothing, promises nothing and keeps no order; what the relay takes beyond it is what the promise costs.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

use crate::load::{self, connect};

/// A forwarder as a process of its own, as the relay is.
pub struct Forwarder {
    child: Child,
    pub address: SocketAddr,
}

impl Forwarder {
    pub async fn start(sink: SocketAddr) -> Forwarder {
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["forward", &address.to_string(), &sink.to_string()])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        while tokio::net::TcpStream::connect(address).await.is_err() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        Forwarder { child, address }
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

/// Forwards until it is killed.
pub async fn serve(address: SocketAddr, sink: SocketAddr) {
    let listener = TcpListener::bind(address).await.unwrap();
    let idle = Arc::new(Mutex::new(Vec::new()));
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        let idle = Arc::clone(&idle);
        tokio::spawn(async move {
            let service = service_fn(move |request| forward(Arc::clone(&idle), sink, request));
            let http = hyper::server::conn::http1::Builder::new();
            drop(http.serve_connection(TokioIo::new(stream), service).await);
        });
    }
}

type Idle = Arc<Mutex<Vec<SendRequest<Full<Bytes>>>>>;

async fn forward(
    idle: Idle,
    sink: SocketAddr,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let kept = idle.lock().unwrap().pop();
    let mut sender = match kept {
        Some(sender) => sender,
        None => connect(sink).await,
    };
    load::request(&mut sender, sink, "POST", "/push", "application/json", body).await;
    idle.lock().unwrap().push(sender);
    Ok(Response::new(Full::new(Bytes::new())))
}
