//! Calls about dead letters: burying, showing, putting back, forgetting. Their files: `dead_letters`.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;

use super::admission::Ticket;
use super::codec::{Accepted, Dead, Record};
use super::dead_letters::DeadLetters;
use super::segment::Frame;
use super::{LetterFilter, LetterId, Refusal, Store, Stored, lock};
use crate::domain::endpoint::EndpointName;
use crate::domain::verdict::DeathReason;

/// A letter to be buried.
#[derive(Debug)]
pub struct Letter {
    /// The event's sequence number.
    pub seq: u64,
    /// Its endpoint.
    pub endpoint: EndpointName,
    /// The event; `None` when its record does not read back.
    pub stored: Option<Stored>,
    /// Why it is given up.
    pub reason: DeathReason,
    /// Attempts that were made.
    pub attempts: u32,
    /// What its last attempt failed with.
    pub problem: Option<Arc<str>>,
}

/// A dead letter, read back.
#[derive(Debug)]
pub struct DeadLetter {
    /// Its name.
    pub id: LetterId,
    pub(super) frame: Frame,
}

impl DeadLetter {
    /// What it says; `None` when its record does not read back.
    #[must_use]
    pub fn dead(&self) -> Option<Dead<'_>> {
        match Record::decode(self.frame.body())? {
            Record::Dead(dead) => Some(dead),
            Record::Opened(_)
            | Record::Accepted(_)
            | Record::Settled(_)
            | Record::Deferred(_)
            | Record::State(_)
            | Record::Sealed { .. }
            | Record::Gone(_) => None,
        }
    }
}

/// A dead letter to be put back into the outbox.
#[derive(Debug)]
pub struct Replay<'a> {
    /// Which.
    pub id: LetterId,
    /// The event as it is accepted anew.
    pub event: Accepted<'a>,
    /// How many events may wait for its endpoint.
    pub events_max: u64,
}

impl Store {
    /// Writes dead letters and puts them on stable storage. Blocks.
    ///
    /// # Errors
    /// They are not buried.
    pub fn bury(&self, letters: &[Letter], now_ms: u64) -> io::Result<()> {
        let dead: Vec<Dead<'_>> = letters
            .iter()
            .map(|letter| Dead {
                seq: letter.seq,
                reason: letter.reason,
                buried_ms: now_ms,
                attempts: letter.attempts,
                event: letter.stored.as_ref().and_then(Stored::event),
                endpoint: letter.endpoint,
                problem: letter.problem.as_deref(),
            })
            .collect();
        if dead.is_empty() {
            return Ok(());
        }
        let result = lock(&self.inner.dead).bury(&dead, now_ms);
        result.inspect_err(|error| self.inner.failed("bury", error))
    }

    /// Some dead letters after `after`, oldest first; with the names of all that were found, also of those whose record
    /// does not read back. Blocks.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn letters(
        &self,
        filter: &LetterFilter,
        after: Option<LetterId>,
        most: usize,
    ) -> io::Result<(Vec<DeadLetter>, Vec<LetterId>)> {
        let first = after.map_or(LetterId::FIRST, LetterId::next);
        let found = lock(&self.inner.dead).find(filter, first, most)?;
        let ids = found.iter().map(|(id, _)| *id).collect();
        let mut letters = Vec::with_capacity(found.len());
        for (id, offset) in found {
            letters.extend(self.read_letter(id, offset)?);
        }
        Ok((letters, ids))
    }

    /// One dead letter; `None` when there is none of that name, or no more. Blocks.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn letter(&self, id: LetterId) -> io::Result<Option<DeadLetter>> {
        let offset = lock(&self.inner.dead).offset(id)?;
        offset.map_or(Ok(None), |offset| self.read_letter(id, offset))
    }

    /// After every letter that there is now.
    #[must_use]
    pub fn letters_end(&self) -> LetterId {
        lock(&self.inner.dead).end()
    }

    fn read_letter(&self, id: LetterId, offset: u32) -> io::Result<Option<DeadLetter>> {
        let frame = DeadLetters::read(&self.inner.options.dir, id, offset)?;
        Ok(frame.map(|frame| DeadLetter { id, frame }))
    }

    /// Removes dead letters for good. Answers how many of them were there; when this returns, that is durable.
    ///
    /// # Errors
    /// None was removed.
    pub async fn purge(&self, ids: &[LetterId]) -> Result<u64, Refusal> {
        let taken = self.take_letters(ids)?;
        let ticket = lock(&self.inner.admission).stage_gone(&taken);
        self.settle_letters(ticket, &taken).await?;
        Ok(taken.len() as u64)
    }

    /// Puts dead letters back into the outbox, each behind what waits in its lane, except those of customers who are
    /// switched off and those whose endpoint is full. Answers which; when this returns, that is durable.
    ///
    /// # Errors
    /// None was replayed.
    pub async fn replay(&self, replays: &[Replay<'_>], now_s: u64) -> Result<Vec<LetterId>, Refusal> {
        let ids: Vec<LetterId> = replays.iter().map(|replay| replay.id).collect();
        let taken = self.take_letters(&ids)?;
        let mut left: HashSet<LetterId> = taken.iter().copied().collect();
        // Each once, however often it is named.
        let replays: Vec<&Replay<'_>> = replays.iter().filter(|replay| left.remove(&replay.id)).collect();
        let staged = self.decided(|admission| admission.replay(&replays, now_s));
        let (replayed, ticket) = match staged {
            Ok(staged) => staged,
            Err(refusal) => {
                self.put_letters_back(&taken);
                return Err(refusal);
            }
        };
        let left: Vec<LetterId> = taken.into_iter().filter(|id| !replayed.contains(id)).collect();
        self.put_letters_back(&left);
        self.settle_letters(Ok(ticket), &replayed).await?;
        Ok(replayed)
    }

    fn take_letters(&self, ids: &[LetterId]) -> Result<Vec<LetterId>, Refusal> {
        let mut dead = lock(&self.inner.dead);
        let mut taken = Vec::with_capacity(ids.len());
        for id in ids {
            match dead.take(*id) {
                Ok(true) => taken.push(*id),
                Ok(false) => {}
                Err(error) => {
                    self.inner.failed("read", &error);
                    taken.iter().for_each(|id| dead.put_back(*id));
                    return Err(Refusal::DiskLow);
                }
            }
        }
        Ok(taken)
    }

    fn put_letters_back(&self, ids: &[LetterId]) {
        let mut dead = lock(&self.inner.dead);
        ids.iter().for_each(|id| dead.put_back(*id));
    }

    async fn settle_letters(&self, ticket: Result<Option<Ticket>, Refusal>, ids: &[LetterId]) -> Result<(), Refusal> {
        let result = match ticket {
            Ok(ticket) => {
                self.wake_writer();
                self.wait(ticket).await
            }
            Err(refusal) => Err(refusal),
        };
        if result.is_err() {
            self.put_letters_back(ids);
        }
        result
    }

    /// Dead letters that are kept, by endpoint.
    #[must_use]
    pub fn dead_letters(&self) -> Vec<(EndpointName, u64)> {
        let counts = lock(&self.inner.dead).counts();
        counts.into_iter().map(|(endpoint, count)| (EndpointName::from_number(endpoint), count)).collect()
    }
}
