//! What is remembered of customers, in memory: a bounded cache over the queue's rows that also holds every change which
//! the queue has not taken yet.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::sync::Arc;

use super::codec::StateChange;
use super::queue::{Queue, QueueError};
use crate::domain::customer::{Customer, NameKind, Toggle};
use crate::domain::endpoint::Plugin;
use crate::domain::keys::HashKey;
use serde::{Deserialize, Serialize};

/// Clean entries of a generation.
const CLEAN_MAX: usize = 20_000;

/// Changes beyond which requests wait until the queue has taken some.
const CHANGED_MAX: usize = 4_000;

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

/// An entry that a request changed.
#[derive(Clone, Debug)]
struct Changed {
    value: StateValue,
    /// The request.
    ticket: u64,
}

/// An entry before a change, to put back when the change could not be stored.
#[derive(Debug)]
pub(super) struct Undo {
    key: Arc<StateKey>,
    before: Option<Changed>,
}

/// What the queue has too. Two generations: what was not used while one filled goes.
#[derive(Debug, Default)]
struct Clean {
    young: HashMap<Arc<StateKey>, StateValue>,
    old: HashMap<Arc<StateKey>, StateValue>,
}

impl Clean {
    fn get(&mut self, key: &StateKey) -> Option<&StateValue> {
        if !self.young.contains_key(key)
            && let Some((key, value)) = self.old.remove_entry(key)
        {
            self.keep(key, value);
        }
        self.young.get(key)
    }

    fn keep(&mut self, key: Arc<StateKey>, value: StateValue) {
        if self.young.len() >= CLEAN_MAX {
            // The table of the generation that goes is used again.
            std::mem::swap(&mut self.young, &mut self.old);
            self.young.clear();
        }
        self.young.insert(key, value);
    }

    fn take(&mut self, key: &StateKey) -> Option<StateValue> {
        self.young.remove(key).or_else(|| self.old.remove(key))
    }
}

/// The cache: changes that the queue has yet to take, over what it has.
#[derive(Debug)]
pub(super) struct StateCache {
    changed: HashMap<Arc<StateKey>, Changed>,
    /// Every change since, oldest first; an entry stays in `changed` until its last one is taken.
    order: VecDeque<(u64, Arc<StateKey>)>,
    applied: u64,
    clean: Clean,
    /// By a hash of the key: moves when the queue has taken an entry, and when a change is undone.
    versions: Vec<u32>,
    hasher: RandomState,
}

/// Keys share a version with few others.
const VERSIONS: usize = 1 << 14;

