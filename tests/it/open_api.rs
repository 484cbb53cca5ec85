//! The open API: signed calls, its own TLS, surveys.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::support::*;

fn now_s() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

fn sha256(text: &str) -> String {
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, text.as_bytes());
    hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The signed part of a query.
fn signed(email: &str, token: &str, timestamp: u64, nonce: &str) -> String {
    let sign = sha256(&format!("{email}&{token}&{timestamp}&{nonce}&v2"));
    format!("email={email}&timestamp={timestamp}&nonce={nonce}&sign_version=v2&sign={sign}")
}

const TOGGLE: &str = "/open_api_v1/im/h5push";
const SURVEY: &str = "/open_api_v1/im/sessions/survey";

struct OpenApi {
    address: SocketAddr,
    config: String,
}

fn open_api(receiver: &Receiver, more: &str) -> OpenApi {
    let address = free_address();
    let accounts = "accounts = [{ email = \"app@example.com\", token = \"s3cret\" }, \
                    { email = \"small@example.com\", token = \"other\", plugins = [13] }]";
    let config = config(receiver.address, &format!("[open_api]\nlisten = \"{address}\"\n{accounts}\n{more}"));
    OpenApi { address, config }
}

impl OpenApi {
    fn call(&self, path: &str, query: &str) -> Value {
        let response = request(self.address, "POST", &format!("{path}?{query}"), &[], b"");
        assert_eq!(response.status, 200, "{response:?}");
        response.json()
    }

    fn code(&self, path: &str, query: &str) -> Value {
        self.call(path, query)["code"].clone()
    }
}

const NOTHING: Value = Value::Null;
const WHO: &str = "web_token=wang&im_web_plugin_id=12";

#[test]
fn only_rightly_signed_calls_are_answered_and_each_nonce_once() {
    let receiver = Receiver::start();
    let open = open_api(&receiver, "");
    let relay = Relay::start(&open.config);
    relay.put_customer(&json!({ "web_token": "wang", "im_web_plugin_id": 12, "h5push": true }));
    let sign = |nonce: &str| signed("app@example.com", "s3cret", now_s(), nonce);
    let first = sign("n-1");
    assert_eq!(open.call(TOGGLE, &format!("{WHO}&{first}"))["status"], "推送中");
    assert_eq!(open.code(TOGGLE, &format!("{WHO}&{first}")), 2_059, "a nonce works once");
    // A wrong signature does not use the nonce up.
    let wrong = signed("app@example.com", "wrong", now_s(), "n-2");
    assert_eq!(open.code(TOGGLE, &format!("{WHO}&{wrong}")), 2_059);
    assert_eq!(open.code(TOGGLE, &format!("{WHO}&{}&h5push=false", sign("n-2"))), 1_000);
    let toggled = open.call(TOGGLE, &format!("{WHO}&{}", sign("n-3")));
    assert_eq!((&toggled["status_code"], &toggled["status"]), (&json!(0), &json!("无推送")));

    // An unknown account, a wrong token, a stale timestamp and an old version look the same.
    let answers: Vec<Value> = [
        signed("nobody@example.com", "s3cret", now_s(), "x-1"),
        signed("app@example.com", "", now_s(), "x-2"),
        signed("app@example.com", "s3cret", now_s() - 16 * 60, "x-3"),
        signed("app@example.com", "s3cret", now_s() + 16 * 60, "x-4"),
        sign("x-5").replace("sign_version=v2", "sign_version=v1"),
        sign("x-6").replace("timestamp=", "timestamp=%2B"),
        sign("x-7").to_uppercase().replace("EMAIL=APP@EXAMPLE.COM", "email=app@example.com").to_lowercase() + "0",
    ]
    .iter()
    .map(|query| open.call(TOGGLE, &format!("{WHO}&{query}")))
    .collect();
    for answer in &answers {
        assert_eq!(answer, &answers[0]);
        assert_eq!(answer["code"], 2_059);
    }
    for part in ["email", "timestamp", "nonce", "sign_version", "sign"] {
        let without: Vec<String> =
            sign("y").split('&').filter(|pair| pair.split('=').next() != Some(part)).map(str::to_owned).collect();
        assert_eq!(open.code(TOGGLE, &format!("{WHO}&{}", without.join("&"))), 2_062, "{part}");
    }
    // Nonces are used up also after a crash and a stop, and stay with their account.
    let relay = Relay::start_in(relay.kill(), &open.config);
    assert_eq!(open.code(TOGGLE, &format!("{WHO}&{first}")), 2_059, "after a crash");
    let relay = Relay::start_in(relay.stop(), &open.config);
    assert_eq!(open.code(TOGGLE, &format!("{WHO}&{first}")), 2_059, "after a stop");
    let other = signed("small@example.com", "other", now_s(), "n-1");
    assert_eq!(open.call(TOGGLE, &format!("{WHO}&{other}"))["status"], "无效客户", "a plugin of somebody else");
    relay.wait_metric("h5push_open_api_requests_total", &[("path", TOGGLE), ("code", "2059")], |count| count == 1.0);
}

