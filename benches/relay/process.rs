//! A relay as a process of its own.

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A relay of its own, on free ports and a throw-away directory on the disk of the build.
pub struct Relay {
    child: Child,
    pub address: SocketAddr,
    pub dir: Arc<tempfile::TempDir>,
}

/// An endpoint's table in the config, bounded by its rate only.
pub fn endpoint(name: &str, sink: SocketAddr, path: &str, rate_per_second: f64) -> String {
    format!(
        "[endpoints.{name}]\nurl = \"http://{sink}{path}\"\nrate_per_second = {rate_per_second:.1}\n\
         burst = {burst}\nconcurrency = 64\nmax_events = 100_000_000\n",
        burst = (rate_per_second / 10.0).max(1.0) as u64,
    )
}

impl Relay {
    /// One endpoint for every plugin.
    pub fn start(sink: SocketAddr) -> Relay {
        Relay::with_endpoints(&endpoint("default", sink, "/push", 1e6))
    }

    /// With these tables of endpoints.
    pub fn with_endpoints(endpoints: &str) -> Relay {
        let dir = Arc::new(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
        let free = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (address, metrics) = (free(), free());
        let text = format!(
            "data_dir = {:?}\n[local]\nlisten = \"{address}\"\n[metrics]\nlisten = \"{metrics}\"\n\
             [outbox]\nmax_events = 100_000_000\n[backoff]\nmax = \"10s\"\n\
             [push]\nallow_networks = [\"127.0.0.0/8\"]\n{endpoints}",
            dir.path().join("data"),
        );
        std::fs::write(dir.path().join("config.toml"), text).unwrap();
        Relay::run(dir, address)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it by a signal and starts it again; also how long it took until it was ready.
    pub fn restart(mut self, signal: &str) -> (Relay, Duration) {
        Command::new("kill").args([signal, &self.pid().to_string()]).status().unwrap();
        self.child.wait().unwrap();
        let begun = Instant::now();
        let relay = Relay::run(Arc::clone(&self.dir), self.address);
        (relay, begun.elapsed())
    }

    fn run(dir: Arc<tempfile::TempDir>, address: SocketAddr) -> Relay {
        let child = Command::new(env!("CARGO_BIN_EXE_h5push-relay"))
            .arg("--config")
            .arg(dir.path().join("config.toml"))
            // As systemd/h5push-relay.service sets them.
            .env("MALLOC_ARENA_MAX", "2")
            .env("MALLOC_MMAP_THRESHOLD_", "262144")
            .env("MALLOC_TRIM_THRESHOLD_", "4194304")
            .env("MALLOC_TOP_PAD_", "1048576")
            .stdin(Stdio::null())
            .stderr(std::fs::File::options().create(true).append(true).open(dir.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        let relay = Relay { child, address, dir };
        let deadline = Instant::now() + Duration::from_secs(60);
        while !relay.is_ready() {
            assert!(Instant::now() < deadline, "the relay does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        relay
    }

    fn is_ready(&self) -> bool {
        use std::io::{Read, Write};
        let Ok(mut stream) = std::net::TcpStream::connect(self.address) else { return false };
        let request = format!("GET /readyz HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n", self.address);
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).is_ok() && answer.starts_with("HTTP/1.1 200")
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
