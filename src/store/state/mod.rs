//! What is remembered of customers: rows of the queue's, and a cache of them in memory.

mod cache;
mod rows;

pub(super) use self::cache::{StateCache, Undo};
pub(super) use self::rows::{BUCKETS, apply, dump, place, plugins_of, read, sweep};
use crate::domain::customer::{Customer, NameKind};
use crate::domain::endpoint::Plugin;

/// What is looked up.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum StateKey {
    Customer(Plugin, String),
    Name(NameKind, Plugin, String),
}

/// What was found: nothing is an answer too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum StateValue {
    // In a box: tables of these have many empty slots.
    Customer(Option<Box<Customer>>),
    Name(Option<String>),
}
