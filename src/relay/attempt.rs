//! One attempt as a task: read the events, compose the push, send it, report.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use bytes::Bytes;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::delivery::{self, Connection, Push, Seen};
use super::target::Target;
use super::{FREE_BYTES, Rules};
use crate::clock;
use crate::domain::endpoint::EndpointName;
use crate::domain::keys::{HashKey, LaneKey};
use crate::domain::push::{self, Composition, PushBounds};
use crate::domain::verdict::{AttemptResult, Report, Verdict};
use crate::store::{Accepted, Reader, Stored};

/// Whether an attempt has begun to send. A withdrawal that comes before ends it; one that comes after does not.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) endpoint: EndpointName,
    at: AtomicU8,
    withdrawn: Notify,
    given_up: Notify,
}

const PREPARING: u8 = 0;
const SENDING: u8 = 1;
const WITHDRAWN: u8 = 2;

impl Stage {
    pub(super) fn new(endpoint: EndpointName) -> Stage {
        Stage { endpoint, at: AtomicU8::new(PREPARING), withdrawn: Notify::new(), given_up: Notify::new() }
    }

    pub(super) fn withdraw(&self) {
        // Already sending: the report says what came of it.
        if self.at.compare_exchange(PREPARING, WITHDRAWN, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            self.withdrawn.notify_one();
        }
    }

    /// Ends it: what it has sent counts as not answered.
    pub(super) fn give_up(&self) {
        self.given_up.notify_one();
    }

    fn is_sending(&self) -> bool {
        self.at.load(Ordering::SeqCst) == SENDING
    }

    fn may_send(&self) -> bool {
        self.at.compare_exchange(PREPARING, SENDING, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }
}

/// Where an event's record is.
#[derive(Debug)]
pub(super) struct RecordAt {
    /// `None`: its segment is gone, which only happens to events that were withdrawn.
    pub reader: Option<Reader>,
    pub offset: u32,
}

/// An attempt to be made.
#[derive(Debug)]
pub(super) struct Job {
    pub lane: u32,
    pub key: Option<LaneKey>,
    pub endpoint: EndpointName,
    pub events: Vec<RecordAt>,
    pub is_fixed: bool,
    pub attempt: u32,
    pub target: Arc<Target>,
    /// On a connection of its own: the last one broke.
    pub is_on_new: bool,
    pub stage: Arc<Stage>,
    pub hashing: HashKey,
    pub rules: Arc<Rules>,
    /// Room for large pushes, KiB.
    pub bodies: Arc<Semaphore>,
    /// Turns to read from the disk what is no longer in memory.
    pub cold_reads: Arc<Semaphore>,
}

/// What came of it.
#[derive(Debug)]
pub(super) struct Done {
    pub lane: u32,
    pub endpoint: EndpointName,
    /// Events that the push carried; none where nothing was sent.
    pub taken: u32,
    pub messages: u32,
    pub accepted_ms: Vec<u64>,
    pub verdict: Verdict,
    /// `None`: nothing was sent.
    pub result: Option<AttemptResult>,
    /// What there is to say of a failure.
    pub detail: Option<String>,
    pub seconds: f64,
}

impl Job {
    pub(super) async fn run(mut self) -> Done {
        let mut done = Done {
            lane: self.lane,
            endpoint: self.endpoint,
            taken: 0,
            messages: 0,
            accepted_ms: Vec::new(),
            verdict: Verdict::Again,
            result: None,
            detail: None,
            seconds: 0.0,
        };
        // What was read is given back before the answer is waited for: thousands of attempts may wait.
        let mut read = self.read(Reader::read_cached);
        if read.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
            // Where nothing else waits for the disk; a few at a time, for that pool is others' too.
            let turn = tokio::select! {
                turn = Arc::clone(&self.cold_reads).acquire_owned() => turn,
                () = self.stage.withdrawn.notified() => return done,
                () = self.stage.given_up.notified() => return done,
            };
            let in_pool = tokio::task::spawn_blocking(move || (self.read(Reader::read), self)).await;
            drop(turn);
            match in_pool {
                Ok(done) => (read, self) = done,
                // The end has come.
                Err(_) => return done,
            }
        }
        let composed = match read {
            Ok((stored, room)) => self.compose(&stored, room, &mut done),
            Err(error) => {
                tracing::error!(endpoint = %self.endpoint, %error, "the journal cannot be read just now");
                return Done { verdict: Verdict::Unread, ..done };
            }
        };
        let Some((push, event_ids)) = composed else {
            return Done { taken: 1, verdict: Verdict::Damaged, ..done };
        };
        let webhook_id = self.rules.logs_attempts.then(|| push.id.clone());
        let begun = clock::now();
        let connection = if self.is_on_new { Connection::New } else { Connection::Any };
        let may_send = || self.stage.may_send();
        let seen = tokio::select! {
            // An answer that is there counts.
            biased;
            seen = delivery::attempt(&self.target, push, connection, self.rules.timeout, may_send) => seen,
            // Nothing was sent; whatever is waited for, it is of no use any more.
            () = self.stage.withdrawn.notified() => None,
            () = self.stage.given_up.notified() => self.stage.is_sending().then(|| Report::Timeout.into()),
        };
        done.seconds = begun.elapsed().as_secs_f64();
        if seen.is_none() {
            done.taken = 0;
        }
        if let Some(Seen { report, detail }) = seen {
            done.verdict = report.verdict();
            done.result = Some(report.result());
            done.detail = describe(report, detail);
            if let Some(webhook_id) = webhook_id {
                tracing::info!(
                    endpoint = %self.endpoint,
                    webhook_id,
                    events = event_ids,
                    attempt = self.attempt,
                    result = report.result().as_str(),
                    status = report.status(),
                    seconds = done.seconds,
                    "attempt"
                );
            }
        }
        done
    }

