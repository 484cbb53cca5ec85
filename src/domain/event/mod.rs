//! An event as the IM server posts it (contract §3): parsed, checked, not copied.

mod messages;

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};
use serde_json::value::RawValue;

use self::messages::MessagesVisitor;
use super::customer::{Hearing, TOKEN_BYTES_MAX};
use super::endpoint::Plugin;
use super::gate::{Assign, Question};
use super::keys::{EventKey, HashKey};

/// Most messages of an event.
pub const MESSAGES_MAX: usize = 1_000;
/// Longest `event_id`, in bytes.
pub const EVENT_ID_BYTES_MAX: usize = 128;
/// Deepest nesting of an event, its own object being the first level.
pub const DEPTH_MAX: usize = 128;

/// Why a posted value is no event.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct Invalid {
    /// The field, or `event` for the whole.
    pub field: Cow<'static, str>,
    /// What is wrong with it.
    pub problem: String,
}

/// An event, borrowing from the request's body.
#[derive(Debug, PartialEq)]
pub struct Event<'a> {
    /// The customer.
    pub web_token: Cow<'a, str>,
    /// The web plugin.
    pub plugin: Plugin,
    /// What it says of the customer.
    pub hearing: Hearing,
    /// Whether the IM server takes the customer to be offline.
    pub offline: bool,
    /// Who speaks.
    pub assign: Assign,
    /// The idempotency key that was given.
    pub event_id: Option<Cow<'a, str>>,
    /// What is relayed; empty when a robot speaks.
    pub messages: Messages<'a>,
}

/// The `messages` of an agent's event.
#[derive(Debug, Default, PartialEq)]
pub struct Messages<'a> {
    /// What stands between the brackets, byte for byte.
    pub text: &'a str,
    /// How many, 1 to [`MESSAGES_MAX`].
    pub count: u32,
    /// Whether one has an `im_sub_session_id` above 0.
    pub has_session: bool,
    /// Whether one is a `close`.
    pub has_close: bool,
    /// The `message_id`s, when every message has a non-empty one.
    pub ids: Option<Vec<Cow<'a, str>>>,
}

#[derive(Deserialize)]
struct Fields<'a> {
    #[serde(borrow)]
    web_token: Option<&'a RawValue>,
    #[serde(borrow)]
    messages: Option<&'a RawValue>,
    #[serde(borrow)]
    im_web_plugin_id: Option<&'a RawValue>,
    #[serde(borrow)]
    h5push: Option<&'a RawValue>,
    #[serde(borrow)]
    offline: Option<&'a RawValue>,
    #[serde(borrow)]
    assign_type: Option<&'a RawValue>,
    #[serde(borrow)]
    event_id: Option<&'a RawValue>,
    #[serde(borrow)]
    customer_token: Option<&'a RawValue>,
    #[serde(borrow)]
    sdk_token: Option<&'a RawValue>,
}

