//! The network's side: endpoints by call, signed pushes, addresses, TLS of receivers, secrets.

use std::io::Write as _;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::*;

const NOTHING: Value = Value::Null;
const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

#[test]
fn an_endpoint_set_by_a_call_wins_over_the_file_until_it_is_deleted() {
    let file = Receiver::start();
    let saved = Receiver::start();
    let relay = Relay::start(&config(file.address, ""));
    let push_to = |id: &str, expected: &Receiver| {
        relay.queue(&event("a", id));
        expected.wait("it", |pushes| pushes.iter().any(|push| push.message_ids() == [id]))
    };
    push_to("m0", &file);
    let body = json!({
        "url": format!("http://{}/saved?key=in-the-query", saved.address),
        "secret": SECRET,
        "rate_per_second": 50,
        "headers": { "x-api-key": "planted", "h5push-attempt": "9" },
    });
    let shown = relay.done("PUT", "/v1/endpoints/12", &body);
    let expected = json!({
        "name": "12", "url": body["url"], "source": "api", "state": "up", "rate_per_second": 50.0, "burst": 5,
        "concurrency": 32, "signed": true, "headers": ["h5push-attempt", "x-api-key"],
    });
    assert_eq!(shown, expected);
    assert_eq!(relay.done("GET", "/v1/endpoints/12", &NOTHING), expected);
    let list = relay.done("GET", "/v1/endpoints", &NOTHING);
    assert_eq!(list["endpoints"], json!([expected]));
    assert!(!list.to_string().contains("planted") && !list.to_string().contains("whsec"));
    let push = push_to("m1", &saved).remove(0);
    assert_eq!(push.header("x-api-key"), "planted");
    assert_eq!(push.header("h5push-attempt"), "1", "what the relay says itself stands");
    assert!(!push.header("webhook-signature").is_empty());

    // A secret that is left out is kept, null removes it; everything else is replaced.
    let put = |body: Value| relay.done("PUT", "/v1/endpoints/12", &body);
    let url = format!("http://{}/", saved.address);
    assert_eq!(
        (&put(json!({ "url": url }))["signed"], &put(json!({ "url": url }))["headers"]),
        (&json!(true), &json!([]))
    );
    assert_eq!(put(json!({ "url": url, "secret": null }))["signed"], false);

    // It is there after a crash; and after the DELETE the file counts again.
    let relay = Relay::start_in(relay.kill(), &config(file.address, ""));
    assert_eq!(relay.done("GET", "/v1/endpoints/12", &NOTHING)["source"], "api");
    relay.done("DELETE", "/v1/endpoints/12", &NOTHING);
    assert_eq!(relay.call("DELETE", "/v1/endpoints/12", &NOTHING).status, 404);
    assert_eq!(relay.done("GET", "/v1/endpoints/12", &NOTHING)["source"], "config");
    relay.queue(&event("a", "m2"));
    file.wait("m2 at the file's", |pushes| pushes.iter().any(|push| push.message_ids() == ["m2"]));
    assert_eq!(relay.call("GET", "/v1/endpoints/99", &NOTHING).status, 404);
}

#[test]
fn a_new_address_keeps_the_secret_of_the_file() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, &format!("secret = \"{SECRET}\"\n")));
    let url = format!("http://{}/new", receiver.address);
    assert_eq!(relay.done("PUT", "/v1/endpoints/12", &json!({ "url": url }))["signed"], true);
    relay.queue(&event("a", "m"));
    assert!(!receiver.wait_pushes(1)[0].header("webhook-signature").is_empty());
    assert_eq!(relay.done("PUT", "/v1/endpoints/12", &json!({ "url": url, "secret": null }))["signed"], false);
    assert_eq!(
        relay.done("PUT", "/v1/endpoints/12", &json!({ "url": url }))["signed"],
        false,
        "what was removed is gone"
    );
}

#[test]
fn no_address_means_no_push_and_what_waits_goes_to_the_address_of_the_moment() {
    let receiver = Receiver::start();
    let relay = Relay::start(&format!(
        "[endpoints.default]\nurl = \"http://{}/\"\n[backoff]\ninitial = \"50ms\"\nmax = \"100ms\"\n",
        receiver.address
    ));
    relay.done("PUT", "/v1/endpoints/12", &json!({ "url": null }));
    assert_eq!(relay.post(&event("a", "m0")).json()["reason"], "no_push_address");
    let other = Receiver::start();
    other.answer_status(500);
    let put = |address: SocketAddr| {
        relay.done("PUT", "/v1/endpoints/12", &json!({ "url": format!("http://{address}/") }));
    };
    put(other.address);
    relay.queue(&event("a", "m1"));
    other.wait_pushes(1);
    put(receiver.address);
    assert_eq!(receiver.wait_delivered(1), ["m1"]);
    // An endpoint that goes takes what waits for it to the dead letters.
    put(other.address);
    relay.queue(&event("a", "m2"));
    other.wait("it", |pushes| pushes.iter().any(|push| push.message_ids() == ["m2"]));
    relay.done("PUT", "/v1/endpoints/12", &json!({ "url": null }));
    let labels = [("endpoint", "12"), ("reason", "endpoint_removed")];
    relay.wait_metric("h5push_dead_letters_total", &labels, |count| count == 1.0);
}

