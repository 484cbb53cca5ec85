//! The relay: one task that owns the schedule. It hears what is durable, starts what is due, records what came of it.

mod attempt;
mod attempts;
mod burials;
mod commands;
mod delivery;
mod descriptors;
mod dialer;
mod holds;
mod notices;
mod reports;
mod resolver;
mod target;
mod trials;
mod withdrawals;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;

use self::attempt::{Job, Stage};
use self::attempts::Attempts;
use self::burials::{Buried, BuryWaiter};
pub use self::commands::{AttemptsSeen, Command, Configure, LaneShown, View};
pub use self::descriptors::max_in_flight;
pub use self::holds::holds;
pub use self::target::Network;
use self::target::Target;
pub use self::trials::Tested;
use self::trials::Trial;
use self::withdrawals::Withdrawing;
use crate::clock;
use crate::config::{Endpoints, UrlRule};
use crate::domain::backlog::Handle;
use crate::domain::endpoint::EndpointName;
use crate::domain::push::PushBounds;
use crate::domain::schedule::{LaneId, Schedule, Start, micros};
use crate::domain::verdict::Verdict;
use crate::metrics::{EndpointMetrics, Metrics};
use crate::store::{Note, Notice, Position, Store};

/// Room for what large pushes hold beyond their first [`FREE_BYTES`] until they are written, over all attempts, KiB. A
/// single event, and a push that is tried again, need none.
const BODIES_KIB: usize = 16 << 10;
/// Attempts that may wait for the disk at once: look-ups, burials and calls are waited for in the same pool of threads.
const COLD_READS: usize = 16;
/// So many bytes of a push need no room.
const FREE_BYTES: usize = 16 << 10;
/// Notices and reports taken at once.
const BATCH: usize = 256;
/// Attempts started at once. In between come those under way, so that no more of them wait for a busy processor than
/// for receivers: each takes some 40 KB.
const STARTS: usize = 32;
/// Notices that may wait for the relay.
pub const NOTICES_MAX: usize = 1_024;
/// Questions that may wait for the relay.
pub const COMMANDS_MAX: usize = 64;
/// Lanes whose last error is kept.
const LANE_ERRORS_MAX: usize = 100_000;
/// How often idle connections and tasks are looked through.
const REAP_EVERY: Duration = Duration::from_secs(10);

/// What the relay is to go by.
#[derive(Debug)]
pub struct Rules {
    /// `push.timeout`
    pub timeout: Duration,
    /// `push.max_messages`, `push.max_bytes`
    pub bounds: PushBounds,
    /// `log.attempts`
    pub logs_attempts: bool,
}

/// The relay's task.
#[derive(Debug)]
pub struct Relay {
    schedule: Schedule,
    store: Store,
    network: Network,
    rules: Arc<Rules>,
    metrics: Metrics,
    targets: HashMap<EndpointName, Arc<Target>>,
    endpoint_metrics: HashMap<EndpointName, Arc<EndpointMetrics>>,
    /// Attempts in flight, to be told when they are withdrawn before they have begun to send.
    stages: HashMap<u32, Arc<Stage>>,
    attempts: Attempts,
    bodies: Arc<Semaphore>,
    cold_reads: Arc<Semaphore>,
    trials: JoinSet<Trial>,
    burying: JoinSet<Vec<Buried>>,
    bury_not_before: u64,
    /// How often a lane's burial could not read its events.
    unread: HashMap<LaneId, u32>,
    /// Withdrawals that wait for a burial to end.
    withdrawing: Vec<Withdrawing>,
    /// Lanes whose last connection broke.
    broken: HashSet<LaneId>,
    notes: Vec<Note>,
    /// Events that ended in this turn, by endpoint.
    ended: HashMap<EndpointName, u64>,
    /// Up to where the journal was heard.
    heard: Position,
    drain: Option<oneshot::Sender<()>>,
    is_draining: bool,
    rate_limited: HashMap<EndpointName, u64>,
    seen: AttemptsSeen,
    /// What the last attempt of a lane failed with, for as many lanes as there is room.
    lane_errors: HashMap<LaneId, Arc<str>>,
    bury_waiters: Vec<BuryWaiter>,
    reap_at: u64,
    newest_slot: Option<u16>,
}

