//! What is asked of the store, and what comes of it.

use tokio::sync::oneshot;

use crate::domain::customer::Customer;
use crate::domain::endpoint::{EndpointName, Plugin};
use crate::domain::event::Event;
use crate::domain::gate::Suppressed;
use crate::domain::keys::{EventKey, LaneKey};
use crate::store::dead_letters::LetterId;
use crate::store::state::{self, StateKey};

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
pub(in crate::store) enum Staged {
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
pub(super) enum Undo {
    State(state::Undo),
    Setting { key: String, before: Option<String> },
    Nonce(u128),
}

/// What the journal's thread writes as one.
#[derive(Debug)]
pub(in crate::store) struct Request {
    pub ticket: u64,
    pub staged: Vec<Staged>,
    pub withdraw: Vec<WithdrawCustomer>,
    pub done: oneshot::Sender<Result<(), Refusal>>,
    /// With the number that each had before, if it had one.
    pub(super) keys: Vec<(EventKey, Option<u32>)>,
    pub(super) endpoints: Vec<EndpointName>,
    pub(super) undo: Vec<Undo>,
}

/// A request that was staged, from the caller's side.
#[derive(Debug)]
pub(in crate::store) struct Ticket {
    pub done: oneshot::Receiver<Result<(), Refusal>>,
}

/// A customer after a change, and what to wait for.
pub(in crate::store) type Changed = (Customer, Option<Ticket>);

/// Which letters were put back, and what to wait for.
pub(in crate::store) type Replayed = (Vec<LetterId>, Option<Ticket>);

/// Either what was decided, or which rows must be fetched first.
pub(in crate::store) enum Step<T> {
    Done(T),
    /// Each with its version of now.
    Missing(Vec<(StateKey, u32)>),
}

/// What a post came to.
#[derive(Debug)]
pub(in crate::store) struct Judged {
    pub posted: Vec<Posted>,
    pub ticket: Option<Ticket>,
    /// Keys of duplicates whose first is not durable yet: they share its fate.
    pub fate_of: Vec<EventKey>,
}
