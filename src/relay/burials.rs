//! What is given up becomes dead letters: many lanes with one sync, and who asked for it is told.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::attempt::RecordAt;
use super::{Relay, micros};
use crate::clock;
use crate::domain::endpoint::EndpointName;
use crate::domain::keys::LaneKey;
use crate::domain::schedule::{Burial, LaneId};
use crate::store::{Ending, Letter, Note, Stored};

/// Events that become dead letters with one sync, and up to a lane's share more.
const BURIED_AT_ONCE: usize = 64;
/// How long a burial that failed waits.
const BURY_AGAIN: Duration = Duration::from_secs(1);
/// How often a burial that cannot read an event is tried again, before the event counts as damaged.
const UNREAD_MAX: u32 = 10;

/// A burial with all that it needs.
struct Grave {
    burial: Burial,
    key: Option<LaneKey>,
    places: Vec<RecordAt>,
    seqs: Vec<u64>,
    problem: Option<Arc<str>>,
    is_last_try: bool,
}

impl Grave {
    /// Reads the events. `None`: one cannot be read just now.
    fn letters(&self) -> Option<Vec<Letter>> {
        let burial = &self.burial;
        let mut letters = Vec::with_capacity(self.places.len());
        for (place, seq) in self.places.iter().zip(self.seqs.iter().copied()) {
            let stored = match place.reader.as_ref().map(|reader| reader.read(place.offset)) {
                Some(Ok(stored)) => stored,
                Some(Err(_)) if !self.is_last_try => return None,
                Some(Err(_)) | None => None,
            };
            // Another lane's is as good as none.
            let is_own = |stored: &Stored| stored.event().is_some_and(|event| Some(event.lane) == self.key);
            let stored = stored.filter(is_own);
            let (problem, reason, attempts) = (self.problem.clone(), burial.reason, burial.attempts);
            letters.push(Letter { seq, endpoint: burial.endpoint, stored, reason, attempts, problem });
        }
        Some(letters)
    }
}

/// What came of a burial.
#[derive(Debug)]
pub(super) struct Buried {
    burial: Burial,
    /// Taken before: a compaction may move the events meanwhile.
    seqs: Vec<u64>,
    end: BurialEnd,
}

/// How a burial ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BurialEnd {
    Done,
    /// An event cannot be read just now.
    Unread,
    /// The dead letters cannot be written just now.
    Unwritten,
}

/// Who gave lanes up.
#[derive(Debug)]
pub(super) struct BuryWaiter {
    /// Those in which some are still to become dead letters, and how many at most.
    lanes: HashMap<LaneId, u32>,
    /// Events that did.
    buried: u64,
    reply: oneshot::Sender<Option<u64>>,
}

impl Relay {
    /// Makes what is to be given up next dead letters.
    pub(super) fn bury_next(&mut self) {
        let (mut burials, mut events) = (Vec::new(), 0);
        while events < BURIED_AT_ONCE
            && let Some(burial) = self.schedule.next_bury()
        {
            events += burial.events.len();
            burials.push(burial);
        }
        if !burials.is_empty() {
            self.bury(burials);
        }
    }

    fn bury(&mut self, burials: Vec<Burial>) {
        let work: Vec<Grave> = burials.into_iter().map(|burial| self.grave(burial)).collect();
        let store = self.store.clone();
        self.burying.spawn_blocking(move || {
            let mut letters = Vec::new();
            let mut buried = Vec::with_capacity(work.len());
            for grave in work {
                let found = grave.letters();
                let end = if found.is_some() { BurialEnd::Done } else { BurialEnd::Unread };
                letters.extend(found.into_iter().flatten());
                buried.push(Buried { burial: grave.burial, seqs: grave.seqs, end });
            }
            if store.bury(&letters, clock::wall_ms()).is_err() {
                for buried in &mut buried {
                    buried.end = BurialEnd::Unwritten;
                }
                return buried;
            }
            for Letter { endpoint, seq, .. } in letters.iter().filter(|letter| letter.stored.is_none()) {
                store.damaged("journal");
                tracing::error!(%endpoint, seq, "an event's record is damaged: its content is lost");
            }
            buried
        });
    }

