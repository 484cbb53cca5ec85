//! The idempotency keys of the last events, in a ring with a table: about 22 bytes for a key.

use std::collections::VecDeque;

use hashbrown::HashTable;

use crate::domain::keys::EventKey;

/// The keys of the last queued events, bounded in number and age.
#[derive(Debug)]
pub(super) struct Ids {
    keys: VecDeque<[u64; 2]>,
    /// (number of the first, second in which they were pushed), a row where the second changes.
    seconds: VecDeque<(u64, u32)>,
    /// Numbers (modulo 2^32) of keys in the ring.
    table: HashTable<u32>,
    /// Number of the oldest key in the ring.
    first: u64,
    max: usize,
    window_s: u64,
}

fn halves(key: EventKey) -> [u64; 2] {
    [key as u64, (key >> 64) as u64]
}

impl Ids {
    pub(super) fn new(max: usize, window_s: u64) -> Ids {
        Ids { keys: VecDeque::new(), seconds: VecDeque::new(), table: HashTable::new(), first: 0, max, window_s }
    }

    /// Begins at a number, for a ring that is loaded with about so many.
    pub(super) fn start_at(&mut self, number: u64, expected: usize) {
        self.first = number;
        let expected = expected.min(self.max);
        self.keys.reserve_exact(expected);
        // Nothing is in it yet, so nothing is hashed anew.
        self.table.reserve(expected, |_| 0);
    }

    /// Number of the next key.
    pub(super) fn next_number(&self) -> u64 {
        self.first + self.keys.len() as u64
    }

    /// Adds a key; the oldest makes room. Answers the number that it had before, for `pop_back`.
    pub(super) fn push(&mut self, key: EventKey, second: u32) -> Option<u32> {
        while self.keys.len() >= self.max.max(1) {
            self.pop_front();
        }
        let number = self.next_number() as u32;
        let key = halves(key);
        // A replayed event has its key again: the newest counts.
        let before = self.find(key);
        if let Some(before) = before {
            self.forget(key, before);
        }
        self.keys.push_back(key);
        if self.seconds.back().is_none_or(|(_, last)| *last != second) {
            self.seconds.push_back((self.next_number() - 1, second));
        }
        let (keys, first) = (&self.keys, self.first as u32);
        self.table.insert_unique(key[0], number, |number| at(keys, first, *number)[0]);
        before
    }

    /// Takes back the last key, of a request that could not be stored; `before` is what pushing it answered.
    pub(super) fn pop_back(&mut self, before: Option<u32>) {
        let Some(key) = self.keys.back().copied() else { return };
        self.forget(key, (self.next_number() - 1) as u32);
        self.keys.pop_back();
        if self.keys.is_empty() || self.seconds.back().is_some_and(|(first, _)| *first == self.next_number()) {
            self.seconds.pop_back();
        }
        // Unless it has made room meanwhile.
        if let Some(before) = before.filter(|before| at(&self.keys, self.first as u32, *before) == key) {
            let (keys, first) = (&self.keys, self.first as u32);
            self.table.insert_unique(key[0], before, |number| at(keys, first, *number)[0]);
        }
    }

    pub(super) fn contains(&self, key: EventKey) -> bool {
        self.find(halves(key)).is_some()
    }

    /// Number of a key, and when it was pushed, Unix seconds.
    pub(super) fn number(&self, key: EventKey) -> Option<(u64, u32)> {
        let place = self.find(halves(key))?.wrapping_sub(self.first as u32);
        let number = self.first + u64::from(place);
        let row = self.seconds.partition_point(|(first, _)| *first <= number).checked_sub(1)?;
        Some((number, self.seconds.get(row)?.1))
    }

    fn find(&self, key: [u64; 2]) -> Option<u32> {
        self.table.find(key[0], |number| at(&self.keys, self.first as u32, *number) == key).copied()
    }

    /// Drops what is older than the window.
    pub(super) fn expire(&mut self, now_s: u64) {
        while self.seconds.front().is_some_and(|(_, second)| now_s.saturating_sub(u64::from(*second)) > self.window_s) {
            self.pop_front();
        }
    }

    fn pop_front(&mut self) {
        let Some(key) = self.keys.front().copied() else { return };
        self.forget(key, self.first as u32);
        self.keys.pop_front();
        self.first += 1;
        // The first row is over when the next begins, or when there is no key.
        if self.seconds.get(1).map_or(self.keys.is_empty(), |(first, _)| *first <= self.first) {
            self.seconds.pop_front();
        }
    }

    fn forget(&mut self, key: [u64; 2], number: u32) {
        if let Ok(entry) = self.table.find_entry(key[0], |other| *other == number) {
            entry.remove();
        }
    }
}

fn at(keys: &VecDeque<[u64; 2]>, first: u32, number: u32) -> [u64; 2] {
    keys.get(number.wrapping_sub(first) as usize).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_is_bounded_in_number_and_age_and_can_take_back() {
        let mut ids = Ids::new(3, 10);
        ids.start_at(u64::from(u32::MAX) - 1, 3);
        for n in 0..5u128 {
            ids.push(n << 64 | n, 100);
        }
        let held: Vec<u128> = (0..6).filter(|n| ids.contains(n << 64 | n)).collect();
        assert_eq!(held, [2, 3, 4]);
        ids.pop_back(None);
        assert!(!ids.contains(4 << 64 | 4) && ids.contains(3 << 64 | 3));
        // The row of a second goes with its last key, also when its first has made room before.
        let mut few = Ids::new(2, 10);
        (0..3).for_each(|key| assert_eq!(few.push(key, 100), None));
        (0..2).for_each(|_| few.pop_back(None));
        few.expire(1_000);
        assert!(few.seconds.is_empty());
        ids.expire(111);
        ids.push(9, 111);
        assert!(ids.contains(9) && !ids.contains(3 << 64 | 3), "older than the window");
        assert_eq!(ids.next_number(), u64::from(u32::MAX) - 1 + 5);
    }

    #[test]
    fn it_agrees_with_a_plain_list() {
        let mut rng = fastrand::Rng::with_seed(5);
        let mut ids = Ids::new(50, 1_000);
        // With what pushing answered: a replayed event has its key again.
        let mut model: VecDeque<(u128, u32, Option<u32>)> = VecDeque::new();
        for round in 0..5_000 {
            let key = u128::from(rng.u64(0..200));
            if rng.u8(0..5) == 0
                && let Some((_, _, before)) = model.pop_back()
            {
                ids.pop_back(before);
            } else if !ids.contains(key) || rng.u8(0..4) == 0 {
                let before = ids.push(key, round / 7);
                model.push_back((key, round / 7, before));
                if model.len() > 50 {
                    model.pop_front();
                }
            }
            for key in 0..200 {
                let second = model.iter().rev().find(|(other, ..)| *other == key).map(|(_, second, _)| *second);
                assert_eq!(ids.number(key).map(|(_, second)| second), second);
            }
            assert!(ids.seconds.len() <= ids.keys.len());
        }
    }
}
