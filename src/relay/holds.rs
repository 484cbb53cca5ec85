//! How long endpoints asked to be left alone (`Retry-After`), kept over a restart.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Relay;
use crate::clock;
use crate::config::{Endpoint, Endpoints};
use crate::domain::endpoint::EndpointName;

const PREFIX: &str = "held/";
/// A hold that is shorter is over before a restart is.
const KEPT_MIN: Duration = Duration::from_secs(1);
/// A hold that is shorter is not logged: each wave of 429 has one.
const SAID_MIN: Duration = Duration::from_secs(60);

/// How long endpoints are still to be left alone, from the store's settings. Another URL has asked for nothing yet.
#[must_use]
pub fn holds(settings: &BTreeMap<String, String>, endpoints: &Endpoints) -> Vec<(EndpointName, Duration)> {
    let now_ms = clock::wall_ms();
    let read = |(key, value): (&String, &String)| {
        let name = EndpointName::any(key.strip_prefix(PREFIX)?).ok()?;
        let (times, url) = value.split_once(' ')?;
        if url != mark(endpoints.get(&name)?.as_ref()?) {
            return None;
        }
        // Versions before this one kept no wait.
        let (until, wait) = times.split_once('/').unwrap_or((times, times));
        let left_ms = until.parse::<u64>().ok()?.checked_sub(now_ms).filter(|left| *left > 0)?;
        // Never longer than it was asked for: the clock may have been set back.
        Some((name, Duration::from_millis(left_ms.min(wait.parse().ok()?))))
    };
    settings.iter().filter_map(read).collect()
}

impl Relay {
    /// Remembers that an endpoint is to be left alone for so long.
    pub(super) fn keep_hold(&self, name: EndpointName, wait: Duration) {
        if let Some(target) = self.targets.get(&name).filter(|_| wait >= KEPT_MIN) {
            let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
            let until_ms = clock::wall_ms().saturating_add(wait_ms);
            self.store.note_setting(&key(name), Some(format!("{until_ms}/{wait_ms} {}", mark(&target.endpoint))));
        }
        if wait >= SAID_MIN {
            tracing::info!(endpoint = %name, seconds = wait.as_secs(), "the receiver asks to be left alone");
        }
    }

    /// Forgets it.
    pub(super) fn drop_hold(&self, name: EndpointName) {
        if self.store.has_setting(&key(name)) {
            self.store.note_setting(&key(name), None);
        }
    }
}

/// Which URL it was.
fn mark(endpoint: &Endpoint) -> String {
    format!("{:08x}", crc32c::crc32c(endpoint.url.uri().to_string().as_bytes()))
}

fn key(name: EndpointName) -> String {
    format!("{PREFIX}{name}")
}