#[test]
fn bad_endpoints_are_refused() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, "[push]\nallow_networks = [\"10.20.0.0/16\"]\n"));
    let refused = [
        json!({}),
        json!({ "url": 7 }),
        json!({ "url": "not a url" }),
        json!({ "url": "ftp://example.com/" }),
        json!({ "url": "https://user:pw@example.com/" }),
        json!({ "url": "https://example.com/#part" }),
        json!({ "url": "http://127.0.0.1/" }),
        json!({ "url": "http://127.1/" }),
        json!({ "url": "http://2130706433/" }),
        json!({ "url": "http://[::ffff:127.0.0.1]/" }),
        json!({ "url": "http://169.254.169.254/latest/meta-data" }),
        json!({ "url": "https://[fd00::1]/" }),
        json!({ "url": "https://a.example/", "headers": { "Host": "b" } }),
        json!({ "url": "https://a.example/", "headers": { "Content-Length": "1" } }),
        json!({ "url": "https://a.example/", "headers": { "webhook-id": "b" } }),
        json!({ "url": "https://a.example/", "headers": { "transfer-encoding": "b" } }),
        json!({ "url": "https://a.example/", "headers": { "Connection": "b" } }),
        json!({ "url": "https://a.example/", "headers": { "x": "a\nb" } }),
        json!({ "url": "https://a.example/", "secret": "short" }),
        json!({ "url": "https://a.example/", "rate_per_second": 0 }),
        json!({ "url": "https://a.example/", "rate_per_second": -1 }),
        json!({ "url": "https://a.example/", "burst": 0 }),
        json!({ "url": "https://a.example/", "concurrency": 0 }),
        json!({ "url": "https://a.example/", "rate_per_secnd": 5 }),
        json!({ "url": format!("https://a.example/{}", "x".repeat(5_000)) }),
    ];
    for body in refused {
        let response = relay.call("PUT", "/v1/endpoints/13", &body);
        assert_eq!((response.status, response.code().as_str()), (400, "invalid_request"), "{body}");
    }
    for name in ["survey", "0", "012", "x", "-1"] {
        let response = relay.call("PUT", &format!("/v1/endpoints/{name}"), &json!({ "url": "https://a.example/" }));
        assert_eq!(response.status, 400, "{name}");
    }
    for (method, path) in [("GET", "nope"), ("DELETE", "nope"), ("POST", "nope/pause"), ("POST", "12/nope")] {
        assert_eq!(relay.call(method, &format!("/v1/endpoints/{path}"), &NOTHING).status, 404, "{method} {path}");
    }
    assert_eq!(relay.call("GET", "/v1/endpoints/13", &NOTHING).status, 404);
    relay.done("PUT", "/v1/endpoints/13", &json!({ "url": "http://10.20.3.4/" }));
}

#[test]
fn a_forbidden_address_gets_no_packet_and_a_reload_closes_what_was_allowed() {
    let receiver = Receiver::start();
    let blocked = [("endpoint", "12"), ("result", "blocked_address")];
    for host in ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"] {
        let config = format!(
            "[endpoints.12]\nurl = \"http://{host}:{}/\"\n[push]\nallow_networks = []\n",
            receiver.address.port()
        );
        let relay = Relay::start(&config);
        relay.queue(&event("a", "m0"));
        relay.wait_metric("h5push_push_attempts_total", &blocked, |count| count >= 1.0);
        assert!(relay.log().contains("allow_networks"), "{}", relay.log());
        assert_eq!(receiver.pushes().len(), 0, "{host}");
    }
    // A pooled connection does not outlive the rule it was made under.
    let relay = Relay::start(&config(receiver.address, "[push]\nallow_networks = [\"127.0.0.0/8\"]\n"));
    relay.queue(&event("a", "m1"));
    receiver.wait_delivered(1);
    let path = relay.dir.path().join("config.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("127.0.0.0/8", "10.0.0.0/8")).unwrap();
    relay.signal("HUP");
    wait_until("it is read", || relay.log().contains("read anew"));
    relay.queue(&event("a", "m2"));
    relay.wait_metric("h5push_push_attempts_total", &blocked, |count| count >= 1.0);
    assert_eq!(receiver.pushes().len(), 1);
}

