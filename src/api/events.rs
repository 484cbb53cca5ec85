//! `POST /v1/events` (contract §3): one event, an array, or NDJSON.

use std::borrow::Cow;
use std::fmt;

use hyper::StatusCode;
use serde::de::{IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

use super::answer::{self, Answer, ApiError, Code, ErrorBody, error};
use super::customers::BAD_PLUGIN;
use super::{Api, query};
use crate::clock;
use crate::domain::endpoint::Plugin;
use crate::domain::event::{Event, JSON_SPACE};
use crate::domain::gate::Suppressed;
use crate::domain::keys::{self, EventKey};
use crate::metrics::EventOutcome;
use crate::store::{Accepted, Ending, Post, Posted, encode_event};

/// Most events of a request.
const EVENTS_MAX: usize = 1_000;

const FULL: &str = "too many events wait for the endpoint";

/// How a body is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Json,
    Ndjson,
}

/// What became of one event, as answered.
#[derive(Serialize)]
struct Outcome<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    event_id: Option<&'a str>,
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<ErrorBody<'a>>,
}

/// An event of a request with its key and its id, the IM server's, made up, or derived.
struct Named<'a> {
    event: Event<'a>,
    key: EventKey,
    id: Cow<'a, str>,
    is_derived: bool,
}

/// One item of a request: an event, or why it is none.
type Item<'a> = Result<Named<'a>, ApiError>;

/// What became of an item.
type Judged<'a> = Result<Posted, &'a ApiError>;

pub(super) async fn post(api: &Api, form: Form, body: &[u8]) -> Result<Answer, ApiError> {
    let begun = clock::now();
    let (texts, is_one) = split(form, body)?;
    if texts.is_empty() {
        return Err(error(Code::InvalidRequest, "events: must not be empty"));
    }
    if texts.len() > EVENTS_MAX {
        return Err(error(Code::InvalidRequest, format!("events: must be at most {EVENTS_MAX}")));
    }
    let bytes_max = api.config.load().max_event_bytes;
    let mut items: Vec<Item<'_>> = texts.into_iter().map(|text| read(api, text, bytes_max)).collect();
    if is_one && let Some(Err(error)) = items.first_mut() {
        api.metrics.count_events(EventOutcome::Rejected(error.code.as_str()), 1);
        return Err(error.clone());
    }
    let now_ms = clock::wall_ms();
    let posts: Vec<Post<'_>> =
        items.iter().filter_map(|item| item.as_ref().ok()).map(|named| prepare(api, named, now_ms)).collect();
    let posted = if posts.is_empty() { Vec::new() } else { store(api, posts, is_one, now_ms).await? };
    let mut posted = posted.into_iter();
    let mut next = || posted.next().unwrap_or(Posted::Suppressed(Suppressed::NoPushAddress));
    let judged: Vec<Judged<'_>> = items.iter().map(|item| item.as_ref().map(|_| next())).collect();
    for judged in &judged {
        count_one(api, *judged);
    }
    api.metrics.accept_seconds.observe(begun.elapsed().as_secs_f64());
    let ids = items.iter().map(|item| item.as_ref().ok().map(|named| named.id.as_ref()));
    if is_one {
        let (Some(judged), Some(id)) = (judged.first(), ids.into_iter().next()) else {
            return Err(error(Code::InvalidRequest, "events: must not be empty"));
        };
        if let Ok(Posted::EndpointFull) = judged {
            return Err(error(Code::EndpointFull, FULL));
        }
        return Ok(answer::json(StatusCode::ACCEPTED, &outcome(id, *judged)));
    }
    #[derive(Serialize)]
    struct Results<'a> {
        results: Vec<Outcome<'a>>,
    }
    let results = ids.zip(judged).map(|(id, judged)| outcome(id, judged)).collect();
    Ok(answer::json(StatusCode::ACCEPTED, &Results { results }))
}

/// `GET /v1/events/{event_id}`: was it pushed, and when.
pub(super) async fn show(api: &Api, event_id: &str, query: &str) -> Result<Answer, ApiError> {
    #[derive(Serialize)]
    struct Shown<'a> {
        event_id: &'a str,
        state: &'static str,
        accepted_at: String,
        settled_at: Option<String>,
    }
    let plugin = form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == "im_web_plugin_id");
    let plugin =
        plugin.filter(|(_, value)| !value.is_empty()).map_or(Some(Plugin::NONE), |(_, value)| Plugin::parse(&value));
    let plugin = plugin.ok_or_else(|| error(Code::InvalidRequest, BAD_PLUGIN))?;
    let given = api.store.hashing().given_event(plugin, event_id);
    let derived = keys::key_of_derived(event_id);
    let store = api.store.clone();
    let now_s = clock::wall_ms() / 1_000;
    let look_up = move || match store.fate(given, now_s) {
        Ok(None) => derived.map_or(Ok(None), |derived| store.fate(derived, now_s)),
        found => found,
    };
    let fate = tokio::task::spawn_blocking(look_up).await.map_err(|_| answer::busy())??;
    let fate = fate.ok_or_else(|| {
        error(Code::NotFound, "event_id: not accepted for this im_web_plugin_id, or longer ago than outbox.dedupe_window or dedupe_max reach")
    })?;
    let state = match fate.ended.map(|(ending, _)| ending) {
        None => "queued",
        Some(Ending::Delivered) => "delivered",
        Some(Ending::Buried) => "dead_letter",
        Some(Ending::Withdrawn) => "withdrawn",
    };
    let shown = Shown {
        event_id,
        state,
        accepted_at: query::rfc3339(fate.accepted_s * 1_000),
        settled_at: fate.ended.map(|(_, second)| query::rfc3339(second * 1_000)),
    };
    Ok(answer::json(StatusCode::OK, &shown))
}

