//! `/v1/dead-letters` (contract §6): what was given up, to be looked at, put back or removed.

use std::borrow::Cow;

use hyper::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::Api;
use super::answer::{self, Answer, ApiError, Code, busy, error};
use super::query::{Query, rfc3339};
use crate::clock;
use crate::domain::endpoint::{EndpointName, Plugin};
use crate::json;
use crate::store::{Accepted, Dead, DeadLetter, LetterFilter, LetterId, Replay};

/// Letters that are replayed or purged at once: one group of the journal.
const AT_ONCE: usize = 256;

#[derive(Serialize)]
struct Shown<'a> {
    id: String,
    endpoint: String,
    web_token: Option<&'a str>,
    im_web_plugin_id: Option<u64>,
    event_id: Option<Cow<'a, str>>,
    reason: &'static str,
    buried_at: String,
    accepted_at: Option<String>,
    attempts: u32,
    last_error: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    messages: Option<Box<RawValue>>,
}

fn shown<'a>(letter: &DeadLetter, dead: &Dead<'a>, with_messages: bool) -> Shown<'a> {
    let event = dead.event.as_ref();
    let messages = event.filter(|_| with_messages).map(|event| format!("[{}]", event.messages));
    Shown {
        id: letter.id.to_string(),
        endpoint: dead.endpoint.to_string(),
        web_token: event.map(|event| event.web_token),
        im_web_plugin_id: event.and_then(|event| event.plugin.given()),
        event_id: event.map(Accepted::event_id),
        reason: dead.reason.as_str(),
        buried_at: rfc3339(dead.buried_ms),
        accepted_at: event.map(|event| rfc3339(event.accepted_ms)),
        attempts: dead.attempts,
        last_error: dead.problem,
        messages: messages.and_then(|messages| RawValue::from_string(messages).ok()),
    }
}

pub(super) async fn list(api: &Api, query: &Query) -> Result<Answer, ApiError> {
    #[derive(Serialize)]
    struct List<'a> {
        dead_letters: Vec<Shown<'a>>,
        next: Option<String>,
    }
    let after = query.after.as_deref().map(|after| id("after", after)).transpose()?;
    let filter = LetterFilter { endpoint: query.endpoint, web_token: query.web_token.clone() };
    let (letters, ids) = fetch(api, filter, after, query.limit).await?;
    let next = ids.last().filter(|_| ids.len() == query.limit).map(LetterId::to_string);
    let dead_letters = letters
        .iter()
        .filter_map(|letter| Some((letter, letter.dead()?)))
        .filter(|(_, dead)| query.web_token.is_none() || is_of(dead, query.web_token.as_deref()))
        .map(|(letter, dead)| shown(letter, &dead, false))
        .collect();
    Ok(answer::json(StatusCode::OK, &List { dead_letters, next }))
}

/// The store finds customers by hash: this is the customer.
fn is_of(dead: &Dead<'_>, web_token: Option<&str>) -> bool {
    dead.event.as_ref().map(|event| event.web_token) == web_token
}

pub(super) async fn show(api: &Api, named: &str) -> Result<Answer, ApiError> {
    let unknown = || error(Code::NotFound, format!("id: there is no dead letter {named}"));
    let id: LetterId = named.parse().map_err(|_| unknown())?;
    let store = api.store.clone();
    let read = tokio::task::spawn_blocking(move || store.letter(id)).await.map_err(|_| busy())?;
    let letter = read.map_err(unreadable)?;
    let found = letter.as_ref().and_then(|letter| Some((letter, letter.dead()?)));
    let (letter, dead) = found.ok_or_else(unknown)?;
    Ok(answer::json(StatusCode::OK, &shown(letter, &dead, true)))
}

/// Which letters a call means: one of these.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Selector {
    ids: Option<Vec<String>>,
    endpoint: Option<String>,
    all: Option<bool>,
}

#[derive(Debug, PartialEq, Eq)]
enum Selected {
    Ids(Vec<LetterId>),
    Filter(LetterFilter),
}

