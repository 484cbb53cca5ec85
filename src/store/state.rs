//! What is remembered of customers, in memory: a bounded cache over the queue's rows that also holds every change which
//! the queue has not taken yet.

use std::collections::HashMap;

use super::codec::StateChange;
use super::queue::{Queue, QueueError};
use crate::domain::customer::{Customer, NameKind};
use crate::domain::endpoint::Plugin;
use crate::domain::keys::HashKey;
use serde::{Deserialize, Serialize};

/// Clean entries beyond which the older half is dropped.
const CLEAN_MAX: usize = 20_000;

/// What is looked up.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum StateKey {
    Customer(Plugin, String),
    Name(NameKind, Plugin, String),
}

/// What was found: nothing is an answer too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum StateValue {
    Customer(Option<Customer>),
    Name(Option<String>),
}

#[derive(Clone, Debug)]
struct Entry {
    value: StateValue,
    /// The request that changed it; 0: as in the queue.
    ticket: u64,
}

/// An entry before a change, to put back when the change could not be stored.
#[derive(Debug)]
pub(super) struct Undo {
    key: StateKey,
    before: Option<Entry>,
}

/// The cache. Two generations: what was not used since the last turn goes, unless the queue has yet to take it.
#[derive(Debug, Default)]
pub(super) struct StateCache {
    young: HashMap<StateKey, Entry>,
    old: HashMap<StateKey, Entry>,
    turns: u64,
    applied: u64,
}

impl StateCache {
    /// Changes whenever something may have left the cache: a row read from the queue before that may be out of date.
    pub(super) fn turns(&self) -> u64 {
        self.turns
    }

    pub(super) fn get(&mut self, key: &StateKey) -> Option<&StateValue> {
        if !self.young.contains_key(key)
            && let Some((key, entry)) = self.old.remove_entry(key)
        {
            self.young.insert(key, entry);
        }
        self.young.get(key).map(|entry| &entry.value)
    }

    /// Takes what was read from the queue, unless something newer is known.
    pub(super) fn fill(&mut self, key: StateKey, value: StateValue) {
        if self.get(&key).is_none() {
            self.make_room();
            self.young.insert(key, Entry { value, ticket: 0 });
        }
    }

    /// Changes an entry on behalf of a request.
    pub(super) fn put(&mut self, key: StateKey, value: StateValue, ticket: u64) -> Undo {
        self.make_room();
        let before = self.young.insert(key.clone(), Entry { value, ticket }).or_else(|| self.old.remove(&key));
        Undo { key, before }
    }

    pub(super) fn undo(&mut self, undo: Undo) {
        self.old.remove(&undo.key);
        match undo.before {
            Some(entry) => self.young.insert(undo.key, entry),
            None => self.young.remove(&undo.key),
        };
        self.turns += 1;
    }

    /// The queue has taken the changes of all requests up to this one.
    pub(super) fn applied(&mut self, ticket: u64) {
        self.applied = self.applied.max(ticket);
    }

    /// Changed customers of that token which the queue may not have yet.
    pub(super) fn customers_of(&self, web_token: &str) -> Vec<Plugin> {
        let of_it = |key: &StateKey| match key {
            StateKey::Customer(plugin, token) if token == web_token => Some(*plugin),
            StateKey::Customer(..) | StateKey::Name(..) => None,
        };
        self.young.keys().chain(self.old.keys()).filter_map(of_it).collect()
    }

    /// Entries that the queue has yet to take.
    pub(super) fn is_crowded(&self) -> bool {
        self.young.len() + self.old.len() > 10 * CLEAN_MAX
    }

    fn make_room(&mut self) {
        if self.young.len() < CLEAN_MAX {
            return;
        }
        let applied = self.applied;
        let mut kept: HashMap<StateKey, Entry> = std::mem::take(&mut self.old);
        kept.retain(|_, entry| entry.ticket > applied);
        self.old = std::mem::replace(&mut self.young, kept);
        self.turns += 1;
    }
}

/// A name's row entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct NameEntry {
    kind: NameKind,
    plugin: Plugin,
    name: String,
    web_token: String,
}

const CUSTOMERS: u8 = b'c';
const NAMES: u8 = b'n';

fn bucket(hashing: &HashKey, name: &str) -> u16 {
    hashing.bucket(name) as u16
}