#[test]
fn a_nonce_works_again_once_its_timestamp_is_stale() {
    let receiver = Receiver::start();
    let open = open_api(&receiver, "timestamp_tolerance = \"1s\"\n");
    let _relay = Relay::start(&open.config);
    let call = || open.code(TOGGLE, &format!("{WHO}&{}", signed("app@example.com", "s3cret", now_s(), "constant")));
    assert_eq!(call(), 1_000);
    assert_eq!(call(), 2_059);
    // Whoever else calls, or nobody.
    std::thread::sleep(Duration::from_millis(2_500));
    assert_eq!(call(), 1_000);
}

#[test]
fn who_is_refused_before_the_body_has_come_is_told_so_and_may_go_on() {
    let receiver = Receiver::start();
    let open = open_api(&receiver, "");
    let _relay = Relay::start(&open.config);
    let mut stream = TcpStream::connect(open.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let wrong = signed("app@example.com", "wrong", now_s(), "n");
    for query in [&*wrong, &*wrong] {
        let head = format!("POST {TOGGLE}?{WHO}&{query} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n");
        write!(stream, "{head}content-length: 2\r\n\r\n").unwrap();
        std::thread::sleep(Duration::from_millis(300));
        stream.write_all(b"{}").unwrap();
        let mut answer = Vec::new();
        while !String::from_utf8_lossy(&answer).contains("2059") {
            let mut some = [0; 1_024];
            let read = stream.read(&mut some).unwrap();
            assert!(read > 0, "closed after {}", String::from_utf8_lossy(&answer));
            answer.extend_from_slice(&some[..read]);
        }
    }
}

#[test]
fn the_open_api_serves_two_paths_and_limits_each_account() {
    let receiver = Receiver::start();
    let open = open_api(&receiver, "rate_limit_per_minute = 3\n");
    let _relay = Relay::start(&open.config);
    for path in ["/", "/v1/events", "/v1/status", "/metrics", "/healthz", "/v1/customers"] {
        assert_eq!(request(open.address, "POST", path, &[], b"").status, 404, "{path}");
    }
    assert_eq!(request(open.address, "GET", TOGGLE, &[], b"").status, 405);
    let body = request(open.address, "POST", TOGGLE, &[("content-type", "text/plain")], b"x");
    // Contract §4: HTTP status 200 and a code, whatever is wrong with the body.
    assert_eq!((body.status, body.json()["code"].as_u64()), (200, Some(2_000)));
    let query = signed("app@example.com", "s3cret", now_s(), "large");
    let json = [("content-type", "application/json")];
    let large = request(open.address, "POST", &format!("{TOGGLE}?{query}"), &json, &vec![b' '; 9 << 20]);
    assert_eq!((large.status, large.json()["code"].as_u64()), (200, Some(2_000)));
    let codes: Vec<Value> = (0..5)
        .map(|number| signed("app@example.com", "s3cret", now_s(), &format!("n-{number}")))
        .map(|query| open.code(TOGGLE, &format!("{WHO}&{query}")))
        .collect();
    assert_eq!(codes, [1_000, 1_000, 1_000, 2_060, 2_060]);
    // Others have their own, and calls that are not signed rightly use nobody's.
    let other = signed("small@example.com", "other", now_s(), "n");
    assert_eq!(open.code(TOGGLE, &format!("{WHO}&{other}")), 1_000);
}

#[test]
fn the_open_api_is_off_by_default_and_needs_tls_beyond_loopback() {
    let check = |text: &str| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, text).unwrap();
        let checked = Command::new(env!("CARGO_BIN_EXE_h5push-relay"))
            .args(["check-config", "--config"])
            .arg(&path)
            .output()
            .unwrap();
        (checked.status.code(), String::from_utf8(checked.stderr).unwrap())
    };
    let (code, problem) = check("[open_api]\nlisten = \"0.0.0.0:8443\"\n");
    assert_eq!(code, Some(78));
    assert!(problem.contains("beyond loopback"), "{problem}");
    assert_eq!(check("[open_api]\nlisten = \"0.0.0.0:8443\"\nbehind_tls_proxy = true\n").0, Some(0));
    assert_eq!(check("[open_api]\nlisten = \"127.0.0.1:8443\"\n").0, Some(0));
    assert_eq!(check("").0, Some(0));
}

