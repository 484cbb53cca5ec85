//! What callers ask of the store, to be durable when they are answered: judged in [`super::admission`], written by the
//! journal's thread, waited for here.

use std::time::Duration;

use super::admission::{Admission, Post, Posted, Refusal, Staged, Step, Ticket};
use super::codec::{Accepted, Record};
use super::{Store, lock, state};
use crate::domain::keys::EventKey;

/// How long a request waits at most for the queue's rows to catch up, and how often it looks.
const ROWS_LIMIT: Duration = Duration::from_secs(10);
const ROWS_AGAIN: Duration = Duration::from_millis(5);
/// How often rows are fetched for a request before it is given up: each time something else changed meanwhile.
const FETCHES_MAX: usize = 100;

impl Store {
    /// Judges events and stores those that are to be pushed. When this returns, they are on stable storage. `is_alone`: an
    /// event by itself, which is refused as a whole where too many wait for its endpoint.
    ///
    /// # Errors
    /// The whole is refused: nothing was stored.
    pub async fn post(&self, mut posts: Vec<Post<'_>>, is_alone: bool, now_ms: u64) -> Result<Vec<Posted>, Refusal> {
        self.wait_for_rows().await?;
        let judged = self.decided(|admission| admission.post(&mut posts, is_alone, now_ms))?;
        self.wait(judged.ticket).await?;
        for key in judged.fate_of {
            let mut fates = self.inner.fates.subscribe();
            loop {
                if let Some(fate) = lock(&self.inner.admission).fate(key) {
                    break fate?;
                }
                fates.changed().await.map_err(|_| Refusal::Stopping)?;
            }
        }
        Ok(judged.posted)
    }

    /// Stores an event that asks no gate. When this returns, it is on stable storage; `false`: too many wait for its
    /// endpoint, and it is not stored.
    ///
    /// # Errors
    /// It is not stored.
    pub async fn post_ungated(&self, event: &Accepted<'_>, events_max: u64) -> Result<bool, Refusal> {
        let second = (event.accepted_ms / 1_000) as u32;
        let record = Record::Accepted(event.clone()).encode();
        let staged = Staged::Event { record, lane: event.lane, endpoint: event.endpoint, second };
        let ticket = lock(&self.inner.admission).post_ungated(event.key, staged, (event.endpoint, events_max))?;
        let is_taken = ticket.is_some();
        self.wake_writer();
        self.wait(ticket).await?;
        Ok(is_taken)
    }

    /// Sets or unsets. When this returns, that is on stable storage.
    ///
    /// # Errors
    /// Nothing changed.
    pub async fn set(&self, key: &str, value: Option<String>) -> Result<(), Refusal> {
        let ticket = lock(&self.inner.admission).set(key, value)?;
        self.wake_writer();
        self.wait(ticket).await
    }

    /// Sets or unsets with the next group, without waiting: of no use where nothing can be stored just now.
    pub fn note_setting(&self, key: &str, value: Option<String>) {
        // Nobody waits for it.
        if let Err(refusal) = lock(&self.inner.admission).set(key, value).map(drop) {
            tracing::debug!(key, ?refusal, "not kept");
        }
        self.wake_writer();
    }

    /// Whether a nonce is used up.
    #[must_use]
    pub fn is_nonce_used(&self, key: EventKey, now_s: u64) -> bool {
        lock(&self.inner.admission).nonces.contains(key, now_s)
    }

    /// Uses a nonce up, durably. `false`: it was used before, or too many are remembered.
    ///
    /// # Errors
    /// It is not used up.
    pub async fn use_nonce(&self, key: EventKey, until_s: u64, now_s: u64) -> Result<bool, Refusal> {
        let ticket = lock(&self.inner.admission).use_nonce(key, until_s, now_s)?;
        let is_fresh = ticket.is_some();
        self.wake_writer();
        self.wait(ticket).await?;
        Ok(is_fresh)
    }

    /// Waits until all that was noted before is on stable storage.
    ///
    /// # Errors
    /// It is not.
    pub fn sync(&self) -> impl Future<Output = Result<(), Refusal>> + Send + use<> {
        let ticket = lock(&self.inner.admission).stage_sync();
        self.wake_writer();
        async move { ticket.done.await.unwrap_or(Err(Refusal::Stopping)) }
    }

    pub(super) fn wake_writer(&self) {
        self.inner.work.notify_one();
    }

    /// Repeats a decision until the rows that it needs are at hand.
    pub(super) fn decided<T>(
        &self,
        mut decide: impl FnMut(&mut Admission) -> Result<Step<T>, Refusal>,
    ) -> Result<T, Refusal> {
        for _ in 0..FETCHES_MAX {
            let (step, is_awaited) = {
                let mut admission = lock(&self.inner.admission);
                let step = decide(&mut admission)?;
                (step, !admission.pending.is_empty() && std::mem::take(&mut admission.is_writer_idle))
            };
            if is_awaited {
                self.inner.work.notify_one();
            }
            let keys = match step {
                Step::Done(done) => return Ok(done),
                Step::Missing(keys) => keys,
            };
            let queue = self.inner.queue().ok_or(Refusal::DiskLow)?;
            let hashing = self.hashing();
            let mut rows = Vec::with_capacity(keys.len());
            for (key, version) in keys {
                let value =
                    state::read(&queue, &hashing, &key).map_err(|error| self.inner.queue_failed("read", &error))?;
                rows.push((key, version, value));
            }
            let mut admission = lock(&self.inner.admission);
            for (key, version, value) in rows {
                admission.cache.fill(key, version, value);
            }
        }
        Err(Refusal::DiskLow)
    }

    /// Waits while the queue's rows are far behind: what they have not taken yet is held in memory.
    pub(super) async fn wait_for_rows(&self) -> Result<(), Refusal> {
        let is_crowded = || lock(&self.inner.admission).cache.is_crowded();
        if !is_crowded() {
            return Ok(());
        }
        let waited = tokio::time::timeout(ROWS_LIMIT, async {
            // One after another, first come, first served: who only looked now and then might never see room.
            let _turn = self.inner.rows_turn.lock().await;
            while is_crowded() {
                tokio::time::sleep(ROWS_AGAIN).await;
            }
        });
        waited.await.map_err(|_| Refusal::DiskLow)
    }

    pub(super) async fn wait(&self, ticket: Option<Ticket>) -> Result<(), Refusal> {
        match ticket {
            None => Ok(()),
            Some(ticket) => ticket.done.await.unwrap_or(Err(Refusal::Stopping)),
        }
    }
}