#[test]
fn pushes_are_verified_by_implementations_that_are_not_ours() {
    let receiver = Receiver::start();
    let old = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";
    let relay = Relay::start(&config(receiver.address, &format!("secret = \"{SECRET} {old}\"\n")));
    let mut posted = event("客户", "m0");
    posted["messages"][0]["data"] = json!({ "content": "您好 🚚 \u{1}\"\\" });
    relay.queue(&posted);
    let push = receiver.wait_pushes(1).remove(0);
    let input = json!({
        "body": String::from_utf8(push.body.clone()).unwrap(),
        "headers": { "webhook-id": push.header("webhook-id"), "webhook-timestamp": push.header("webhook-timestamp"),
                     "webhook-signature": push.header("webhook-signature") },
    });
    // Our own command for whoever builds a receiver says the same.
    for (secret, expected) in [(SECRET, 0), (old, 0), ("whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", 1)] {
        let mut verify = Command::new(env!("CARGO_BIN_EXE_h5push-relay"))
            .args(["verify", "--secret", secret])
            .args(["--id", push.header("webhook-id"), "--timestamp", push.header("webhook-timestamp")])
            .args(["--signature", push.header("webhook-signature")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        verify.stdin.take().unwrap().write_all(&push.body).unwrap();
        let done = verify.wait_with_output().unwrap();
        assert_eq!(done.status.code(), Some(expected), "{done:?}");
    }
    let python = "import sys,json\nfrom standardwebhooks.webhooks import Webhook\nd=json.load(sys.stdin)\n\
                  [Webhook(s).verify(d['body'],d['headers']) for s in sys.argv[1:]]\n";
    let node = "const {Webhook}=require('standardwebhooks');const d=JSON.parse(require('fs').readFileSync(0));\
                for(const s of process.argv.slice(1))new Webhook(s).verify(d.body,d.headers)";
    let tools = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("webhooks");
    std::fs::create_dir_all(&tools).unwrap();
    let python_dir = tools.join("python");
    let npm_dir = tools.join("node");
    let install = |program: &str, arguments: &[&str], is_there: bool| {
        is_there
            || Command::new(program)
                .args(arguments)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .is_ok_and(|status| status.success())
    };
    let pip = ["-m", "pip", "install", "--quiet", "--target", python_dir.to_str().unwrap(), "standardwebhooks==1.1.0"];
    let npm = ["install", "--silent", "--prefix", npm_dir.to_str().unwrap(), "standardwebhooks@1.1.1"];
    let verifiers = [
        (
            "python3",
            install("python3", &pip, python_dir.exists()),
            vec!["-c", python],
            ("PYTHONPATH", python_dir.clone()),
        ),
        ("node", install("npm", &npm, npm_dir.exists()), vec!["-e", node], ("NODE_PATH", npm_dir.join("node_modules"))),
    ];
    for (program, is_installed, arguments, (variable, value)) in verifiers {
        if !is_installed {
            println!("SKIPPED: {program}'s standardwebhooks could not be installed");
            continue;
        }
        let check = |input: &Value| {
            let mut child = Command::new(program)
                .args(&arguments)
                .args([SECRET, old])
                .env(variable, &value)
                .stdin(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            child.stdin.take().unwrap().write_all(input.to_string().as_bytes()).unwrap();
            child.wait_with_output().unwrap()
        };
        let done = check(&input);
        assert!(done.status.success(), "{program}: {}", String::from_utf8_lossy(&done.stderr));
        let mut forged = input.clone();
        forged["body"] = json!("{}");
        assert!(!check(&forged).status.success(), "{program} takes anything");
    }
}

#[test]
fn planted_secrets_are_nowhere_to_be_seen() {
    let receiver = Receiver::start();
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, "planted-local-token").unwrap();
    let listen = free_address();
    let secret = "whsec_cGxhbnRlZC1zaWduaW5nLXNlY3JldC0xMjM0NTY3ODkw";
    let config = format!(
        "[local]\ntoken_file = {token:?}\n[endpoints.12]\nurl = \"http://{}/push?planted-in-query\"\nsecret = \"{secret}\"\n\
         headers = {{ x-key = \"planted-header\" }}\n[backoff]\ninitial = \"20ms\"\nmax = \"40ms\"\n\
         [open_api]\nlisten = \"{listen}\"\naccounts = [{{ email = \"a@b\", token = \"planted-account\" }}]\n",
        receiver.address
    );
    receiver.answer(|push| match push.header("h5push-attempt") {
        "1" => Answer::Status(500),
        "2" => Answer::With(302, "location", "/elsewhere"),
        _ => Answer::Status(410),
    });
    let relay = Relay::start(&config.replace("[backoff]", "[log]\nattempts = true\nlevel = \"debug\"\n[backoff]"));
    let bearer = [("authorization", "Bearer planted-local-token"), ("content-type", "application/json")];
    let mut posted = event("wang", "m0");
    posted["messages"][0]["data"] = json!({ "content": "planted-content" });
    assert_eq!(request(relay.local, "POST", "/v1/events", &bearer, posted.to_string().as_bytes()).status, 202);
    relay.wait_metric("h5push_dead_letters", &[("endpoint", "12")], |count| count == 1.0);
    let mut seen = relay.log();
    seen += &get(relay.metrics, "/metrics").text();
    for path in ["/v1/status", "/v1/lanes", "/v1/dead-letters"] {
        seen += &request(relay.local, "GET", path, &bearer, b"").text();
    }
    let endpoints = request(relay.local, "GET", "/v1/endpoints", &bearer, b"").text();
    assert!(!endpoints.contains("planted-header") && !endpoints.contains("whsec"));
    let checked = Command::new(env!("CARGO_BIN_EXE_h5push-relay"))
        .args(["check-config", "--config"])
        .arg(relay.dir.path().join("config.toml"))
        .output()
        .unwrap();
    seen += &String::from_utf8([checked.stdout, checked.stderr].concat()).unwrap();
    // A file that is wrong is complained of without what stands in it.
    let path = relay.dir.path().join("config.toml");
    let right = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, right.replace(&format!("secret = \"{secret}\""), &format!("secret = \"{secret}"))).unwrap();
    relay.signal("HUP");
    wait_until("the refusal", || relay.log().contains("invalid basic string"));
    std::fs::write(&path, right).unwrap();
    seen += &relay.log();
    for planted in ["planted", "whsec_", "cGxhbnRlZ"] {
        let at = seen.find(planted);
        assert_eq!(at, None, "{}", at.map_or("", |at| &seen[at.saturating_sub(200)..(at + 100).min(seen.len())]));
    }
    // Whoever can read the file of a secret is told of.
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o644)).unwrap();
    relay.signal("HUP");
    wait_until("the warning", || relay.log().contains("others may read it"));
}

