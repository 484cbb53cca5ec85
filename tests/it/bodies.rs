//! Bodies that are too large, or that do not come.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::support::*;

#[test]
fn a_sender_that_looks_for_no_answer_before_it_has_sent_all_is_told_that_it_is_too_much() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, ""));
    let piece = vec![b' '; 1 << 20];
    for head in ["content-length: 12582912", "transfer-encoding: chunked"] {
        let mut stream = TcpStream::connect(relay.local).unwrap();
        let host = relay.local;
        let head =
            format!("POST /v1/events HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n{head}\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        let is_chunked = head.contains("chunked");
        for _ in 0..12 {
            if is_chunked {
                stream.write_all(b"100000\r\n").unwrap();
            }
            stream.write_all(&piece).unwrap();
            if is_chunked {
                stream.write_all(b"\r\n").unwrap();
            }
        }
        if is_chunked {
            stream.write_all(b"0\r\n\r\n").unwrap();
        }
        let mut answer = vec![0; 12];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(String::from_utf8(answer).unwrap(), "HTTP/1.1 413");
    }
}

#[test]
fn a_sender_that_is_refused_by_its_head_is_told_so_after_a_large_body() {
    let receiver = Receiver::start();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("token"), "secret-token").unwrap();
    let token = format!("[local]\ntoken_file = {:?}\n", dir.path().join("token"));
    let relay = Relay::start(&config(receiver.address, &token));
    let (right, json) = ("authorization: Bearer secret-token", "content-type: application/json");
    let refused = [
        (401, "POST /v1/events", "authorization: Bearer wrong", json),
        (403, "POST /v1/events", "origin: http://elsewhere.example", json),
        (404, "POST /v1/nothing", right, json),
        (405, "POST /v1/status", right, json),
        (415, "POST /v1/events", right, "content-type: text/plain"),
        (415, "PUT /v1/customers", right, "content-type: application/x-ndjson"),
    ];
    let piece = vec![b' '; 1 << 20];
    for (status, line, first, second) in refused {
        let mut stream = TcpStream::connect(relay.local).unwrap();
        let host = relay.local;
        let head = format!("{line} HTTP/1.1\r\nhost: {host}\r\n{first}\r\n{second}\r\ncontent-length: 6291456\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        for _ in 0..6 {
            stream.write_all(&piece).unwrap();
        }
        let mut answer = vec![0; 12];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(String::from_utf8(answer).unwrap(), format!("HTTP/1.1 {status}"), "{line} {first} {second}");
    }
}

#[test]
fn an_array_is_no_object_and_what_is_wrong_names_its_field() {
    let relay = Relay::start("");
    let calls = [
        ("DELETE", "/v1/dead-letters", r#"[null,null,true]"#, "body: "),
        ("POST", "/v1/dead-letters/replay", r#"[null,null,true]"#, "body: "),
        ("POST", "/v1/lanes/bury", r#"["12",null,true]"#, "body: "),
        ("PUT", "/v1/endpoints/50", r#"["http://8.8.8.8/x",null,5,1,1,{}]"#, "body: "),
        ("PUT", "/v1/customers", r#"["a"]"#, "body: "),
        ("DELETE", "/v1/dead-letters", r#"{"all":"true"}"#, "all: "),
        ("POST", "/v1/dead-letters/replay", r#"{"ids":"1-0"}"#, "ids: "),
        ("POST", "/v1/lanes/bury", r#"{"endpoint":12}"#, "endpoint: "),
        ("PUT", "/v1/endpoints/50", r#"{"url":"http://8.8.8.8/","burst":-1}"#, "burst: "),
        ("PUT", "/v1/customers", r#"{"web_token":"a","toggle":"ON"}"#, "toggle: "),
        ("DELETE", "/v1/customers?web_token=a&plugin=12", "", "plugin: "),
        ("DELETE", "/v1/customers?web_token=a&im_web_plugin_id=", "", "im_web_plugin_id: "),
    ];
    for (method, path, body, begins) in calls {
        let json = [("content-type", "application/json")];
        let headers = if body.is_empty() { &json[..0] } else { &json[..] };
        let answer = request(relay.local, method, path, headers, body.as_bytes());
        assert_eq!((answer.status, answer.code().as_str()), (400, "invalid_request"), "{method} {path} {body}");
        let message = answer.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(message.starts_with(begins), "{method} {path} {body}: {message}");
    }
}

#[test]
fn bodies_of_unknown_size_that_do_not_come_keep_no_others_out() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, ""));
    let head = format!(
        "POST /v1/events HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\n\
         transfer-encoding: chunked\r\n\r\n1\r\n[\r\n",
        relay.local
    );
    let _dripping: Vec<TcpStream> = (0..20)
        .map(|_| {
            let mut stream = TcpStream::connect(relay.local).unwrap();
            stream.write_all(head.as_bytes()).unwrap();
            stream
        })
        .collect();
    let begun = Instant::now();
    let large = format!("[{}{}]", event("a", "m"), " ".repeat(200 << 10));
    let answer = request(relay.local, "POST", "/v1/events", &[("content-type", "application/json")], large.as_bytes());
    assert_eq!(answer.status, 202, "{answer:?}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}