fn select(body: &[u8]) -> Result<Selected, ApiError> {
    let wrong = |problem: String| error(Code::InvalidRequest, problem);
    let selector: Selector = json::object(body).map_err(wrong)?;
    match (selector.ids, selector.endpoint, selector.all) {
        (Some(ids), None, None) => {
            let mut ids = ids.iter().map(|text| id("ids", text)).collect::<Result<Vec<LetterId>, ApiError>>()?;
            // As they were given up: so those of a lane come back in its order.
            ids.sort_unstable();
            Ok(Selected::Ids(ids))
        }
        (None, Some(endpoint), None) => {
            let endpoint = EndpointName::any(&endpoint).map_err(|bad| wrong(format!("endpoint: {bad}")))?;
            Ok(Selected::Filter(LetterFilter { endpoint: Some(endpoint), web_token: None }))
        }
        (None, None, Some(true)) => Ok(Selected::Filter(LetterFilter::default())),
        _ => Err(wrong("body: needs one of ids, endpoint, or all = true".to_owned())),
    }
}

fn id(field: &str, text: &str) -> Result<LetterId, ApiError> {
    text.parse().map_err(|bad| error(Code::InvalidRequest, format!("{field}: {bad}")))
}

/// Goes through the selected letters, some at a time. Those that are given up meanwhile are not among them.
struct Letters<'a> {
    api: &'a Api,
    selected: Selected,
    after: Option<LetterId>,
    end: LetterId,
}

impl<'a> Letters<'a> {
    fn new(api: &'a Api, selected: Selected) -> Letters<'a> {
        Letters { api, selected, after: None, end: api.store.letters_end() }
    }

    /// The next ones: those that read back, and the names of all, of which some may not be there. `None`: no more.
    async fn next(&mut self) -> Result<Option<(Vec<DeadLetter>, Vec<LetterId>)>, ApiError> {
        match &mut self.selected {
            Selected::Ids(ids) if ids.is_empty() => Ok(None),
            Selected::Ids(ids) => {
                let now: Vec<LetterId> = ids.drain(..ids.len().min(AT_ONCE)).collect();
                let (store, named) = (self.api.store.clone(), now.clone());
                let read = move || now.into_iter().map(|id| store.letter(id)).collect::<Result<Vec<_>, _>>();
                let found = tokio::task::spawn_blocking(read).await.map_err(|_| busy())?.map_err(unreadable)?;
                Ok(Some((found.into_iter().flatten().collect(), named)))
            }
            Selected::Filter(filter) => {
                let (mut found, mut ids) = fetch(self.api, filter.clone(), self.after, AT_ONCE).await?;
                found.retain(|letter| letter.id < self.end);
                ids.retain(|id| *id < self.end);
                self.after = ids.last().copied().or(self.after);
                Ok((!ids.is_empty()).then_some((found, ids)))
            }
        }
    }
}

pub(super) async fn replay(api: &Api, body: &[u8]) -> Result<Answer, ApiError> {
    #[derive(Serialize)]
    struct Done {
        replayed: u64,
        skipped: u64,
    }
    let _replaying = api.replaying.lock().await;
    let mut letters = Letters::new(api, select(body)?);
    let (mut replayed, mut skipped) = (0, 0);
    let mut refusal = None;
    while let Some((found, ids)) = letters.next().await? {
        let now_ms = clock::wall_ms();
        let dead: Vec<(LetterId, Dead<'_>)> =
            found.iter().filter_map(|letter| Some((letter.id, letter.dead()?))).collect();
        let replays: Vec<Replay<'_>> =
            dead.iter().filter_map(|(id, dead)| prepare(api, *id, dead.event.as_ref()?, now_ms)).collect();
        let done = match &refusal {
            None => api.store.replay(&replays, now_ms / 1_000).await,
            Some(refusal) => Err(*refusal),
        };
        let count = match done {
            Ok(done) => done.len() as u64,
            // What was replayed before stands: that is no error any more.
            Err(again) if replayed > 0 => {
                refusal = Some(again);
                0
            }
            Err(refusal) => return Err(refusal.into()),
        };
        replayed += count;
        skipped += ids.len() as u64 - count;
    }
    tracing::info!(replayed, skipped, "dead letters replayed by a call");
    Ok(answer::json(StatusCode::OK, &Done { replayed, skipped }))
}

/// The event as it is accepted anew, for the plugin's endpoint of now; `None` without one.
fn prepare<'a>(api: &Api, id: LetterId, event: &Accepted<'a>, now_ms: u64) -> Option<Replay<'a>> {
    let (endpoint, events_max) = if event.endpoint == EndpointName::SURVEY {
        let endpoints = api.endpoints.load();
        let survey = endpoints.get(&EndpointName::SURVEY)?.as_ref()?;
        (survey.name, survey.max_events)
    } else {
        api.endpoint_of(event.plugin)?
    };
    let lane = api.store.hashing().lane(endpoint, event.plugin, event.web_token);
    Some(Replay { id, event: Accepted { endpoint, lane, accepted_ms: now_ms, ..event.clone() }, events_max })
}