impl Relay {
    /// A relay over a schedule that is filled already.
    #[must_use]
    pub fn new(
        schedule: Schedule,
        store: Store,
        network: Network,
        (endpoints, rule): (&Endpoints, &Arc<UrlRule>),
        rules: Rules,
        metrics: Metrics,
    ) -> Relay {
        // What was loaded is heard of: a checkpoint before the first group must not begin at the beginning.
        let heard = store.durable();
        let mut relay = Relay {
            schedule,
            store,
            network,
            rules: Arc::new(rules),
            metrics,
            targets: HashMap::new(),
            endpoint_metrics: HashMap::new(),
            stages: HashMap::new(),
            attempts: Attempts::new(),
            bodies: Arc::new(Semaphore::new(BODIES_KIB)),
            cold_reads: Arc::new(Semaphore::new(COLD_READS)),
            trials: JoinSet::new(),
            burying: JoinSet::new(),
            bury_not_before: 0,
            unread: HashMap::new(),
            withdrawing: Vec::new(),
            broken: HashSet::new(),
            notes: Vec::new(),
            ended: HashMap::new(),
            heard,
            drain: None,
            is_draining: false,
            rate_limited: HashMap::new(),
            seen: AttemptsSeen::default(),
            lane_errors: HashMap::new(),
            bury_waiters: Vec::new(),
            reap_at: 0,
            newest_slot: None,
        };
        relay.configure(endpoints, rule, false);
        relay
    }

    /// Takes endpoints over: what is new is there, what is gone gives up what waits for it. Where anything of a push or
    /// its rule is another, connections of before are used no more, and attempts that have not begun to send begin again.
    fn configure(&mut self, endpoints: &Endpoints, rule: &Arc<UrlRule>, is_reload: bool) {
        let now = clock::micros();
        let mut before = std::mem::take(&mut self.targets);
        let mut changed = HashSet::new();
        let mut elsewhere = Vec::new();
        for endpoint in endpoints.values().flatten() {
            let name = endpoint.name;
            self.schedule.put_endpoint(name, endpoint.limits, now);
            // Its series are there from the start.
            drop(self.metrics_of(name));
            let new = Arc::new(self.network.target(endpoint.clone(), rule));
            let old = before.remove(&name);
            let is_same = |old: &Arc<Target>| old.rule == new.rule && old.endpoint.is_same_receiver(&new.endpoint);
            let same = old.as_ref().filter(|old| is_same(old));
            if same.is_none() {
                changed.insert(name);
            }
            if old.as_ref().is_some_and(|old| old.endpoint.url != new.endpoint.url) {
                elsewhere.push(name);
            }
            // With a reload come other trusted certificates.
            let kept = same.filter(|old| !is_reload && old.endpoint.limits == new.endpoint.limits).cloned();
            self.targets.insert(name, kept.unwrap_or(new));
        }
        let gone: Vec<EndpointName> = self
            .schedule
            .endpoints(now)
            .map(|view| view.name)
            .filter(|name| !self.targets.contains_key(name))
            .collect();
        for name in gone {
            self.schedule.remove_endpoint(name);
            self.seen.forget(name);
        }
        changed.extend(before.keys());
        self.stages.values().filter(|stage| changed.contains(&stage.endpoint)).for_each(|stage| stage.withdraw());
        for name in elsewhere.into_iter().chain(before.into_keys()) {
            self.schedule.forget_failures(name, now);
            self.seen.forget(name);
            self.drop_hold(name);
        }
    }

