//! What operators do (contract §6), but for dead letters: lanes, pausing, retrying, testing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use hyper::StatusCode;
use serde::{Deserialize, Serialize};

use super::answer::{self, Answer, ApiError, Code, busy, error};
use super::query::{Query, rfc3339};
use super::{Api, endpoints};
use crate::clock;
use crate::domain::endpoint::{EndpointName, Plugin};
use crate::domain::keys::LaneKey;
use crate::domain::schedule::Pauses;
use crate::json;
use crate::relay::{Command, LaneShown, Tested};

/// Settings of the store that are pauses begin with this.
const PREFIX: &str = "pauses/";
/// How long a test waits for its turn in the endpoint's rate.
const TURN_LIMIT: Duration = Duration::from_secs(5);
/// How long giving up may take until it is answered; the rest goes on by itself.
const BURY_LIMIT: Duration = Duration::from_secs(60);

/// When endpoints were paused, and which are, from the store's settings.
#[must_use]
pub fn pauses(settings: &BTreeMap<String, String>) -> Vec<(EndpointName, Pauses)> {
    let read = |(key, text): (&String, &String)| {
        let name = EndpointName::any(key.strip_prefix(PREFIX)?).ok()?;
        Some((name, serde_json::from_str(text).ok()?))
    };
    settings.iter().filter_map(read).collect()
}

#[derive(Serialize)]
struct Lane {
    endpoint: String,
    web_token: Option<String>,
    im_web_plugin_id: Option<u64>,
    events: u32,
    in_flight: bool,
    attempts: u32,
    accepted_at: Option<String>,
    /// `null`: now, or nobody knows.
    next_attempt_at: Option<String>,
    /// `null`: for nothing but its turn.
    waits_for: Option<&'static str>,
    last_error: Option<Arc<str>>,
}

pub(super) async fn lanes(api: &Api, query: &Query) -> Result<Answer, ApiError> {
    #[derive(Serialize)]
    struct List {
        lanes: Vec<Lane>,
        next: Option<String>,
    }
    let after = query.after.as_deref().map(str::parse).transpose();
    let after = after.map_err(|_| error(Code::InvalidRequest, "after: must be `next` of the page before"))?;
    let keys = match &query.web_token {
        Some(web_token) => Some(lanes_of(api, query.endpoint, web_token)?),
        None => None,
    };
    let (endpoint, most) = (query.endpoint, query.limit);
    let shown = api.ask(|reply| Command::Lanes { endpoint, keys, after, most, reply }).await.ok_or_else(busy)?;
    let next = shown.last().filter(|_| shown.len() == most).map(|last| last.lane.id.to_string());
    let now_ms = clock::wall_ms();
    let read = move || shown.into_iter().map(|shown| read_lane(shown, now_ms)).collect();
    let lanes = tokio::task::spawn_blocking(read).await.map_err(|_| busy())?;
    Ok(answer::json(StatusCode::OK, &List { lanes, next }))
}

fn read_lane(shown: LaneShown, now_ms: u64) -> Lane {
    let LaneShown { lane, head: (reader, offset), waits, last_error } = shown;
    let head = reader.and_then(|reader| reader.read(offset).ok().flatten());
    let event = head.as_ref().and_then(|head| head.event());
    Lane {
        endpoint: lane.endpoint.to_string(),
        web_token: event.as_ref().map(|event| event.web_token.to_owned()),
        im_web_plugin_id: event.as_ref().and_then(|event| event.plugin.given()),
        events: lane.events,
        in_flight: lane.in_flight,
        attempts: lane.retry.map_or(0, |retry| retry.made()),
        accepted_at: event.map(|event| rfc3339(event.accepted_ms)),
        next_attempt_at: waits.and_then(|(_, left)| moment(now_ms, left)),
        waits_for: waits.map(|(what, _)| what.as_str()),
        last_error,
    }
}

/// The moment that is so far away.
pub(super) fn moment(now_ms: u64, left: Option<Duration>) -> Option<String> {
    left.map(|left| rfc3339(now_ms + left.as_millis() as u64))
}

/// The lanes that a customer may have, of one endpoint or of all; for surveys, those of the session of that number.
fn lanes_of(api: &Api, endpoint: Option<EndpointName>, web_token: &str) -> Result<Vec<LaneKey>, ApiError> {
    let mut plugins = api.store.plugins_of(web_token)?;
    plugins.push(Plugin::NONE);
    let hashing = api.store.hashing();
    let mut keys = Vec::new();
    if endpoint == Some(EndpointName::SURVEY) {
        keys.push(hashing.lane(EndpointName::SURVEY, Plugin::NONE, web_token));
    }
    for plugin in plugins {
        let theirs =
            hashing.lanes(plugin, web_token).filter(|(name, _)| endpoint.is_none_or(|endpoint| endpoint == *name));
        keys.extend(theirs.map(|(_, lane)| lane));
    }
    keys.sort_unstable();
    keys.dedup();
    Ok(keys)
}

