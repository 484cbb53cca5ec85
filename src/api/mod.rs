//! The listeners: what callers on this host, monitoring and the app's server see (contract §2 to §4, §6, §7).

mod answer;
mod body;
mod customers;
mod dead_letters;
mod endpoints;
mod events;
mod h5push;
mod local;
mod metrics;
mod open_api;
mod operate;
mod page;
mod query;
mod seats;
mod server;
mod status;
mod survey;
mod udesk;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::{Semaphore, mpsc, oneshot};

pub use self::endpoints::{Reloaded, entries};
pub use self::open_api::Callers;
pub use self::operate::pauses;
pub use self::server::{
    Bound, Inherited, ListenError, Shutdown, bind_local, bind_tcp_at, serve_local, serve_metrics, serve_open_api,
};
pub use self::status::History;
use crate::clock;
use crate::config::{Config, Endpoints};
use crate::domain::customer::Customer;
use crate::domain::endpoint::{EndpointName, Plugin};
use crate::domain::gate::{self, Question};
use crate::metrics::{EndpointNow, Metrics, Now};
use crate::relay::{Command, View};
use crate::store::Store;

/// Memory for the bodies of requests, KiB; a single body is at most 32 MiB.
const BODIES_KIB: usize = 48 << 10;
/// Bodies of large requests that are worked at at once, KiB: parsed and encoded, each takes two to three times as much
/// again.
const POSTING_KIB: usize = 1 << 10;
/// How long the relay may take to answer a question.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// What the last reload of the config came to.
#[derive(Clone, Debug, Default)]
pub struct Reload {
    /// When, Unix milliseconds; `None`: there was none.
    pub at_ms: Option<u64>,
    /// Why the config of before is still in effect.
    pub error: Option<String>,
    /// Keys that changed and need a restart.
    pub needs_restart: Vec<&'static str>,
}

/// What every request can use.
#[derive(Debug)]
pub struct Api {
    /// The outbox.
    pub store: Store,
    /// All metrics.
    pub metrics: Metrics,
    /// Questions to the relay.
    pub relay: mpsc::Sender<Command>,
    /// The config of now.
    pub config: ArcSwap<Config>,
    /// The endpoints of now.
    pub endpoints: ArcSwap<Endpoints>,
    /// Held while config or endpoints change.
    pub changes: tokio::sync::Mutex<()>,
    /// Held while dead letters are replayed, so that those of a lane stay in order.
    pub replaying: tokio::sync::Mutex<()>,
    /// What the last reload of the config came to.
    pub reload: Mutex<Reload>,
    /// How many events waited over the last hour.
    pub history: History,
    /// When this began.
    pub begun: Instant,
    /// Who has called over the network, and how often.
    pub callers: Callers,
    /// Memory for bodies that are being read or judged, in KiB: what does not fit waits its turn.
    pub bodies: Arc<Semaphore>,
    /// Of those, what is being worked at.
    pub posting: Semaphore,
    /// Whether the listeners are up and nobody has asked for a stop.
    pub is_up: AtomicBool,
}

impl Api {
    /// Nothing listens yet.
    #[must_use]
    pub fn new(
        config: &Arc<Config>,
        endpoints: Endpoints,
        store: Store,
        metrics: Metrics,
        relay: mpsc::Sender<Command>,
    ) -> Api {
        local::show_routes(&metrics);
        Api {
            store,
            metrics,
            relay,
            config: ArcSwap::new(Arc::clone(config)),
            endpoints: ArcSwap::from_pointee(endpoints),
            changes: tokio::sync::Mutex::default(),
            replaying: tokio::sync::Mutex::default(),
            reload: Mutex::default(),
            history: History::default(),
            begun: clock::now(),
            callers: Callers::default(),
            bodies: Arc::new(Semaphore::new(BODIES_KIB)),
            posting: Semaphore::new(POSTING_KIB),
            is_up: AtomicBool::new(false),
        }
    }

    /// The endpoint that takes a plugin's events: its own, or the default.
    fn endpoint_of(&self, plugin: Plugin) -> Option<(EndpointName, u64)> {
        let endpoints = self.endpoints.load();
        let found = EndpointName::that_take(plugin).find_map(|name| endpoints.get(&name));
        found?.as_ref().map(|endpoint| (endpoint.name, endpoint.max_events))
    }

    /// Whether there is an endpoint of that name, with an address.
    fn is_configured(&self, name: EndpointName) -> bool {
        self.endpoints.load().get(&name).is_some_and(Option::is_some)
    }

    /// Whether the next offline agent message of a customer would be pushed.
    fn would_push(&self, customer: &Customer) -> bool {
        let question = Question::next_offline_message(self.endpoint_of(customer.plugin).is_some());
        gate::decide(question, customer, self.config.load().require_h5push).is_ok()
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        self.ask_patiently(command, ANSWER_LIMIT).await
    }

    async fn ask_patiently<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
        patience: Duration,
    ) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        let answered = async {
            self.relay.send(command(reply)).await.ok()?;
            answer.await.ok()
        };
        tokio::time::timeout(patience, answered).await.ok()?
    }

    async fn waiting(&self, plugin: Plugin, web_token: &str) -> Option<u64> {
        let web_token = web_token.to_owned();
        self.ask(|reply| Command::Waiting { plugin, web_token, reply }).await
    }

    /// How everything stands, and how the relay sees it; `None` when the relay does not answer.
    async fn now(&self) -> Option<(Now, View)> {
        let view: View = self.ask(Command::View).await?;
        let store = self.store.clone();
        let (store_bytes, dead) =
            tokio::task::spawn_blocking(move || (store.bytes(), store.dead_letters())).await.ok()?;
        let dead: BTreeMap<EndpointName, u64> = dead.into_iter().collect();
        let now_s = clock::wall_ms() / 1_000;
        let mut endpoints: Vec<EndpointNow> = view
            .endpoints
            .iter()
            .map(|endpoint| EndpointNow {
                name: endpoint.name,
                events: endpoint.events,
                oldest_age_seconds: endpoint
                    .oldest
                    .map_or(0.0, |oldest| now_s.saturating_sub(u64::from(oldest)) as f64),
                in_flight: endpoint.in_flight,
                is_up: endpoint.is_up,
                state: endpoint.state(),
                dead_letters: dead.get(&endpoint.name).copied().unwrap_or(0),
            })
            .collect();
        for (name, dead_letters) in dead {
            if dead_letters > 0 && !endpoints.iter().any(|endpoint| endpoint.name == name) {
                endpoints.push(EndpointNow::idle(name, dead_letters));
            }
        }
        let now = Now {
            endpoints,
            outbox_bytes: view.outbox_bytes,
            capacity_events: self.config.load().max_events,
            free_bytes: self.store.free_bytes(),
            free_floor_bytes: self.store.free_floor(),
            store_bytes,
        };
        Some((now, view))
    }

    /// Whether it accepts: listeners up, store open, disk above the floor and writable.
    fn is_ready(&self) -> Result<(), &'static str> {
        if !self.is_up.load(Ordering::SeqCst) {
            return Err("starting or stopping");
        }
        if self.store.is_disk_low() {
            return Err("the disk is nearly full");
        }
        if self.store.is_failing() {
            return Err("the store cannot be written");
        }
        Ok(())
    }
}

/// Shared by all connections.
pub type Shared = Arc<Api>;