    /// Works until the store tells no more.
    pub async fn run(mut self, mut notices: mpsc::Receiver<Notice>, mut commands: mpsc::Receiver<Command>) {
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            let is_more_due = self.start_due();
            if is_more_due {
                // What is under way goes first.
                tokio::task::yield_now().await;
            }
            let wake = self.wake_at();
            tokio::select! {
                heard = notices.recv_many(&mut batch, BATCH) => {
                    if heard == 0 {
                        return;
                    }
                    for notice in batch.drain(..) {
                        self.hear(notice);
                    }
                }
                Some(done) = self.attempts.next() => {
                    self.take_report(done);
                    while let Some(done) = self.attempts.try_next() {
                        self.take_report(done);
                    }
                }
                Some(tried) = self.trials.join_next() => self.take_trial(tried),
                Some(buried) = self.burying.join_next() => self.take_burials(buried),
                Some(command) = commands.recv() => self.answer(command),
                () = sleep_until(wake) => {}
                () = std::future::ready(()), if is_more_due => {}
            }
            self.write_notes();
            self.answer_buried();
            self.reap();
            if self.attempts.is_empty()
                && self.trials.is_empty()
                && let Some(drained) = self.drain.take()
            {
                // Nobody waits any more.
                drained.send(()).ok();
            }
        }
    }

    fn wake_at(&self) -> Option<u64> {
        let reap = Some(self.reap_at).filter(|at| *at > 0);
        let bury = Some(self.bury_not_before).filter(|at| *at > 0 && !self.is_draining);
        let due = if self.is_draining { None } else { self.schedule.wake_at() };
        [due, reap, bury].into_iter().flatten().min()
    }

    fn seqs(&self, events: &[Handle]) -> Vec<u64> {
        events.iter().map(|event| self.schedule.backlog.seq(*event)).collect()
    }

    fn write_notes(&mut self) {
        if !self.notes.is_empty() {
            self.store.note(std::mem::take(&mut self.notes));
        }
        for (endpoint, count) in self.ended.drain() {
            self.store.uncount(endpoint, count);
        }
    }

    // ---- what is due ----

    /// Starts what is due, a batch at most. Says whether it stopped at that.
    fn start_due(&mut self) -> bool {
        if self.is_draining {
            return false;
        }
        let now = clock::micros();
        let mut started = 0;
        while started < STARTS
            && let Some(start) = self.schedule.next(now)
        {
            self.start(start);
            started += 1;
        }
        if self.burying.is_empty() && self.bury_not_before <= now {
            self.bury_not_before = 0;
            self.bury_next();
        }
        started == STARTS
    }

    fn start(&mut self, start: Start) {
        let Some(target) = self.targets.get(&start.endpoint).cloned() else {
            // Never: the schedule starts nothing for an endpoint that is gone.
            self.report(start.lane, 0, Verdict::Again);
            return;
        };
        let events = self.records(&start.events);
        let stage = Arc::new(Stage::new(start.endpoint));
        self.stages.insert(start.lane, Arc::clone(&stage));
        let job = Job {
            lane: start.lane,
            key: self.schedule.lane_key(start.lane),
            endpoint: start.endpoint,
            events,
            is_fixed: start.is_fixed,
            attempt: start.attempt,
            target,
            is_on_new: self.broken.remove(&start.lane),
            stage,
            hashing: self.store.hashing(),
            rules: Arc::clone(&self.rules),
            bodies: Arc::clone(&self.bodies),
            cold_reads: Arc::clone(&self.cold_reads),
        };
        self.attempts.start(job);
        self.reap_later();
    }

    /// An attempt may leave a connection to be closed.
    fn reap_later(&mut self) {
        if self.reap_at == 0 {
            self.reap_at = clock::micros() + micros(REAP_EVERY);
        }
    }

    fn records(&self, events: &[Handle]) -> Vec<attempt::RecordAt> {
        events
            .iter()
            .map(|event| attempt::RecordAt {
                reader: self.store.reader(event.slot()),
                offset: self.schedule.backlog.offset(*event),
            })
            .collect()
    }

    // ---- what came of it ----

    fn metrics_of(&mut self, endpoint: EndpointName) -> Arc<EndpointMetrics> {
        Arc::clone(self.endpoint_metrics.entry(endpoint).or_insert_with(|| self.metrics.endpoint(endpoint)))
    }

    fn reap(&mut self) {
        let now = clock::micros();
        if self.reap_at == 0 || now < self.reap_at {
            return;
        }
        self.attempts.reap();
        let left = self.targets.values().filter(|target| target.reap()).count();
        let is_quiet = left == 0 && self.attempts.is_empty();
        self.reap_at = if is_quiet { 0 } else { now + micros(REAP_EVERY) };
    }
}

/// Sleeps until a moment of [`clock::micros`]; for ever without one.
async fn sleep_until(at: Option<u64>) {
    match at {
        None => std::future::pending().await,
        Some(at) => tokio::time::sleep(Duration::from_micros(at.saturating_sub(clock::micros()))).await,
    }
}
