//! Many events that wait for endpoints that are down; then a drain while a tenth of the customers fail; then the rest:
//! memory, disk, starts, and what the backlog costs those who post meanwhile.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::load::{PLUGIN, Shape, from_all, one_by_one, post_all, quantile};
use crate::probe::{bytes_below, status_mib};
use crate::process::{Relay, endpoint};
use crate::sink::Sink;

/// Posts whose answer times are measured.
const SINGLES: u64 = 2_000;
const H5PUSH: &str = "/open_api_v1/im/h5push";

/// Fewer than 50,000 customers would have events in two requests at once, whose order is nobody's.
pub async fn run(shape: Shape, events: u64) {
    let sink = Arc::new(Sink::watching(shape));
    let sink_address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let tables: String =
        (0..shape.endpoints).map(|at| endpoint(&(PLUGIN + at).to_string(), sink_address, "/push", 1e6)).collect();
    let mut relay = Relay::with_endpoints(&tables);
    let mut posted = Posted { shape, rounds: 0, healthy: 0, all: 0 };
    println!("{events} waiting events of {} customers over {} endpoints", shape.customers, shape.endpoints);

    let some = shape.customers / 5;
    posted.post(&relay, some).await;
    let empty = posted.measure(&relay, some).await;
    let rest = events.saturating_sub(posted.all + some + SINGLES);
    let took = posted.post(&relay, rest).await;
    println!("accepted in requests of 500                {:>12.0} /s", rest as f64 / took.as_secs_f64());
    let full = posted.measure(&relay, some).await;
    println!(
        "  of {some} known customers, hardly anything waiting, then all: {:.0} /s, {:.0} /s, ratio {:.2}",
        empty.rate,
        full.rate,
        full.rate / empty.rate
    );
    for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
        let (empty, full) = (quantile(&empty.singles, share), quantile(&full.singles, share));
        println!("  of one event at a time, {name} of the answer: {empty:.2} ms, {full:.2} ms");
    }
    tokio::time::sleep(Duration::from_secs(6)).await;
    println!("peak memory                                {:>12.1} MiB", status_mib(relay.pid(), "VmHWM:"));
    let payload = shape.event(posted.rounds * shape.customers).len() as f64;
    println!("payload of one event                       {payload:>12} bytes");
    let disk = bytes_below(relay.dir.path()) as f64 / posted.all as f64;
    println!("disk for one event                         {disk:>12.0} bytes   ratio {:.2}", disk / payload);

    for (how, signal) in [("kill -9", "-KILL"), ("a clean stop", "-TERM")] {
        let took;
        (relay, took) = relay.restart(signal);
        println!("start after {how:<28} {:>14.2} s", took.as_secs_f64());
        println!("  peak memory of the start                 {:>12.0} MiB", status_mib(relay.pid(), "VmHWM:"));
    }

    sink.serve_on(Some(sink_address)).await;
    sink.wait_for(1).await;
    let begun = Instant::now();
    sink.wait_for(posted.healthy / 2).await;
    let mut shares = sink.by_endpoint();
    shares.sort_unstable();
    sink.wait_for(posted.healthy).await;
    let took = begun.elapsed().as_secs_f64();
    println!("drained, a tenth of the customers failing  {:>12.0} /s", posted.healthy as f64 / took);
    let fair = posted.healthy as f64 / 2.0 / shape.endpoints as f64;
    println!(
        "  at half of it, the endpoints had of their shares: the least {:.2}, the most {:.2}",
        shares[0] as f64 / fair,
        shares[shares.len() - 1] as f64 / fair
    );
    sink.mend();
    sink.wait_for(posted.all).await;
    assert_eq!(sink.messages.load(Ordering::SeqCst), posted.all, "nothing is sent twice");
    println!("peak memory of the drain                   {:>12.1} MiB", status_mib(relay.pid(), "VmHWM:"));
    for wait in [1, 9, 20, 30] {
        tokio::time::sleep(Duration::from_secs(wait)).await;
        let disk = bytes_below(relay.dir.path()) as f64;
        println!("disk after it, {wait} s                         {:>12.1} MiB", disk / f64::from(1 << 20));
    }

    let customer = move |number: u64| (number % shape.customers, PLUGIN + number % shape.customers % shape.endpoints);
    let took = from_all(relay.address, "POST", shape.customers, move |number| {
        let (customer, plugin) = customer(number);
        let query = format!("web_token=customer-{customer}&im_web_plugin_id={plugin}&h5push=false");
        (H5PUSH.to_owned(), "application/x-www-form-urlencoded", query)
    })
    .await;
    println!("toggles set                                {:>12.0} /s", shape.customers as f64 / took.as_secs_f64());
    // Everywhere in the table, by steps that have nothing in common with its size.
    let lookups = (0..5_000).map(|at| {
        let (customer, plugin) = customer(at * 7_919);
        (format!("/v1/customers?web_token=customer-{customer}&im_web_plugin_id={plugin}"), String::new())
    });
    let times = one_by_one(relay.address, "GET", lookups).await;
    for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
        println!("  lookup of a customer, {name}                {:>12.2} ms", quantile(&times, share));
    }
    (relay, _) = relay.restart("-TERM");
    println!("memory after a start with the customers    {:>12.1} MiB", status_mib(relay.pid(), "VmRSS:"));
}

/// What was posted so far: whole rounds of the customers' numbers, so that each customer's numbers ascend.
struct Posted {
    shape: Shape,
    rounds: u64,
    /// Events of customers whose pushes never fail.
    healthy: u64,
    all: u64,
}

struct Measured {
    /// Events a second, in requests of 500 from all connections.
    rate: f64,
    /// Answer times of single posts, ascending.
    singles: Vec<Duration>,
}

impl Posted {
    async fn post(&mut self, relay: &Relay, events: u64) -> Duration {
        let first = self.count(events);
        post_all(relay.address, "/v1/events", self.shape, events, 500, first).await
    }

    async fn measure(&mut self, relay: &Relay, events: u64) -> Measured {
        let took = self.post(relay, events).await;
        let first = self.count(SINGLES);
        let shape = self.shape;
        let posts = (0..SINGLES).map(|number| ("/v1/events".to_owned(), shape.event(first + number)));
        let singles = one_by_one(relay.address, "POST", posts).await;
        Measured { rate: events as f64 / took.as_secs_f64(), singles }
    }

    /// Numbers for the next events; gives the first.
    fn count(&mut self, events: u64) -> u64 {
        let first = self.rounds * self.shape.customers;
        let numbers = first..first + events;
        self.healthy += numbers.filter(|number| !self.shape.fails(number % self.shape.customers)).count() as u64;
        self.all += events;
        self.rounds += events.div_ceil(self.shape.customers);
        first
    }
}
