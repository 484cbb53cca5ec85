//! The lanes: who waits in which order, about 40 bytes for a lane, and more only for one that has failed.

use hashbrown::HashTable;

use crate::domain::backlog::Handle;
use crate::domain::keys::LaneKey;

/// A lane's place in the table, stable while it is known to the schedule.
pub type LaneId = u32;

const NO_RETRY: u32 = u32::MAX;

/// Where a lane is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Nowhere: nothing waits.
    Free,
    /// In one of its endpoint's two queues.
    Ready,
    /// In its endpoint's timer heap.
    Waiting,
    /// One push in flight.
    Flying,
    /// Its first events are being given up.
    Burying,
}

/// One lane.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lane {
    pub key: LaneKey,
    pub head: Handle,
    pub tail: Handle,
    pub len: u32,
    pub endpoint: u32,
    pub state: State,
    retry: u32,
}

/// What is known of the push at the head of a lane that has failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Retry {
    /// Attempts made with this body and `webhook-id`.
    pub tries: u32,
    /// Failures that count towards `push.max_attempts`.
    pub attempts: u32,
    /// Refusals that count towards `push.max_refusals`.
    pub refusals: u32,
    /// Events of the push, fixed at its first attempt; 0: not fixed.
    pub fixed: u32,
    /// After a refusal: how many events, from the head, still go singly.
    pub singles: u32,
    /// What each of those starts with.
    pub singles_attempts: u32,
    /// What each of those starts with.
    pub singles_refusals: u32,
    /// Successes of the endpoint at the first attempt; not known of attempts before a restart (then 0).
    #[serde(skip)]
    pub mark: u64,
    /// Successes since then that were this lane's own.
    #[serde(skip)]
    pub own: u64,
    /// When it is due, microseconds of the schedule's clock.
    #[serde(skip)]
    pub due: u64,
}

impl Retry {
    /// Attempts that were made, as people are told: with this body, or that count.
    #[must_use]
    pub fn made(&self) -> u32 {
        self.tries.max(self.attempts)
    }
}

/// A table of more lanes is given back when none of them is left. Few in tests: the simulation is to come by it.
const KEPT_MAX: usize = if cfg!(test) { 4 } else { 65_536 };

/// All lanes, found by key.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    lanes: Vec<Lane>,
    free: Vec<LaneId>,
    index: HashTable<LaneId>,
    retries: Vec<Retry>,
    free_retries: Vec<u32>,
}

impl Lanes {
    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    #[cfg(test)]
    pub(super) fn sizes(&self) -> [(&'static str, usize); 5] {
        [
            ("lanes", self.lanes.capacity()),
            ("free lanes", self.free.capacity()),
            ("lanes by key", self.index.num_buckets()),
            ("retries", self.retries.capacity()),
            ("free retries", self.free_retries.capacity()),
        ]
    }

    pub(super) fn find(&self, key: LaneKey) -> Option<LaneId> {
        self.index.find(key.0, |id| self.key(*id) == key).copied()
    }

    fn key(&self, id: LaneId) -> LaneKey {
        self.get(id).map_or(LaneKey(0), |lane| lane.key)
    }

    pub(super) fn get(&self, id: LaneId) -> Option<&Lane> {
        self.lanes.get(id as usize)
    }

    /// The lanes from that place of the table on.
    pub(super) fn from(&self, first: LaneId) -> impl Iterator<Item = (LaneId, &Lane)> {
        let known = self.lanes.iter().enumerate().skip(first as usize).map(|(id, lane)| (id as LaneId, lane));
        known.filter(|(_, lane)| lane.state != State::Free)
    }

    pub(super) fn get_mut(&mut self, id: LaneId) -> Option<&mut Lane> {
        self.lanes.get_mut(id as usize)
    }

    pub(super) fn create(&mut self, key: LaneKey, endpoint: u32) -> LaneId {
        let lane =
            Lane { key, head: Handle::NONE, tail: Handle::NONE, len: 0, endpoint, state: State::Free, retry: NO_RETRY };
        let id = match self.free.pop() {
            Some(id) => {
                if let Some(place) = self.lanes.get_mut(id as usize) {
                    *place = lane;
                }
                id
            }
            None => {
                self.lanes.push(lane);
                (self.lanes.len() - 1) as LaneId
            }
        };
        let lanes = &self.lanes;
        self.index.insert_unique(key.0, id, |id| lanes.get(*id as usize).map_or(0, |lane| lane.key.0));
        id
    }

    /// Forgets a lane in which nothing waits and which is in no queue.
    pub(super) fn release(&mut self, id: LaneId) {
        self.set_retry(id, None);
        let Some(lane) = self.lanes.get_mut(id as usize) else { return };
        lane.state = State::Free;
        let key = lane.key;
        let lanes = &self.lanes;
        let is_it = |other: &LaneId| lanes.get(*other as usize).is_some_and(|lane| lane.key == key);
        if let Ok(entry) = self.index.find_entry(key.0, is_it) {
            entry.remove();
            self.free.push(id);
        }
        if self.index.is_empty() && self.lanes.len() > KEPT_MAX {
            *self = Lanes::default();
        }
    }

    pub(super) fn retry(&self, id: LaneId) -> Option<&Retry> {
        let at = self.get(id)?.retry;
        self.retries.get(at as usize)
    }

    pub(super) fn set_retry(&mut self, id: LaneId, retry: Option<Retry>) {
        let Some(lane) = self.lanes.get_mut(id as usize) else { return };
        match (retry, self.retries.get_mut(lane.retry as usize)) {
            (Some(retry), Some(place)) => *place = retry,
            (Some(retry), None) => match self.free_retries.pop() {
                Some(at) => {
                    lane.retry = at;
                    if let Some(place) = self.retries.get_mut(at as usize) {
                        *place = retry;
                    }
                }
                None => {
                    lane.retry = self.retries.len() as u32;
                    self.retries.push(retry);
                }
            },
            (None, Some(_)) => {
                self.free_retries.push(lane.retry);
                lane.retry = NO_RETRY;
            }
            (None, None) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_table_is_given_back_when_nothing_waits() {
        let mut lanes = Lanes::default();
        let create = |lanes: &mut Lanes, count: usize| (0..count as u64).map(|n| lanes.create(LaneKey(n), 0)).collect();
        let few: Vec<LaneId> = create(&mut lanes, KEPT_MAX);
        few.iter().for_each(|id| lanes.release(*id));
        assert_eq!((lanes.len(), lanes.lanes.len()), (0, KEPT_MAX), "a small one is kept");
        let many: Vec<LaneId> = create(&mut lanes, KEPT_MAX + 1);
        many.iter().for_each(|id| lanes.release(*id));
        assert!(lanes.sizes().iter().all(|(_, size)| *size <= 1), "{:?}", lanes.sizes());
        assert_eq!(lanes.find(LaneKey(7)), None);
        let id = lanes.create(LaneKey(7), 0);
        assert_eq!(lanes.find(LaneKey(7)), Some(id));
        // Whoever still knows a place of before finds nothing there.
        lanes.release(many[KEPT_MAX]);
        assert_eq!(lanes.len(), 1);
    }
}
