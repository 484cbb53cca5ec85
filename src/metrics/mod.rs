//! Every metric of contract §7: names, labels, and that known label values are there from the start at 0.

mod endpoints;

use std::sync::Arc;

use prometheus::{
    Encoder as _, Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

pub use self::endpoints::{EndpointMetrics, EndpointNow};
use self::endpoints::{Endpoints, Scraped};
use crate::domain::customer::Toggle;
use crate::domain::endpoint::EndpointName;
use crate::domain::gate::Suppressed;

/// The content type of the exposition, whatever was asked for.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4";

/// The path that nearly all requests are for.
pub const EVENTS: &str = "/v1/events";
/// The call that sets and reads a customer's switch.
pub const H5PUSH: &str = "/open_api_v1/im/h5push";
/// The call that takes a rating.
pub const SURVEY: &str = "/open_api_v1/im/sessions/survey";

const ATTEMPT_BUCKETS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0];
const LATENCY_BUCKETS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1_800.0, 7_200.0, 36_000.0,
    86_400.0,
];
const ACCEPT_BUCKETS: &[f64] = &[0.000_5, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5];

/// What the store counts.
#[derive(Clone, Debug)]
pub struct StoreMetrics {
    /// Time of an fdatasync of the journal.
    pub sync_seconds: Histogram,
    /// Failures by operation.
    pub errors: IntCounterVec,
    /// Damage by what was damaged.
    pub damage: IntCounterVec,
    endpoints: Arc<Endpoints>,
}

impl StoreMetrics {
    /// Counts damage.
    pub fn damaged(&self, what: &str, count: u64) {
        self.damage.with_label_values(&[what]).inc_by(count);
    }

    /// Counts dead letters that went for age or number.
    pub fn dead_dropped(&self, endpoint: EndpointName, count: u64) {
        self.endpoints.of(endpoint).dead_dropped(count);
    }
}

/// What is read when it is scraped.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Now {
    /// Every endpoint.
    pub endpoints: Vec<EndpointNow>,
    /// Bytes of records that wait.
    pub outbox_bytes: u64,
    /// `outbox.max_events`.
    pub capacity_events: u64,
    /// Free space, bytes.
    pub free_bytes: u64,
    /// `outbox.min_free_disk`, bytes.
    pub free_floor_bytes: u64,
    /// Bytes of the data directory.
    pub store_bytes: u64,
}

/// All metrics.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
    endpoints: Arc<Endpoints>,
    /// Of the store.
    pub store: StoreMetrics,
    events: IntCounterVec,
    /// Looked up once: these two are counted for nearly every event.
    queued: IntCounter,
    accepted_requests: IntCounter,
    /// Time of an attempt, head of the answer included.
    pub push_seconds: Histogram,
    /// From acceptance to delivery.
    pub delivery_seconds: Histogram,
    /// From the whole request to the answer.
    pub accept_seconds: Histogram,
    outbox_bytes: IntGauge,
    capacity_events: IntGauge,
    free_bytes: Gauge,
    free_floor_bytes: Gauge,
    store_bytes: Gauge,
    local_requests: IntCounterVec,
    /// Events withdrawn.
    pub withdrawn: IntCounter,
    toggles: IntCounterVec,
    surveys: IntCounterVec,
    open_api_requests: IntCounterVec,
    reload_successful: IntGauge,
}