/// One request over TLS; the certificate's serial decides whether it is trusted.
fn over_tls(
    address: SocketAddr,
    ca: &rustls::pki_types::CertificateDer<'static>,
    path: &str,
) -> Result<Response, String> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ca.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = "localhost".try_into().unwrap();
    let connection = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let stream = std::net::TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut tls = rustls::StreamOwned::new(connection, stream);
    let text = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    tls.write_all(text.as_bytes()).map_err(|error| error.to_string())?;
    let mut answer = Vec::new();
    tls.read_to_end(&mut answer).map_err(|error| error.to_string())?;
    Ok(parse(&answer))
}

#[test]
fn the_open_api_speaks_tls_and_takes_a_new_certificate_at_sighup() {
    let receiver = Receiver::start();
    let dir = tempfile::tempdir().unwrap();
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    let make = || {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        std::fs::write(&cert, made.cert.pem()).unwrap();
        std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        made.cert.der().clone()
    };
    let first = make();
    let open = open_api(&receiver, &format!("tls = {{ cert_file = {cert:?}, key_file = {key:?} }}\n"));
    let relay = Relay::start(&open.config);
    let call = |nonce: &str, ca| {
        let query = signed("app@example.com", "s3cret", now_s(), nonce);
        over_tls(open.address, ca, &format!("{TOGGLE}?{WHO}&{query}"))
    };
    assert_eq!(call("n-1", &first).unwrap().json()["code"], 1_000);
    let second = make();
    assert!(call("n-2", &second).is_err(), "not read yet");
    relay.signal("HUP");
    wait_until("the new certificate is served", || call(&fastrand::u64(..).to_string(), &second).is_ok());
    assert!(call("n-3", &first).is_err());
    // A certificate that is none changes nothing.
    std::fs::write(&cert, "nonsense").unwrap();
    relay.signal("HUP");
    wait_until("that is said", || relay.metric("h5push_config_last_reload_successful", &[]) == 0.0);
    assert_eq!(call("n-4", &second).unwrap().json()["code"], 1_000);
}