impl<'a> Event<'a> {
    /// Reads one event. An optional field that is `null` is taken as absent.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn parse(text: &'a str) -> Result<Event<'a>, Invalid> {
        let text = text.trim_matches(JSON_SPACE);
        if !text.starts_with('{') {
            return Err(invalid("event", "must be a JSON object"));
        }
        if depth(text.as_bytes()) > DEPTH_MAX {
            return Err(invalid("event", format!("nested deeper than {DEPTH_MAX} levels")));
        }
        let fields: Fields<'a> = serde_json::from_str(text).map_err(|error| invalid("event", error.to_string()))?;
        let web_token = bounded(fields.web_token, "web_token", TOKEN_BYTES_MAX)?
            .ok_or_else(|| invalid("web_token", "is required"))?;
        let plugin = match fields.im_web_plugin_id {
            None => Plugin::NONE,
            Some(raw) => serde_json::from_str::<u64>(raw.get())
                .ok()
                .and_then(Plugin::new)
                .ok_or_else(|| invalid("im_web_plugin_id", "must be an integer from 0 to 2^63-1"))?,
        };
        let assign = match string(fields.assign_type, "assign_type")?.as_deref() {
            None | Some("agent") => Assign::Agent,
            Some("robot" | "urobot") => Assign::Robot,
            Some(_) => return Err(invalid("assign_type", "must be agent, robot or urobot")),
        };
        let name = |raw, field| -> Result<Option<String>, Invalid> {
            let name = string(raw, field)?.filter(|name| !name.is_empty());
            match name {
                Some(name) if name.len() > TOKEN_BYTES_MAX => Err(too_long(field, TOKEN_BYTES_MAX)),
                Some(name) => Ok(Some(name.into_owned())),
                None => Ok(None),
            }
        };
        Ok(Event {
            plugin,
            hearing: Hearing {
                customer_token: name(fields.customer_token, "customer_token")?,
                sdk_token: name(fields.sdk_token, "sdk_token")?,
                h5push: boolean(fields.h5push, "h5push")?,
                toggle: None,
            },
            offline: boolean(fields.offline, "offline")?.unwrap_or(true),
            assign,
            event_id: bounded(fields.event_id, "event_id", EVENT_ID_BYTES_MAX)?,
            messages: match assign {
                Assign::Robot => Messages::default(),
                Assign::Agent => messages(fields.messages)?,
            },
            web_token,
        })
    }

    /// The idempotency key: the given one, or made of the `message_id`s; `None` when there is neither.
    #[must_use]
    pub fn key(&self, hashing: &HashKey) -> Option<EventKey> {
        match (&self.event_id, &self.messages.ids) {
            (Some(id), _) => Some(hashing.given_event(self.plugin, id)),
            (None, Some(ids)) => {
                Some(hashing.derived_event(self.plugin, &self.web_token, ids.iter().map(AsRef::as_ref)))
            }
            (None, None) => None,
        }
    }

    /// What the gate looks at.
    #[must_use]
    pub fn question(&self, has_endpoint: bool) -> Question {
        Question {
            has_endpoint,
            assign: self.assign,
            has_session: self.messages.has_session,
            has_close: self.messages.has_close,
            offline: self.offline,
        }
    }
}

/// JSON's insignificant white space (RFC 8259 §2).
pub const JSON_SPACE: [char; 4] = [' ', '\t', '\n', '\r'];

fn invalid(field: &'static str, problem: impl Into<String>) -> Invalid {
    Invalid { field: Cow::Borrowed(field), problem: problem.into() }
}

fn too_long(field: &'static str, bytes_max: usize) -> Invalid {
    invalid(field, format!("must be at most {bytes_max} bytes long"))
}

fn string<'a>(raw: Option<&'a RawValue>, field: &'static str) -> Result<Option<Cow<'a, str>>, Invalid> {
    raw.map(|raw| serde_json::from_str::<Text<'a>>(raw.get()).map(|text| text.0))
        .transpose()
        .map_err(|_| invalid(field, "must be a string"))
}

fn bounded<'a>(
    raw: Option<&'a RawValue>,
    field: &'static str,
    bytes_max: usize,
) -> Result<Option<Cow<'a, str>>, Invalid> {
    match string(raw, field)? {
        Some(text) if text.is_empty() => Err(invalid(field, "must not be empty")),
        Some(text) if text.len() > bytes_max => Err(too_long(field, bytes_max)),
        other => Ok(other),
    }
}

fn boolean(raw: Option<&RawValue>, field: &'static str) -> Result<Option<bool>, Invalid> {
    raw.map(|raw| serde_json::from_str(raw.get())).transpose().map_err(|_| invalid(field, "must be true or false"))
}

fn messages(raw: Option<&RawValue>) -> Result<Messages<'_>, Invalid> {
    let raw = raw.ok_or_else(|| invalid("messages", "is required"))?.get();
    let text = raw
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .ok_or_else(|| invalid("messages", "must be an array of objects"))?
        .trim_matches(JSON_SPACE);
    if text.is_empty() {
        return Err(invalid("messages", "must not be empty"));
    }
    let mut reader = serde_json::Deserializer::from_str(raw);
    let found = reader.deserialize_seq(MessagesVisitor).map_err(|error| invalid("messages", error.to_string()))?;
    Ok(Messages { text, ..found })
}

/// How deep arrays and objects are nested in a JSON text.
fn depth(text: &[u8]) -> usize {
    let (mut now, mut most, mut in_string, mut escaped) = (0usize, 0usize, false, false);
    for &byte in text {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'[' | b'{' => {
                now += 1;
                most = most.max(now);
            }
            b']' | b'}' => now = now.saturating_sub(1),
            _ => {}
        }
    }
    most
}

/// A string, borrowed where it holds no escape.
struct Text<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Text<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;
        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Borrowed(text)))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(TextVisitor)
    }
}

#[cfg(test)]
mod tests;