pub(super) async fn purge(api: &Api, body: &[u8]) -> Result<Answer, ApiError> {
    #[derive(Serialize)]
    struct Done {
        purged: u64,
    }
    let mut letters = Letters::new(api, select(body)?);
    let mut purged = 0;
    while let Some((_, ids)) = letters.next().await? {
        purged += api.store.purge(&ids).await?;
    }
    tracing::info!(purged, "dead letters purged by a call");
    Ok(answer::json(StatusCode::OK, &Done { purged }))
}

/// Removes a forgotten customer's letters: of one plugin, or of all.
pub(super) async fn forget(api: &Api, plugin: Option<Plugin>, web_token: &str) -> Result<u64, ApiError> {
    let filter = LetterFilter { endpoint: None, web_token: Some(web_token.to_owned()) };
    let (mut after, mut removed) = (None, 0);
    loop {
        let (found, ids) = fetch(api, filter.clone(), after, AT_ONCE).await?;
        let Some(last) = ids.last() else { return Ok(removed) };
        after = Some(*last);
        let is_theirs = |dead: &Dead<'_>| {
            let event = dead.event.as_ref();
            is_of(dead, Some(web_token))
                && event.is_some_and(|event| {
                    event.endpoint != EndpointName::SURVEY && plugin.is_none_or(|plugin| plugin == event.plugin)
                })
        };
        let ids: Vec<LetterId> = found
            .iter()
            .filter(|letter| letter.dead().is_some_and(|dead| is_theirs(&dead)))
            .map(|letter| letter.id)
            .collect();
        removed += api.store.purge(&ids).await?;
    }
}

async fn fetch(
    api: &Api,
    filter: LetterFilter,
    after: Option<LetterId>,
    most: usize,
) -> Result<(Vec<DeadLetter>, Vec<LetterId>), ApiError> {
    let store = api.store.clone();
    let read = tokio::task::spawn_blocking(move || store.letters(&filter, after, most)).await.map_err(|_| busy())?;
    read.map_err(unreadable)
}

fn unreadable(problem: std::io::Error) -> ApiError {
    tracing::error!(%problem, "dead letters cannot be read");
    error(Code::DiskLow, "dead letters cannot be read just now")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selector_is_exactly_one_of_three() {
        let id: LetterId = "3-17".parse().unwrap();
        assert_eq!(select(br#"{"ids":["3-17"]}"#).unwrap(), Selected::Ids(vec![id]));
        assert_eq!(select(br#"{"all":true}"#).unwrap(), Selected::Filter(LetterFilter::default()));
        assert!(matches!(select(br#"{"endpoint":"12"}"#).unwrap(), Selected::Filter(_)));
        for body in ["", "{}", r#"{"all":false}"#, r#"{"all":true,"ids":[]}"#, r#"{"ids":["x"]}"#, r#"{"id":"3-17"}"#] {
            assert_eq!(select(body.as_bytes()).unwrap_err().code, Code::InvalidRequest, "{body}");
        }
    }
}
