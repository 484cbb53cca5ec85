//! What is looked at in a message; the rest is relayed as it stands.

use std::borrow::Cow;
use std::fmt;

use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::{MESSAGES_MAX, Messages, Text};

/// What the relay reads of one message.
struct Glance<'a> {
    id: Option<Cow<'a, str>>,
    has_session: bool,
    is_close: bool,
}

pub(super) struct MessagesVisitor;

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
                while let Some(key) = map.next_key::<Key<'de>>()? {
                    match key.0.as_ref() {
                        b"message_id" => glance.id = text(map.next_value()?),
                        b"type" => glance.is_close = text(map.next_value()?).as_deref() == Some("close"),
                        b"im_sub_session_id" => glance.has_session = is_above_zero(map.next_value()?),
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

/// A key of an object as the bytes that it means: by its grammar half of a surrogate pair may stand in it.
struct Key<'a>(Cow<'a, [u8]>);

impl<'de> Deserialize<'de> for Key<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyVisitor;
        impl<'de> Visitor<'de> for KeyVisitor {
            type Value = Key<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_borrowed_bytes<E: de::Error>(self, bytes: &'de [u8]) -> Result<Key<'de>, E> {
                Ok(Key(Cow::Borrowed(bytes)))
            }
            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Key<'de>, E> {
                Ok(Key(Cow::Owned(bytes.to_owned())))
            }
        }
        deserializer.deserialize_bytes(KeyVisitor)
    }
}

/// What a string says; `None` for anything else.
fn text(value: &RawValue) -> Option<Cow<'_, str>> {
    let text = value.get();
    if !text.starts_with('"') {
        return None;
    }
    serde_json::from_str::<Text<'_>>(text).ok().map(|text| text.0)
}

/// Whether it is a number above 0, also in a decimal string.
fn is_above_zero(value: &RawValue) -> bool {
    match text(value) {
        Some(text) => {
            !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) && text.bytes().any(|byte| byte != b'0')
        }
        // Some writers write whole numbers as 1.0, and very large ones are infinite here. Nothing else of JSON's is a
        // number to Rust.
        None => value.get().parse::<f64>().is_ok_and(|number| number > 0.0),
    }
}
