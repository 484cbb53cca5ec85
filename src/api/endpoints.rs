//! `/v1/endpoints` (contract §3): the push addresses that an administrator saved, over those of the config file.

use std::collections::BTreeMap;
use std::sync::Arc;

use hyper::StatusCode;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

use super::answer::{self, Answer, ApiError, Code, error};
use super::{ANSWER_LIMIT, Api};
use crate::config::{Config, Endpoint, Endpoints, Entry, Source};
use crate::domain::endpoint::EndpointName;
use crate::domain::schedule;
use crate::relay::{self, Command, Configure, Network};

/// What a reload brings beside the config: certificates read anew, and rules of the relay and its schedule.
pub type Reloaded = (Network, relay::Rules, schedule::Rules);

/// Settings of the store that are endpoints begin with this.
const PREFIX: &str = "endpoint/";

/// The endpoints that calls have set, from the store's settings. One that cannot be read gets no push: its events are not
/// for the config file's address, nor for `default`.
#[must_use]
pub fn entries(settings: &BTreeMap<String, String>) -> BTreeMap<EndpointName, Entry> {
    let mut all = BTreeMap::new();
    for (key, text) in settings {
        let Some(name) = key.strip_prefix(PREFIX).and_then(|name| name.parse().ok()) else { continue };
        match Entry::from_text(text) {
            Some(entry) => drop(all.insert(name, entry)),
            None => {
                tracing::error!(endpoint = %name, "a stored endpoint cannot be read: nothing is pushed to it");
                all.insert(name, Entry::default());
            }
        }
    }
    all
}

#[derive(Serialize)]
struct Shown {
    name: String,
    url: Option<String>,
    source: &'static str,
    state: &'static str,
    /// `null`, like the next two: no push.
    rate_per_second: Option<f64>,
    burst: Option<u32>,
    concurrency: Option<u32>,
    signed: bool,
    headers: Vec<String>,
}

fn shown(name: EndpointName, endpoint: Option<&Endpoint>, state: &'static str) -> Shown {
    let limits = endpoint.map(|endpoint| endpoint.limits);
    Shown {
        name: name.to_string(),
        url: endpoint.map(|endpoint| endpoint.url.uri().to_string()),
        source: match endpoint.map(|endpoint| endpoint.source) {
            Some(Source::Config) => "config",
            // Only a call says that there is no push.
            Some(Source::Api) | None => "api",
        },
        state,
        rate_per_second: limits.map(|limits| limits.rate_per_second),
        burst: limits.map(|limits| limits.burst),
        concurrency: limits.map(|limits| limits.concurrency),
        signed: endpoint.is_some_and(|endpoint| endpoint.signing.is_some()),
        headers: endpoint.map_or_else(Vec::new, |endpoint| {
            endpoint.headers.iter().map(|(name, _)| name.as_str().to_owned()).collect()
        }),
    }
}

/// Reads the name of an endpoint that should be there: what is no name is not there.
pub(super) fn known_name(text: &str) -> Result<EndpointName, ApiError> {
    EndpointName::any(text).map_err(|_| error(Code::NotFound, format!("name: there is no endpoint {text}")))
}

/// Reads an endpoint's name in a path.
pub(super) fn name(text: &str) -> Result<EndpointName, ApiError> {
    EndpointName::any(text).map_err(|bad| error(Code::InvalidRequest, format!("name: {bad}")))
}

pub(super) async fn list(api: &Api) -> Result<Answer, ApiError> {
    #[derive(Serialize)]
    struct List {
        endpoints: Vec<Shown>,
    }
    let states = states(api).await?;
    let all = api.endpoints.load();
    let endpoints = all.iter().map(|(name, endpoint)| shown(*name, endpoint.as_ref(), state(&states, *name))).collect();
    Ok(answer::json(StatusCode::OK, &List { endpoints }))
}

pub(super) async fn show(api: &Api, name: EndpointName) -> Result<Answer, ApiError> {
    let states = states(api).await?;
    let all = api.endpoints.load();
    let endpoint = all.get(&name).ok_or_else(|| unknown(name))?;
    Ok(answer::json(StatusCode::OK, &shown(name, endpoint.as_ref(), state(&states, name))))
}

