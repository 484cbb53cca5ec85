//! What is counted and shown of each endpoint.
//!
//! A collector of its own: the library's vectors keep a name, a help text and the labels for each of an endpoint's
//! twenty counters, 10 MB for 1,000 endpoints. Here a counter is a number, and the rest is made when it is scraped.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::core::{Collector, Desc};
use prometheus::proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType};

use crate::domain::endpoint::EndpointName;
use crate::domain::verdict::{AttemptResult, DeathReason};

/// Endpoints beyond `metrics.max_endpoints` are shown together under this label.
const OTHER: &str = "other";

/// The counters of one endpoint.
#[derive(Debug, Default)]
pub struct EndpointMetrics {
    attempts: [AtomicU64; AttemptResult::ALL.len()],
    messages_delivered: AtomicU64,
    rate_limited_micros: AtomicU64,
    dead_letters: [AtomicU64; DeathReason::ALL.len()],
    dead_letters_dropped: AtomicU64,
}

impl EndpointMetrics {
    /// Counts an attempt.
    pub fn attempt(&self, result: AttemptResult) {
        let counters = AttemptResult::ALL.iter().zip(&self.attempts);
        counters.filter(|(other, _)| **other == result).for_each(|(_, counter)| add(counter, 1));
    }

    /// Counts messages whose push succeeded.
    pub fn delivered(&self, messages: u64) {
        add(&self.messages_delivered, messages);
    }

    /// Counts time in which a lane was ready and the rate forbade it, microseconds.
    pub fn rate_limited(&self, micros: u64) {
        add(&self.rate_limited_micros, micros);
    }

    /// Counts dead letters.
    pub fn died(&self, reason: DeathReason, count: u64) {
        let counters = DeathReason::ALL.iter().zip(&self.dead_letters);
        counters.filter(|(other, _)| **other == reason).for_each(|(_, counter)| add(counter, count));
    }

    /// Counts dead letters that went for age or number.
    pub fn dead_dropped(&self, count: u64) {
        add(&self.dead_letters_dropped, count);
    }

    /// Messages whose push succeeded.
    #[must_use]
    pub fn delivered_messages(&self) -> u64 {
        get(&self.messages_delivered)
    }

    /// Attempts that did not succeed.
    #[must_use]
    pub fn failed_attempts(&self) -> u64 {
        let failed = AttemptResult::ALL.iter().zip(&self.attempts).filter(|(result, _)| **result != AttemptResult::Ok);
        failed.map(|(_, counter)| get(counter)).sum()
    }
}

fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// How an endpoint stands when it is scraped.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EndpointNow {
    /// Its name.
    pub name: EndpointName,
    /// Events that wait.
    pub events: u64,
    /// Age of the oldest, seconds; 0 when none waits.
    pub oldest_age_seconds: f64,
    /// Attempts in flight.
    pub in_flight: u32,
    /// Whether it is up.
    pub is_up: bool,
    /// The contract's word for how it is.
    pub state: &'static str,
    /// Dead letters that are kept.
    pub dead_letters: u64,
}

impl EndpointNow {
    /// An endpoint for which nothing waits and nothing is in flight.
    #[must_use]
    pub fn idle(name: EndpointName, dead_letters: u64) -> EndpointNow {
        EndpointNow { name, events: 0, oldest_age_seconds: 0.0, in_flight: 0, is_up: true, state: "up", dead_letters }
    }
}

/// The metrics of all endpoints.
#[derive(Debug)]
pub(super) struct Endpoints {
    known: Mutex<Known>,
    max: usize,
    families: Families,
}

#[derive(Debug, Default)]
struct Known {
    /// In the order in which they became known: the first have labels of their own.
    places: HashMap<EndpointName, usize>,
    metrics: Vec<Arc<EndpointMetrics>>,
    now: Vec<EndpointNow>,
}

