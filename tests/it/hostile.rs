//! Bad input and bad peers: limits cut them off, and the others go on.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::support::*;

#[test]
fn smuggled_and_broken_requests_store_nothing() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, ""));
    let body = event("a", "m").to_string();
    let head = format!("POST /v1/events HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\n", relay.local);
    let requests = [
        format!("{head}content-length: {}\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", body.len()),
        format!("{head}content-length: 3\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len()),
        format!("{head}transfer-encoding: chunked\r\nconnection: close\r\n\r\nzz\r\n{body}\r\n0\r\n\r\n"),
        format!("{head}content-length: -1\r\nconnection: close\r\n\r\n{body}"),
        "POST /v1/events\r\n\r\n".to_owned(),
        "\u{0}\u{1}\u{2}\r\n\r\n".to_owned(),
        format!("{head}x-large: {}\r\ncontent-length: 0\r\n\r\n", "y".repeat(70_000)),
        format!("{head}{}content-length: 0\r\n\r\n", "x-many: 1\r\n".repeat(200)),
    ];
    for (number, text) in requests.iter().enumerate() {
        let response = exchange(relay.local, text.as_bytes());
        assert!((400..500).contains(&response.status), "request {number}: {response:?}");
    }
    assert_eq!(relay.metric("h5push_events_total", &[("outcome", "queued")]), 0.0);
    relay.queue(&event("a", "m"));
    receiver.wait_delivered(1);
}

#[test]
fn slow_and_idle_clients_are_cut_off_and_starve_nobody() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, "[local]\nmax_connections = 64"));
    let mut slow: Vec<TcpStream> = (0..40)
        .map(|number| {
            let mut stream = TcpStream::connect(relay.local).unwrap();
            let bytes: &[u8] = if number % 2 == 0 { b"POST /v1/ev" } else { b"" };
            stream.write_all(bytes).unwrap();
            stream
        })
        .collect();
    let begun = Instant::now();
    for number in 0..20 {
        relay.queue(&event("a", &format!("m{number}")));
    }
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    // A body that does not come is answered 408 within its limit.
    let head = format!(
        "POST /v1/events HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{{",
        relay.local
    );
    let begun = Instant::now();
    let response = exchange(relay.local, head.as_bytes());
    assert_eq!((response.status, response.code().as_str()), (408, "request_timeout"));
    assert!(begun.elapsed() < Duration::from_secs(15));
    // And the idle ones are closed.
    let stream = slow.first_mut().unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(40))).unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(40));
}

#[test]
fn large_bodies_that_do_not_come_keep_no_small_one_waiting() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, ""));
    let head = format!(
        "POST /v1/events HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n[",
        relay.local,
        8 << 20
    );
    let _slow: Vec<TcpStream> = (0..20)
        .map(|_| {
            let mut stream = TcpStream::connect(relay.local).unwrap();
            stream.write_all(head.as_bytes()).unwrap();
            stream
        })
        .collect();
    std::thread::sleep(Duration::from_millis(200));
    let begun = Instant::now();
    relay.queue(&event("a", "m"));
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
}

/// A receiver that does something else with each connection.
fn misbehaving(act: impl Fn(TcpStream) + Send + Clone + 'static) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, act) = (stream.unwrap(), act.clone());
            std::thread::spawn(move || act(stream));
        }
    });
    address
}

/// MiB of a body that nobody wants.
static GIGABYTE_SENT: AtomicU64 = AtomicU64::new(0);

fn read_request(stream: &mut TcpStream) {
    let mut bytes = [0; 65_536];
    // A connection that the relay gave up has nothing to be read.
    drop(stream.read(&mut bytes));
}

