//! What one endpoint's trouble costs the others: end to end beside an endpoint that hangs and one that is held back by
//! its rate, with many events waiting for each.

use std::sync::Arc;

use crate::load::{PLUGIN, Shape, post_all, quantile};
use crate::probe::median;
use crate::process::{Relay, endpoint};
use crate::ratios::end_to_end;
use crate::sink::{HANG, Sink};

const WAITING: u64 = 100_000;
const ROUNDS: u64 = 3;

pub async fn run() {
    // The troubled endpoints have a sink of their own: what comes slowly there is not measured.
    let (sink, troubled) = (Arc::new(Sink::default()), Arc::new(Sink::default()));
    let (to, troubled_to) = (sink.serve_on(None).await, troubled.serve_on(None).await);
    let good = endpoint(&PLUGIN.to_string(), to, "/push", 1e6);
    let hung = endpoint(&(PLUGIN + 1).to_string(), troubled_to, HANG, 1e6);
    let limited = endpoint(&(PLUGIN + 2).to_string(), troubled_to, "/push", 1.0);
    let alone = Relay::with_endpoints(&good);
    let beside = Relay::with_endpoints(&[good, hung, limited].concat());
    // Every third customer's events go to the good endpoint.
    let shape = Shape { customers: 30_000, endpoints: 3 };
    post_all(beside.address, "/v1/events", shape, 3 * WAITING, 200, 0).await;
    sink.wait_for(WAITING).await;

    let (mut plain, mut troubled) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for round in 0..ROUNDS {
        for (relay, figures) in [(&alone, &mut plain), (&beside, &mut troubled)] {
            let latencies = end_to_end(relay, &sink, (100 + round) * WAITING).await;
            figures[0].push(quantile(&latencies, 0.5));
            figures[1].push(quantile(&latencies, 0.99));
        }
    }
    for (name, plain, troubled) in
        plain.into_iter().zip(troubled).zip(["p50", "p99"]).map(|((plain, troubled), name)| (name, plain, troubled))
    {
        let (plain, troubled) = (median(plain), median(troubled));
        println!(
            "beside one endpoint that hangs and one at its rate, {WAITING} waiting for each, {name} {troubled:.2} ms, \
             {:.2} times that alone",
            troubled / plain
        );
    }
}
