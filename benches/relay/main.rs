//! The relay against the direct way, in one run on loopback. `cargo bench` prints a table; compare ratios, not machines.
//!
//! The same load generator and the same sink serve the ceiling (generator posts straight to the sink) and the relay
//! (generator posts to the relay, the relay pushes to the sink).
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::disallowed_methods,
    unreachable_pub,
    reason = "a bench measures time, prints, and fails by panicking; its modules are its own"
)]

mod beside;
mod forward;
mod load;
mod probe;
mod process;
mod ratios;
mod scale;
mod sink;

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let arguments: Vec<String> = std::env::args().collect();
    let number = |at: usize| arguments.get(at).and_then(|count| count.parse().ok());
    if let Some(at) = arguments.iter().position(|argument| argument == "scale") {
        // `cargo bench -- scale 10000000 1000000 1000`: so many events of so many customers over so many endpoints.
        let events = number(at + 1).unwrap_or(1_000_000);
        let customers = number(at + 2).unwrap_or(events / 10).max(1);
        let endpoints = number(at + 3).unwrap_or(1_000).clamp(1, customers);
        runtime.block_on(scale::run(load::Shape { customers, endpoints }, events));
    } else if let [_, mode, address, sink, log @ ..] = &*arguments
        && mode == "forward"
    {
        let log = log.first().map(Into::into);
        runtime.block_on(forward::serve(address.parse().unwrap(), sink.parse().unwrap(), log));
    } else if arguments.iter().any(|argument| argument == "beside") {
        runtime.block_on(beside::run());
    } else {
        runtime.block_on(ratios::run());
        runtime.block_on(beside::run());
    }
}
