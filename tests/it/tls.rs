//! Receivers' TLS: what is wrong with it, as a real server shows it.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::*;

/// An OpenSSL server with its own certificate authority; answers every request with 200.
struct OpenSsl {
    child: std::process::Child,
    address: SocketAddr,
}

impl OpenSsl {
    fn start(dir: &std::path::Path, cert: &str, more: &[&str]) -> OpenSsl {
        let address = free_address();
        let child = Command::new("openssl")
            .args(["s_server", "-quiet", "-www", "-accept", &address.to_string()])
            .args(["-cert", &format!("{cert}.pem"), "-key", &format!("{cert}.key")])
            .args(more)
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let server = OpenSsl { child, address };
        wait_until("openssl listens", || std::net::TcpStream::connect(address).is_ok());
        server
    }
}

impl Drop for OpenSsl {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn openssl(dir: &std::path::Path, line: &str) {
    let done = Command::new("openssl").args(line.split(' ')).current_dir(dir).output().unwrap();
    assert!(done.status.success(), "openssl {line}: {}", String::from_utf8_lossy(&done.stderr));
}

#[test]
fn receivers_with_bad_tls_fail_as_tls_and_the_log_says_why() {
    if Command::new("openssl").arg("version").output().is_err() {
        println!("SKIPPED: there is no openssl");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    openssl(dir, "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 30 -subj /CN=ca");
    openssl(dir, "req -x509 -newkey rsa:2048 -nodes -keyout other-ca.key -out other-ca.pem -days 30 -subj /CN=other");
    let issue = |name: &str, host: &str, ca: &str, days: &str| {
        std::fs::write(dir.join("ext"), format!("subjectAltName=DNS:{host}\n")).unwrap();
        openssl(dir, &format!("req -new -newkey rsa:2048 -nodes -keyout {name}.key -out {name}.csr -subj /CN={name}"));
        openssl(
            dir,
            &format!(
                "x509 -req -in {name}.csr -CA {ca}.pem -CAkey {ca}.key -CAcreateserial -out {name}.pem {days} -extfile ext"
            ),
        );
    };
    issue("good", "localhost", "ca", "-days 30");
    issue("wrong-name", "elsewhere.test", "ca", "-days 30");
    issue("unknown-ca", "localhost", "other-ca", "-days 30");
    issue("client", "client.test", "ca", "-days 30");
    openssl(
        dir,
        "req -x509 -newkey rsa:2048 -nodes -keyout self.key -out self.pem -days 30 -subj /CN=localhost -addext subjectAltName=DNS:localhost",
    );
    // `x509 -req` takes only days from now: an expired one comes of a day that is over.
    issue("expired", "localhost", "ca", "-days -1");
    let servers = [
        ("good", OpenSsl::start(dir, "good", &[]), ""),
        ("wrong-name", OpenSsl::start(dir, "wrong-name", &[]), "not valid for name"),
        ("unknown-ca", OpenSsl::start(dir, "unknown-ca", &[]), "UnknownIssuer"),
        ("self", OpenSsl::start(dir, "self", &[]), ""),
        ("expired", OpenSsl::start(dir, "expired", &[]), "Expired"),
        ("old", OpenSsl::start(dir, "good", &["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"]), ""),
        ("no-ecdhe", OpenSsl::start(dir, "good", &["-tls1_2", "-cipher", "AES128-GCM-SHA256"]), ""),
        // With TLS 1.3 a missing client certificate is told after the handshake.
        ("mutual", OpenSsl::start(dir, "good", &["-Verify", "1", "-CAfile", "ca.pem", "-verify_return_error"]), ""),
        (
            "mutual-known",
            OpenSsl::start(dir, "good", &["-Verify", "1", "-CAfile", "ca.pem", "-verify_return_error"]),
            "",
        ),
    ];
    let mut config = String::new();
    for (number, (name, server, _)) in servers.iter().enumerate() {
        let more = match *name {
            "mutual-known" => format!(
                "client_cert_file = {:?}\nclient_key_file = {:?}\n",
                dir.join("client.pem"),
                dir.join("client.key")
            ),
            _ => String::new(),
        };
        let port = server.address.port();
        config += &format!("[endpoints.{}]\nurl = \"https://localhost:{port}/\"\n{more}", number + 1);
    }
    let relay = Relay::start(&format!("{config}[tls]\nextra_ca_file = {:?}\n", dir.join("ca.pem")));
    for (number, (name, _, problem)) in servers.iter().enumerate() {
        let mut posted = event("a", &format!("m{number}"));
        posted["im_web_plugin_id"] = json!(number + 1);
        relay.queue(&posted);
        let endpoint = (number + 1).to_string();
        let attempts = |result: &str| {
            relay.metric("h5push_push_attempts_total", &[("endpoint", endpoint.as_str()), ("result", result)])
        };
        // Any answer at all says that the session stands: `openssl s_server -www` answers 200 to a GET only.
        let spoke =
            || attempts("ok") + attempts("error_status") + attempts("refused") + attempts("io") + attempts("timeout");
        wait_until(name, || spoke() + attempts("tls") > 0.0);
        match *name {
            // The session stands, and then `s_server -www` leaves a POST unanswered.
            "good" | "mutual-known" => {
                assert_eq!(attempts("tls") + attempts("io"), 0.0, "{name}: {}", relay.log());
                assert!(attempts("timeout") + attempts("ok") > 0.0, "{name}");
            }
            // … and where its connection is reset with that, before it is read.
            "mutual" => assert!(attempts("tls") + attempts("io") > 0.0 && attempts("timeout") == 0.0, "{name}"),
            _ => {
                assert_eq!(spoke(), 0.0, "{name}: {:?}", relay.endpoint(&endpoint)["last_error"]);
                let log = relay.log();
                let line = log.lines().find(|line| line.contains(&format!("no push can be sent endpoint={endpoint} ")));
                assert!(
                    line.is_some_and(|line| line.contains("tls") && line.contains(problem)),
                    "{name}: {line:?}\n{log}"
                );
            }
        }
    }
}

#[test]
fn pushes_go_over_tls_to_a_receiver_whose_ca_is_trusted_and_to_no_other() {
    use std::sync::Arc;
    let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let key = rustls::pki_types::PrivateKeyDer::try_from(certified.signing_key.serialize_der()).unwrap();
    let server = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(server));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let port = listener.local_addr().unwrap().port();
    runtime.spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                let mut bytes = [0; 65_536];
                while stream.read(&mut bytes).await.is_ok_and(|read| read > 0) {
                    let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
                    if stream.write_all(answer).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ca.pem");
    std::fs::write(&ca, certified.cert.pem()).unwrap();
    let endpoint = format!("[endpoints.12]\nurl = \"https://localhost:{port}/\"\n");
    let relay = Relay::start(&format!("{endpoint}[tls]\nextra_ca_file = {ca:?}\n"));
    relay.queue(&event("a", "m0"));
    relay.wait_metric("h5push_messages_delivered_total", &[], |count| count == 1.0);
    drop(relay);
    let wrong_name = format!("[endpoints.13]\nurl = \"https://127.0.0.1:{port}/\"\n");
    let relay = Relay::start(&format!("{endpoint}{wrong_name}"));
    for plugin in [12, 13] {
        let mut event = event("a", &format!("m{plugin}"));
        event["im_web_plugin_id"] = serde_json::json!(plugin);
        relay.queue(&event);
        let name = plugin.to_string();
        let labels = [("endpoint", name.as_str()), ("result", "tls")];
        relay.wait_metric("h5push_push_attempts_total", &labels, |count| count >= 1.0);
    }
}

/// Takes connections for `to`, and lets nothing through before it is told.
fn held_back(to: SocketAddr) -> (SocketAddr, Arc<AtomicUsize>, mpsc::Sender<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (release, released) = mpsc::channel::<()>();
    let taken = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&taken);
    std::thread::spawn(move || {
        let (client, _) = listener.accept().unwrap();
        counted.fetch_add(1, Ordering::SeqCst);
        released.recv().ok();
        let server = TcpStream::connect(to).unwrap();
        let copies = [(client.try_clone(), server.try_clone()), (Ok(server), Ok(client))];
        for (from, to) in copies {
            let (mut from, mut to) = (from.unwrap(), to.unwrap());
            std::thread::spawn(move || std::io::copy(&mut from, &mut to));
        }
    });
    (address, taken, release)
}

#[test]
fn a_push_that_is_still_connecting_when_its_address_changes_goes_to_the_new_one() {
    if Command::new("openssl").arg("version").output().is_err() {
        println!("SKIPPED: there is no openssl");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    openssl(
        dir,
        "req -x509 -newkey rsa:2048 -nodes -keyout own.key -out own.pem -days 30 -subj /CN=localhost -addext subjectAltName=DNS:localhost -addext basicConstraints=critical,CA:FALSE",
    );
    let old = free_address();
    let said = dir.join("said");
    let mut server = Command::new("openssl")
        .args(["s_server", "-quiet", "-accept", &old.to_string(), "-cert", "own.pem", "-key", "own.key"])
        .current_dir(dir)
        .stdin(Stdio::piped())
        .stdout(std::fs::File::create(&said).unwrap())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let heard = |what: &str| String::from_utf8_lossy(&std::fs::read(&said).unwrap()).contains(what);
    let relay = Relay::start(&format!(
        "[push]\nallow_networks = [\"127.0.0.0/8\"]\ntimeout = \"5s\"\n[tls]\nextra_ca_file = {:?}\n\
         [backoff]\ninitial = \"50ms\"\nmax = \"100ms\"\n",
        dir.join("own.pem")
    ));
    let put = |url: String| relay.done("PUT", "/v1/endpoints/12", &json!({ "url": url }));
    // It listens, and shows what it hears; and hears one at a time.
    put(format!("https://localhost:{}/", old.port()));
    relay.queue(&event("b", "m0"));
    wait_until("the old one hears", || heard("m0"));
    let receiver = Receiver::start();
    put(format!("http://{}/", receiver.address));
    receiver.wait_delivered(1);
    let (held, taken, release) = held_back(old);
    put(format!("https://localhost:{}/", held.port()));
    relay.queue(&event("a", "m1"));
    wait_until("it connects", || taken.load(Ordering::SeqCst) == 1);
    put(format!("http://{}/", receiver.address));
    release.send(()).unwrap();
    assert_eq!(receiver.wait_delivered(2), ["m0", "m1"]);
    std::thread::sleep(Duration::from_millis(300));
    assert!(!heard("m1"));
    // Nor is one waited for that says nothing.
    let (silent, taken, _release) = held_back(old);
    put(format!("https://localhost:{}/", silent.port()));
    relay.queue(&event("c", "m2"));
    wait_until("it connects", || taken.load(Ordering::SeqCst) == 1);
    let begun = Instant::now();
    put(format!("http://{}/", receiver.address));
    receiver.wait_delivered(3);
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    server.kill().unwrap();
    server.wait().unwrap();
}

#[test]
fn changes_of_one_endpoint_leave_what_connects_to_another_alone() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let relay = Relay::start("[push]\nallow_networks = [\"127.0.0.0/8\"]\ntimeout = \"1s\"\n");
    let put = |name: &str, url: String| relay.done("PUT", &format!("/v1/endpoints/{name}"), &json!({ "url": url }));
    put("12", format!("https://{}/", silent.local_addr().unwrap()));
    relay.queue(&event("a", "m"));
    for number in 0..20 {
        put("13", format!("http://127.0.0.1:9/{number}"));
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(relay.metric("h5push_push_attempts_total", &[("endpoint", "12"), ("result", "timeout")]) >= 1.0);
}