#[test]
fn answers_that_never_end_keep_no_more_connections_than_the_endpoint_may_have() {
    let open = Arc::new(AtomicUsize::new(0));
    let most = Arc::new(AtomicUsize::new(0));
    let counts = (Arc::clone(&open), Arc::clone(&most));
    let address = misbehaving(move |mut stream| {
        let (open, most) = &counts;
        most.fetch_max(open.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        read_request(&mut stream);
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nx").ok();
        // Until the relay closes it.
        drop(stream.read(&mut [0]));
        open.fetch_sub(1, Ordering::SeqCst);
    });
    let relay = Relay::start(&config(address, "concurrency = 4\n"));
    for number in 0..100 {
        relay.queue(&event(&format!("c{number}"), &format!("m{number}")));
    }
    relay.wait_metric("h5push_messages_delivered_total", &[("endpoint", "12")], |count| count == 100.0);
    // In flight, and kept; one of each may be closing just then.
    let most = most.load(Ordering::SeqCst);
    assert!((2..=16).contains(&most), "{most} connections");
    wait_until("all are closed", || open.load(Ordering::SeqCst) == 0);
}

#[test]
fn each_misbehaviour_of_a_receiver_costs_one_attempt_and_has_its_result() {
    type Act = fn(TcpStream);
    let acts: [(&str, Act); 7] = [
        ("timeout", |mut stream| {
            read_request(&mut stream);
            std::thread::sleep(Duration::from_secs(60));
        }),
        ("timeout", |mut stream| {
            read_request(&mut stream);
            for byte in b"HTTP/1.1 200 OK\r\nx-slow: ".iter().chain(std::iter::repeat_n(&b'y', 1_000)) {
                if stream.write_all(&[*byte]).is_err() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        }),
        ("timeout", |mut stream| {
            read_request(&mut stream);
            while stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").is_ok() {
                std::thread::sleep(Duration::from_millis(50));
            }
        }),
        ("io", |mut stream| read_request(&mut stream)),
        ("io", |mut stream| {
            read_request(&mut stream);
            stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").ok();
        }),
        ("io", |mut stream| {
            read_request(&mut stream);
            let head = format!("HTTP/1.1 200 OK\r\n{}\r\n", "x-many: 1\r\n".repeat(5_000));
            stream.write_all(head.as_bytes()).ok();
        }),
        ("ok", |mut stream| {
            read_request(&mut stream);
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n").ok();
            let chunk = vec![b'x'; 1 << 20];
            while stream.write_all(&chunk).is_ok() {
                GIGABYTE_SENT.fetch_add(1, Ordering::SeqCst);
            }
        }),
    ];
    let mut text = String::from("[push]\ntimeout = \"1s\"\n[backoff]\ninitial = \"1h\"\nmax = \"1h\"\n");
    let dead = free_address();
    for (number, (_, act)) in acts.iter().enumerate() {
        let act = *act;
        text += &format!("[endpoints.{}]\nurl = \"http://{}/\"\n", number + 1, misbehaving(act));
    }
    text += &format!("[endpoints.100]\nurl = \"http://{dead}/\"\n");
    text += "[endpoints.101]\nurl = \"http://no-such-host.invalid/\"\n";
    text += &format!("[endpoints.102]\nurl = \"https://{}/\"\n", misbehaving(|mut stream| read_request(&mut stream)));
    let relay = Relay::start(&text);
    let results: Vec<(u64, &str)> = acts
        .iter()
        .enumerate()
        .map(|(number, (result, _))| (number as u64 + 1, *result))
        .chain([(100, "connect"), (101, "connect"), (102, "tls")])
        .collect();
    for (plugin, _) in &results {
        let mut event = event("a", &format!("m{plugin}"));
        event["im_web_plugin_id"] = serde_json::json!(plugin);
        relay.queue(&event);
    }
    for (plugin, result) in results {
        let endpoint = plugin.to_string();
        let labels = [("endpoint", endpoint.as_str()), ("result", result)];
        relay.wait_metric("h5push_push_attempts_total", &labels, |count| count == 1.0);
        let waiting = if result == "ok" { 0.0 } else { 1.0 };
        relay.wait_metric("h5push_outbox_events", &[("endpoint", &endpoint)], |count| count == waiting);
    }
    std::thread::sleep(Duration::from_secs(2));
    assert!(GIGABYTE_SENT.load(Ordering::SeqCst) < 64, "a gigabyte is not read");
}

#[test]
fn statuses_are_counted_by_what_they_mean_and_redirects_not_followed() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, "[backoff]\ninitial = \"1h\"\nmax = \"1h\"\n"));
    receiver.answer(|push| match push.customer().as_str() {
        "redirected" => Answer::With(302, "location", "/elsewhere"),
        "refused" => Answer::Status(404),
        "failed" => Answer::Status(408),
        _ => Answer::Status(204),
    });
    for customer in ["redirected", "refused", "failed", "well"] {
        relay.queue(&event(customer, customer));
    }
    receiver.wait_pushes(4);
    for (result, count) in [("ok", 1.0), ("refused", 1.0), ("error_status", 2.0)] {
        relay.wait_metric("h5push_push_attempts_total", &[("endpoint", "12"), ("result", result)], |found| {
            found == count
        });
    }
    assert!(receiver.pushes().iter().all(|push| push.path == "/push"));
}

#[test]
fn a_pooled_connection_that_the_receiver_closed_delays_nothing() {
    // Answers one request a connection with keep-alive, and closes it a little later.
    let address = misbehaving(|mut stream| {
        read_request(&mut stream);
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").ok();
        std::thread::sleep(Duration::from_millis(20));
    });
    let text = format!("[endpoints.12]\nurl = \"http://{address}/\"\n[backoff]\ninitial = \"1h\"\nmax = \"1h\"\n");
    let relay = Relay::start(&text);
    for number in 0..30 {
        relay.queue(&event("a", &format!("m{number}")));
        std::thread::sleep(Duration::from_millis(fastrand::u64(10..30)));
    }
    relay.wait_metric("h5push_messages_delivered_total", &[("endpoint", "12")], |count| count == 30.0);
}

#[test]
fn pipelined_requests_are_answered_one_after_another() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, ""));
    let request = |id: &str, more: &str| {
        let body = event("a", id).to_string();
        format!(
            "POST /v1/events HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n{more}\r\n{body}",
            relay.local,
            body.len()
        )
    };
    let mut stream = TcpStream::connect(relay.local).unwrap();
    let both: String = (0..20).map(|number| request(&format!("m{number}"), "")).collect();
    stream.write_all((both + &request("m20", "connection: close\r\n")).as_bytes()).unwrap();
    let mut answers = String::new();
    stream.read_to_string(&mut answers).unwrap();
    assert_eq!(answers.matches("HTTP/1.1 202").count(), 21, "{answers}");
    let expected: Vec<String> = (0..21).map(|number| format!("m{number}")).collect();
    assert_eq!(receiver.wait_delivered(21), expected, "in their order");
}

