//! A bounded cache over the queue's rows that also holds every change which the queue has not taken yet.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;

use super::{StateKey, StateValue};
use crate::domain::endpoint::Plugin;

/// Clean entries of a generation.
const CLEAN_MAX: usize = 20_000;

/// Changes beyond which requests wait until the queue has taken some.
const CHANGED_MAX: usize = 4_000;

/// An entry that a request changed.
#[derive(Clone, Debug)]
struct Changed {
    value: StateValue,
    /// The request.
    ticket: u64,
}

/// An entry before a change, to put back when the change could not be stored.
#[derive(Debug)]
pub(in crate::store) struct Undo {
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
pub(in crate::store) struct StateCache {
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
    pub(in crate::store) fn new() -> StateCache {
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
    pub(in crate::store) fn version(&self, key: &StateKey) -> u32 {
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

    pub(in crate::store) fn get(&mut self, key: &StateKey) -> Option<&StateValue> {
        match self.changed.get(key) {
            Some(changed) => Some(&changed.value),
            None => self.clean.get(key),
        }
    }

    /// The last request that changed an entry which the queue has not taken yet; 0 without one.
    pub(in crate::store) fn changed_by(&self, key: &StateKey) -> u64 {
        self.changed.get(key).map_or(0, |changed| changed.ticket)
    }

    /// Takes what was read from the queue since `version`, unless something newer is or was known.
    pub(in crate::store) fn fill(&mut self, key: StateKey, version: u32, value: StateValue) {
        if self.get(&key).is_none() && self.version(&key) == version {
            self.clean.keep(Arc::new(key), value);
        }
    }

    /// Changes an entry on behalf of a request.
    pub(in crate::store) fn put(&mut self, key: StateKey, value: StateValue, ticket: u64) -> Undo {
        let key = Arc::new(key);
        self.order.push_back((ticket, Arc::clone(&key)));
        let clean = self.clean.take(&key);
        let before = self.changed.insert(Arc::clone(&key), Changed { value, ticket });
        Undo { key, before: before.or(clean.map(|value| Changed { value, ticket: 0 })) }
    }

    pub(in crate::store) fn undo(&mut self, undo: Undo) {
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
    pub(in crate::store) fn applied(&mut self, ticket: u64) {
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
    pub(in crate::store) fn customers_of(&self, web_token: &str) -> Vec<Plugin> {
        let of_it = |key: &Arc<StateKey>| match &**key {
            StateKey::Customer(plugin, token) if token == web_token => Some(*plugin),
            StateKey::Customer(..) | StateKey::Name(..) => None,
        };
        self.changed.keys().filter_map(of_it).collect()
    }

    /// Whether more changes wait for the queue than memory is meant for.
    pub(in crate::store) fn is_crowded(&self) -> bool {
        self.order.len() > CHANGED_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::customer::Customer;

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
