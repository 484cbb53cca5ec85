//! `h5push-relay`: takes events posted on localhost, keeps them durably, and relays them in order to H5 push addresses.
//!
//! The promise: after the 202 an event that was answered `queued` is never lost, never out of order for its customer, never
//! sent where it must not go, and never waits on someone else's broken server.
//!
//! ```text
//! IM server ─POST─> api ─> Store::post (gate, duplicates; on stable storage, then 202)
//!                             │ Notice::Durable, in the order of the journal
//!                         relay: domain::schedule picks a lane that is due, an endpoint that has room
//!                             │ Start (events of one lane)
//!                         attempt: read, compose, deliver ─> Report (what was seen)
//!                         domain::verdict ─> Verdict  (what it means: the one table of statuses)
//!                         domain::schedule ─> ToRecord (delivered | deferred)
//!                             │           └─> Burial (given up) ─> Store::bury (the dead letter, on stable storage)
//!                             │ Note                                  │ Note
//!                         Store::note (into the journal, before the lane's next push)
//!
//! app's server ─signed POST─> api::open_api ─> the same store: switches withdraw, surveys are events of a lane of their own
//! operator ─> api::operate ─> Command ─> relay      (pause, retry, bury, test; settings are kept by the store)
//! ```
//!
//! Invariants, each with the test that holds it:
//!
//! - what was answered `queued` is delivered, a dead letter or withdrawn: `tests/it/crash.rs`, the store's model, a power
//!   cut after each of its steps, `tests/it/disk.rs`, `tests/it/endurance.rs`;
//! - a lane goes in order, one push at a time, within rate and concurrency, and nothing is stuck: the schedule's simulation;
//! - nothing grows from day to day: its ten days;
//! - no packet goes to a forbidden address: `relay::dialer`;
//! - what is gone is not replayed: `store::dead_letters`.
//!
//! Section numbers (§) are those of the service's contract, `docs/contract.md`: what other programs see, which the README
//! explains to each of them.
//!
//! | module | owns | may use |
//! | --- | --- | --- |
//! | [`domain`] | the rules of events, customers and pushes; plain data, no clock, no chance, no I/O | nothing |
//! | [`store`] | journal, sled, checkpoints, dead letters | domain, metrics, clock |
//! | [`relay`] | the schedule's task, attempts, connections to receivers | domain, store, metrics, config, clock |
//! | [`api`] | listeners, requests, answers | domain, store, relay, metrics, config, clock, json |
//! | [`config`] | the file as written and as needed | domain, json |
//! | [`app`] | wiring, start, reload, stop | domain, store, relay, api, metrics, config, clock, log |
//! | [`cli`] | arguments, subcommands, exit codes | app, config, domain, store, clock, log |
//! | [`metrics`] | what is counted, by which names | domain |
//! | [`log`] | where log lines go | config |
//! | [`clock`] | time and chance | nothing |
//! | [`json`] | bodies of calls | nothing |

pub mod api;
pub mod app;
pub mod cli;
pub mod clock;
pub mod config;
pub mod domain;
#[cfg(test)]
mod fuzz;
pub mod json;
pub mod log;
pub mod metrics;
pub mod relay;
pub mod store;