pub(super) async fn bury(api: &Api, body: &[u8]) -> Result<Answer, ApiError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Bury {
        endpoint: String,
        web_token: Option<String>,
        #[serde(default)]
        first_only: bool,
    }
    #[derive(Serialize)]
    struct Buried {
        buried: u64,
    }
    let bury: Bury = json::object(body).map_err(wrong)?;
    let endpoint = EndpointName::any(&bury.endpoint).map_err(|bad| wrong(format!("endpoint: {bad}")))?;
    let keys = match &bury.web_token {
        Some(web_token) => Some(lanes_of(api, Some(endpoint), web_token)?),
        None => None,
    };
    let first_only = bury.first_only;
    let command = |reply| Command::Bury { endpoint, keys, first_only, reply };
    let buried = api.ask_patiently(command, BURY_LIMIT).await.ok_or_else(busy)?;
    let buried = buried.ok_or_else(partly_buried)?;
    tracing::info!(%endpoint, buried, "events given up by a call");
    Ok(answer::json(StatusCode::OK, &Buried { buried }))
}

fn partly_buried() -> ApiError {
    error(Code::DiskLow, "not all of it can be stored just now: the rest follows when it can, unless the relay stops")
}

/// `POST /v1/endpoints/{name}/{action}`.
pub(super) async fn act(api: &Api, named: &str) -> Result<Answer, ApiError> {
    let (name, action) = named.split_once('/').unwrap_or((named, ""));
    let name = endpoints::known_name(name)?;
    if !api.is_configured(name) {
        return Err(error(Code::NotFound, format!("name: there is no endpoint {name}")));
    }
    match action {
        "pause" => set_paused(api, name, true).await,
        "resume" => set_paused(api, name, false).await,
        "retry" => {
            api.ask(|reply| Command::RetryNow(name, reply)).await.ok_or_else(busy)?;
            endpoints::show(api, name).await
        }
        _ => test(api, name).await,
    }
}

async fn set_paused(api: &Api, name: EndpointName, is_paused: bool) -> Result<Answer, ApiError> {
    {
        let _changing = api.changes.lock().await;
        let known = pauses(&api.store.settings()).into_iter().find(|(known, _)| *known == name);
        let mut pauses = known.map(|(_, pauses)| pauses).unwrap_or_default();
        let now_s = clock::wall_ms() / 1_000;
        if is_paused {
            // What is younger than a pause is no older for it.
            let view = api.ask(Command::View).await.ok_or_else(busy)?;
            let oldest =
                view.endpoints.iter().find(|endpoint| endpoint.name == name).and_then(|endpoint| endpoint.oldest);
            pauses.begin(now_s, oldest.map_or(now_s, u64::from));
        } else {
            pauses.end(now_s);
        }
        if !pauses.is_empty() {
            let text = serde_json::to_string(&pauses).map_err(|problem| wrong(problem.to_string()))?;
            api.store.set(&format!("{PREFIX}{name}"), Some(text)).await?;
            let command = |reply| Command::Pause { endpoint: name, pauses, reply };
            api.ask(command).await.ok_or_else(busy)?;
        }
    }
    tracing::info!(endpoint = %name, is_paused, "endpoint paused or resumed by a call");
    endpoints::show(api, name).await
}

async fn test(api: &Api, name: EndpointName) -> Result<Answer, ApiError> {
    #[derive(Serialize)]
    struct Tried {
        result: &'static str,
        status: Option<u16>,
        duration_ms: f64,
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    }
    if name == EndpointName::SURVEY {
        return Err(wrong("name: a test is no survey"));
    }
    let begun = clock::now();
    loop {
        let patience = api.config.load().timeout + TURN_LIMIT;
        let tested = api.ask_patiently(|reply| Command::Test(name, reply), patience).await.ok_or_else(busy)?;
        match tested {
            Tested::Unknown => return Err(error(Code::NotFound, format!("name: there is no endpoint {name}"))),
            Tested::NotBefore(wait) if begun.elapsed() + wait < TURN_LIMIT => tokio::time::sleep(wait).await,
            Tested::NotBefore(_) => {
                let limit = TURN_LIMIT.as_secs();
                return Err(error(
                    Code::Stopping,
                    format!("the endpoint's rate has no room for a test within {limit} s"),
                ));
            }
            Tested::Made { result, status, took, detail } => {
                let duration_ms = (took.as_secs_f64() * 1e6).round() / 1e3;
                return Ok(answer::json(StatusCode::OK, &Tried { result, status, duration_ms, error: detail }));
            }
        }
    }
}

fn wrong(message: impl Into<String>) -> ApiError {
    error(Code::InvalidRequest, message)
}
