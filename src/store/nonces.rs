//! The nonces of signed calls that are used up, each until its timestamp is stale.

use std::collections::{BTreeSet, HashMap};

/// Most nonces at once: some 60 bytes each. Ten accounts at 600 calls a minute use 180,000.
const NONCES_MAX: usize = 1_000_000;

/// Nonces, by a hash of account and nonce.
#[derive(Debug, Default)]
pub(super) struct Nonces {
    until: HashMap<u128, u64>,
    order: BTreeSet<(u64, u128)>,
}

impl Nonces {
    /// Whether it is used up.
    pub(super) fn contains(&self, key: u128, now_s: u64) -> bool {
        self.until.get(&key).is_some_and(|until| *until >= now_s)
    }

    /// Uses a nonce up; `false` when it was used before, or may have been and is forgotten, or no more can be remembered.
    pub(super) fn take(&mut self, key: u128, until_s: u64, now_s: u64) -> bool {
        while let Some((until, key)) = self.order.first().copied().filter(|(until, _)| *until < now_s) {
            self.order.remove(&(until, key));
            self.until.remove(&key);
        }
        if until_s < now_s || self.until.len() >= NONCES_MAX || self.until.contains_key(&key) {
            return false;
        }
        self.until.insert(key, until_s);
        self.order.insert((until_s, key))
    }

    /// Takes back what could not be stored.
    pub(super) fn forget(&mut self, key: u128) {
        if let Some(until) = self.until.remove(&key) {
            self.order.remove(&(until, key));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nonce_works_once_until_it_is_stale() {
        let mut nonces = Nonces::default();
        assert!(nonces.take(1, 100, 0));
        assert!(!nonces.take(1, 100, 50));
        assert!(!nonces.take(1, 130, 100), "until its end");
        assert!(nonces.contains(1, 100) && !nonces.contains(1, 101) && !nonces.contains(2, 0));
        assert!(!nonces.take(1, 100, 101), "its timestamp became stale while the body came");
        assert!(nonces.take(1, 200, 101));
        nonces.forget(1);
        assert!(nonces.take(1, 200, 102), "its call was not stored");
        assert_eq!((nonces.until.len(), nonces.order.len()), (1, 1));
    }
}
