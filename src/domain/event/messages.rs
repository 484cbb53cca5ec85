//! What is looked at in a message; the rest is relayed as it stands.

use std::borrow::Cow;
use std::fmt;

use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

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
                while let Some(key) = map.next_key::<Text<'de>>()? {
                    match key.0.as_ref() {
                        "message_id" => glance.id = map.next_value::<Loose<'de>>()?.text(),
                        "type" => {
                            glance.is_close = map.next_value::<Loose<'de>>()?.text().as_deref() == Some("close");
                        }
                        "im_sub_session_id" => {
                            glance.has_session = map.next_value::<Loose<'de>>()?.is_above_zero();
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
    fn is_above_zero(&self) -> bool {
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
            fn visit_f64<E: de::Error>(self, number: f64) -> Result<Loose<'de>, E> {
                // Some writers write whole numbers so, and very large ones come so.
                Ok(if number > 0.0 { Loose::Positive } else { Loose::Other })
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
