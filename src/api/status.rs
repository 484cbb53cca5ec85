//! What operators see first (contract §6): the status, with what waited over the last hour.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::StatusCode;
use serde::Serialize;

use super::Api;
use super::answer::{self, Answer, ApiError, busy};
use super::operate::moment;
use super::query::rfc3339;
use crate::clock;
use crate::domain::endpoint::EndpointName;
use crate::relay::Command;

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
    /// `false`: it is no more, and its events have been or are being given up.
    configured: bool,
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

pub(super) async fn show(api: &Api) -> Result<Answer, ApiError> {
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
                configured: api.is_configured(endpoint.name),
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
