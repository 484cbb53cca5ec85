//! An event as the IM server posts it (contract §3): parsed, checked, not copied.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

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

/// What the relay reads of one message.
struct Glance<'a> {
    id: Option<Cow<'a, str>>,
    has_session: bool,
    is_close: bool,
}

struct MessagesVisitor;

impl<'de> Visitor<'de> for MessagesVisitor {
    type Value = Messages<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Messages<'de>, A::Error> {
        let mut messages = Messages { ids: Some(Vec::new()), ..Messages::default() };
        while let Some(glance) = seq.next_element::<Glance<'de>>()? {
            messages.count += 1;
            if messages.count as usize > MESSAGES_MAX {
                return Err(de::Error::custom(format_args!("must be at most {MESSAGES_MAX}")));
            }
            messages.has_session |= glance.has_session;
            messages.has_close |= glance.is_close;
            match (glance.id.filter(|id| !id.is_empty()), &mut messages.ids) {
                (Some(id), Some(ids)) => ids.push(id),
                _ => messages.ids = None,
            }
        }
        Ok(messages)
    }
}

impl<'de> Deserialize<'de> for Glance<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct GlanceVisitor;
        impl<'de> Visitor<'de> for GlanceVisitor {
            type Value = Glance<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Glance<'de>, A::Error> {
                let mut glance = Glance { id: None, has_session: false, is_close: false };
                while let Some(key) = map.next_key::<Text<'de>>()? {
                    match key.0.as_ref() {
                        "message_id" => glance.id = map.next_value::<Loose<'de>>()?.text(),
                        "type" => {
                            glance.is_close = map.next_value::<Loose<'de>>()?.text().as_deref() == Some("close");
                        }
                        "im_sub_session_id" => {
                            glance.has_session = map.next_value::<Loose<'de>>()?.is_positive_integer();
                        }
                        _ => {
                            map.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                Ok(glance)
            }
        }
        deserializer.deserialize_any(GlanceVisitor)
    }
}

/// Any JSON value, of which only strings and integers matter.
enum Loose<'a> {
    Text(Cow<'a, str>),
    Positive,
    Other,
}

impl<'a> Loose<'a> {
    fn text(self) -> Option<Cow<'a, str>> {
        match self {
            Loose::Text(text) => Some(text),
            Loose::Positive | Loose::Other => None,
        }
    }

    /// A number above 0, also in a decimal string.
    fn is_positive_integer(&self) -> bool {
        match self {
            Loose::Positive => true,
            Loose::Text(text) => {
                !text.is_empty()
                    && text.bytes().all(|byte| byte.is_ascii_digit())
                    && text.bytes().any(|byte| byte != b'0')
            }
            Loose::Other => false,
        }
    }
}