/// What became of an event, as counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventOutcome {
    /// Stored.
    Queued,
    /// Known already.
    Duplicate,
    /// The gate said no.
    Suppressed(Suppressed),
    /// Invalid: the error's code.
    Rejected(&'static str),
    /// Not now: the error's code.
    Refused(&'static str),
}

/// Codes of rejections, for metrics that start at 0.
const REJECTED: [&str; 2] = ["invalid_event", "too_large"];
/// Codes of refusals, for metrics that start at 0.
const REFUSED: [&str; 4] = ["outbox_full", "endpoint_full", "disk_low", "stopping"];
/// What the store does that can fail.
const STORE_OPS: [&str; 8] = ["append", "sync", "queue", "read", "bury", "checkpoint", "allocate", "expire"];
/// What becomes of surveys.
const SURVEYS: [&str; 3] = ["queued", "rejected", "refused"];
/// The open API's calls, and what they answer.
const OPEN_API_PATHS: [&str; 2] = [H5PUSH, SURVEY];
const OPEN_API_CODES: [&str; 6] = ["1000", "2000", "2059", "2060", "2062", "5000"];
/// What can be damaged.
const DAMAGE: [&str; 6] = ["journal", "torn_tail", "queue", "checkpoint", "dead_letters", "state_log"];

impl Metrics {
    /// All metrics, at 0.
    ///
    /// # Errors
    /// Two metrics of one name: a mistake in this file.
    pub fn new(endpoints_max: usize) -> Result<Metrics, prometheus::Error> {
        let registry = Registry::new();
        let make = Maker { registry: &registry };
        let endpoints = Arc::new(Endpoints::new(endpoints_max)?);
        registry.register(Box::new(Scraped(Arc::clone(&endpoints))))?;
        let events = make.counters("h5push_events_total", "Events posted, by outcome.", &["outcome", "reason"])?;
        let local_requests = make.counters(
            "h5push_local_requests_total",
            "Requests on the local listener, by path and status.",
            &["path", "code"],
        )?;
        let metrics = Metrics {
            queued: events.with_label_values(&["queued", ""]),
            accepted_requests: local_requests.with_label_values(&[EVENTS, "202"]),
            events,
            local_requests,
            store: StoreMetrics {
                sync_seconds: make.histogram(
                    "h5push_store_sync_duration_seconds",
                    "Time of an fdatasync of the journal.",
                    ACCEPT_BUCKETS,
                )?,
                errors: make.counters("h5push_store_errors_total", "Failures of the store.", &["op"])?,
                damage: make.counters("h5push_store_damage_total", "Damage found in the store's files.", &["what"])?,
                endpoints: Arc::clone(&endpoints),
            },
            push_seconds: make.histogram(
                "h5push_push_duration_seconds",
                "Time of an attempt at a push.",
                ATTEMPT_BUCKETS,
            )?,
            delivery_seconds: make.histogram(
                "h5push_delivery_latency_seconds",
                "Time from the acceptance of an event to its delivery.",
                LATENCY_BUCKETS,
            )?,
            accept_seconds: make.histogram(
                "h5push_accept_duration_seconds",
                "Time from the whole request to the answer.",
                ACCEPT_BUCKETS,
            )?,
            outbox_bytes: make.gauge("h5push_outbox_bytes", "Bytes of records that wait, about.")?,
            capacity_events: make.gauge("h5push_outbox_capacity_events", "Most events that may wait.")?,
            free_bytes: make.real("h5push_store_free_bytes", "Free space of the data directory's disk.")?,
            free_floor_bytes: make
                .real("h5push_store_free_floor_bytes", "Free space below which events are refused.")?,
            store_bytes: make.real("h5push_store_bytes", "Bytes of the data directory.")?,
            withdrawn: make.register(IntCounter::new(
                "h5push_withdrawn_total",
                "Events withdrawn: toggled off, or customer forgotten.",
            )?)?,
            toggles: make.counters("h5push_toggles_total", "Toggles set, by state.", &["state"])?,
            surveys: make.counters("h5push_surveys_total", "Surveys received, by outcome.", &["outcome"])?,
            open_api_requests: make.open_api_requests()?,
            reload_successful: make.reload_successful()?,
            endpoints,
            registry: registry.clone(),
        };
        metrics.start_at_zero();
        make.constants()?;
        Ok(metrics)
    }

    fn start_at_zero(&self) {
        for outcome in ["queued", "duplicate"] {
            self.events.with_label_values(&[outcome, ""]);
        }
        for reason in Suppressed::ALL {
            self.events.with_label_values(&["suppressed", reason.as_str()]);
        }
        for (outcome, reasons) in [("rejected", REJECTED.as_slice()), ("refused", REFUSED.as_slice())] {
            for reason in reasons {
                self.events.with_label_values(&[outcome, reason]);
            }
        }
        for op in STORE_OPS {
            self.store.errors.with_label_values(&[op]);
        }
        for what in DAMAGE {
            self.store.damage.with_label_values(&[what]);
        }
        for state in Toggle::ALL {
            self.toggles.with_label_values(&[state.as_str()]);
        }
        for outcome in SURVEYS {
            self.surveys.with_label_values(&[outcome]);
        }
        for path in OPEN_API_PATHS {
            for code in OPEN_API_CODES {
                self.open_api_requests.with_label_values(&[path, code]);
            }
            self.open_api_requests.with_label_values(&[path, "405"]);
        }
        self.open_api_requests.with_label_values(&["other", "404"]);
        self.reload_successful.set(1);
    }

    /// The counters of an endpoint.
    #[must_use]
    pub fn endpoint(&self, name: EndpointName) -> Arc<EndpointMetrics> {
        self.endpoints.of(name)
    }

    /// Counts events.
    pub fn count_events(&self, outcome: EventOutcome, count: u64) {
        let (outcome, reason) = match outcome {
            EventOutcome::Queued => return self.queued.inc_by(count),
            EventOutcome::Duplicate => ("duplicate", ""),
            EventOutcome::Suppressed(reason) => ("suppressed", reason.as_str()),
            EventOutcome::Rejected(code) => ("rejected", code),
            EventOutcome::Refused(code) => ("refused", code),
        };
        self.events.with_label_values(&[outcome, reason]).inc_by(count);
    }

    /// Shows a counter of requests on `[local]` before there is one.
    pub fn show_requests(&self, path: &'static str, code: u16) {
        self.local_requests.with_label_values(&[path, code.to_string().as_str()]);
    }

    /// Counts a request on `[local]`. `path` is a route, never what was asked for.
    pub fn count_request(&self, path: &'static str, code: u16) {
        if path == EVENTS && code == 202 {
            return self.accepted_requests.inc();
        }
        self.local_requests.with_label_values(&[path, code.to_string().as_str()]).inc();
    }

    /// Counts a call of the open API. `path` is a route, never what was asked for.
    pub fn count_open_api(&self, path: &'static str, code: u32) {
        self.open_api_requests.with_label_values(&[path, code.to_string().as_str()]).inc();
    }

    /// Counts a survey: `queued`, `rejected` or `refused`.
    pub fn count_survey(&self, outcome: &'static str) {
        self.surveys.with_label_values(&[outcome]).inc();
    }

    /// Says whether the config that was read last is the one that runs.
    pub fn reloaded(&self, is_successful: bool) {
        self.reload_successful.set(i64::from(is_successful));
    }

    /// Counts a toggle that was set.
    pub fn count_toggle(&self, state: &str) {
        self.toggles.with_label_values(&[state]).inc();
    }

    /// The exposition, with the gauges as they are now.
    ///
    /// # Errors
    /// The encoder's.
    pub fn expose(&self, now: &Now) -> Result<Vec<u8>, prometheus::Error> {
        self.endpoints.stand(&now.endpoints);
        self.outbox_bytes.set(now.outbox_bytes as i64);
        self.capacity_events.set(now.capacity_events as i64);
        self.free_bytes.set(now.free_bytes as f64);
        self.free_floor_bytes.set(now.free_floor_bytes as f64);
        self.store_bytes.set(now.store_bytes as f64);
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}

struct Maker<'a> {
    registry: &'a Registry,
}

impl Maker<'_> {
    fn register<C: prometheus::core::Collector + Clone + 'static>(&self, metric: C) -> Result<C, prometheus::Error> {
        self.registry.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    /// What stays as it is while the process runs.
    fn constants(&self) -> Result<(), prometheus::Error> {
        let build = self.gauges("h5push_build_info", "The build that runs.", &["version", "revision"])?;
        let revision = option_env!("H5PUSH_REVISION").unwrap_or("unknown");
        build.with_label_values(&[env!("CARGO_PKG_VERSION"), revision]).set(1);
        let collector = prometheus::process_collector::ProcessCollector::for_self();
        self.registry.register(Box::new(collector))?;
        Ok(())
    }

    fn open_api_requests(&self) -> Result<IntCounterVec, prometheus::Error> {
        self.counters(
            "h5push_open_api_requests_total",
            "Calls of the open API, by path and the code that was answered.",
            &["path", "code"],
        )
    }

    fn reload_successful(&self) -> Result<IntGauge, prometheus::Error> {
        self.gauge(
            "h5push_config_last_reload_successful",
            "Whether the config that was read last is the one that runs.",
        )
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, prometheus::Error> {
        self.register(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, prometheus::Error> {
        self.register(IntGaugeVec::new(Opts::new(name, help), labels)?)
    }

    fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, prometheus::Error> {
        self.register(IntGauge::new(name, help)?)
    }

    fn real(&self, name: &str, help: &str) -> Result<Gauge, prometheus::Error> {
        self.register(Gauge::new(name, help)?)
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Result<Histogram, prometheus::Error> {
        self.register(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))?)
    }
}
