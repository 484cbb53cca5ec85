//! What is remembered of a customer: the switches, and the other names.

use serde::{Deserialize, Serialize};

use super::endpoint::Plugin;

/// Longest token and name of a customer, in bytes.
pub const TOKEN_BYTES_MAX: usize = 256;

/// A customer's forced push switch (contract §1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Toggle {
    /// Unset: the IM server's judgement holds.
    #[default]
    Auto,
    /// Pushing is forced on.
    On,
    /// Pushing is forced off.
    Off,
}

impl Toggle {
    /// Every one.
    pub const ALL: [Toggle; 3] = [Toggle::Auto, Toggle::On, Toggle::Off];

    /// The contract's word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Toggle::Auto => "auto",
            Toggle::On => "on",
            Toggle::Off => "off",
        }
    }
}

/// Which of a customer's other names a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum NameKind {
    /// `customer_token`
    Customer,
    /// `sdk_token`
    Sdk,
}

/// One person at one plugin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Customer {
    /// The person.
    pub web_token: String,
    /// The web plugin.
    pub plugin: Plugin,
    /// Another name, if it was told.
    pub customer_token: Option<String>,
    /// Another name, if it was told.
    pub sdk_token: Option<String>,
    /// Whether the page was opened with `h5push=true`; `None`: not known.
    pub h5push: Option<bool>,
    /// The forced switch.
    pub toggle: Toggle,
    /// When the customer was last heard of, Unix seconds, in steps of [`heard_step`].
    pub heard: u64,
}

/// What a request says of a customer; `None` leaves things as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hearing {
    /// `customer_token`
    pub customer_token: Option<String>,
    /// `sdk_token`
    pub sdk_token: Option<String>,
    /// `h5push`
    pub h5push: Option<bool>,
    /// `toggle`
    pub toggle: Option<Toggle>,
}

/// How exactly "last heard of" is kept, in seconds: a sixteenth of `forget_after`, at most a day, so that
/// most events change nothing on disk.
#[must_use]
pub fn heard_step(forget_after_s: u64) -> u64 {
    (forget_after_s / 16).clamp(1, 86_400)
}

impl Customer {
    /// A customer of whom only the name is known.
    #[must_use]
    pub fn new(web_token: &str, plugin: Plugin) -> Customer {
        Customer {
            web_token: web_token.to_owned(),
            plugin,
            customer_token: None,
            sdk_token: None,
            h5push: None,
            toggle: Toggle::Auto,
            heard: 0,
        }
    }

    /// The other name of that kind.
    #[must_use]
    pub fn name(&self, kind: NameKind) -> Option<&str> {
        match kind {
            NameKind::Customer => self.customer_token.as_deref(),
            NameKind::Sdk => self.sdk_token.as_deref(),
        }
    }

    /// Sets or removes the other name of that kind.
    pub fn set_name(&mut self, kind: NameKind, name: Option<String>) {
        match kind {
            NameKind::Customer => self.customer_token = name,
            NameKind::Sdk => self.sdk_token = name,
        }
    }

    /// The customer after a request that said `hearing` at `now_s`.
    #[must_use]
    pub fn after(&self, hearing: &Hearing, now_s: u64, forget_after_s: u64) -> Customer {
        let mut next = self.clone();
        if let Some(name) = &hearing.customer_token {
            next.customer_token = Some(name.clone());
        }
        if let Some(name) = &hearing.sdk_token {
            next.sdk_token = Some(name.clone());
        }
        next.h5push = hearing.h5push.or(next.h5push);
        next.toggle = hearing.toggle.unwrap_or(next.toggle);
        // Also after a wall clock that leapt ahead has come back.
        if now_s.abs_diff(next.heard) >= heard_step(forget_after_s) {
            next.heard = now_s;
        }
        next
    }

    /// Whether the customer was not heard of for `forget_after_s`.
    #[must_use]
    pub fn is_forgotten(&self, now_s: u64, forget_after_s: u64) -> bool {
        now_s.saturating_sub(self.heard) > forget_after_s.saturating_add(heard_step(forget_after_s))
    }
}