    /// Reads the events up to the first that does not read back, or for which there is no room; also the room that they
    /// take.
    fn read(&self, read: impl Fn(&Reader, u32) -> io::Result<Option<Stored>>) -> io::Result<(Vec<Stored>, Room)> {
        let mut room: Room = None;
        let mut all = Vec::with_capacity(self.events.len());
        let mut bytes = 0;
        for at in &self.events {
            let Some(reader) = &at.reader else { break };
            match read(reader, at.offset) {
                Ok(Some(stored)) => {
                    bytes += stored.event().map_or(0, |event| event.messages.len());
                    let is_first = all.is_empty();
                    if bytes > FREE_BYTES && !self.is_fixed && !is_first {
                        let kib = ((bytes - FREE_BYTES) / 1_024) as u32 + 1;
                        let more = kib.saturating_sub(room.as_ref().map_or(0, |room| room.num_permits() as u32));
                        match (Arc::clone(&self.bodies).try_acquire_many_owned(more), &mut room) {
                            (Ok(more), Some(room)) => room.merge(more),
                            (Ok(more), room) => *room = Some(more),
                            (Err(_), _) => break,
                        }
                    }
                    all.push(stored);
                }
                Ok(None) => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(error),
                // A push that was tried goes as it was, or not at all.
                Err(error) if all.is_empty() || self.is_fixed => return Err(error),
                Err(_) => break,
            }
            if bytes > self.rules.bounds.bytes_max && !self.is_fixed {
                break;
            }
        }
        Ok((all, room))
    }

    /// Puts as many events as go together into one body, which holds its room until it is written; also their ids, where
    /// attempts are logged. `None`: not even the first can be read.
    fn compose(&self, stored: &[Stored], room: Room, done: &mut Done) -> Option<(Push, String)> {
        let is_own = |event: &Accepted<'_>| Some(event.lane) == self.key;
        let first = stored.first()?.event().filter(is_own)?;
        // What was sent before goes together again, whatever the bounds are now.
        let unbounded = PushBounds { messages_max: u32::MAX, bytes_max: usize::MAX };
        let bounds = if self.is_fixed { unbounded } else { self.rules.bounds };
        let is_survey = self.endpoint == EndpointName::SURVEY;
        let mut composition = Composition::default();
        let mut events = Vec::new();
        let mut event_ids = Vec::new();
        for stored in stored {
            let Some(event) = stored.event().filter(is_own) else { break };
            let is_same = event.plugin == first.plugin && event.web_token == first.web_token;
            let is_alone = is_survey && !events.is_empty();
            if !is_same || is_alone || !composition.take(event.count, event.messages, bounds) {
                break;
            }
            events.push((stored.seq(), event.key));
            if self.rules.logs_attempts {
                event_ids.push(event.event_id());
            }
            done.accepted_ms.push(event.accepted_ms);
        }
        done.taken = events.len() as u32;
        done.messages = composition.messages();
        // A survey is stored as the body that the IM server gets.
        let body =
            if is_survey { first.messages.to_owned() } else { composition.body(first.web_token, first.plugin).ok()? };
        let id = push::webhook_id(&self.hashing, &events);
        let body = match room {
            None => Bytes::from(body),
            Some(room) => Bytes::from_owner(Roomy { body, _room: room }),
        };
        Some((Push { id, attempt: self.attempt, body }, event_ids.join(" ")))
    }
}

/// The room that a large push takes.
type Room = Option<OwnedSemaphorePermit>;

/// A large body, and the room that it takes.
struct Roomy {
    body: String,
    _room: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Roomy {
    fn as_ref(&self) -> &[u8] {
        self.body.as_bytes()
    }
}

/// A failure in words, for status, lanes and dead letters; `None` for a success.
fn describe(report: Report, detail: Option<String>) -> Option<String> {
    let what = match report {
        Report::Status { code: 200..=299, .. } => return None,
        Report::Status { code, .. } => format!("status {code}"),
        Report::SurveyCode(code) => format!("code {code}"),
        Report::Timeout => "no answer in time".to_owned(),
        Report::StaleConnection => "closed while idle".to_owned(),
        Report::Connect | Report::Tls | Report::BlockedAddress | Report::Io => report.result().as_str().to_owned(),
    };
    Some(match detail {
        Some(detail) => format!("{what}: {detail}"),
        None => what,
    })
}
