//! The real binary over real sockets.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::wildcard_enum_match_arm,
    unreachable_pub,
    reason = "a test fails by panicking, measures time, and says what it skips"
)]

mod accept;
mod bodies;
mod clock;
mod command_line;
mod crash;
mod customers;
mod damage;
mod disk;
mod endurance;
mod hostile;
mod limits;
mod load;
mod monitoring;
mod network;
mod open_api;
mod openapi;
mod operate;
mod page;
mod process;
mod push;
mod support;
mod tls;
mod trials;
