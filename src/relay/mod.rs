//! The relay: one task that owns the schedule. It hears what is durable, starts what is due, records what came of it.

mod attempt;
mod commands;
mod deliverer;
mod dialer;
mod limits;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use self::attempt::{Done, Flight, Job};
pub use self::commands::{AttemptsSeen, Command, Configure, LaneShown, Tested, View};
use self::deliverer::Target;
pub use self::deliverer::{Deliverer, TlsError};
pub use self::limits::max_in_flight;
use crate::clock;
use crate::config::{Endpoints, UrlRule};
use crate::domain::backlog::Handle;
use crate::domain::endpoint::EndpointName;
use crate::domain::keys::LaneKey;
use crate::domain::outcome::{AttemptResult, Verdict};
use crate::domain::push::PushBounds;
use crate::domain::schedule::{Breaker, Burial, LaneId, Moment, Schedule, Start};
use crate::metrics::{EndpointMetrics, Metrics};
use crate::store::{Compacted, Ending, Item, Letter, Note, Notice, Position, Snapshot, Store, WithdrawCustomer};

/// Notices and reports taken at once.
const BATCH: usize = 256;
/// Notices that may wait for the relay.
pub const NOTICES_MAX: usize = 1_024;
/// Questions that may wait for the relay.
pub const COMMANDS_MAX: usize = 64;
/// How long a burial that failed waits.
const BURY_AGAIN: Duration = Duration::from_secs(1);
/// Lanes whose last error is kept.
const LANE_ERRORS_MAX: usize = 100_000;
/// How often idle connections are looked through.
const REAP_EVERY: Duration = Duration::from_secs(10);

/// What the relay is to go by.
#[derive(Debug)]
pub struct Settings {
    /// `push.timeout`
    pub timeout: Duration,
    /// `push.max_messages`, `push.max_bytes`
    pub bounds: PushBounds,
    /// `log.attempts`
    pub logs_attempts: bool,
}

/// What came of a burial.
#[derive(Debug)]
struct Buried {
    burial: Burial,
    /// Taken before: a compaction may move the events meanwhile.
    seqs: Vec<u64>,
    is_done: bool,
}

/// The relay's task.
#[derive(Debug)]
pub struct Relay {
    schedule: Schedule,
    store: Store,
    deliverer: Deliverer,
    settings: Arc<Settings>,
    metrics: Metrics,
    targets: HashMap<EndpointName, Arc<Target>>,
    endpoint_metrics: HashMap<EndpointName, Arc<EndpointMetrics>>,
    /// Attempts in flight, to be told when they are withdrawn before they have begun to send.
    flights: HashMap<u32, Arc<Flight>>,
    attempts: JoinSet<Done>,
    burying: JoinSet<Buried>,
    bury_not_before: u64,
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
    /// Who waits until nothing is being given up any more, with how many events that was.
    bury_waiters: Vec<(u64, oneshot::Sender<u64>)>,
    reap_at: u64,
    newest_slot: Option<u16>,
}

