//! What operators see and do (contract §6), but for dead letters: status, lanes, pausing, retrying, testing.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
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
struct Status {
    version: &'static str,
    uptime_seconds: u64,
    outbox: Outbox,
    dead_letters: u64,
    disk: Disk,
    config: Reloaded,
    history_step_seconds: u64,
    endpoints: Vec<Endpoint>,
}

#[derive(Serialize)]
struct Outbox {
    events: u64,
    bytes: u64,
    oldest_age_seconds: f64,
    capacity_events: u64,
}

#[derive(Serialize)]
struct Disk {
    free_bytes: u64,
    floor_bytes: u64,
}

/// What the last reload came to.
#[derive(Serialize)]
struct Reloaded {
    reloaded_at: Option<String>,
    error: Option<String>,
    needs_restart: Vec<&'static str>,
}

#[derive(Serialize)]
struct Endpoint {
    name: String,
    state: &'static str,
    events: u64,
    oldest_age_seconds: f64,
    in_flight: u32,
    dead_letters: u64,
    /// Why nothing is begun just now, and until when, if that is known.
    waits_for: Option<&'static str>,
    waits_until: Option<String>,
    last_error: Option<Arc<str>>,
    /// Counters since the start, for those who want rates.
    delivered_messages: u64,
    failed_attempts: u64,
    /// What an attempt takes, lately; `null` before the first.
    attempt_seconds: Option<f64>,
    /// Events that waited, a sample each `history_step_seconds`, the newest last: up to an hour.
    history: Vec<u64>,
}

/// Events that waited for each endpoint over the last hour.
#[derive(Debug, Default)]
pub struct History(Mutex<BTreeMap<EndpointName, VecDeque<u64>>>);

/// Between two samples, and how many there are.
const HISTORY_STEP: Duration = Duration::from_secs(30);
const HISTORY_MAX: usize = 120;

impl History {
    /// Takes a sample each half minute, for ever.
    pub async fn keep(api: Arc<Api>) {
        let mut tick = tokio::time::interval(HISTORY_STEP);
        loop {
            tick.tick().await;
            let Some(view) = api.ask(Command::View).await else { continue };
            let mut all = api.history.0.lock().unwrap_or_else(PoisonError::into_inner);
            for endpoint in &view.endpoints {
                let samples = all.entry(endpoint.name).or_default();
                samples.push_back(endpoint.events);
                if samples.len() > HISTORY_MAX {
                    samples.pop_front();
                }
            }
            all.retain(|name, _| view.endpoints.iter().any(|endpoint| endpoint.name == *name));
        }
    }

    fn of(&self, name: EndpointName) -> Vec<u64> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(&name).map_or_else(Vec::new, |samples| samples.iter().copied().collect())
    }
}

pub(super) async fn status(api: &Api) -> Result<Answer, ApiError> {
    let (now, view) = api.now().await.ok_or_else(busy)?;
    let reload = api.reload.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let now_ms = clock::wall_ms();
    let endpoints: Vec<Endpoint> = now
        .endpoints
        .iter()
        .map(|endpoint| {
            let counted = api.metrics.endpoint(endpoint.name);
            Endpoint {
                name: endpoint.name.to_string(),
                state: endpoint.state,
                events: endpoint.events,
                oldest_age_seconds: endpoint.oldest_age_seconds,
                in_flight: endpoint.in_flight,
                dead_letters: endpoint.dead_letters,
                waits_for: view.waits.get(&endpoint.name).map(|(what, _)| what.as_str()),
                waits_until: view.waits.get(&endpoint.name).and_then(|(_, left)| moment(now_ms, *left)),
                last_error: view.seen.last_errors.get(&endpoint.name).cloned(),
                attempt_seconds: view.seen.attempt_seconds.get(&endpoint.name).copied(),
                history: api.history.of(endpoint.name),
                delivered_messages: counted.delivered_messages(),
                failed_attempts: counted.failed_attempts(),
            }
        })
        .collect();
    let status = Status {
        version: env!("CARGO_PKG_VERSION"),
        uptime_seconds: api.begun.elapsed().as_secs(),
        outbox: Outbox {
            events: endpoints.iter().map(|endpoint| endpoint.events).sum(),
            bytes: now.outbox_bytes,
            oldest_age_seconds: endpoints.iter().map(|endpoint| endpoint.oldest_age_seconds).fold(0.0, f64::max),
            capacity_events: now.capacity_events,
        },
        dead_letters: endpoints.iter().map(|endpoint| endpoint.dead_letters).sum(),
        disk: Disk { free_bytes: now.free_bytes, floor_bytes: now.free_floor_bytes },
        config: Reloaded {
            reloaded_at: reload.at_ms.map(rfc3339),
            error: reload.error,
            needs_restart: reload.needs_restart,
        },
        history_step_seconds: HISTORY_STEP.as_secs(),
        endpoints,
    };
    Ok(answer::json(StatusCode::OK, &status))
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
fn moment(now_ms: u64, left: Option<Duration>) -> Option<String> {
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
    tracing::info!(%endpoint, buried, "events given up by a call");
    Ok(answer::json(StatusCode::OK, &Buried { buried }))
}

/// `POST /v1/endpoints/{name}/{action}`.
pub(super) async fn act(api: &Api, named: &str) -> Result<Answer, ApiError> {
    let (name, action) = named.split_once('/').unwrap_or((named, ""));
    let name = endpoints::known_name(name)?;
    if !api.endpoints.load().get(&name).is_some_and(Option::is_some) {
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
