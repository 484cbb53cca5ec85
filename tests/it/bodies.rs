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