async fn store(api: &Api, posts: Vec<Post<'_>>, is_alone: bool, now_ms: u64) -> Result<Vec<Posted>, ApiError> {
    let count = posts.len() as u64;
    api.store.post(posts, is_alone, now_ms).await.map_err(|refusal| {
        let error = ApiError::from(refusal);
        api.metrics.count_events(EventOutcome::Refused(error.code.as_str()), count);
        error
    })
}

/// The texts of the events; and whether the request is one event by itself.
fn split(form: Form, body: &[u8]) -> Result<(Vec<&[u8]>, bool), ApiError> {
    match form {
        Form::Ndjson => {
            let lines = body.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
            Ok((lines.filter(|line| !line.is_empty()).take(EVENTS_MAX + 1).collect(), false))
        }
        Form::Json => {
            let text = std::str::from_utf8(body)
                .map_err(|_| error(Code::InvalidRequest, "body: must be UTF-8"))?
                .trim_matches(JSON_SPACE);
            if !text.starts_with('[') {
                return Ok((vec![text.as_bytes()], true));
            }
            let Items(items) = serde_json::from_str(text)
                .map_err(|problem| error(Code::InvalidRequest, format!("body: {problem}")))?;
            Ok((items, false))
        }
    }
}

/// The texts of an array's items, one more than is allowed at most: a body of many small ones would take ten times its
/// size.
struct Items<'a>(Vec<&'a [u8]>);

impl<'de: 'a, 'a> Deserialize<'de> for Items<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Items<'a>, D::Error> {
        deserializer.deserialize_seq(ItemsVisitor)
    }
}

struct ItemsVisitor;

impl<'de> Visitor<'de> for ItemsVisitor {
    type Value = Items<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Items<'de>, A::Error> {
        let mut items = Vec::new();
        while items.len() <= EVENTS_MAX
            && let Some(item) = seq.next_element::<&RawValue>()?
        {
            items.push(item.get().as_bytes());
        }
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Items(items))
    }
}

fn read<'a>(api: &Api, text: &'a [u8], bytes_max: usize) -> Item<'a> {
    if text.len() > bytes_max {
        let problem = format!("event: must be at most {bytes_max} bytes");
        return Err(error(Code::TooLarge, problem));
    }
    let text = std::str::from_utf8(text).map_err(|_| error(Code::InvalidEvent, "event: must be UTF-8"))?;
    let event = Event::parse(text).map_err(|invalid| error(Code::InvalidEvent, invalid.to_string()))?;
    let hashing = api.store.hashing();
    let (key, id, is_derived) = match (event.key(&hashing), &event.event_id) {
        (Some(key), Some(id)) => (key, id.clone(), false),
        (Some(key), None) => (key, Cow::Owned(keys::derived_id(key)), true),
        (None, _) => {
            let id = format!("evt_{:032x}", clock::random_id());
            (hashing.given_event(event.plugin, &id), Cow::Owned(id), false)
        }
    };
    Ok(Named { event, key, id, is_derived })
}

fn prepare<'a>(api: &Api, named: &'a Named<'a>, now_ms: u64) -> Post<'a> {
    let Named { event, key, id, is_derived } = named;
    let hashing = api.store.hashing();
    let endpoint = api.endpoint_of(event.plugin);
    let name = endpoint.map_or(crate::domain::endpoint::EndpointName::DEFAULT, |(name, _)| name);
    let lane = hashing.lane(name, event.plugin, &event.web_token);
    let record = encode_event(Accepted {
        endpoint: name,
        plugin: event.plugin,
        lane,
        key: *key,
        accepted_ms: now_ms,
        given_id: Some(id.as_ref()).filter(|_| !is_derived),
        web_token: &event.web_token,
        count: event.messages.count,
        messages: event.messages.text,
    });
    Post { event, key: *key, endpoint, lane, record }
}

fn outcome<'a>(id: Option<&'a str>, judged: Judged<'a>) -> Outcome<'a> {
    let plain = Outcome { event_id: id, outcome: "queued", reason: None, error: None };
    match judged {
        Ok(Posted::Queued) => plain,
        Ok(Posted::Duplicate) => Outcome { outcome: "duplicate", ..plain },
        Ok(Posted::Suppressed(reason)) => Outcome { outcome: "suppressed", reason: Some(reason.as_str()), ..plain },
        Ok(Posted::EndpointFull) => {
            let error = ErrorBody { code: Code::EndpointFull.as_str(), message: FULL };
            Outcome { outcome: "refused", error: Some(error), ..plain }
        }
        Err(error) => Outcome { outcome: "rejected", error: Some(error.body()), ..plain },
    }
}

fn count_one(api: &Api, judged: Judged<'_>) {
    let outcome = match judged {
        Ok(Posted::Queued) => EventOutcome::Queued,
        Ok(Posted::Duplicate) => EventOutcome::Duplicate,
        Ok(Posted::Suppressed(reason)) => EventOutcome::Suppressed(reason),
        Ok(Posted::EndpointFull) => EventOutcome::Refused(Code::EndpointFull.as_str()),
        Err(error) => EventOutcome::Rejected(error.code.as_str()),
    };
    api.metrics.count_events(outcome, 1);
}
