//! The relay against the ceiling, the direct post.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::forward::Forwarder;
use crate::load::{CONNECTIONS, Shape, due, paced, post_all, quantile};
use crate::probe::{cpu_ticks, fdatasync_p50, median, status_mib};
use crate::process::Relay;
use crate::sink::Sink;

const SHAPE: Shape = Shape { customers: 20_000, endpoints: 1 };
const EVENTS: u64 = 100_000;
const BATCH: u64 = 200;
const ROUNDS: u64 = 9;
const PACED_PER_SECOND: u64 = 1_000;

pub async fn run() {
    let sink = Arc::new(Sink::default());
    let sink_address = sink.serve_on(None).await;

    println!(
        "h5push-relay bench: {CONNECTIONS} connections, {} customers, {EVENTS} events of about 300 bytes",
        SHAPE.customers
    );
    println!("fdatasync of this disk, p50                {:>12.3} ms", fdatasync_p50().as_secs_f64() * 1e3);

    let mut ceilings = Vec::new();
    let mut forwarded = [Vec::new(), Vec::new()];
    let mut relayed = Vec::new();
    let mut costs = Vec::new();
    for round in 0..ROUNDS {
        let before = cpu_ticks(std::process::id());
        let took = post_all(sink_address, "/", SHAPE, EVENTS, 1, round * EVENTS).await;
        let direct_ticks = cpu_ticks(std::process::id()) - before;
        ceilings.push(EVENTS as f64 / took.as_secs_f64());

        let mut forward_ticks = [0; 2];
        for stores in [false, true] {
            let forwarder = Forwarder::start(sink_address, stores).await;
            sink.messages.store(0, Ordering::SeqCst);
            let begun = Instant::now();
            post_all(forwarder.address, "/", SHAPE, EVENTS, 1, round * EVENTS).await;
            sink.wait_for(EVENTS).await;
            forwarded[usize::from(stores)].push(EVENTS as f64 / begun.elapsed().as_secs_f64());
            forward_ticks[usize::from(stores)] = cpu_ticks(forwarder.pid());
        }

        let relay = Relay::start(sink_address);
        sink.messages.store(0, Ordering::SeqCst);
        let begun = Instant::now();
        let accepted = post_all(relay.address, "/v1/events", SHAPE, EVENTS, 1, round * EVENTS).await;
        sink.wait_for(EVENTS).await;
        let delivered = begun.elapsed();
        relayed.push(EVENTS as f64 / delivered.as_secs_f64());
        let relay_ticks = cpu_ticks(relay.pid());
        costs.push(relay_ticks as f64 / direct_ticks as f64);
        println!(
            "round {round}: direct {:>8.0}/s   forwarded {:>8.0}/s   stored and forwarded {:>8.0}/s   \
             accepted {:>8.0}/s   accepted and delivered {:>8.0}/s   \
             CPU of an event: direct {:>3.0} µs, forwarder {:>3.0} µs, with a file {:>3.0} µs, relay {:>3.0} µs",
            ceilings.last().unwrap(),
            forwarded[0].last().unwrap(),
            forwarded[1].last().unwrap(),
            EVENTS as f64 / accepted.as_secs_f64(),
            relayed.last().unwrap(),
            micros(direct_ticks),
            micros(forward_ticks[0]),
            micros(forward_ticks[1]),
            micros(relay_ticks),
        );
    }
    let (ceiling, relayed) = (median(ceilings), median(relayed));
    println!("one event a request: direct ceiling        {ceiling:>12.0} /s");
    for (what, forwarded) in ["forwarded, not stored", "stored and forwarded "].into_iter().zip(forwarded.map(median)) {
        println!("one event a request, {what} {forwarded:>12.0} /s   ratio {:.2}", forwarded / ceiling);
    }
    println!("one event a request, durable and delivered {relayed:>12.0} /s   ratio {:.2}", relayed / ceiling);
    println!(
        "CPU of an event in the relay               {:>12.1} times the direct post's, client and server",
        median(costs)
    );

    let relay = Relay::start(sink_address);
    sink.messages.store(0, Ordering::SeqCst);
    let begun = Instant::now();
    let took = post_all(relay.address, "/v1/events", SHAPE, 5 * EVENTS, BATCH, 10 * EVENTS).await;
    println!("accepted in requests of {BATCH}                {:>12.0} /s", 5.0 * EVENTS as f64 / took.as_secs_f64());
    sink.wait_for(5 * EVENTS).await;
    println!(
        "  … and delivered                          {:>12.0} /s",
        5.0 * EVENTS as f64 / begun.elapsed().as_secs_f64()
    );
    drop(relay);

    let relay = Relay::start(sink_address);
    let latencies = end_to_end(&relay, &sink, 100 * EVENTS).await;
    for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
        println!(
            "end to end at {PACED_PER_SECOND}/s, {name}                  {:>12.2} ms",
            quantile(&latencies, share)
        );
    }
    drop(relay);

    let relay = Relay::start(sink_address);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let before = cpu_ticks(relay.pid());
    tokio::time::sleep(Duration::from_secs(10)).await;
    let ticks = cpu_ticks(relay.pid()) - before;
    println!("idle: resident                             {:>12.1} MiB", status_mib(relay.pid(), "VmRSS:"));
    println!("idle: CPU of one core over 10 s            {:>12.2} %", ticks as f64 / 10.0);
}

/// Ten seconds of single events to a relay that pushes to this sink: how long after each was due it came, ascending.
pub async fn end_to_end(relay: &Relay, sink: &Sink, first: u64) -> Vec<Duration> {
    let events = PACED_PER_SECOND * 10;
    sink.messages.store(0, Ordering::SeqCst);
    sink.seen.lock().unwrap().clear();
    sink.keeps.store(true, Ordering::SeqCst);
    let begun = paced(relay.address, SHAPE, PACED_PER_SECOND, events, first).await;
    sink.wait_for(events).await;
    sink.keeps.store(false, Ordering::SeqCst);
    let late = |(number, at): &(u64, Instant)| at.duration_since(due(begun, PACED_PER_SECOND, number - first));
    let mut latencies: Vec<Duration> = sink.seen.lock().unwrap().iter().map(late).collect();
    latencies.sort();
    latencies
}

/// CPU of one event, when all of a round took so many ticks of 10 ms.
fn micros(ticks: u64) -> f64 {
    ticks as f64 * 1e4 / EVENTS as f64
}