    fn grave(&self, burial: Burial) -> Grave {
        Grave {
            key: self.schedule.lane_key(burial.lane),
            places: self.records(&burial.events),
            seqs: self.seqs(&burial.events),
            problem: self.lane_errors.get(&burial.lane).cloned(),
            is_last_try: self.unread.get(&burial.lane).is_some_and(|times| *times >= UNREAD_MAX),
            burial,
        }
    }

    pub(super) fn bury_lanes(
        &mut self,
        endpoint: EndpointName,
        keys: Option<Vec<LaneKey>>,
        first_only: bool,
        reply: oneshot::Sender<Option<u64>>,
    ) {
        let lanes: Vec<LaneId> = match keys {
            Some(keys) => keys.into_iter().filter_map(|key| self.schedule.lane_id(key)).collect(),
            None => self.schedule.lanes_from(0).filter(|lane| lane.endpoint == endpoint).map(|lane| lane.id).collect(),
        };
        let given_up = lanes.into_iter().map(|lane| (lane, self.schedule.bury(lane, first_only)));
        let lanes = given_up.filter(|(_, events)| *events > 0).collect();
        self.bury_waiters.retain(|waiter| !waiter.reply.is_closed());
        self.bury_waiters.push(BuryWaiter { lanes, buried: 0, reply });
    }

    /// Counts what became dead letters of a lane for those who gave it up.
    pub(super) fn count_buried(&mut self, lane: LaneId, events: u32) {
        let is_burying = self.schedule.is_burying(lane);
        for waiter in &mut self.bury_waiters {
            if let Some(left) = waiter.lanes.get_mut(&lane) {
                let its_own = events.min(*left);
                waiter.buried += u64::from(its_own);
                *left -= its_own;
                if *left == 0 || !is_burying {
                    waiter.lanes.remove(&lane);
                }
            }
        }
    }

    /// Answers those who gave something up, when all of it is dead letters or was delivered.
    pub(super) fn answer_buried(&mut self) {
        for waiter in self.bury_waiters.extract_if(.., |waiter| waiter.lanes.is_empty()) {
            waiter.reply.send(Some(waiter.buried)).ok();
        }
        if self.is_draining && self.burying.is_empty() {
            // Nothing more becomes dead letters: unanswered, it is stopping.
            self.bury_waiters.clear();
        }
    }

    pub(super) fn take_burials(&mut self, done: Result<Vec<Buried>, tokio::task::JoinError>) {
        match done {
            Ok(done) => done.into_iter().for_each(|buried| self.take_burial(buried)),
            Err(error) => tracing::error!(%error, "burials ended without a report"),
        }
        for withdrawing in std::mem::take(&mut self.withdrawing) {
            self.withdraw(withdrawing);
        }
    }

    fn take_burial(&mut self, Buried { burial, seqs, end }: Buried) {
        let now = clock::micros();
        if end != BurialEnd::Done {
            if end == BurialEnd::Unread {
                *self.unread.entry(burial.lane).or_default() += 1;
            } else {
                for waiter in self.bury_waiters.extract_if(.., |waiter| waiter.lanes.contains_key(&burial.lane)) {
                    waiter.reply.send(None).ok();
                }
            }
            self.schedule.not_buried(&burial);
            self.bury_not_before = now + micros(BURY_AGAIN);
            return;
        }
        self.unread.remove(&burial.lane);
        let count = burial.events.len() as u32;
        let lane = self.schedule.lane_key(burial.lane).unwrap_or(LaneKey(0));
        self.schedule.buried(&burial, now);
        self.count_buried(burial.lane, count);
        if self.schedule.waiting(lane) == 0 {
            self.lane_errors.remove(&burial.lane);
        }
        self.notes.push(Note::Settled { lane, ending: Ending::Buried, retry_is_over: true, seqs });
        *self.ended.entry(burial.endpoint).or_default() += u64::from(count);
        self.metrics_of(burial.endpoint).died(burial.reason, u64::from(count));
        let reason = burial.reason.as_str();
        tracing::warn!(endpoint = %burial.endpoint, reason, events = count, "events became dead letters");
    }
}
