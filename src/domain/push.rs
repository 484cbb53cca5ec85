//! A push: the body that is posted, and its `webhook-id` (contract §5).

use std::hash::Hasher;

use siphasher::sip128::{Hasher128, SipHasher13};

use super::endpoint::Plugin;
use super::keys::{EventKey, HashKey};

/// How much goes into one push.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PushBounds {
    /// Most messages (`push.max_messages`).
    pub messages_max: u32,
    /// Most bytes of messages (`push.max_bytes`).
    pub bytes_max: usize,
}

/// Collects the waiting events of a lane into one push.
#[derive(Debug, Default)]
pub struct Composition {
    messages: u32,
    text: String,
    events: u32,
}

impl Composition {
    /// Takes an event if it still fits; the first one always does. An event is never split.
    pub fn take(&mut self, count: u32, text: &str, bounds: PushBounds) -> bool {
        let fits = self.messages.saturating_add(count) <= bounds.messages_max
            && self.text.len() + 1 + text.len() <= bounds.bytes_max;
        if self.events > 0 && !fits {
            return false;
        }
        if self.events > 0 {
            self.text.push(',');
        }
        self.text.push_str(text);
        self.messages += count;
        self.events += 1;
        true
    }

    /// Messages taken so far.
    #[must_use]
    pub fn messages(&self) -> u32 {
        self.messages
    }

    /// The body: these fields and no others.
    ///
    /// # Errors
    /// Never for a string; serde_json's writer says so in its type only.
    pub fn body(&self, web_token: &str, plugin: Plugin) -> Result<String, serde_json::Error> {
        let mut body = String::with_capacity(self.text.len() + web_token.len() + 80);
        body.push_str("{\"web_token\":");
        body.push_str(&serde_json::to_string(web_token)?);
        if let Some(id) = plugin.given() {
            body.push_str(",\"im_web_plugin_id\":");
            body.push_str(&id.to_string());
        }
        body.push_str(",\"messages\":[");
        body.push_str(&self.text);
        body.push_str("]}");
        Ok(body)
    }
}

/// The `webhook-id` of a push: the same for the same events of the same store, and for no others. Sequence numbers alone
/// would be used again by a store that was restored from a backup.
#[must_use]
pub fn webhook_id(key: &HashKey, events: &[(u64, EventKey)]) -> String {
    let mut hasher = SipHasher13::new_with_key(&key.0);
    hasher.write(b"push");
    for (seq, key) in events {
        hasher.write_u64(*seq);
        hasher.write(&key.to_le_bytes());
    }
    format!("msg_{:032x}", hasher.finish128().as_u128())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: PushBounds = PushBounds { messages_max: 3, bytes_max: 40 };

    #[test]
    fn events_go_together_up_to_the_bounds_and_alone_beyond_them() {
        let mut few = Composition::default();
        assert!(few.take(2, r#"{"a":1},{"a":2}"#, BOUNDS));
        assert!(few.take(1, r#"{"a":3}"#, BOUNDS));
        assert!(!few.take(1, r#"{"a":4}"#, BOUNDS));
        assert_eq!(
            few.body("t\"\n", Plugin::new(12).unwrap()).unwrap(),
            r#"{"web_token":"t\"\n","im_web_plugin_id":12,"messages":[{"a":1},{"a":2},{"a":3}]}"#
        );
        let mut large = Composition::default();
        let text = format!(r#"{{"x":"{}"}}"#, "y".repeat(100));
        assert!(large.take(7, &text, BOUNDS));
        assert!(!large.take(1, "{}", BOUNDS));
        assert_eq!(large.body("a", Plugin::NONE).unwrap(), format!(r#"{{"web_token":"a","messages":[{text}]}}"#));
    }

    #[test]
    fn ids_depend_on_the_store_and_on_every_event() {
        let key = HashKey([1; 16]);
        let events = [(1, 7), (2, 8)];
        assert_eq!(webhook_id(&key, &events), webhook_id(&key, &events));
        assert_ne!(webhook_id(&key, &events), webhook_id(&key, &events[..1]));
        assert_ne!(webhook_id(&key, &events), webhook_id(&HashKey([2; 16]), &events));
        assert_ne!(webhook_id(&key, &events), webhook_id(&key, &[(1, 7), (2, 9)]), "the numbers of a backup");
        assert!(!webhook_id(&key, &events).contains('.'));
    }
}