#[derive(Debug)]
struct Families {
    attempts: Desc,
    messages_delivered: Desc,
    rate_limited_seconds: Desc,
    dead_letters_total: Desc,
    dead_letters_dropped: Desc,
    outbox_events: Desc,
    outbox_oldest: Desc,
    in_flight: Desc,
    up: Desc,
    dead_letters: Desc,
}

impl Families {
    fn new() -> Result<Families, prometheus::Error> {
        let desc = |name: &str, help: &str, more: &[&str]| {
            let labels = ["endpoint"].iter().chain(more).map(|label| (*label).to_owned()).collect();
            Desc::new(name.to_owned(), help.to_owned(), labels, HashMap::new())
        };
        Ok(Families {
            attempts: desc("h5push_push_attempts_total", "Attempts at a push, by result.", &["result"])?,
            messages_delivered: desc("h5push_messages_delivered_total", "Messages whose push succeeded.", &[])?,
            rate_limited_seconds: desc(
                "h5push_rate_limited_seconds_total",
                "Seconds in which a push was ready and the endpoint's rate forbade it.",
                &[],
            )?,
            dead_letters_total: desc("h5push_dead_letters_total", "Events given up, by reason.", &["reason"])?,
            dead_letters_dropped: desc(
                "h5push_dead_letters_dropped_total",
                "Dead letters that went for age or number.",
                &[],
            )?,
            outbox_events: desc("h5push_outbox_events", "Events that wait.", &[])?,
            outbox_oldest: desc(
                "h5push_outbox_oldest_age_seconds",
                "Age of the oldest event that waits; 0 when none does.",
                &[],
            )?,
            in_flight: desc("h5push_in_flight", "Attempts in flight.", &[])?,
            up: desc("h5push_endpoint_up", "Whether the endpoint is up.", &[])?,
            dead_letters: desc("h5push_dead_letters", "Dead letters that are kept.", &[])?,
        })
    }
}

/// What is shown under one label.
#[derive(Debug, Default)]
struct Shown<'a> {
    counted: Vec<&'a EndpointMetrics>,
    now: Vec<&'a EndpointNow>,
}

impl Endpoints {
    pub(super) fn new(max: usize) -> Result<Endpoints, prometheus::Error> {
        Ok(Endpoints { known: Mutex::default(), max, families: Families::new()? })
    }

    pub(super) fn of(&self, name: EndpointName) -> Arc<EndpointMetrics> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.metrics_of(name)
    }

    /// What the next scrape shows of how they stand.
    pub(super) fn stand(&self, now: &[EndpointNow]) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        for endpoint in now {
            known.metrics_of(endpoint.name);
        }
        known.now = now.to_vec();
    }
}

impl Known {
    fn metrics_of(&mut self, name: EndpointName) -> Arc<EndpointMetrics> {
        let place = *self.places.entry(name).or_insert(self.metrics.len());
        if place == self.metrics.len() {
            self.metrics.push(Arc::default());
        }
        self.metrics.get(place).map(Arc::clone).unwrap_or_default()
    }
}

/// What the registry scrapes.
#[derive(Debug)]
pub(super) struct Scraped(pub Arc<Endpoints>);

