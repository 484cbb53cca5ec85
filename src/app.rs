//! Wiring, start and stop: the only file that sees everything.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use crate::api::{self, Api, Bound, History, Inherited, Reload};
use crate::clock;
use crate::config::{Config, ConfigError};
use crate::domain::push::PushBounds;
use crate::domain::retry::Delays;
use crate::domain::schedule::{self, Schedule};
use crate::log;
use crate::metrics::Metrics;
use crate::relay::{self, Command, NOTICES_MAX, Network, Relay, max_in_flight};
use crate::store::{self, Store, Threads};

/// How long the relay's task may take to go round.
const PING_LIMIT: Duration = Duration::from_secs(5);
/// Longest time between checkpoints.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(5);

/// Why the relay does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The data directory cannot be used.
    #[error(transparent)]
    Store(#[from] store::OpenError),
    /// An address cannot be listened on.
    #[error(transparent)]
    Listen(#[from] api::ListenError),
    /// The TLS library refuses its own settings.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// A listener would be open to the network without what that needs.
    #[error("{0}")]
    Exposed(String),
    /// A mistake in the metrics.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

/// A relay that runs.
#[derive(Debug)]
pub struct App {
    store: Store,
    threads: Threads,
    commands: mpsc::Sender<Command>,
    relay: tokio::task::JoinHandle<()>,
    listeners: JoinSet<()>,
    scrapes: JoinSet<()>,
    stop_local: watch::Sender<bool>,
    stop_metrics: watch::Sender<bool>,
    api: Arc<Api>,
    /// The config of the start.
    started: Arc<Config>,
    /// Where `[local]` listens, for TCP.
    pub local_address: Option<SocketAddr>,
    /// Where `[metrics]` listens.
    pub metrics_address: Option<SocketAddr>,
    /// Where `[open_api]` listens.
    pub open_api_address: Option<SocketAddr>,
}

/// How long it may take to note that attempts were given up.
const NOTED_LIMIT: Duration = Duration::from_secs(1);

impl App {
    /// Opens the store, binds the listeners and starts everything. When this returns, it accepts.
    ///
    /// # Errors
    /// Nothing runs.
    pub async fn start(config: Config) -> Result<App, StartError> {
        close_to_others();
        let metrics = Metrics::new(config.metrics_max_endpoints)?;
        let rules = schedule_rules(&config);
        let network = Network::new(&config.extra_ca, rules.max_in_flight)?;
        for warning in &config.warnings {
            tracing::warn!("{warning}");
        }
        // Bound before the store is opened: a wrong address is said at once. What comes early waits in the kernel.
        let mut inherited = Inherited::take()?;
        let local = inherited.of("local").map_or_else(|| api::bind_local(&config.local), Ok)?;
        let scrape = inherited.of("metrics").map_or_else(|| api::bind_tcp_at(config.metrics_listen), Ok)?;
        let open_api = match config.open_api.listen {
            Some(address) => Some(inherited.of("open_api").map_or_else(|| api::bind_tcp_at(address), Ok)?),
            None => None,
        };
        inherited.end();
        let (local_address, metrics_address) = (local.address(), scrape.address());
        let open_api_address = open_api.as_ref().and_then(Bound::address);
        check_exposure(&config, local_address, open_api_address).map_err(StartError::Exposed)?;
        let config = Arc::new(config);
        let mut schedule = Schedule::new(rules);
        let (tell, notices) = mpsc::channel(NOTICES_MAX);
        let options = store_options(&config);
        let store_metrics = metrics.store.clone();
        let file = Arc::clone(&config);
        let opened = tokio::task::spawn_blocking(move || {
            let begun = clock::now();
            // What waits for an endpoint that is not there is given up: they must be known before it is loaded.
            let prepare = |settings: &_, schedule: &mut Schedule| {
                let endpoints = file.effective(&api::entries(settings));
                for endpoint in endpoints.values().flatten() {
                    schedule.put_endpoint(endpoint.name, endpoint.limits, 0);
                }
                for (name, pauses) in api::pauses(settings) {
                    schedule.set_pauses(name, pauses, 0);
                }
                for (name, wait) in relay::holds(settings, &endpoints) {
                    tracing::info!(endpoint = %name, seconds = wait.as_secs(), "the receiver asked to be left alone");
                    schedule.hold(name, wait, clock::micros());
                }
            };
            let opened = Store::open(options, store_metrics, &mut schedule, prepare, tell);
            (opened, schedule, begun.elapsed())
        });
        let (opened, schedule, took) = match opened.await {
            Ok(opened) => opened,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        };
        let (store, threads) = opened?;
        tracing::info!(events = schedule.events(), lanes = schedule.lanes(), ?took, "the store is open");
        let endpoints = config.effective(&api::entries(&store.settings()));
        for endpoint in endpoints.values().flatten() {
            tracing::info!(endpoint = %endpoint.name, url = endpoint.url.shown(), "endpoint");
        }
        let rule = Arc::new(config.url_rule.clone());
        let configured = (&endpoints, &rule);
        let relay = Relay::new(schedule, store.clone(), network, configured, relay_rules(&config), metrics.clone());
        let (commands, asked) = mpsc::channel(relay::COMMANDS_MAX);
        let relay = tokio::spawn(relay.run(notices, asked));
        let api = Arc::new(Api::new(&config, endpoints, store.clone(), metrics, commands.clone()));
        let mut listeners = JoinSet::new();
        let (stop_local, local_stopped) = watch::channel(false);
        let (stop_metrics, metrics_stopped) = watch::channel(false);
        if let Some(open_api) = open_api {
            listeners.spawn(api::serve_open_api(open_api, Arc::clone(&api), local_stopped.clone()));
        }
        listeners.spawn(api::serve_local(local, Arc::clone(&api), local_stopped));
        let mut scrapes = JoinSet::new();
        scrapes.spawn(History::keep(Arc::clone(&api)));
        scrapes.spawn(api::serve_metrics(scrape, Arc::clone(&api), metrics_stopped));
        api.is_up.store(true, Ordering::SeqCst);
        Ok(App {
            store,
            threads,
            commands,
            relay,
            listeners,
            scrapes,
            stop_local,
            stop_metrics,
            api,
            started: config,
            local_address,
            metrics_address,
            open_api_address,
        })
    }

    /// Goes by another config from now on, as far as that needs no restart: all of it, or, if it is wrong, nothing.
    ///
    /// # Errors
    /// Why not.
    pub async fn reload(&self, read: Result<Config, ConfigError>) -> Result<(), String> {
        let result = match read {
            Ok(config) => self.take_over(config).await,
            Err(error) => Err(error.to_string()),
        };
        let (needs_restart, error) = match &result {
            Ok(needs_restart) => (needs_restart.clone(), None),
            Err(error) => (Vec::new(), Some(error.clone())),
        };
        self.api.metrics.reloaded(error.is_none());
        let at_ms = Some(clock::wall_ms());
        let reload = Reload { at_ms, error, needs_restart };
        *self.api.reload.lock().unwrap_or_else(PoisonError::into_inner) = reload;
        match result {
            Ok(needs_restart) => {
                if !needs_restart.is_empty() {
                    tracing::warn!(keys = needs_restart.join(" "), "changed, and in effect only after a restart");
                }
                tracing::info!("the config was read anew");
                Ok(())
            }
            Err(error) => {
                tracing::error!(error, "the config was not taken over");
                Err(error)
            }
        }
    }

    async fn take_over(&self, config: Config) -> Result<Vec<&'static str>, String> {
        if config.is_empty {
            // What waits would be given up, though it is more likely that somebody is just writing the file.
            return Err("the file is empty".to_owned());
        }
        // The listeners stay where they are, whatever the new file says of addresses.
        check_exposure(&config, self.local_address, self.open_api_address)
            .map_err(|error| format!("{error}; it listens there until a restart"))?;
        let schedule = schedule_rules(&config);
        let network = Network::new(&config.extra_ca, schedule.max_in_flight).map_err(|error| error.to_string())?;
        for warning in &config.warnings {
            tracing::warn!("{warning}");
        }
        let changed = config.needs_restart(&self.started);
        let config = Arc::new(config);
        let reloaded = (network, relay_rules(&config), schedule);
        let configured = self.api.reconfigure(Arc::clone(&config), reloaded).await;
        configured.map_err(|error| format!("{error}: endpoints and what pushes go by may be the new ones"))?;
        self.store.set_rules(rules(&config));
        self.store.set_free_floor(config.min_free_disk);
        log::set_level(&config.log_level);
        Ok(changed)
    }

    /// Whether the relay's task goes round.
    pub async fn is_alive(&self) -> bool {
        let (reply, answer) = oneshot::channel();
        let asked = self.commands.send(Command::Ping(reply));
        let answered = async { asked.await.is_ok() && answer.await.is_ok() };
        tokio::time::timeout(PING_LIMIT, answered).await == Ok(true)
    }

    /// A line on how it is, for systemd.
    #[must_use]
    pub fn summary(&self) -> String {
        format!("{} events wait", self.store.waiting())
    }

    /// Stops: listeners first, then attempts, then the store. What is accepted is kept.
    pub async fn stop(self) {
        let App { store, threads, commands, relay, mut listeners, mut scrapes, stop_local, stop_metrics, api, .. } =
            self;
        let mut deadline = tokio::time::Instant::now() + self.started.shutdown_timeout;
        api.is_up.store(false, Ordering::SeqCst);
        stop_local.send_replace(true);
        let (reply, drained) = oneshot::channel();
        if commands.send(Command::Drain(reply)).await.is_ok()
            && tokio::time::timeout_at(deadline, drained).await.is_err()
        {
            tracing::warn!("attempts in flight are given up: they will be made again");
            let (reply, noted) = oneshot::channel();
            if commands.send(Command::GiveUp(reply)).await.is_ok() {
                drop(tokio::time::timeout(NOTED_LIMIT, noted).await);
            }
            // Whoever waited for an attempt is answered now.
            deadline = tokio::time::Instant::now() + NOTED_LIMIT;
        }
        // Requests that had begun are answered by now, or too slow.
        let answered = async { while listeners.join_next().await.is_some() {} };
        if tokio::time::timeout_at(deadline, answered).await.is_err() {
            tracing::warn!("a request was still being sent");
        }
        stop_metrics.send_replace(true);
        listeners.shutdown().await;
        scrapes.shutdown().await;
        drop(commands);
        let ended = tokio::task::spawn_blocking(move || store.end(threads)).await;
        if ended.is_err() {
            tracing::error!("the store did not end well");
        }
        relay.abort();
        tracing::info!("stopped");
    }
}

/// Holds the addresses that are really bound (systemd may have chosen them) against the rules of contract §2.
fn check_exposure(config: &Config, local: Option<SocketAddr>, open_api: Option<SocketAddr>) -> Result<(), String> {
    local.map_or(Ok(()), |address| config.local.may_listen_on(address))?;
    open_api.map_or(Ok(()), |address| config.open_api.may_listen_on(address))
}

/// What this process creates from now on is for nobody else, whoever created the data directory.
fn close_to_others() {
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
}

/// A store that was opened without a relay, to be looked at.
#[derive(Debug)]
pub struct Stopped {
    /// The store.
    pub store: Store,
    /// What waits in it.
    pub schedule: Schedule,
    threads: Threads,
    notices: mpsc::Receiver<store::Notice>,
}

/// Opens the data directory of a relay that is stopped. What the config says of endpoints is of no account: nothing is
/// given up.
///
/// # Errors
/// The directory cannot be used, or a relay uses it.
pub fn open_stopped(config: &Config) -> Result<Stopped, StartError> {
    close_to_others();
    let mut schedule = Schedule::new(schedule_rules(config));
    let metrics = Metrics::new(config.metrics_max_endpoints)?;
    let (tell, notices) = mpsc::channel(NOTICES_MAX);
    let prepare = |_: &_, _: &mut Schedule| ();
    let options = store::Options { is_relaying: false, ..store_options(config) };
    let (store, threads) = Store::open(options, metrics.store, &mut schedule, prepare, tell)?;
    Ok(Stopped { store, schedule, threads, notices })
}

impl Stopped {
    /// Ends the store's threads.
    pub fn close(self) {
        drop(self.notices);
        self.store.end(self.threads);
    }
}

fn relay_rules(config: &Config) -> relay::Rules {
    relay::Rules {
        timeout: config.timeout,
        bounds: PushBounds { messages_max: config.max_messages, bytes_max: config.max_bytes },
        logs_attempts: config.log_attempts,
    }
}

fn schedule_rules(config: &Config) -> schedule::Rules {
    schedule::Rules {
        delays: Delays::new(&config.backoff),
        max_age_s: config.max_age.as_secs(),
        max_attempts: config.max_attempts,
        max_refusals: config.max_refusals,
        breaker_failures: config.breaker_failures,
        max_in_flight: max_in_flight(config.max_in_flight, callers(config)),
        events_per_push: config.max_messages,
    }
}

/// Connections that callers may hold.
fn callers(config: &Config) -> u32 {
    let open_api = config.open_api.listen.map_or(0, |_| config.open_api.max_connections);
    config.local.max_connections.saturating_add(open_api)
}

fn store_options(config: &Config) -> store::Options {
    store::Options {
        is_relaying: true,
        dir: config.data_dir.clone(),
        segment_bytes: store::SEGMENT_BYTES,
        queue_bytes_min: store::QUEUE_BYTES_MIN,
        free_min: config.min_free_disk,
        checkpoint_every: CHECKPOINT_EVERY,
        rules: rules(config),
        dead_keep_s: config.dead_keep.as_secs(),
        dead_max: config.dead_max,
    }
}

fn rules(config: &Config) -> store::Rules {
    store::Rules {
        events_max: config.max_events,
        dedupe_window_s: config.dedupe_window.as_secs(),
        dedupe_max: config.dedupe_max,
        require_h5push: config.require_h5push,
        forget_after_s: config.forget_after.as_secs(),
    }
}