impl<'de> Deserialize<'de> for Loose<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct LooseVisitor;
        impl<'de> Visitor<'de> for LooseVisitor {
            type Value = Loose<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }
            fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<Loose<'de>, E> {
                Ok(Loose::Text(Cow::Borrowed(text)))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Loose<'de>, E> {
                Ok(Loose::Text(Cow::Owned(text.to_owned())))
            }
            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Loose<'de>, E> {
                Ok(if number > 0 { Loose::Positive } else { Loose::Other })
            }
            fn visit_i64<E: de::Error>(self, _: i64) -> Result<Loose<'de>, E> {
                Ok(Loose::Other)
            }
            fn visit_f64<E: de::Error>(self, _: f64) -> Result<Loose<'de>, E> {
                Ok(Loose::Other)
            }
            fn visit_bool<E: de::Error>(self, _: bool) -> Result<Loose<'de>, E> {
                Ok(Loose::Other)
            }
            fn visit_unit<E: de::Error>(self) -> Result<Loose<'de>, E> {
                Ok(Loose::Other)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Loose<'de>, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Loose::Other)
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Loose<'de>, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Loose::Other)
            }
        }
        deserializer.deserialize_any(LooseVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field_of_error(text: &str) -> String {
        Event::parse(text).unwrap_err().field.into_owned()
    }

    #[test]
    fn a_whole_event_is_read_and_its_messages_stay_as_they_are() {
        let text = r#" {"web_token":"a","im_web_plugin_id":12,"h5push":true,"offline":false,"customer_token":"c",
            "sdk_token":"","event_id":"e-1","unknown":[1,{"x":null}],
            "messages": [ {"type":"close", "im_sub_session_id":"17","message_id":"m1","data":1.50} ,{"message_id":"m\u0032"} ] } "#;
        let event = Event::parse(text).unwrap();
        assert_eq!(event.web_token, "a");
        assert_eq!(event.plugin.id(), 12);
        assert_eq!(event.hearing.h5push, Some(true));
        assert_eq!(event.hearing.customer_token.as_deref(), Some("c"));
        assert_eq!(event.hearing.sdk_token, None);
        assert!(!event.offline);
        assert_eq!(event.event_id.as_deref(), Some("e-1"));
        assert_eq!(event.messages.count, 2);
        assert!(event.messages.has_session && event.messages.has_close);
        assert_eq!(event.messages.ids.as_deref(), Some(&[Cow::from("m1"), Cow::from("m2")][..]));
        assert_eq!(
            event.messages.text,
            r#"{"type":"close", "im_sub_session_id":"17","message_id":"m1","data":1.50} ,{"message_id":"m\u0032"}"#
        );
    }

    #[test]
    fn errors_name_the_field() {
        let table = [
            (r#"[]"#, "event"),
            (r#"{"web_token":"a""#, "event"),
            (r#"{"messages":[{}]}"#, "web_token"),
            (r#"{"web_token":null,"messages":[{}]}"#, "web_token"),
            (r#"{"web_token":"","messages":[{}]}"#, "web_token"),
            (r#"{"web_token":1,"messages":[{}]}"#, "web_token"),
            (r#"{"web_token":"a"}"#, "messages"),
            (r#"{"web_token":"a","messages":{}}"#, "messages"),
            (r#"{"web_token":"a","messages":[ ]}"#, "messages"),
            (r#"{"web_token":"a","messages":[1]}"#, "messages"),
            (r#"{"web_token":"a","messages":[["close"]]}"#, "messages"),
            (r#"{"web_token":"a","messages":[{}],"im_web_plugin_id":-1}"#, "im_web_plugin_id"),
            (r#"{"web_token":"a","messages":[{}],"im_web_plugin_id":1.5}"#, "im_web_plugin_id"),
            (r#"{"web_token":"a","messages":[{}],"im_web_plugin_id":"12"}"#, "im_web_plugin_id"),
            (r#"{"web_token":"a","messages":[{}],"h5push":"true"}"#, "h5push"),
            (r#"{"web_token":"a","messages":[{}],"offline":1}"#, "offline"),
            (r#"{"web_token":"a","messages":[{}],"assign_type":"human"}"#, "assign_type"),
            (r#"{"web_token":"a","messages":[{}],"event_id":""}"#, "event_id"),
            (r#"{"web_token":"a","messages":[{}],"customer_token":7}"#, "customer_token"),
        ];
        for (text, field) in table {
            assert_eq!(field_of_error(text), field, "{text}");
        }
    }

    #[test]
    fn lengths_at_their_bounds() {
        let event = |web_token: usize, event_id: usize, messages: usize| {
            let text = format!(
                r#"{{"web_token":"{}","event_id":"{}","messages":[{}]}}"#,
                "t".repeat(web_token),
                "e".repeat(event_id),
                vec!["{}"; messages].join(",")
            );
            Event::parse(&text).map(|_| ()).map_err(|error| error.field.into_owned())
        };
        assert_eq!(event(256, 128, 1_000), Ok(()));
        assert_eq!(event(257, 128, 1_000), Err("web_token".into()));
        assert_eq!(event(256, 129, 1_000), Err("event_id".into()));
        assert_eq!(event(256, 128, 1_001), Err("messages".into()));
    }

    #[test]
    fn nesting_is_allowed_to_128_levels() {
        // The event, the array and the message are three levels.
        let nested = |levels: usize| {
            let (open, close) = ("[".repeat(levels - 3), "]".repeat(levels - 3));
            format!(r#"{{"web_token":"a","messages":[{{"d":"]]{{{{","x":{open}{close}}}]}}"#)
        };
        assert!(Event::parse(&nested(128)).is_ok());
        assert_eq!(field_of_error(&nested(129)), "event");
    }

    #[test]
    fn sessions_count_above_zero_also_in_decimal_strings() {
        let table = [
            ("1", true),
            ("0", false),
            ("-1", false),
            ("1.5", false),
            ("null", false),
            ("true", false),
            ("[1]", false),
            (r#""3001""#, true),
            (r#""000""#, false),
            (r#""007""#, true),
            (r#""-1""#, false),
            (r#"""#.to_owned().as_str(), false),
            (r#""1x""#, false),
            ("18446744073709551615", true),
        ]
        .map(|(value, counts)| (if value == "\"" { "\"\"".to_owned() } else { value.to_owned() }, counts));
        for (value, counts) in table {
            let text = format!(r#"{{"web_token":"a","messages":[{{"im_sub_session_id":{value}}}]}}"#);
            assert_eq!(Event::parse(&text).unwrap().messages.has_session, counts, "{value}");
        }
    }

    #[test]
    fn a_robots_messages_are_not_looked_at() {
        for messages in ["{\"sessionId\":1}", "[]", "7", "[1]"] {
            let text = format!(r#"{{"web_token":"a","assign_type":"urobot","messages":{messages}}}"#);
            assert_eq!(Event::parse(&text).unwrap().assign, Assign::Robot);
        }
    }

    #[test]
    fn keys_are_given_or_made_of_every_message_id() {
        let hashing = HashKey([1; 16]);
        let key = |text: &str| Event::parse(text).unwrap().key(&hashing);
        let derived = key(r#"{"web_token":"a","messages":[{"message_id":"m"}]}"#);
        assert!(derived.is_some());
        assert_eq!(derived, key(r#"{"web_token":"a","im_web_plugin_id":0,"messages":[{"x":1,"message_id":"m"}]}"#));
        assert_ne!(derived, key(r#"{"web_token":"b","messages":[{"message_id":"m"}]}"#));
        assert_eq!(key(r#"{"web_token":"a","messages":[{"message_id":"m"},{}]}"#), None);
        assert_eq!(key(r#"{"web_token":"a","messages":[{"message_id":""}]}"#), None);
        assert_eq!(key(r#"{"web_token":"a","messages":[{"message_id":7}]}"#), None);
    }

    #[test]
    fn no_text_makes_the_parser_panic_and_what_it_takes_is_relayed_as_it_stands() {
        let conversation = include_str!("../../tests/it/conversation.ndjson");
        let examples: Vec<&[u8]> = conversation.lines().map(str::as_bytes).collect();
        crate::fuzz::fuzz(&examples, |bytes| {
            let Ok(text) = std::str::from_utf8(bytes) else { return };
            if let Ok(event) = Event::parse(text) {
                assert!(!event.web_token.is_empty() && text.contains(event.messages.text));
                let body = format!("[{}]", event.messages.text);
                // By its grammar: an escaped half of a surrogate pair is valid JSON, and the receiver's affair.
                let is_array = serde_json::from_str::<Vec<&serde_json::value::RawValue>>(&body).is_ok();
                assert!(event.messages.count == 0 || is_array);
            }
        });
    }
}
