//! The real binary over real sockets.

mod accept;
mod crash;
mod customers;
mod hostile;
mod limits;
mod process;
mod push;
mod support;
