//! The contract's rules of events, customers and pushes, as plain data and total functions. (What a call may look like is
//! in `api`, what a config may say in `config`.)
//!
//! Nothing here reads a clock, rolls dice, opens a file or a socket, or waits: the time and the jitter are
//! arguments. `relay` and `api` ask, do what they are told and report back.

pub mod address;
pub mod ages;
pub mod backlog;
pub mod customer;
pub mod endpoint;
pub mod event;
pub mod gate;
pub mod keys;
mod offsets;
pub mod push;
pub mod retry;
pub mod schedule;
pub mod signature;
pub mod verdict;
