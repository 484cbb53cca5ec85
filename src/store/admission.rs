//! The one critical section in front of the journal: gate, duplicates, limits, what is remembered. No I/O.
//!
//! What it decides is staged in a [`Request`], which the journal's thread writes and syncs; if that fails, everything
//! the request changed here is put back.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use tokio::sync::oneshot;

use super::codec::{Accepted, Record, StateChange};
use super::dead_letters::LetterId;
use super::ids::Ids;
use super::nonces::Nonces;
use super::state::{self, StateCache, StateKey, StateValue};
use super::{Position, Replay};
use crate::domain::customer::{Customer, Hearing, NameKind, Toggle};
use crate::domain::endpoint::{EndpointName, Plugin};
use crate::domain::event::Event;
use crate::domain::gate::{self, Suppressed};
use crate::domain::keys::{EventKey, LaneKey};

/// What the gate and the memory of customers go by.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Most events that wait in all (`outbox.max_events`).
    pub events_max: u64,
    /// `outbox.dedupe_window`, seconds.
    pub dedupe_window_s: u64,
    /// `outbox.dedupe_max`.
    pub dedupe_max: usize,
    /// `gate.require_h5push`.
    pub require_h5push: bool,
    /// `gate.forget_after`, seconds.
    pub forget_after_s: u64,
}

/// An event to be judged and stored.
#[derive(Debug)]
pub struct Post<'a> {
    /// The event.
    pub event: &'a Event<'a>,
    /// Its idempotency key.
    pub key: EventKey,
    /// Where it would go, and how many events may wait there.
    pub endpoint: Option<(EndpointName, u64)>,
    /// Its lane, at that endpoint.
    pub lane: LaneKey,
    /// Its record, encoded.
    pub record: Vec<u8>,
}

/// What became of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Posted {
    /// Stored: on stable storage.
    Queued,
    /// Its key was accepted before.
    Duplicate,
    /// The gate said no.
    Suppressed(Suppressed),
    /// Too many wait for its endpoint. Nothing was stored.
    EndpointFull,
}

/// Why a whole request was refused. Nothing was stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// `outbox.max_events` wait.
    #[error("the outbox is full")]
    OutboxFull,
    /// The disk is full, nearly full, or does not take what is written.
    #[error("the disk is full or cannot be written")]
    DiskLow,
    /// The relay is stopping.
    #[error("the relay is stopping")]
    Stopping,
}

/// One record of a request.
#[derive(Debug)]
pub(super) enum Staged {
    Event { record: Vec<u8>, lane: LaneKey, endpoint: EndpointName, second: u32 },
    Other(Vec<u8>),
}

/// Told to the relay when the request is durable, in order with its events.
#[derive(Debug)]
pub struct WithdrawCustomer {
    /// The customer's plugin.
    pub plugin: Plugin,
    /// The customer.
    pub web_token: String,
    /// Answered, with how many events were withdrawn, when that is durable.
    pub done: oneshot::Sender<u64>,
}

/// What a request changed here, to put back when it could not be stored.
#[derive(Debug)]
enum Undo {
    State(state::Undo),
    Setting { key: String, before: Option<String> },
    Nonce(u128),
}

/// What the journal's thread writes as one.
#[derive(Debug)]
pub(super) struct Request {
    pub ticket: u64,
    pub staged: Vec<Staged>,
    pub withdraw: Vec<WithdrawCustomer>,
    pub done: oneshot::Sender<Result<(), Refusal>>,
    keys: Vec<EventKey>,
    endpoints: Vec<EndpointName>,
    undo: Vec<Undo>,
}

/// A request that was staged, from the caller's side.
#[derive(Debug)]
pub(super) struct Ticket {
    pub done: oneshot::Receiver<Result<(), Refusal>>,
}

/// A customer after a change, and what to wait for.
pub(super) type Changed = (Customer, Option<Ticket>);

/// Which letters were put back, and what to wait for.
pub(super) type Replayed = (Vec<LetterId>, Option<Ticket>);