impl StateCache {
    pub(super) fn new() -> StateCache {
        StateCache {
            changed: HashMap::new(),
            order: VecDeque::new(),
            applied: 0,
            clean: Clean::default(),
            versions: vec![0; VERSIONS],
            hasher: RandomState::new(),
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
        match self.changed.get(key) {
            Some(changed) => Some(&changed.value),
            None => self.clean.get(key),
        }
    }

    /// Takes what was read from the queue since `version`, unless something newer is or was known.
    pub(super) fn fill(&mut self, key: StateKey, version: u32, value: StateValue) {
        if self.get(&key).is_none() && self.version(&key) == version {
            self.clean.keep(Arc::new(key), value);
        }
    }

    /// Changes an entry on behalf of a request.
    pub(super) fn put(&mut self, key: StateKey, value: StateValue, ticket: u64) -> Undo {
        let key = Arc::new(key);
        self.order.push_back((ticket, Arc::clone(&key)));
        let clean = self.clean.take(&key);
        let before = self.changed.insert(Arc::clone(&key), Changed { value, ticket });
        Undo { key, before: before.or(clean.map(|value| Changed { value, ticket: 0 })) }
    }

    pub(super) fn undo(&mut self, undo: Undo) {
        self.move_version(&undo.key);
        self.changed.remove(&undo.key);
        // Undone newest first: the change that goes is the last one.
        if self.order.back().is_some_and(|(_, key)| *key == undo.key) {
            self.order.pop_back();
        }
        match undo.before {
            Some(before) if before.ticket > self.applied => drop(self.changed.insert(undo.key, before)),
            Some(before) => self.clean.keep(undo.key, before.value),
            None => (),
        }
    }

    /// The queue has taken the changes of all requests up to this one.
    pub(super) fn applied(&mut self, ticket: u64) {
        self.applied = self.applied.max(ticket);
        while self.order.front().is_some_and(|(of, _)| *of <= self.applied) {
            let Some((_, key)) = self.order.pop_front() else { break };
            if self.changed.get(&key).is_some_and(|changed| changed.ticket <= self.applied)
                && let Some((key, changed)) = self.changed.remove_entry(&key)
            {
                self.move_version(&key);
                self.clean.keep(key, changed.value);
            }
        }
    }

    /// Changed customers of that token which the queue may not have yet.
    pub(super) fn customers_of(&self, web_token: &str) -> Vec<Plugin> {
        let of_it = |key: &Arc<StateKey>| match &**key {
            StateKey::Customer(plugin, token) if token == web_token => Some(*plugin),
            StateKey::Customer(..) | StateKey::Name(..) => None,
        };
        self.changed.keys().filter_map(of_it).collect()
    }

    /// Whether more changes wait for the queue than memory is meant for.
    pub(super) fn is_crowded(&self) -> bool {
        self.order.len() > CHANGED_MAX
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
                Ok(customers.into_iter().find(is_it).map(Stored::into_customer).map(Box::new))
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

/// Where a change goes: changes of one bucket have the same place, and places next to each other share pages.
pub(super) fn place(hashing: &HashKey, change: &StateChange) -> (u8, u32) {
    match change {
        StateChange::PutCustomer(Customer { web_token, .. }) | StateChange::DropCustomer { web_token, .. } => {
            (CUSTOMERS, bucket(hashing, web_token))
        }
        StateChange::Name { name, .. } => (NAMES, bucket(hashing, name)),
        StateChange::Setting { .. } | StateChange::Nonce { .. } => (0, 0),
    }
}

/// Makes a change in the queue's rows. `is_forgotten` says which other customers of the bucket are to go. Answers how
/// many changes before it no longer count.
pub(super) fn apply(
    queue: &Queue,
    hashing: &HashKey,
    change: &StateChange,
    is_forgotten: impl Fn(&Customer) -> bool,
) -> Result<usize, QueueError> {
    let (_, bucket) = place(hashing, change);
    match change {
        StateChange::PutCustomer(customer) => {
            let mut customers: Vec<Customer> = queue.bucket(CUSTOMERS, bucket)?;
            let before = customers.len();
            customers.retain(|other| {
                let is_it = other.plugin == customer.plugin && other.web_token == customer.web_token;
                !is_it && !is_forgotten(other)
            });
            let gone = before - customers.len();
            customers.push(customer.clone());
            queue.put_bucket(CUSTOMERS, bucket, &customers)?;
            Ok(gone)
        }
        StateChange::DropCustomer { plugin, web_token } => {
            let mut customers: Vec<Customer> = queue.bucket(CUSTOMERS, bucket)?;
            let before = customers.len();
            customers.retain(|other| other.plugin != *plugin || other.web_token != *web_token);
            let gone = before - customers.len();
            queue.put_bucket(CUSTOMERS, bucket, &customers)?;
            Ok(gone + 1)
        }
        StateChange::Name { kind, plugin, name, web_token } => {
            let mut names: Vec<NameEntry> = queue.bucket(NAMES, bucket)?;
            let before = names.len();
            names.retain(|other| other.kind != *kind || other.plugin != *plugin || other.name != *name);
            let gone = before - names.len() + usize::from(web_token.is_none());
            if let Some(web_token) = web_token {
                let (name, web_token) = (name.clone(), web_token.clone());
                names.push(NameEntry { kind: *kind, plugin: *plugin, name, web_token });
            }
            queue.put_bucket(NAMES, bucket, &names)?;
            Ok(gone)
        }
        StateChange::Setting { key, value } => queue.put_setting(key, value.as_deref()).map(|()| 1),
        // It is out of date before the log is long.
        StateChange::Nonce { key, until_s } => queue.put_nonce(*key, *until_s).map(|()| 1),
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
pub(super) fn dump(queue: &Queue, mut write: impl FnMut(StateChange) -> io::Result<()>) -> Result<(), QueueError> {
    for (key, value) in queue.settings()? {
        write(StateChange::Setting { key, value: Some(value) })?;
    }
    for (key, until_s) in queue.nonces()? {
        write(StateChange::Nonce { key, until_s })?;
    }
    for bucket in 0..BUCKETS {
        for customer in queue.bucket::<Customer>(CUSTOMERS, bucket)? {
            write(StateChange::PutCustomer(customer))?;
        }
        for NameEntry { kind, plugin, name, web_token } in queue.bucket(NAMES, bucket)? {
            write(StateChange::Name { kind, plugin, name, web_token: Some(web_token) })?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_undone_is_not_waited_for() {
        let mut cache = StateCache::new();
        for round in 0..3 * CHANGED_MAX as u64 {
            let key = StateKey::Customer(Plugin::NONE, round.to_string());
            let undo = cache.put(key, StateValue::Customer(None), round + 1);
            assert!(!cache.is_crowded());
            cache.undo(undo);
        }
        assert_eq!((cache.order.len(), cache.changed.len()), (0, 0));
    }

    #[test]
    fn a_row_read_before_a_change_never_hides_it() {
        let mut cache = StateCache::new();
        let key = || StateKey::Customer(Plugin::NONE, "a".to_owned());
        let named = |token: &str| StateValue::Customer(Some(Box::new(Customer::new(token, Plugin::NONE))));
        let version = cache.version(&key());
        cache.put(key(), named("new"), 1);
        cache.fill(key(), version, named("old"));
        assert_eq!(cache.get(&key()), Some(&named("new")));
        cache.applied(1);
        assert_eq!(cache.get(&key()), Some(&named("new")), "it stays for a while");
        // It leaves the cache while another reader still has the row of before.
        for other in 0..3 * CLEAN_MAX as u64 {
            let version = cache.version(&StateKey::Customer(Plugin::NONE, format!("x{other}")));
            cache.fill(StateKey::Customer(Plugin::NONE, format!("x{other}")), version, StateValue::Customer(None));
        }
        cache.fill(key(), version, named("old"));
        assert_eq!(cache.get(&key()), None, "what was read before is not believed");
    }
}
