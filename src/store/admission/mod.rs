//! The one critical section in front of the journal: gate, duplicates, limits, what is remembered. No I/O.
//!
//! What it decides is staged in a [`Request`], which the journal's thread writes and syncs; if that fails, everything
//! the request changed here is put back.

mod customers;
mod letters;
mod request;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use tokio::sync::oneshot;

use self::request::Undo;
pub(super) use self::request::{Changed, Judged, Replayed, Request, Staged, Step, Ticket};
pub use self::request::{Post, Posted, Refusal, Rules, WithdrawCustomer};
use super::Position;
use super::codec::{Record, StateChange};
use super::ids::Ids;
use super::nonces::Nonces;
use super::state::{StateCache, StateKey};
use crate::clock;
use crate::domain::endpoint::EndpointName;
use crate::domain::event::Event;
use crate::domain::gate::{self, Suppressed};
use crate::domain::keys::EventKey;

/// For how long after the keeper has looked at the clock, each second, it is taken to go on as time goes.
const TRUSTED_FOR_S: u64 = 60;

/// Everything that is decided before the 202.
#[derive(Debug)]
pub(super) struct Admission {
    pub rules: Rules,
    pub ids: Ids,
    pub cache: StateCache,
    /// What operators set and receivers asked for, all of it.
    pub settings: BTreeMap<String, String>,
    pub nonces: Nonces,
    pub pending: Vec<Request>,
    pub is_stopping: bool,
    pub is_disk_low: bool,
    /// The wall clock when it was last known not to have leapt, Unix seconds.
    pub trusted_s: u64,
    /// The journal's thread sleeps: it is to be woken, once, when something is staged.
    pub is_writer_idle: bool,
    undurable: HashSet<EventKey>,
    next_ticket: u64,
    /// The last request that is on stable storage.
    durable_ticket: u64,
    waiting: u64,
    waiting_by_endpoint: HashMap<EndpointName, u64>,
    /// Where the journal ends after each request whose changes of customers the queue has not taken yet.
    unapplied: VecDeque<(Position, u64)>,
}

impl Admission {
    pub(super) fn new(rules: Rules, ids: Ids) -> Admission {
        Admission {
            rules,
            ids,
            cache: StateCache::new(),
            settings: BTreeMap::new(),
            nonces: Nonces::default(),
            pending: Vec::new(),
            is_stopping: false,
            is_disk_low: false,
            trusted_s: clock::wall_ms() / 1_000,
            is_writer_idle: false,
            undurable: HashSet::new(),
            next_ticket: 1,
            durable_ticket: 0,
            waiting: 0,
            waiting_by_endpoint: HashMap::new(),
            unapplied: VecDeque::new(),
        }
    }

    /// The moment by which keys and customers are old: not one to which the clock has just leapt.
    pub(super) fn aging(&self, now_s: u64) -> u64 {
        if now_s.abs_diff(self.trusted_s) <= TRUSTED_FOR_S { now_s } else { self.trusted_s.min(now_s) }
    }

    /// Counts an event that waited before the start.
    pub(super) fn count_waiting(&mut self, endpoint: EndpointName, events: u64) {
        self.waiting += events;
        *self.waiting_by_endpoint.entry(endpoint).or_default() += events;
    }

    /// Uncounts events that have ended.
    pub(super) fn uncount(&mut self, endpoint: EndpointName, events: u64) {
        self.waiting = self.waiting.saturating_sub(events);
        if let Some(count) = self.waiting_by_endpoint.get_mut(&endpoint) {
            *count = count.saturating_sub(events);
            if *count == 0 {
                self.waiting_by_endpoint.remove(&endpoint);
            }
        }
    }

    pub(super) fn waiting(&self) -> u64 {
        self.waiting
    }

