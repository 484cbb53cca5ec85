//! What is remembered of customers, in memory: a bounded cache over the queue's rows that also holds every change which
//! the queue has not taken yet.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};

use super::codec::StateChange;
use super::queue::{Queue, QueueError};
use crate::domain::customer::{Customer, NameKind, Toggle};
use crate::domain::endpoint::Plugin;
use crate::domain::keys::HashKey;
use serde::{Deserialize, Serialize};

/// Clean entries beyond which the older half is dropped.
const CLEAN_MAX: usize = 20_000;

/// Entries beyond which requests wait until the queue has taken some.
const CHANGED_MAX: usize = 80_000;

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
#[derive(Debug)]
pub(super) struct StateCache {
    young: HashMap<StateKey, Entry>,
    old: HashMap<StateKey, Entry>,
    /// By a hash of the key: moves when a changed entry leaves the cache.
    versions: Vec<u32>,
    hasher: RandomState,
    applied: u64,
    /// Size of the young generation at which it becomes the old one.
    turn_at: usize,
    /// `applied` when everything that it covers was last dropped.
    purged: u64,
}

/// Keys share a version with few others.
const VERSIONS: usize = 1 << 14;

impl StateCache {
    pub(super) fn new() -> StateCache {
        StateCache {
            young: HashMap::new(),
            old: HashMap::new(),
            versions: vec![0; VERSIONS],
            hasher: RandomState::new(),
            applied: 0,
            turn_at: CLEAN_MAX,
            purged: 0,
        }
    }

    /// A row that is read from the queue is out of date if this has moved meanwhile: a newer value came and went.
    pub(super) fn version(&self, key: &StateKey) -> u32 {
        self.versions.get(self.shard(key)).copied().unwrap_or(0)
    }

    fn shard(&self, key: &StateKey) -> usize {
        self.hasher.hash_one(key) as usize % VERSIONS
    }

    fn move_version(&mut self, key: &StateKey) {
        let shard = self.shard(key);
        if let Some(version) = self.versions.get_mut(shard) {
            *version = version.wrapping_add(1);
        }
    }

    pub(super) fn get(&mut self, key: &StateKey) -> Option<&StateValue> {
        if !self.young.contains_key(key)
            && let Some((key, entry)) = self.old.remove_entry(key)
        {
            self.young.insert(key, entry);
        }
        self.young.get(key).map(|entry| &entry.value)
    }

    /// Takes what was read from the queue since `version`, unless something newer is or was known.
    pub(super) fn fill(&mut self, key: StateKey, version: u32, value: StateValue) {
        if self.get(&key).is_none() && self.version(&key) == version {
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
        self.move_version(&undo.key);
        match undo.before {
            Some(entry) => self.young.insert(undo.key, entry),
            None => self.young.remove(&undo.key),
        };
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

    /// Whether more changes wait for the queue than memory is meant for.
    pub(super) fn is_crowded(&mut self) -> bool {
        if self.young.len() + self.old.len() > CHANGED_MAX && self.purged != self.applied {
            self.purged = self.applied;
            // Both generations, so that only what the queue has yet to take is left.
            self.turn();
            self.turn();
        }
        self.young.len() + self.old.len() > CHANGED_MAX
    }

    fn make_room(&mut self) {
        if self.young.len() >= self.turn_at {
            self.turn();
        }
    }

    fn turn(&mut self) {
        let mut kept = HashMap::new();
        for (key, entry) in std::mem::take(&mut self.old) {
            if entry.ticket > self.applied {
                kept.insert(key, entry);
            } else if entry.ticket > 0 {
                self.move_version(&key);
            }
        }
        // What must be kept may be more than that: then the next turn comes when as much again is new.
        self.turn_at = CLEAN_MAX.max(2 * kept.len());
        self.old = std::mem::replace(&mut self.young, kept);
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

/// A customer as it stands in a row, without copying those that are not looked for. The fields are those of
/// [`Customer`], in its order.
#[derive(Deserialize)]
struct Stored<'a> {
    web_token: &'a str,
    plugin: Plugin,
    customer_token: Option<&'a str>,
    sdk_token: Option<&'a str>,
    h5push: Option<bool>,
    toggle: Toggle,
    heard: u64,
}

impl Stored<'_> {
    fn into_customer(self) -> Customer {
        Customer {
            web_token: self.web_token.to_owned(),
            plugin: self.plugin,
            customer_token: self.customer_token.map(str::to_owned),
            sdk_token: self.sdk_token.map(str::to_owned),
            h5push: self.h5push,
            toggle: self.toggle,
            heard: self.heard,
        }
    }
}

/// Buckets of customers, and of names: a few entries each up to some millions, so that a change rewrites little.
pub(super) const BUCKETS: u32 = 1 << 18;
const CUSTOMERS: u8 = b'c';
const NAMES: u8 = b'n';

fn bucket(hashing: &HashKey, name: &str) -> u32 {
    hashing.bucket(name) as u32 % BUCKETS
}

/// Reads what the queue's rows say.
pub(super) fn read(queue: &Queue, hashing: &HashKey, key: &StateKey) -> Result<StateValue, QueueError> {
    Ok(match key {
        StateKey::Customer(plugin, web_token) => {
            let found = queue.look_in_bucket(CUSTOMERS, bucket(hashing, web_token), |page| {
                let customers: Vec<Stored<'_>> =
                    postcard::from_bytes(page).map_err(|_| QueueError::Damaged("bucket"))?;
                let is_it = |customer: &Stored<'_>| customer.plugin == *plugin && customer.web_token == web_token;
                Ok(customers.into_iter().find(is_it).map(Stored::into_customer))
            })?;
            StateValue::Customer(found)
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
    bucket: u32,
    is_forgotten: impl Fn(&Customer) -> bool + Copy,
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
    for bucket in 0..BUCKETS {
        for customer in queue.bucket::<Customer>(CUSTOMERS, bucket)? {
            write(StateChange::PutCustomer(customer));
        }
        for NameEntry { kind, plugin, name, web_token } in queue.bucket(NAMES, bucket)? {
            write(StateChange::Name { kind, plugin, name, web_token: Some(web_token) });
        }
    }
    Ok(())
}