/// Either what was decided, or which rows must be fetched first.
pub(super) enum Step<T> {
    Done(T),
    /// Each with its version of now.
    Missing(Vec<(StateKey, u32)>),
}

/// Everything that is decided before the 202.
#[derive(Debug)]
pub(super) struct Admission {
    pub rules: Rules,
    pub ids: Ids,
    pub cache: StateCache,
    /// What operators set, all of it.
    pub settings: BTreeMap<String, String>,
    pub nonces: Nonces,
    pub pending: Vec<Request>,
    pub is_stopping: bool,
    pub is_disk_low: bool,
    /// The journal's thread sleeps: it is to be woken when something is staged.
    pub is_writer_idle: bool,
    undurable: HashSet<EventKey>,
    next_ticket: u64,
    waiting: u64,
    waiting_by_endpoint: HashMap<EndpointName, u64>,
    /// Where the journal ends after each request that the queue has not taken yet.
    unapplied: VecDeque<(Position, u64)>,
}

/// What a post came to.
#[derive(Debug)]
pub(super) struct Judged {
    pub posted: Vec<Posted>,
    pub ticket: Option<Ticket>,
    /// Keys of duplicates whose first is not durable yet: they share its fate.
    pub fate_of: Vec<EventKey>,
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
            is_writer_idle: false,
            undurable: HashSet::new(),
            next_ticket: 1,
            waiting: 0,
            waiting_by_endpoint: HashMap::new(),
            unapplied: VecDeque::new(),
        }
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
    pub(super) fn post(&mut self, posts: &mut [Post<'_>], now_ms: u64) -> Result<Step<Judged>, Refusal> {
        self.check_open()?;
        if self.is_disk_low {
            return Err(Refusal::DiskLow);
        }
        let mut missing = HashSet::new();
        for post in posts.iter().filter(|post| post.endpoint.is_some()) {
            let event = post.event;
            self.collect_missing(event.plugin, &event.web_token, &event.hearing, &mut missing);
        }
        if !missing.is_empty() {
            return Ok(self.missing(missing));
        }
        let now_s = now_ms / 1_000;
        self.ids.expire(now_s);
        let (done, receiver) = oneshot::channel();
        let mut request = self.begin(done);
        let mut posted = Vec::with_capacity(posts.len());
        let mut fate_of = Vec::new();
        for post in posts {
            let verdict = self.judge(post, &mut request, &mut fate_of, now_s);
            posted.push(verdict);
        }
        if self.waiting > self.rules.events_max && !request.endpoints.is_empty() {
            self.put_back(request);
            return Err(Refusal::OutboxFull);
        }
        let ticket = self.stage(request).then_some(Ticket { done: receiver });
        Ok(Step::Done(Judged { posted, ticket, fate_of }))
    }

    fn judge(&mut self, post: &mut Post<'_>, request: &mut Request, fate_of: &mut Vec<EventKey>, now_s: u64) -> Posted {
        let event = post.event;
        let Some((endpoint, events_max)) = post.endpoint else {
            return Posted::Suppressed(Suppressed::NoPushAddress);
        };
        if self.ids.contains(post.key) {
            if self.undurable.contains(&post.key) {
                fate_of.push(post.key);
            }
            return Posted::Duplicate;
        }
        let (after, changes) = self.hear(event.plugin, &event.web_token, &event.hearing, now_s);
        let verdict = gate::decide(event.question(true), &after, self.rules.require_h5push);
        if verdict.is_ok() && self.waiting_by_endpoint.get(&endpoint).is_some_and(|count| *count >= events_max) {
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
            self.ids.push(key, *second);
            self.undurable.insert(key);
            self.count_waiting(*endpoint, 1);
            request.keys.push(key);
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
        if self.waiting_by_endpoint.get(&endpoint).is_some_and(|count| *count >= events_max) {
            return Ok(None);
        }
        let (done, receiver) = oneshot::channel();
        let mut request = self.begin(done);
        self.append(&mut request, key, event);
        Ok(self.stage(request).then_some(Ticket { done: receiver }))
    }

    /// Stages dead letters that are put back, as far as their customers are not switched off and their endpoints not
    /// full; answers which.
    ///
    /// # Errors
    /// The request is refused, and nothing changed.
    pub(super) fn replay(&mut self, replays: &[&Replay<'_>], now_s: u64) -> Result<Step<Replayed>, Refusal> {
        self.check_open()?;
        if self.is_disk_low {
            return Err(Refusal::DiskLow);
        }
        if self.waiting + replays.len() as u64 > self.rules.events_max {
            return Err(Refusal::OutboxFull);
        }
        let key = |event: &Accepted<'_>| StateKey::Customer(event.plugin, event.web_token.to_owned());
        let of_customers = || replays.iter().filter(|replay| replay.event.endpoint != EndpointName::SURVEY);
        let missing: HashSet<StateKey> =
            of_customers().map(|replay| key(&replay.event)).filter(|key| self.cache.get(key).is_none()).collect();
        if !missing.is_empty() {
            return Ok(self.missing(missing));
        }
        let (done, receiver) = oneshot::channel();
        let mut request = self.begin(done);
        let mut replayed = Vec::new();
        for Replay { id, event, events_max } in replays {
            let is_off = event.endpoint != EndpointName::SURVEY
                && self
                    .known(event.plugin, event.web_token, now_s)
                    .is_some_and(|customer| customer.toggle == Toggle::Off);
            if is_off || self.waiting_by_endpoint.get(&event.endpoint).is_some_and(|count| count >= events_max) {
                continue;
            }
            let record = Record::Accepted(event.clone()).encode();
            let (lane, endpoint, second) = (event.lane, event.endpoint, now_s as u32);
            self.append(&mut request, event.key, Staged::Event { record, lane, endpoint, second });
            replayed.push(*id);
        }
        if !replayed.is_empty() {
            request.staged.push(Staged::Other(Record::Gone(replayed.clone()).encode()));
        }
        let ticket = self.stage(request).then_some(Ticket { done: receiver });
        Ok(Step::Done((replayed, ticket)))
    }

    /// Stages that dead letters are gone.
    ///
    /// # Errors
    /// The request is refused, and nothing changed.
    pub(super) fn stage_gone(&mut self, ids: &[LetterId]) -> Result<Option<Ticket>, Refusal> {
        self.check_open()?;
        let (done, receiver) = oneshot::channel();
        let mut request = self.begin(done);
        if !ids.is_empty() {
            request.staged.push(Staged::Other(Record::Gone(ids.to_vec()).encode()));
        }
        Ok(self.stage(request).then_some(Ticket { done: receiver }))
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
        let (done, receiver) = oneshot::channel();
        let mut request = self.begin(done);
        request.undo.push(Undo::Setting { key: key.to_owned(), before });
        let change = StateChange::Setting { key: key.to_owned(), value };
        request.staged.push(Staged::Other(Record::State(change).encode()));
        Ok(self.stage(request).then_some(Ticket { done: receiver }))
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
        let (done, receiver) = oneshot::channel();
        let mut request = self.begin(done);
        request.undo.push(Undo::Nonce(key));
        request.staged.push(Staged::Other(Record::State(StateChange::Nonce { key, until_s }).encode()));
        Ok(self.stage(request).then_some(Ticket { done: receiver }))
    }

    /// Stages what a request says of a customer. `Done(None)`: there is no such customer, and there must be.
    ///
    /// # Errors
    /// The request is refused, and nothing changed.
    pub(super) fn change(
        &mut self,
        plugin: Plugin,
        web_token: &str,
        hearing: &Hearing,
        must_exist: bool,
        now_s: u64,
        withdraw: Option<oneshot::Sender<u64>>,
    ) -> Result<Step<Option<Changed>>, Refusal> {
        self.check_open()?;
        let mut missing = HashSet::new();
        self.collect_missing(plugin, web_token, hearing, &mut missing);
        if !missing.is_empty() {
            return Ok(self.missing(missing));
        }
        if must_exist && self.known(plugin, web_token, now_s).is_none() {
            return Ok(Step::Done(None));
        }
        let (after, changes) = self.hear(plugin, web_token, hearing, now_s);
        let (done, receiver) = oneshot::channel();
        let mut request = self.begin(done);
        self.remember(changes, &mut request);
        if let Some(done) = withdraw.filter(|_| after.toggle == Toggle::Off) {
            request.withdraw.push(WithdrawCustomer { plugin, web_token: web_token.to_owned(), done });
        }
        let ticket = self.stage(request).then_some(Ticket { done: receiver });
        Ok(Step::Done(Some((after, ticket))))
    }

    /// Stages that a customer is forgotten at some plugins.
    ///
    /// # Errors
    /// The request is refused, and nothing changed.
    pub(super) fn forget(
        &mut self,
        plugins: &[Plugin],
        web_token: &str,
        mut withdraw: impl FnMut() -> oneshot::Sender<u64>,
    ) -> Result<Step<Option<Ticket>>, Refusal> {
        self.check_open()?;
        let key = |plugin: &Plugin| StateKey::Customer(*plugin, web_token.to_owned());
        let keys: Vec<StateKey> = plugins.iter().map(key).filter(|key| self.cache.get(key).is_none()).collect();
        if !keys.is_empty() {
            return Ok(self.missing(keys));
        }
        let (done, receiver) = oneshot::channel();
        let mut request = self.begin(done);
        for plugin in plugins {
            let mut changes = vec![StateChange::DropCustomer { plugin: *plugin, web_token: web_token.to_owned() }];
            if let Some(StateValue::Customer(Some(customer))) = self.cache.get(&key(plugin)).cloned() {
                for kind in [NameKind::Customer, NameKind::Sdk] {
                    changes.extend(customer.name(kind).map(|name| name_change(kind, *plugin, name, None)));
                }
            }
            self.remember(changes, &mut request);
            let (web_token, done) = (web_token.to_owned(), withdraw());
            request.withdraw.push(WithdrawCustomer { plugin: *plugin, web_token, done });
        }
        let ticket = self.stage(request).then_some(Ticket { done: receiver });
        Ok(Step::Done(ticket))
    }

    /// A customer that is remembered; the caller has seen to it that the row is here.
    pub(super) fn known(&mut self, plugin: Plugin, web_token: &str, now_s: u64) -> Option<Customer> {
        let forget_after_s = self.rules.forget_after_s;
        match self.cache.get(&StateKey::Customer(plugin, web_token.to_owned())) {
            Some(StateValue::Customer(Some(customer))) => {
                Some(customer).filter(|customer| !customer.is_forgotten(now_s, forget_after_s)).map(|it| (**it).clone())
            }
            Some(StateValue::Customer(None) | StateValue::Name(_)) | None => None,
        }
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
            for key in &request.keys {
                self.undurable.remove(key);
            }
        }
        if let Some(last) = requests.last() {
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
    pub(super) fn stage_sync(&mut self) -> oneshot::Receiver<Result<(), Refusal>> {
        let (done, receiver) = oneshot::channel();
        let request = self.begin(done);
        self.pending.push(request);
        receiver
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

    fn begin(&mut self, done: oneshot::Sender<Result<(), Refusal>>) -> Request {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        Request {
            ticket,
            staged: Vec::new(),
            withdraw: Vec::new(),
            done,
            keys: Vec::new(),
            endpoints: Vec::new(),
            undo: Vec::new(),
        }
    }

    /// Hands a request on; says whether there is anything to wait for.
    fn stage(&mut self, request: Request) -> bool {
        let has_work = !request.staged.is_empty() || !request.withdraw.is_empty();
        if has_work {
            self.pending.push(request);
        }
        has_work
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
        for key in request.keys.iter().rev() {
            self.ids.pop_back();
            self.undurable.remove(key);
        }
        for endpoint in request.endpoints {
            self.uncount(endpoint, 1);
        }
        request.done
    }

    /// Which rows must be in the cache before a request about this customer can be decided.
    fn collect_missing(&mut self, plugin: Plugin, web_token: &str, hearing: &Hearing, missing: &mut HashSet<StateKey>) {
        let mut need = |cache: &mut StateCache, key: StateKey| -> Option<StateValue> {
            let found = cache.get(&key).cloned();
            if found.is_none() {
                missing.insert(key);
            }
            found
        };
        need(&mut self.cache, StateKey::Customer(plugin, web_token.to_owned()));
        for (kind, name) in names(hearing) {
            let holder = need(&mut self.cache, StateKey::Name(kind, plugin, name.to_owned()));
            if let Some(StateValue::Name(Some(other))) = holder
                && other != web_token
            {
                need(&mut self.cache, StateKey::Customer(plugin, other));
            }
        }
    }

    /// The customer after `hearing`, and what changes. The rows are in the cache.
    fn hear(&mut self, plugin: Plugin, web_token: &str, hearing: &Hearing, now_s: u64) -> (Customer, Vec<StateChange>) {
        let before = self.known(plugin, web_token, now_s);
        let base = before.clone().unwrap_or_else(|| Customer::new(web_token, plugin));
        let after = base.after(hearing, now_s, self.rules.forget_after_s);
        // In such an order that a crash in the middle leaves everybody to be found by the name that was acknowledged.
        let mut changes = Vec::new();
        let mut former = Vec::new();
        for (kind, name) in names(hearing) {
            if base.name(kind) == Some(name) && before.is_some() {
                continue;
            }
            former.extend(base.name(kind).map(|old| name_change(kind, plugin, old, None)));
            let holder = match self.cache.get(&StateKey::Name(kind, plugin, name.to_owned())) {
                Some(StateValue::Name(holder)) => holder.clone(),
                Some(StateValue::Customer(_)) | None => None,
            };
            if let Some(holder) = holder.filter(|holder| holder != web_token)
                && let Some(mut other) = self.known(plugin, &holder, now_s)
                && other.name(kind) == Some(name)
            {
                other.set_name(kind, None);
                changes.push(StateChange::PutCustomer(other));
            }
            changes.push(name_change(kind, plugin, name, Some(web_token.to_owned())));
        }
        if before.as_ref() != Some(&after) {
            changes.push(StateChange::PutCustomer(after.clone()));
        }
        changes.extend(former);
        (after, changes)
    }

    /// Applies changes to the cache and stages them.
    fn remember(&mut self, changes: Vec<StateChange>, request: &mut Request) {
        for change in changes {
            let (key, value) = match &change {
                StateChange::PutCustomer(customer) => (
                    StateKey::Customer(customer.plugin, customer.web_token.clone()),
                    StateValue::Customer(Some(Box::new(customer.clone()))),
                ),
                StateChange::DropCustomer { plugin, web_token } => {
                    (StateKey::Customer(*plugin, web_token.clone()), StateValue::Customer(None))
                }
                StateChange::Name { kind, plugin, name, web_token } => {
                    (StateKey::Name(*kind, *plugin, name.clone()), StateValue::Name(web_token.clone()))
                }
                // Held whole, not in the cache: `set` and `use_nonce` see to them.
                StateChange::Setting { .. } | StateChange::Nonce { .. } => continue,
            };
            request.undo.push(Undo::State(self.cache.put(key, value, request.ticket)));
            request.staged.push(Staged::Other(Record::State(change).encode()));
        }
    }
}

fn name_change(kind: NameKind, plugin: Plugin, name: &str, web_token: Option<String>) -> StateChange {
    StateChange::Name { kind, plugin, name: name.to_owned(), web_token }
}

fn names(hearing: &Hearing) -> impl Iterator<Item = (NameKind, &str)> {
    [(NameKind::Customer, &hearing.customer_token), (NameKind::Sdk, &hearing.sdk_token)]
        .into_iter()
        .filter_map(|(kind, name)| name.as_deref().map(|name| (kind, name)))
}