    /// Judges and stages posted events.
    ///
    /// # Errors
    /// The whole is refused, and nothing changed.
    pub(super) fn post(
        &mut self,
        posts: &mut [Post<'_>],
        is_alone: bool,
        now_ms: u64,
    ) -> Result<Step<Judged>, Refusal> {
        self.check_open()?;
        if self.is_disk_low {
            return Err(Refusal::DiskLow);
        }
        let now_s = now_ms / 1_000;
        let mut missing = HashSet::new();
        for post in posts.iter().filter(|post| post.endpoint.is_some()) {
            let event = post.event;
            self.collect_missing(event.plugin, &event.web_token, &event.hearing, now_s, &mut missing);
        }
        if !missing.is_empty() {
            return Ok(self.missing(missing));
        }
        self.ids.expire(self.aging(now_s));
        let (mut request, ticket) = self.begin();
        let rests = |event: &Event<'_>| self.rests_on_undurable(event.plugin, &event.web_token, &event.hearing);
        let rests = posts.iter().any(|post| post.endpoint.is_some() && rests(post.event));
        let mut posted = Vec::with_capacity(posts.len());
        let mut fate_of = Vec::new();
        for post in posts {
            let verdict = self.judge(post, is_alone, &mut request, &mut fate_of, now_s);
            posted.push(verdict);
        }
        if self.waiting > self.rules.events_max && !request.endpoints.is_empty() {
            self.put_back(request);
            return Err(Refusal::OutboxFull);
        }
        let ticket = self.stage(request, ticket, rests);
        Ok(Step::Done(Judged { posted, ticket, fate_of }))
    }

    fn judge(
        &mut self,
        post: &mut Post<'_>,
        is_alone: bool,
        request: &mut Request,
        fate_of: &mut Vec<EventKey>,
        now_s: u64,
    ) -> Posted {
        let event = post.event;
        if self.ids.contains(post.key) {
            if self.undurable.contains(&post.key) {
                fate_of.push(post.key);
            }
            return Posted::Duplicate;
        }
        let Some((endpoint, events_max)) = post.endpoint else {
            return Posted::Suppressed(Suppressed::NoPushAddress);
        };
        let (after, changes) = self.hear(event.plugin, &event.web_token, &event.hearing, now_s);
        let verdict = gate::decide(event.question(true), &after, self.rules.require_h5push);
        if verdict.is_ok() && self.is_full(endpoint, events_max) {
            // What it says of its customer holds all the same (contract §3), unless the answer is an error.
            if !is_alone {
                self.remember(changes, request);
            }
            return Posted::EndpointFull;
        }
        self.remember(changes, request);
        if let Err(reason) = verdict {
            return Posted::Suppressed(reason);
        }
        let record = std::mem::take(&mut post.record);
        self.append(request, post.key, Staged::Event { record, lane: post.lane, endpoint, second: now_s as u32 });
        Posted::Queued
    }

    fn append(&mut self, request: &mut Request, key: EventKey, event: Staged) {
        if let Staged::Event { endpoint, second, .. } = &event {
            let before = self.ids.push(key, *second);
            self.undurable.insert(key);
            self.count_waiting(*endpoint, 1);
            request.keys.push((key, before));
            request.endpoints.push(*endpoint);
            request.staged.push(event);
        }
    }

    /// Stages an event that asks no gate, or says that too many wait for its endpoint.
    ///
    /// # Errors
    /// The request is refused, and nothing changed.
    pub(super) fn post_ungated(
        &mut self,
        key: EventKey,
        event: Staged,
        (endpoint, events_max): (EndpointName, u64),
    ) -> Result<Option<Ticket>, Refusal> {
        self.check_open()?;
        if self.is_disk_low {
            return Err(Refusal::DiskLow);
        }
        if self.waiting >= self.rules.events_max {
            return Err(Refusal::OutboxFull);
        }
        if self.is_full(endpoint, events_max) {
            return Ok(None);
        }
        let (mut request, ticket) = self.begin();
        self.append(&mut request, key, event);
        Ok(self.stage(request, ticket, false))
    }

    fn is_full(&self, endpoint: EndpointName, events_max: u64) -> bool {
        self.waiting_by_endpoint.get(&endpoint).copied().unwrap_or(0) >= events_max
    }

    /// Stages a setting.
    ///
    /// # Errors
    /// The request is refused, and nothing changed.
    pub(super) fn set(&mut self, key: &str, value: Option<String>) -> Result<Option<Ticket>, Refusal> {
        self.check_open()?;
        let before = match value.clone() {
            Some(value) => self.settings.insert(key.to_owned(), value),
            None => self.settings.remove(key),
        };
        let (mut request, ticket) = self.begin();
        request.undo.push(Undo::Setting { key: key.to_owned(), before });
        let change = StateChange::Setting { key: key.to_owned(), value };
        request.staged.push(Staged::Other(Record::State(change).encode()));
        Ok(self.stage(request, ticket, false))
    }

    /// Uses a nonce up; `None` when it was used before, or too many are remembered.
    ///
    /// # Errors
    /// The request is refused, and nothing changed.
    pub(super) fn use_nonce(&mut self, key: u128, until_s: u64, now_s: u64) -> Result<Option<Ticket>, Refusal> {
        self.check_open()?;
        if !self.nonces.take(key, until_s, now_s) {
            return Ok(None);
        }
        let (mut request, ticket) = self.begin();
        request.undo.push(Undo::Nonce(key));
        request.staged.push(Staged::Other(Record::State(StateChange::Nonce { key, until_s }).encode()));
        Ok(self.stage(request, ticket, false))
    }

    /// What became of an event whose duplicate waits: `None` while it is not known.
    pub(super) fn fate(&self, key: EventKey) -> Option<Result<(), Refusal>> {
        let is_stored = self.ids.contains(key);
        (!self.undurable.contains(&key)).then_some(if is_stored { Ok(()) } else { Err(Refusal::DiskLow) })
    }

    /// The requests up to this place of the journal are in the queue's rows.
    pub(super) fn applied(&mut self, position: Position) {
        while self.unapplied.front().is_some_and(|(end, _)| *end <= position) {
            if let Some((_, ticket)) = self.unapplied.pop_front() {
                self.cache.applied(ticket);
            }
        }
    }

    /// Requests that were written end there, and are durable.
    pub(super) fn durable(&mut self, requests: &[Request], end: Position) {
        for request in requests {
            for (key, _) in &request.keys {
                self.undurable.remove(key);
            }
        }
        if let Some(last) = requests.last() {
            self.durable_ticket = last.ticket;
        }
        let is_change = |request: &&Request| request.undo.iter().any(|undo| matches!(undo, Undo::State(_)));
        if let Some(last) = requests.iter().rev().find(is_change) {
            self.unapplied.push_back((end, last.ticket));
        }
    }

    /// Puts back what requests changed, newest first; those that came after them go too, having built on them.
    pub(super) fn fail(&mut self, written: Vec<Request>, refusal: Refusal) {
        let newer = std::mem::take(&mut self.pending);
        for request in written.into_iter().chain(newer).rev() {
            let done = self.put_back(request);
            // The caller may have gone.
            done.send(Err(refusal)).ok();
        }
    }

    /// Stages a request that only waits for what was written before.
    pub(super) fn stage_sync(&mut self) -> Ticket {
        let (request, ticket) = self.begin();
        self.pending.push(request);
        ticket
    }

    /// Stages a request that changes nothing, for the journal to be written.
    pub(super) fn stage_probe(&mut self) {
        let (mut request, _) = self.begin();
        let change = StateChange::Setting { key: "probe".to_owned(), value: None };
        request.staged.push(Staged::Other(Record::State(change).encode()));
        self.pending.push(request);
    }

    fn missing<T>(&self, keys: impl IntoIterator<Item = StateKey>) -> Step<T> {
        let with_version = |key: StateKey| {
            let version = self.cache.version(&key);
            (key, version)
        };
        Step::Missing(keys.into_iter().map(with_version).collect())
    }

    fn check_open(&self) -> Result<(), Refusal> {
        if self.is_stopping { Err(Refusal::Stopping) } else { Ok(()) }
    }

    fn begin(&mut self) -> (Request, Ticket) {
        let (done, answer) = oneshot::channel();
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let request = Request {
            ticket,
            staged: Vec::new(),
            withdraw: Vec::new(),
            done,
            keys: Vec::new(),
            endpoints: Vec::new(),
            undo: Vec::new(),
        };
        (request, Ticket { done: answer })
    }

    /// Hands a request on; `None`: there is nothing to wait for. `rests`: it was decided by what another request has
    /// changed and is not durable yet, and is as true as that.
    fn stage(&mut self, request: Request, ticket: Ticket, rests: bool) -> Option<Ticket> {
        let has_work = rests || !request.staged.is_empty() || !request.withdraw.is_empty();
        has_work.then(|| {
            self.pending.push(request);
            ticket
        })
    }

    fn put_back(&mut self, request: Request) -> oneshot::Sender<Result<(), Refusal>> {
        for undo in request.undo.into_iter().rev() {
            match undo {
                Undo::State(undo) => self.cache.undo(undo),
                Undo::Setting { key, before: Some(before) } => drop(self.settings.insert(key, before)),
                Undo::Setting { key, before: None } => drop(self.settings.remove(&key)),
                Undo::Nonce(key) => self.nonces.forget(key),
            }
        }
        for (key, before) in request.keys.into_iter().rev() {
            self.ids.pop_back(before);
            self.undurable.remove(&key);
        }
        for endpoint in request.endpoints {
            self.uncount(endpoint, 1);
        }
        request.done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::keys::LaneKey;

    #[test]
    fn a_clock_that_has_leapt_makes_nothing_old_and_requests_leave_nothing_behind() {
        let rules =
            Rules { require_h5push: false, forget_after_s: 600, events_max: 10, dedupe_window_s: 600, dedupe_max: 10 };
        let mut admission = Admission::new(rules, Ids::new(10, 600));
        admission.trusted_s = 10_000;
        for (now_s, aging) in [(9_990, 9_990), (10_060, 10_060), (10_061, 10_000), (5_000_000, 10_000), (10, 10)] {
            assert_eq!(admission.aging(now_s), aging, "{now_s}");
        }
        let event =
            |second| Staged::Event { record: Vec::new(), lane: LaneKey(1), endpoint: EndpointName::DEFAULT, second };
        let (mut request, _ticket) = admission.begin();
        admission.append(&mut request, 1, event(10_000));
        admission.append(&mut request, 2, event(5_000_000));
        assert!(admission.ids.contains(1) && admission.ids.contains(2));
        // Nor is anything kept of requests for which the queue has no row to change: there may be any number of them.
        admission.durable(&[request], Position::default());
        assert!(admission.unapplied.is_empty() && admission.undurable.is_empty());
    }
}