impl Relay {
    /// A relay over a schedule that is filled already.
    #[must_use]
    pub fn new(
        schedule: Schedule,
        store: Store,
        deliverer: Deliverer,
        (endpoints, rule): (&Endpoints, &Arc<UrlRule>),
        settings: Settings,
        metrics: Metrics,
    ) -> Relay {
        // What was loaded is heard of: a checkpoint before the first group must not begin at the beginning.
        let heard = store.durable();
        let mut relay = Relay {
            schedule,
            store,
            deliverer,
            settings: Arc::new(settings),
            metrics,
            targets: HashMap::new(),
            endpoint_metrics: HashMap::new(),
            flights: HashMap::new(),
            attempts: JoinSet::new(),
            burying: JoinSet::new(),
            bury_not_before: 0,
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
        relay.configure(endpoints, rule);
        relay
    }

    /// Takes endpoints over: what is new is there, what is gone gives up what waits for it. Connections of before are
    /// used no more, having been made under the old rule.
    fn configure(&mut self, endpoints: &Endpoints, rule: &Arc<UrlRule>) {
        let now = clock::micros();
        self.targets.clear();
        for endpoint in endpoints.values().flatten() {
            self.schedule.put_endpoint(endpoint.name, endpoint.limits, now);
            // Its series are there from the start.
            drop(self.metrics_of(endpoint.name));
            self.targets.insert(endpoint.name, Arc::new(self.deliverer.target(endpoint.clone(), rule)));
        }
        let gone: Vec<EndpointName> =
            self.schedule.endpoints().map(|view| view.name).filter(|name| !self.targets.contains_key(name)).collect();
        for name in gone {
            self.schedule.remove_endpoint(name);
            self.seen.forget(name);
        }
    }

    /// Works until the store tells no more and nobody asks any more.
    pub async fn run(mut self, mut notices: mpsc::Receiver<Notice>, mut commands: mpsc::Receiver<Command>) {
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            self.start_due();
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
                Some(done) = self.attempts.join_next() => {
                    self.take_report(done);
                    while let Some(done) = self.attempts.try_join_next() {
                        self.take_report(done);
                    }
                }
                Some(buried) = self.burying.join_next() => self.take_burial(buried),
                Some(command) = commands.recv() => self.answer(command),
                () = sleep_until(wake) => {}
            }
            self.write_notes();
            self.answer_buried();
            self.reap();
            if self.attempts.is_empty()
                && let Some(drained) = self.drain.take()
            {
                // Nobody waits any more.
                drained.send(()).ok();
            }
        }
    }

    fn wake_at(&self) -> Option<u64> {
        let reap = Some(self.reap_at).filter(|at| *at > 0);
        let bury = Some(self.bury_not_before).filter(|at| *at > 0);
        let due = if self.is_draining { None } else { self.schedule.wake_at() };
        [due, reap, bury].into_iter().flatten().min()
    }

    // ---- what the store tells ----

    fn hear(&mut self, notice: Notice) {
        match notice {
            Notice::SegmentBegun { slot, segment } => {
                if let Some(before) = self.newest_slot.replace(slot) {
                    self.schedule.backlog.seal(before);
                }
                self.schedule.backlog.open(slot, segment);
            }
            Notice::Durable { items, end, answers } => {
                let now = clock::micros();
                for item in items {
                    match item {
                        Item::Appended(event) => {
                            let backlog = &mut self.schedule.backlog;
                            let handle = backlog.append(event.slot, None, event.offset, event.second, event.len);
                            match handle {
                                Some(handle) => {
                                    self.schedule.appended(handle, event.lane, event.endpoint, now);
                                }
                                None => tracing::error!(slot = event.slot, "an event in no segment"),
                            }
                        }
                        Item::Withdraw(customer) => self.withdraw(customer),
                    }
                }
                self.heard = end;
                answers.send();
            }
            Notice::Snapshot(reply) => {
                let marks = self.schedule.backlog.marks().collect();
                // The store has given up waiting.
                drop(reply.send(Snapshot { position: self.heard, marks }));
            }
            Notice::SegmentRemoved(slot) => self.schedule.backlog.close(slot),
            Notice::SegmentCompacted(compacted) => self.move_events(compacted),
        }
    }

    fn move_events(&mut self, compacted: Compacted) {
        self.schedule.move_events(compacted.old_slot, compacted.new_slot, compacted.segment, &compacted.events);
        // The store has ended.
        compacted.done.send(()).ok();
    }

    /// Withdraws what waits of a customer, and answers when that is durable.
    fn withdraw(&mut self, customer: WithdrawCustomer) {
        let mut withdrawn = 0;
        for endpoint in [EndpointName::of(customer.plugin), EndpointName::DEFAULT] {
            let lane = self.store.hashing().lane(endpoint, customer.plugin, &customer.web_token);
            if let Some(id) = self.schedule.lane_id(lane) {
                self.lane_errors.remove(&id);
            }
            let found = self.schedule.withdraw(lane);
            if found.events.is_empty() && !found.had_retry {
                continue;
            }
            if let Some(id) = self.schedule.lane_id(lane)
                && let Some(flight) = self.flights.get(&id)
            {
                flight.withdraw();
            }
            let count = found.events.len() as u64;
            *self.ended.entry(endpoint).or_default() += count;
            self.metrics.withdrawn.inc_by(count - u64::from(found.in_flight));
            withdrawn += count;
            let seqs = self.seqs(&found.events);
            self.notes.push(Note::Settled { lane, ending: Ending::Withdrawn, retry_is_over: found.had_retry, seqs });
        }
        self.write_notes();
        let synced = self.store.sync();
        tokio::spawn(async move {
            if synced.await.is_ok() {
                // The caller has gone.
                customer.done.send(withdrawn).ok();
            }
        });
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

    fn start_due(&mut self) {
        if self.is_draining {
            return;
        }
        let now = clock::micros();
        while let Some(start) = self.schedule.next(now) {
            self.start(start);
        }
        if self.burying.is_empty() && self.bury_not_before <= now {
            self.bury_not_before = 0;
            if let Some(burial) = self.schedule.next_bury() {
                self.bury(burial);
            }
        }
    }

    fn start(&mut self, start: Start) {
        let Some(target) = self.targets.get(&start.endpoint).cloned() else {
            // Never: the schedule starts nothing for an endpoint that is gone.
            self.report(start.lane, 0, Verdict::Again);
            return;
        };
        let events = self.places(&start.events);
        let flight = Arc::new(Flight::default());
        self.flights.insert(start.lane, Arc::clone(&flight));
        let job = Job {
            lane: start.lane,
            endpoint: start.endpoint,
            events,
            is_fixed: start.is_fixed,
            attempt: start.attempt,
            target,
            flight,
            hashing: self.store.hashing(),
            settings: Arc::clone(&self.settings),
        };
        let deliverer = self.deliverer.clone();
        self.attempts.spawn(async move { job.run(&deliverer).await });
        if self.reap_at == 0 {
            self.reap_at = clock::micros() + micros(REAP_EVERY);
        }
    }

    fn places(&self, events: &[Handle]) -> Vec<attempt::Place> {
        events
            .iter()
            .map(|event| attempt::Place {
                reader: self.store.reader(event.slot()),
                offset: self.schedule.backlog.offset(*event),
            })
            .collect()
    }

    fn bury(&mut self, burial: Burial) {
        let places = self.places(&burial.events);
        let seqs = self.seqs(&burial.events);
        let store = self.store.clone();
        let problem = self.lane_errors.get(&burial.lane).cloned();
        self.burying.spawn_blocking(move || {
            let mut letters = Vec::with_capacity(places.len());
            for (place, seq) in places.iter().zip(seqs.iter().copied()) {
                let stored = match place.reader.as_ref().map(|reader| reader.read(place.offset)) {
                    Some(Ok(stored)) => stored,
                    // Not readable just now: later.
                    Some(Err(_)) => return Buried { burial, seqs, is_done: false },
                    None => None,
                };
                if stored.is_none() {
                    store.damaged("journal");
                    tracing::error!(endpoint = %burial.endpoint, seq, "an event's record is damaged: its content is lost");
                }
                letters.push(Letter { seq, endpoint: burial.endpoint, stored, problem: problem.clone() });
            }
            let is_done = store.bury(&letters, burial.reason, burial.attempts, clock::wall_ms()).is_ok();
            Buried { burial, seqs, is_done }
        });
    }

    // ---- what came of it ----

    fn take_report(&mut self, done: Result<Done, tokio::task::JoinError>) {
        let done = match done {
            Ok(done) => done,
            // A panic has ended the process already; nothing is ever cancelled.
            Err(error) => return tracing::error!(%error, "an attempt ended without a report"),
        };
        self.flights.remove(&done.lane);
        let metrics = self.metrics_of(done.endpoint);
        if let Some(result) = done.result {
            metrics.attempt(result);
            self.metrics.push_seconds.observe(done.seconds);
            self.seen.took(done.endpoint, done.seconds);
        }
        let delivered = done.verdict == Verdict::Delivered;
        if delivered {
            metrics.delivered(u64::from(done.messages));
            let now_ms = clock::wall_ms();
            for accepted_ms in &done.accepted_ms {
                let seconds = now_ms.saturating_sub(*accepted_ms) as f64 / 1_000.0;
                self.metrics.delivery_seconds.observe(seconds);
            }
        }
        if done.verdict == Verdict::Damaged {
            self.store.damaged("journal");
        }
        self.note_error(done.lane, done.endpoint, done.result, done.detail);
        self.report(done.lane, done.taken, done.verdict);
    }

    /// Keeps what a lane and its endpoint fail with. What only an operator or the endpoint's owner can mend is logged
    /// when it changes.
    fn note_error(
        &mut self,
        lane: LaneId,
        endpoint: EndpointName,
        result: Option<AttemptResult>,
        detail: Option<String>,
    ) {
        let Some(problem) = detail else {
            if result == Some(AttemptResult::Ok) {
                self.seen.last_errors.remove(&endpoint);
                self.lane_errors.remove(&lane);
            }
            return;
        };
        let known = self.seen.last_errors.get(&endpoint).filter(|known| ***known == *problem).cloned();
        let problem = known.clone().unwrap_or_else(|| problem.into());
        if known.is_none()
            && let Some(result @ (AttemptResult::Tls | AttemptResult::BlockedAddress)) = result
        {
            tracing::warn!(%endpoint, result = result.as_str(), %problem, "no push can be sent");
        }
        self.seen.last_errors.insert(endpoint, Arc::clone(&problem));
        if self.lane_errors.len() < LANE_ERRORS_MAX || self.lane_errors.contains_key(&lane) {
            self.lane_errors.insert(lane, problem);
        }
    }

    fn report(&mut self, lane: u32, taken: u32, verdict: Verdict) {
        let second = clock::wall_ms() / 1_000;
        let moment = Moment { now: clock::micros(), second, dice: clock::dice() };
        let endpoint = self.schedule.endpoint_of(lane);
        let outcome = self.schedule.reported(lane, taken, verdict, moment);
        let (Some(key), Some(endpoint)) = (outcome.lane, endpoint) else { return };
        self.metrics.withdrawn.inc_by(u64::from(outcome.withdrawn_late));
        if !outcome.delivered_late.is_empty() {
            // Recorded as withdrawn before: whoever asks for such an event is told that it was pushed.
            let seqs = self.seqs(&outcome.delivered_late);
            self.notes.push(Note::Settled { lane: key, ending: Ending::Delivered, retry_is_over: false, seqs });
        }
        match outcome.breaker {
            Some(Breaker::WentDown) => tracing::warn!(%endpoint, "the endpoint is down: probing it"),
            Some(Breaker::CameUp) => tracing::info!(%endpoint, "the endpoint is up again"),
            None => {}
        }
        if !outcome.delivered.is_empty() || outcome.retry_is_over {
            *self.ended.entry(endpoint).or_default() += outcome.delivered.len() as u64;
            let seqs = self.seqs(&outcome.delivered);
            self.notes.push(Note::Settled {
                lane: key,
                ending: Ending::Delivered,
                retry_is_over: outcome.retry_is_over,
                seqs,
            });
        }
        if let Some(deferred) = outcome.deferred {
            let wait_ms = u64::try_from(deferred.wait.as_millis()).unwrap_or(u64::MAX);
            self.notes.push(Note::Deferred {
                lane: key,
                head: self.schedule.backlog.seq(deferred.head),
                retry: deferred.retry,
                due_ms: clock::wall_ms().saturating_add(wait_ms),
            });
        }
    }

    fn take_burial(&mut self, done: Result<Buried, tokio::task::JoinError>) {
        let Buried { burial, seqs, is_done } = match done {
            Ok(done) => done,
            Err(error) => return tracing::error!(%error, "a burial ended without a report"),
        };
        let now = clock::micros();
        if !is_done {
            self.schedule.not_buried(&burial);
            self.bury_not_before = now + micros(BURY_AGAIN);
            return;
        }
        let count = burial.events.len() as u64;
        let lane = self.schedule.lane_key(burial.lane).unwrap_or(LaneKey(0));
        self.schedule.buried(&burial, now);
        if self.schedule.waiting(lane) == 0 {
            self.lane_errors.remove(&burial.lane);
        }
        self.notes.push(Note::Settled { lane, ending: Ending::Buried, retry_is_over: true, seqs });
        *self.ended.entry(burial.endpoint).or_default() += count;
        self.metrics_of(burial.endpoint).died(burial.reason, count);
        let reason = burial.reason.as_str();
        tracing::warn!(endpoint = %burial.endpoint, reason, events = count, "events became dead letters");
    }

    fn metrics_of(&mut self, endpoint: EndpointName) -> Arc<EndpointMetrics> {
        Arc::clone(self.endpoint_metrics.entry(endpoint).or_insert_with(|| self.metrics.endpoint(endpoint)))
    }

    fn reap(&mut self) {
        let now = clock::micros();
        if self.reap_at == 0 || now < self.reap_at {
            return;
        }
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

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
