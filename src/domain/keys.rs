//! Keyed hashes that stand for long names: lanes (64 bits) and idempotency keys (128 bits).
//!
//! The key is random for each data directory, so that nobody outside can make two names collide.

use std::hash::Hasher;

use siphasher::sip::SipHasher13;
use siphasher::sip128::{Hasher128, SipHasher13 as Sip128};

use super::endpoint::{EndpointName, Plugin};

/// The secret of one data directory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct HashKey(pub [u8; 16]);

/// An event's idempotency key.
pub type EventKey = u128;

/// A lane: customer, plugin, endpoint. Two lanes with one key are merely served as one; readers compare the names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct LaneKey(pub u64);

impl std::fmt::Debug for HashKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HashKey(…)")
    }
}

impl HashKey {
    /// The secret of a data directory, by its identity.
    #[must_use]
    pub fn of(identity: [u8; 32]) -> HashKey {
        HashKey(std::array::from_fn(|at| identity.get(at).copied().unwrap_or(0)))
    }

    /// The lane of a customer of a plugin for an endpoint.
    #[must_use]
    pub fn lane(&self, endpoint: EndpointName, plugin: Plugin, web_token: &str) -> LaneKey {
        let mut hasher = SipHasher13::new_with_key(&self.0);
        hasher.write_u64(endpoint.number());
        hasher.write_u64(plugin.id());
        hasher.write(web_token.as_bytes());
        LaneKey(hasher.finish())
    }

    /// The lanes that a customer's pushes of a plugin may wait in, with their endpoints.
    pub fn lanes(&self, plugin: Plugin, web_token: &str) -> impl Iterator<Item = (EndpointName, LaneKey)> {
        EndpointName::that_take(plugin).map(move |endpoint| (endpoint, self.lane(endpoint, plugin, web_token)))
    }

    /// The bucket number of a name, over all plugins.
    #[must_use]
    pub fn bucket(&self, name: &str) -> u64 {
        let mut hasher = SipHasher13::new_with_key(&self.0);
        hasher.write(b"bucket");
        hasher.write(name.as_bytes());
        hasher.finish()
    }

    /// The key of an `event_id` that the IM server gave.
    #[must_use]
    pub fn given_event(&self, plugin: Plugin, event_id: &str) -> EventKey {
        self.event(b'g', plugin, std::iter::once(event_id))
    }

    /// The key that is made of the customer and the list of `message_id`s. Never equal to a given one.
    #[must_use]
    pub fn derived_event<'a>(
        &self,
        plugin: Plugin,
        web_token: &'a str,
        message_ids: impl IntoIterator<Item = &'a str>,
    ) -> EventKey {
        self.event(b'd', plugin, std::iter::once(web_token).chain(message_ids))
    }

    /// The key of an account's nonce.
    #[must_use]
    pub fn nonce(&self, account: &str, nonce: &str) -> EventKey {
        self.event(b'n', Plugin::NONE, [account, nonce].into_iter())
    }

    fn event<'a>(&self, tag: u8, plugin: Plugin, parts: impl Iterator<Item = &'a str>) -> EventKey {
        let mut hasher = Sip128::new_with_key(&self.0);
        hasher.write_u8(tag);
        hasher.write_u64(plugin.id());
        for part in parts {
            hasher.write_u64(part.len() as u64);
            hasher.write(part.as_bytes());
        }
        hasher.finish128().as_u128()
    }
}

/// What an event's id begins with that is made of its `message_id`s.
const DERIVED: &str = "mid_";

/// The `event_id` of an event that came without one: its key, so that it need not be stored.
#[must_use]
pub fn derived_id(key: EventKey) -> String {
    format!("{DERIVED}{key:032x}")
}

/// The key that an id says, if it is a derived one.
#[must_use]
pub fn key_of_derived(event_id: &str) -> Option<EventKey> {
    event_id.strip_prefix(DERIVED).and_then(|hex| u128::from_str_radix(hex, 16).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_derived_id_says_its_key() {
        for key in [0, 1, 0x0123_4567_89ab_cdef, u128::MAX] {
            assert_eq!(key_of_derived(&derived_id(key)), Some(key));
        }
        assert_eq!(key_of_derived("evt_00000000000000000000000000000001"), None);
        assert_eq!(key_of_derived("mid_"), None);
    }

    #[test]
    fn event_keys_differ_by_plugin_kind_and_cut() {
        let key = HashKey([7; 16]);
        let (a, b) = (Plugin::new(1).unwrap(), Plugin::new(2).unwrap());
        let all = [
            key.given_event(a, "x"),
            key.given_event(b, "x"),
            key.derived_event(a, "x", []),
            key.derived_event(a, "x", ["y", "z"]),
            key.derived_event(a, "x", ["yz"]),
            key.derived_event(a, "xy", ["z"]),
            key.derived_event(a, "x", ["z", "y"]),
        ];
        let distinct: std::collections::HashSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
    }
}
