//! How many waiting events were accepted when, so that the oldest age is at hand without a scan.

use std::collections::VecDeque;

/// Buckets beyond which neighbours are merged.
const BUCKETS_MAX: usize = 2_048;

/// Counts of events by the second in which they were accepted, oldest first. Exact while fewer than
/// `BUCKETS_MAX` different seconds wait; then neighbouring seconds share a bucket and the age errs upwards.
#[derive(Debug, Default)]
pub struct Ages {
    buckets: VecDeque<(u32, u32)>,
}

impl Ages {
    /// Counts an event accepted at `second`.
    pub fn add(&mut self, second: u32) {
        let at = self.buckets.partition_point(|(start, _)| *start <= second);
        match at.checked_sub(1).and_then(|before| self.buckets.get_mut(before)) {
            Some((start, count)) if *start == second => *count += 1,
            _ => {
                self.buckets.insert(at, (second, 1));
                if self.buckets.len() > BUCKETS_MAX {
                    self.merge();
                }
            }
        }
    }

    /// Uncounts an event accepted at `second`.
    pub fn remove(&mut self, second: u32) {
        let after = self.buckets.partition_point(|(start, _)| *start <= second);
        // After a merge the event's own second may have gone into the bucket before.
        for at in (0..after).rev() {
            if let Some((_, count)) = self.buckets.get_mut(at).filter(|(_, count)| *count > 0) {
                *count -= 1;
                break;
            }
        }
        while self.buckets.front().is_some_and(|(_, count)| *count == 0) {
            self.buckets.pop_front();
        }
    }

    /// The second in which the oldest was accepted; `None` when nothing waits.
    #[must_use]
    pub fn oldest(&self) -> Option<u32> {
        self.buckets.front().map(|(start, _)| *start)
    }

    #[cfg(test)]
    pub(crate) fn buckets(&self) -> usize {
        self.buckets.capacity()
    }

    fn merge(&mut self) {
        let mut merged: VecDeque<(u32, u32)> = VecDeque::with_capacity(BUCKETS_MAX);
        for (index, (start, count)) in self.buckets.drain(..).enumerate() {
            match merged.back_mut() {
                Some((_, sum)) if index % 2 == 1 => *sum += count,
                _ => merged.push_back((start, count)),
            }
        }
        self.buckets = merged;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_is_exact_for_a_few_seconds_and_never_too_young() {
        let mut ages = Ages::default();
        assert_eq!(ages.oldest(), None);
        for second in [10, 10, 12, 11, 12] {
            ages.add(second);
        }
        for (gone, oldest) in [(10, Some(10)), (12, Some(10)), (10, Some(11)), (11, Some(12)), (12, None)] {
            ages.remove(gone);
            assert_eq!(ages.oldest(), oldest, "after {gone}");
        }
        let many = 10 * BUCKETS_MAX as u32;
        (0..many).for_each(|second| ages.add(second));
        assert!(ages.buckets.len() <= BUCKETS_MAX);
        for second in 0..many {
            assert!(ages.oldest().is_some_and(|oldest| oldest <= second));
            ages.remove(second);
        }
        assert_eq!(ages.oldest(), None);
    }
}