#[test]
fn thousands_of_idle_and_dripping_connections_keep_nobody_out() {
    const IDLE: usize = 10_000;
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, "[local]\nmax_connections = 200\n"));
    let worst = |count: usize| {
        (0..count)
            .map(|number| {
                let begun = Instant::now();
                relay.queue(&event("a", &format!("{}-{number}", fastrand::u64(..))));
                begun.elapsed()
            })
            .max()
            .unwrap()
    };
    let quiet = worst(50);
    // Fewer at once where this process may not hold so many; the relay itself never holds more than it may.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let count = IDLE.min(limit.map_or(IDLE, |limit| (limit as usize).saturating_sub(1_000)));
    let mut held = Vec::new();
    let mut during = Duration::ZERO;
    for number in 0..count {
        let mut stream = TcpStream::connect(relay.local).unwrap();
        if number % 3 == 0 {
            stream.write_all(b"POST /v1/events HTTP/1.1\r\nhost: local").unwrap();
        }
        held.push(stream);
        if number % 500 == 499 {
            during = during.max(worst(5));
        }
    }
    println!(
        "{count} connections held open: slowest of 50 requests {quiet:?} without, of {} {during:?} with",
        count / 100
    );
    assert!(during < Duration::from_secs(1) + 20 * quiet, "{during:?} beside {quiet:?}");
}

/// Bodies that were announced and do not come, more than there are places.
#[test]
fn bodies_that_do_not_come_keep_nobody_out() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, "[local]\nmax_connections = 20\n"));
    let refused = format!("POST /v1/events HTTP/1.1\r\nhost: {}\r\ncontent-type: text/plain\r\n", relay.local);
    let accepted = refused.replace("text/plain", "application/json");
    for head in [accepted, refused] {
        let stalled: Vec<TcpStream> = (0..60)
            .map(|_| {
                let mut stream = TcpStream::connect(relay.local).unwrap();
                stream.write_all(format!("{head}content-length: 1000\r\n\r\n{{").as_bytes()).unwrap();
                stream
            })
            .collect();
        let begun = Instant::now();
        assert_eq!(get(relay.local, "/healthz").status, 200);
        let took = begun.elapsed();
        println!("60 bodies that do not come on 20 places: {took:?}");
        assert!(took < Duration::from_secs(4), "{took:?}");
        drop(stalled);
    }
}

#[test]
fn a_flood_of_requests_beyond_max_connections_leaves_others_their_turn() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, "[local]\nmax_connections = 50\n"));
    let latencies = |count: usize| {
        let mut all: Vec<Duration> = (0..count)
            .map(|number| {
                let begun = Instant::now();
                relay.queue(&event("a", &format!("{}-{number}", fastrand::u64(..))));
                begun.elapsed()
            })
            .collect();
        all.sort();
        (all[count / 2], all[count - 1])
    };
    let quiet = latencies(100);
    // Each asks again as soon as it is answered, and comes again when it is sent away.
    let answered = Arc::new(AtomicU64::new(0));
    let is_over = Arc::new(AtomicBool::new(false));
    let flood = |clients: usize| {
        let start = |_| {
            let (to, answered, is_over) = (relay.local, Arc::clone(&answered), Arc::clone(&is_over));
            std::thread::spawn(move || {
                let mut answer = [0; 4_096];
                while !is_over.load(Ordering::Relaxed) {
                    let Ok(mut stream) = TcpStream::connect(to) else { continue };
                    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                    while !is_over.load(Ordering::Relaxed)
                        && stream
                            .write_all(b"GET /v1/customers?web_token=a HTTP/1.1\r\nhost: localhost\r\n\r\n")
                            .is_ok()
                        && stream.read(&mut answer).is_ok_and(|read| read > 0)
                    {
                        answered.fetch_add(1, Ordering::Relaxed);
                    }
                }
            })
        };
        (0..clients).map(start).collect::<Vec<_>>()
    };
    // Fewer than there are places, and eight times as many.
    for clients in [40, 400] {
        is_over.store(false, Ordering::Relaxed);
        let threads = flood(clients);
        std::thread::sleep(Duration::from_millis(500));
        let before = answered.load(Ordering::Relaxed);
        let begun = Instant::now();
        let (median, slowest) = latencies(100);
        let rate = (answered.load(Ordering::Relaxed) - before) as f64 / begun.elapsed().as_secs_f64();
        is_over.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.join().unwrap();
        }
        println!(
            "{clients} clients with {rate:.0} requests a second on 50 places: others {median:?}, slowest {slowest:?}; \
             alone {quiet:?}"
        );
        assert!(rate > 100.0, "no flood: {rate}");
        assert!(slowest < Duration::from_secs(1) + 20 * quiet.1, "{slowest:?} beside {quiet:?}");
    }
}