/// Reads what the queue's rows say.
pub(super) fn read(queue: &Queue, hashing: &HashKey, key: &StateKey) -> Result<StateValue, QueueError> {
    Ok(match key {
        StateKey::Customer(plugin, web_token) => {
            let customers: Vec<Customer> = queue.bucket(CUSTOMERS, bucket(hashing, web_token))?;
            let is_it = |customer: &Customer| customer.plugin == *plugin && customer.web_token == *web_token;
            StateValue::Customer(customers.into_iter().find(is_it))
        }
        StateKey::Name(kind, plugin, name) => {
            let names: Vec<NameEntry> = queue.bucket(NAMES, bucket(hashing, name))?;
            let is_it = |entry: &NameEntry| entry.kind == *kind && entry.plugin == *plugin && entry.name == *name;
            StateValue::Name(names.into_iter().find(is_it).map(|entry| entry.web_token))
        }
    })
}

/// The plugins at which the queue's rows know a customer.
pub(super) fn plugins_of(queue: &Queue, hashing: &HashKey, web_token: &str) -> Result<Vec<Plugin>, QueueError> {
    let customers: Vec<Customer> = queue.bucket(CUSTOMERS, bucket(hashing, web_token))?;
    Ok(customers.into_iter().filter(|other| other.web_token == web_token).map(|other| other.plugin).collect())
}

/// Makes a change in the queue's rows. `is_forgotten` says which other customers of the bucket are to go.
pub(super) fn apply(
    queue: &Queue,
    hashing: &HashKey,
    change: &StateChange,
    is_forgotten: impl Fn(&Customer) -> bool,
) -> Result<(), QueueError> {
    match change {
        StateChange::PutCustomer(customer) => {
            let bucket = bucket(hashing, &customer.web_token);
            let mut customers: Vec<Customer> = queue.bucket(CUSTOMERS, bucket)?;
            customers.retain(|other| {
                let is_it = other.plugin == customer.plugin && other.web_token == customer.web_token;
                !is_it && !is_forgotten(other)
            });
            customers.push(customer.clone());
            queue.put_bucket(CUSTOMERS, bucket, &customers)
        }
        StateChange::DropCustomer { plugin, web_token } => {
            let bucket = bucket(hashing, web_token);
            let mut customers: Vec<Customer> = queue.bucket(CUSTOMERS, bucket)?;
            customers.retain(|other| other.plugin != *plugin || other.web_token != *web_token);
            queue.put_bucket(CUSTOMERS, bucket, &customers)
        }
        StateChange::Name { kind, plugin, name, web_token } => {
            let bucket = bucket(hashing, name);
            let mut names: Vec<NameEntry> = queue.bucket(NAMES, bucket)?;
            names.retain(|other| other.kind != *kind || other.plugin != *plugin || other.name != *name);
            if let Some(web_token) = web_token {
                let (name, web_token) = (name.clone(), web_token.clone());
                names.push(NameEntry { kind: *kind, plugin: *plugin, name, web_token });
            }
            queue.put_bucket(NAMES, bucket, &names)
        }
    }
}

/// Drops what is forgotten from one bucket; says the names that went with it.
pub(super) fn sweep(
    queue: &Queue,
    hashing: &HashKey,
    bucket: u16,
    is_forgotten: impl Fn(&Customer) -> bool,
) -> Result<(), QueueError> {
    let customers: Vec<Customer> = queue.bucket(CUSTOMERS, bucket)?;
    let (gone, kept): (Vec<Customer>, Vec<Customer>) = customers.into_iter().partition(|other| is_forgotten(other));
    if gone.is_empty() {
        return Ok(());
    }
    for customer in &gone {
        for kind in [NameKind::Customer, NameKind::Sdk] {
            let Some(name) = customer.name(kind) else { continue };
            let key = StateKey::Name(kind, customer.plugin, name.to_owned());
            if read(queue, hashing, &key)? == StateValue::Name(Some(customer.web_token.clone())) {
                let (plugin, name) = (customer.plugin, name.to_owned());
                apply(queue, hashing, &StateChange::Name { kind, plugin, name, web_token: None }, |_| false)?;
            }
        }
    }
    queue.put_bucket(CUSTOMERS, bucket, &kept)
}

/// Every change that would build the rows anew, bucket by bucket.
pub(super) fn dump(queue: &Queue, mut write: impl FnMut(StateChange)) -> Result<(), QueueError> {
    for bucket in 0..=u16::MAX {
        for customer in queue.bucket::<Customer>(CUSTOMERS, bucket)? {
            write(StateChange::PutCustomer(customer));
        }
        for NameEntry { kind, plugin, name, web_token } in queue.bucket(NAMES, bucket)? {
            write(StateChange::Name { kind, plugin, name, web_token: Some(web_token) });
        }
    }
    Ok(())
}
