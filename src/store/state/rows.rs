//! Customers and names as rows of the queue's: in buckets by a hash of their name.

use std::io;

use serde::{Deserialize, Serialize};

use super::{StateKey, StateValue};
use crate::domain::customer::{Customer, NameKind, Toggle};
use crate::domain::endpoint::Plugin;
use crate::domain::keys::HashKey;
use crate::store::codec::StateChange;
use crate::store::queue::{Queue, QueueError};

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
pub(in crate::store) const BUCKETS: u32 = 1 << 18;
const CUSTOMERS: u8 = b'c';
const NAMES: u8 = b'n';

fn bucket(hashing: &HashKey, name: &str) -> u32 {
    hashing.bucket(name) as u32 % BUCKETS
}

/// Reads what the queue's rows say.
pub(in crate::store) fn read(queue: &Queue, hashing: &HashKey, key: &StateKey) -> Result<StateValue, QueueError> {
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
pub(in crate::store) fn plugins_of(
    queue: &Queue,
    hashing: &HashKey,
    web_token: &str,
) -> Result<Vec<Plugin>, QueueError> {
    let customers: Vec<Customer> = queue.bucket(CUSTOMERS, bucket(hashing, web_token))?;
    Ok(customers.into_iter().filter(|other| other.web_token == web_token).map(|other| other.plugin).collect())
}

/// Where a change goes: changes of one bucket have the same place, and places next to each other share pages.
pub(in crate::store) fn place(hashing: &HashKey, change: &StateChange) -> (u8, u32) {
    match change {
        StateChange::PutCustomer(Customer { web_token, .. }) | StateChange::DropCustomer { web_token, .. } => {
            (CUSTOMERS, bucket(hashing, web_token))
        }
        StateChange::Name { name, .. } => (NAMES, bucket(hashing, name)),
        StateChange::Setting { .. } | StateChange::Nonce { .. } => (0, 0),
    }
}

/// Makes a change in the queue's rows. Answers how many changes before it no longer count.
pub(in crate::store) fn apply(queue: &Queue, hashing: &HashKey, change: &StateChange) -> Result<usize, QueueError> {
    let (_, bucket) = place(hashing, change);
    match change {
        StateChange::PutCustomer(customer) => {
            let mut customers: Vec<Customer> = queue.bucket(CUSTOMERS, bucket)?;
            let before = customers.len();
            customers.retain(|other| other.plugin != customer.plugin || other.web_token != customer.web_token);
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

/// Drops what is forgotten from one bucket, with its names; says how many customers and how many names.
pub(in crate::store) fn sweep(
    queue: &Queue,
    hashing: &HashKey,
    bucket: u32,
    is_forgotten: impl Fn(&Customer) -> bool + Copy,
) -> Result<usize, QueueError> {
    let customers: Vec<Customer> = queue.bucket(CUSTOMERS, bucket)?;
    let (gone, kept): (Vec<Customer>, Vec<Customer>) = customers.into_iter().partition(|other| is_forgotten(other));
    if gone.is_empty() {
        return Ok(0);
    }
    let mut names = 0;
    for customer in &gone {
        for kind in [NameKind::Customer, NameKind::Sdk] {
            let Some(name) = customer.name(kind) else { continue };
            let key = StateKey::Name(kind, customer.plugin, name.to_owned());
            if read(queue, hashing, &key)? == StateValue::Name(Some(customer.web_token.clone())) {
                let (plugin, name) = (customer.plugin, name.to_owned());
                apply(queue, hashing, &StateChange::Name { kind, plugin, name, web_token: None })?;
                names += 1;
            }
        }
    }
    queue.put_bucket(CUSTOMERS, bucket, &kept)?;
    Ok(gone.len() + names)
}

/// Every change that would build the rows anew, bucket by bucket.
pub(in crate::store) fn dump(
    queue: &Queue,
    mut write: impl FnMut(StateChange) -> io::Result<()>,
) -> Result<(), QueueError> {
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