#[test]
fn a_slow_name_server_is_not_waited_for_by_others() {
    // A host that does not resolve costs its own attempts only.
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, "[endpoints.13]\nurl = \"http://does-not-resolve.invalid/\"\n"));
    let mut posted = event("a", "m0");
    posted["im_web_plugin_id"] = json!(13);
    relay.queue(&posted);
    relay.queue(&event("b", "m1"));
    receiver.wait_delivered(1);
    let labels = [("endpoint", "13"), ("result", "connect")];
    relay.wait_metric("h5push_push_attempts_total", &labels, |count| count >= 1.0);
    std::thread::sleep(Duration::from_millis(10));
}

#[test]
fn a_reload_never_opens_a_bound_listener_to_the_network() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, ""));
    drop(relay);
    // Bound beyond loopback with a token; the new file names loopback and no token, but the socket stays where it is.
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let port = free_address().port();
    let metrics = free_address();
    let text = |listen: &str, token: &str| {
        format!(
            "data_dir = {:?}\n[local]\nlisten = \"{listen}:{port}\"\n{token}\n[metrics]\nlisten = \"{metrics}\"\n\
             [outbox]\nmin_free_disk = 0\n[log]\nformat = \"text\"\n",
            dir.path().join("data")
        )
    };
    let path = dir.path().join("config.toml");
    std::fs::write(&path, text("0.0.0.0", "token = \"s3cret\"")).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_h5push-relay"))
        .arg("--config")
        .arg(&path)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("it is ready", || {
        std::net::TcpStream::connect(metrics).is_ok() && get(metrics, "/readyz").status == 200
    });
    std::fs::write(&path, text("127.0.0.1", "")).unwrap();
    Command::new("kill").args(["-HUP", &child.id().to_string()]).status().unwrap();
    wait_until("the reload failed", || {
        get(metrics, "/metrics").text().contains("h5push_config_last_reload_successful 0")
    });
    assert_eq!(get(SocketAddr::from(([127, 0, 0, 1], port)), "/v1/status").status, 401);
    child.kill().unwrap();
    child.wait().unwrap();
}