pub(super) async fn put(api: &Api, name: EndpointName, body: &[u8]) -> Result<Answer, ApiError> {
    if name == EndpointName::SURVEY {
        return Err(error(Code::InvalidRequest, "name: survey is im_server.survey_url of the config"));
    }
    {
        let _changing = api.changes.lock().await;
        let config = api.config.load_full();
        let all = entries(&api.store.settings());
        let entry = Entry::put(body, all.get(&name), name, &config.defaults, &config.url_rule);
        let text = entry.and_then(|entry| entry.to_text());
        let text = text.map_err(|problem| error(Code::InvalidRequest, problem))?;
        let room = api.room_for_change().await?;
        api.store.set(&format!("{PREFIX}{name}"), Some(text)).await?;
        api.apply(room, config, None).await?;
    }
    tracing::info!(endpoint = %name, "endpoint set by a call");
    show(api, name).await
}

pub(super) async fn delete(api: &Api, name: EndpointName) -> Result<Answer, ApiError> {
    #[derive(Serialize)]
    struct Deleted {
        deleted: bool,
    }
    let _changing = api.changes.lock().await;
    let key = format!("{PREFIX}{name}");
    if !api.store.has_setting(&key) {
        let message = format!("name: no call has set {name}; what the config file says is changed there");
        return Err(error(Code::NotFound, message));
    }
    let room = api.room_for_change().await?;
    api.store.set(&key, None).await?;
    api.apply(room, api.config.load_full(), None).await?;
    tracing::info!(endpoint = %name, "endpoint deleted by a call");
    Ok(answer::json(StatusCode::OK, &Deleted { deleted: true }))
}

fn unknown(name: EndpointName) -> ApiError {
    error(Code::NotFound, format!("name: there is no endpoint {name}"))
}

async fn states(api: &Api) -> Result<BTreeMap<EndpointName, &'static str>, ApiError> {
    let view = api.ask(Command::View).await.ok_or_else(answer::busy)?;
    Ok(view.endpoints.iter().map(|endpoint| (endpoint.name, endpoint.state())).collect())
}

fn state(states: &BTreeMap<EndpointName, &'static str>, name: EndpointName) -> &'static str {
    states.get(&name).copied().unwrap_or("up")
}

impl Api {
    /// Goes by another config from now on.
    ///
    /// # Errors
    /// The relay does not answer.
    pub async fn reconfigure(&self, config: Arc<Config>, reloaded: Reloaded) -> Result<(), String> {
        let _changing = self.changes.lock().await;
        let room = self.room_for_change().await.map_err(|error| error.message)?;
        self.apply(room, config, Some(reloaded)).await.map_err(|error| error.message)
    }

    /// Room among the relay's questions: without it a change is not begun.
    async fn room_for_change(&self) -> Result<mpsc::Permit<'_, Command>, ApiError> {
        let room = tokio::time::timeout(ANSWER_LIMIT, self.relay.reserve()).await;
        room.ok().and_then(Result::ok).ok_or_else(answer::busy)
    }

    /// Makes a config, and the endpoints that come of it, the ones of now. `changes` is held.
    ///
    /// # Errors
    /// The relay does not answer: it goes by the new ones a little later.
    async fn apply(
        &self,
        room: mpsc::Permit<'_, Command>,
        config: Arc<Config>,
        reloaded: Option<Reloaded>,
    ) -> Result<(), ApiError> {
        let new = Arc::new(config.effective(&entries(&self.store.settings())));
        // First what goes, so that nothing is accepted for it any more; then the relay; then what is new, so that
        // nothing is accepted for it before the relay knows it.
        let old = self.endpoints.load_full();
        let both: Endpoints = old
            .iter()
            .filter_map(|(name, endpoint)| match new.get(name) {
                Some(Some(_)) => Some((*name, endpoint.clone())),
                Some(None) => Some((*name, None)),
                None => None,
            })
            .collect();
        self.endpoints.store(Arc::new(both));
        let rule = Arc::new(config.url_rule.clone());
        let endpoints = Arc::clone(&new);
        let (reply, configured) = oneshot::channel();
        room.send(Command::Configure(Box::new(Configure { endpoints, rule, reloaded, reply })));
        let configured = tokio::time::timeout(ANSWER_LIMIT, configured).await;
        self.config.store(config);
        self.endpoints.store(new);
        if matches!(configured, Ok(Ok(()))) { Ok(()) } else { Err(answer::busy()) }
    }
}