impl Collector for Scraped {
    fn desc(&self) -> Vec<&Desc> {
        let Families {
            attempts,
            messages_delivered,
            rate_limited_seconds,
            dead_letters_total,
            dead_letters_dropped,
            outbox_events,
            outbox_oldest,
            in_flight,
            up,
            dead_letters,
        } = &self.0.families;
        let counters =
            vec![attempts, messages_delivered, rate_limited_seconds, dead_letters_total, dead_letters_dropped];
        [counters, vec![outbox_events, outbox_oldest, in_flight, up, dead_letters]].concat()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let known = self.0.known.lock().unwrap_or_else(PoisonError::into_inner);
        let label = |name: &EndpointName| match known.places.get(name) {
            Some(place) if *place < self.0.max => name.to_string(),
            _ => OTHER.to_owned(),
        };
        let mut shown: BTreeMap<String, Shown<'_>> = BTreeMap::new();
        for (name, place) in &known.places {
            shown.entry(label(name)).or_default().counted.extend(known.metrics.get(*place).map(Arc::as_ref));
        }
        for now in &known.now {
            shown.entry(label(&now.name)).or_default().now.push(now);
        }
        let named = |desc: &Desc, name: &str, values: &[&str], of: &dyn Fn(&EndpointMetrics, usize) -> f64| {
            let of_one = |(label, shown): (&String, &Shown<'_>)| -> Vec<Metric> {
                let sum = |at: usize| shown.counted.iter().map(|metrics| of(metrics, at)).sum();
                let labels = |value: &&str| vec![pair("endpoint", label), pair(name, value)];
                values.iter().enumerate().map(|(at, value)| counter(labels(value), sum(at))).collect()
            };
            family(desc, MetricType::COUNTER, shown.iter().flat_map(of_one).collect())
        };
        let counted = |desc: &Desc, of: &dyn Fn(&EndpointMetrics) -> f64| {
            let sum = |shown: &Shown<'_>| shown.counted.iter().map(|metrics| of(metrics)).sum();
            let metrics = shown.iter().map(|(label, shown)| counter(vec![pair("endpoint", label)], sum(shown)));
            family(desc, MetricType::COUNTER, metrics.collect())
        };
        let gauged = |desc: &Desc, of: &dyn Fn(&[&EndpointNow]) -> f64| {
            let current = shown.iter().filter(|(_, shown)| !shown.now.is_empty());
            let metrics = current.map(|(label, shown)| gauge(vec![pair("endpoint", label)], of(&shown.now)));
            family(desc, MetricType::GAUGE, metrics.collect())
        };
        let results = AttemptResult::ALL.map(AttemptResult::as_str);
        let reasons = DeathReason::ALL.map(DeathReason::as_str);
        let at = |counters: &[AtomicU64], at: usize| counters.get(at).map_or(0, get) as f64;
        let total =
            |now: &[&EndpointNow], of: fn(&EndpointNow) -> u64| now.iter().map(|now| of(now)).sum::<u64>() as f64;
        let families = &self.0.families;
        vec![
            named(&families.attempts, "result", &results, &|metrics, result| at(&metrics.attempts, result)),
            named(&families.dead_letters_total, "reason", &reasons, &|metrics, reason| {
                at(&metrics.dead_letters, reason)
            }),
            counted(&families.messages_delivered, &|metrics| get(&metrics.messages_delivered) as f64),
            counted(&families.rate_limited_seconds, &|metrics| get(&metrics.rate_limited_micros) as f64 / 1e6),
            counted(&families.dead_letters_dropped, &|metrics| get(&metrics.dead_letters_dropped) as f64),
            gauged(&families.outbox_events, &|now| total(now, |now| now.events)),
            gauged(&families.outbox_oldest, &|now| now.iter().map(|now| now.oldest_age_seconds).fold(0.0, f64::max)),
            gauged(&families.in_flight, &|now| total(now, |now| u64::from(now.in_flight))),
            // Of those shown together, the worst.
            gauged(&families.up, &|now| f64::from(u8::from(now.iter().all(|now| now.is_up)))),
            gauged(&families.dead_letters, &|now| total(now, |now| now.dead_letters)),
        ]
    }
}

fn pair(name: &str, value: &str) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name(name.to_owned());
    pair.set_value(value.to_owned());
    pair
}

fn counter(labels: Vec<LabelPair>, value: f64) -> Metric {
    let mut counter = Counter::default();
    counter.set_value(value);
    let mut metric = Metric::from_label(labels);
    metric.set_counter(counter);
    metric
}

fn gauge(labels: Vec<LabelPair>, value: f64) -> Metric {
    let mut gauge = Gauge::default();
    gauge.set_value(value);
    let mut metric = Metric::from_label(labels);
    metric.set_gauge(gauge);
    metric
}

fn family(desc: &Desc, kind: MetricType, metrics: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(desc.fq_name.clone());
    family.set_help(desc.help.clone());
    family.set_field_type(kind);
    family.set_metric(metrics);
    family
}