#[test]
fn surveys_are_kept_and_delivered_in_order_until_the_im_server_takes_them() {
    let receiver = Receiver::start();
    let im_server = Receiver::start();
    // Its address is not among the allowed ones, and need not be.
    let config = format!(
        "[im_server]\nsurvey_url = \"http://{}/surveys\"\n[backoff]\ninitial = \"50ms\"\nmax = \"100ms\"\n\
         [endpoints.12]\nurl = \"http://{}/\"\n[push]\nallow_networks = []\n",
        im_server.address, receiver.address
    );
    let relay = Relay::start(&config);
    im_server.answer(|_| Answer::Body(200, r#"{"code":5000,"message":"busy"}"#));
    let call = |query: &str| request(relay.local, "POST", &format!("{SURVEY}?{query}"), &[], b"").json();
    let answer = call("im_sub_session_id=3001&option_id=2&remark=%E5%BE%88%E5%A5%BD");
    assert_eq!(answer, json!({ "code": 1_000, "message": "请求成功" }));
    assert_eq!(call("im_sub_session_id=3001&option_id=3")["code"], 1_000);
    im_server.wait_pushes(2);
    let relay = Relay::start_in(relay.kill(), &config);
    im_server.answer(|_| Answer::Body(200, r#"{"code":1000}"#));
    relay.wait_metric("h5push_messages_delivered_total", &[("endpoint", "survey")], |count| count == 2.0);
    let pushes = im_server.pushes();
    let last: Vec<Value> = pushes.iter().rev().take(2).map(Push::json).collect();
    assert_eq!(last[1], json!({ "im_sub_session_id": 3001, "option_id": 2, "remark": "很好" }));
    assert_eq!(last[0], json!({ "im_sub_session_id": 3001, "option_id": 3 }));
    assert!(pushes.iter().all(|push| push.path == "/surveys" && push.header("content-type") == "application/json"));

    // What the IM server will never take is a dead letter at once.
    im_server.answer(|_| Answer::Body(200, r#"{"code":9200}"#));
    let form = [("content-type", "application/x-www-form-urlencoded")];
    let answer = request(relay.local, "POST", SURVEY, &form, b"im_sub_session_id=3002&option_id=1").json();
    assert_eq!(answer["code"], 1_000);
    relay.wait_metric("h5push_dead_letters", &[("endpoint", "survey")], |count| count == 1.0);
    let letters = relay.done("GET", "/v1/dead-letters?endpoint=survey", &NOTHING)["dead_letters"].clone();
    assert_eq!(letters[0]["reason"], "refused");
    im_server.answer_status(200);
    let replayed = relay.done("POST", "/v1/dead-letters/replay", &json!({ "endpoint": "survey" }));
    assert_eq!(replayed["replayed"], 1);
    relay.wait_metric("h5push_messages_delivered_total", &[("endpoint", "survey")], |count| count == 3.0);
    // A 2xx is a success unless a code says otherwise, however much it says besides.
    let page: &'static str = Box::leak("x".repeat(100_000).into_boxed_str());
    im_server.answer(move |_| Answer::Body(200, page));
    let answer = request(relay.local, "POST", SURVEY, &form, b"im_sub_session_id=3004&option_id=1").json();
    assert_eq!(answer["code"], 1_000);
    relay.wait_metric("h5push_messages_delivered_total", &[("endpoint", "survey")], |count| count == 4.0);
    for (query, code) in [("option_id=1", 2_062), ("im_sub_session_id=x&option_id=1", 2_000)] {
        let answer = request(relay.local, "POST", &format!("{SURVEY}?{query}"), &[], b"").json();
        assert_eq!(answer["code"], code, "{query}");
    }
    relay.wait_metric("h5push_surveys_total", &[("outcome", "rejected")], |count| count == 2.0);
}

#[test]
fn without_a_survey_url_surveys_are_an_error() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, ""));
    let path = format!("{SURVEY}?im_sub_session_id=1&option_id=1");
    assert_eq!(request(relay.local, "POST", &path, &[], b"").json()["code"], 2_000);
}

#[test]
fn a_survey_finds_no_room_where_nothing_may_wait() {
    let receiver = Receiver::start();
    let survey = format!("[im_server]\nsurvey_url = \"http://{}/\"\n[defaults]\nmax_events = 0\n", receiver.address);
    let relay = Relay::start(&config(receiver.address, &survey));
    let path = format!("{SURVEY}?im_sub_session_id=1&option_id=1");
    assert_eq!(request(relay.local, "POST", &path, &[], b"").json()["code"], 5_000);
    relay.wait_metric("h5push_surveys_total", &[("outcome", "refused")], |count| count == 1.0);
}
