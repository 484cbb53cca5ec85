//! The thread of the journal: gathers requests into groups, writes and syncs each, tells who waits.

use std::io;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use tokio::sync::mpsc;

use super::admission::Request;
use super::journal::{self, Begun, Writer};
use super::{Answers, Inner, Item, Notice, Refusal, disk, lock};
use crate::domain::backlog::PLACES_MAX;

/// Most records of a group, unless one request has more: many more fit into a segment.
const GROUP_RECORDS_MAX: usize = PLACES_MAX / 4;

/// How many of the requests that wait make a group, by how many records each has.
fn group_len(records: impl Iterator<Item = usize>) -> usize {
    let mut sum = 0;
    let fits = |records: &usize| {
        let is_first = sum == 0;
        sum += (*records).max(1);
        is_first || sum <= GROUP_RECORDS_MAX
    };
    records.take_while(fits).count()
}

impl Inner {
    pub(super) fn note(&self, bodies: Vec<Vec<u8>>) {
        let mut writer = lock(&self.writer);
        match writer.note(bodies) {
            // Without a segment the keeper has one begun within a second.
            Ok(()) => {}
            Err(error) => {
                // Room for just this is held ready.
                disk::release_reserve(&self.options.dir);
                if let Err(error) = writer.write_owed() {
                    self.failed("append", &error);
                }
                self.failed("append", &error);
            }
        }
    }

    /// The journal's thread: writes and syncs groups of requests until the end.
    pub(super) fn write_groups(&self) {
        loop {
            let requests = self.next_group();
            if requests.is_empty() {
                break;
            }
            match self.write_durably(&requests) {
                Ok(written) => {
                    // One that only waits for what was written before says nothing of that.
                    if requests.iter().any(|request| !request.staged.is_empty()) {
                        self.is_failing.store(false, Ordering::Relaxed);
                    }
                    self.publish(requests, written);
                }
                Err(error) => {
                    self.is_failing.store(true, Ordering::Relaxed);
                    self.failed("append", &error);
                    lock(&self.admission).fail(requests, Refusal::DiskLow);
                    self.fates.send_replace(());
                }
            }
        }
    }

    /// The requests that wait, once there are some; none at the end.
    fn next_group(&self) -> Vec<Request> {
        let mut admission = lock(&self.admission);
        if admission.pending.is_empty() {
            while admission.pending.is_empty() && !self.is_ending.load(Ordering::SeqCst) {
                admission.is_writer_idle = true;
                admission = self.work.wait(admission).unwrap_or_else(PoisonError::into_inner);
            }
            admission.is_writer_idle = false;
            drop(admission);
            // Where all cores are busy, the first request has woken this thread in the place of one that was about to
            // bring the next: those come first, and one sync does for all of them. Else this takes no time.
            std::thread::yield_now();
            admission = lock(&self.admission);
        }
        let group = group_len(admission.pending.iter().map(|request| request.staged.len()));
        let rest = admission.pending.split_off(group);
        std::mem::replace(&mut admission.pending, rest)
    }

    /// Writes a group and syncs it. After a failed sync the group is written again, once, into a new segment: pages of the
    /// old one may be marked clean without being on disk.
    fn write_durably(&self, requests: &[Request]) -> io::Result<journal::Written> {
        for is_last in [false, true] {
            let (begun, written) = {
                let mut writer = lock(&self.writer);
                let records = requests.iter().map(|request| request.staged.len()).sum();
                let is_removed = records > 0 && writer.is_removed();
                let begun = if is_removed || writer.wants_roll(records) { Some(self.roll(&mut writer)?) } else { None };
                if is_removed {
                    self.failed("append", &"the segment's file was removed: what is in it goes with this process");
                }
                (begun, writer.write_group(requests))
            };
            // With the lock released: the relay may be waiting for it while its channel is full.
            if let Some(begun) = begun {
                let notice = Notice::SegmentBegun { slot: begun.slot, segment: begun.segment };
                drop(self.notices.blocking_send(notice));
            }
            let written = written?;
            let timer = self.metrics.sync_seconds.start_timer();
            let synced = written.sync();
            timer.observe_duration();
            let mut writer = lock(&self.writer);
            match synced {
                Ok(()) => {
                    writer.synced(&written);
                    return Ok(written);
                }
                Err(error) => {
                    self.failed("sync", &error);
                    writer.abandon(&written);
                    if is_last {
                        return Err(error);
                    }
                }
            }
        }
        Err(io::ErrorKind::Other.into())
    }

    /// Begins a segment before anything is accepted, for what is noted of the events that wait. Where the disk does not
    /// take it, it is begun with the first group.
    pub(super) fn begin_segment(&self) {
        match self.roll(&mut lock(&self.writer)) {
            Ok(Begun { slot, segment }) => {
                // The first notice of all: there is room.
                drop(self.notices.try_send(Notice::SegmentBegun { slot, segment }));
            }
            Err(error) => self.failed("append", &error),
        }
    }

    fn roll(&self, writer: &mut Writer) -> io::Result<Begun> {
        let mut segments = self.segments.write().unwrap_or_else(PoisonError::into_inner);
        let begun = writer.roll(&mut segments)?;
        if let Some((number, end)) = writer.previous() {
            segments.ends.insert(number, end);
        }
        tracing::debug!(segment = begun.segment, "began a segment");
        Ok(begun)
    }

    fn publish(&self, requests: Vec<Request>, written: journal::Written) {
        lock(&self.admission).durable(&requests, written.end);
        *lock(&self.durable) = written.end;
        self.durable_moved.notify_all();
        self.fates.send_replace(());
        let mut items = Vec::new();
        let mut answers = Vec::with_capacity(requests.len());
        for (request, events) in requests.into_iter().zip(written.events) {
            items.extend(events.into_iter().map(Item::Appended));
            items.extend(request.withdraw.into_iter().map(Item::Withdraw));
            answers.push(request.done);
        }
        let notice = Notice::Durable { items, end: written.end, answers: Answers(answers) };
        if let Err(mpsc::error::SendError(Notice::Durable { answers, .. })) = self.notices.blocking_send(notice) {
            // The relay has ended: what it was not told is found at the next start.
            answers.send();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A group goes into one segment, whatever came while the disk took its time.
    #[test]
    fn a_group_has_room_in_a_segment() {
        assert_eq!(group_len([].into_iter()), 0);
        assert_eq!(group_len([0, 0, 5].into_iter()), 3);
        assert_eq!(group_len([GROUP_RECORDS_MAX + 1, 1].into_iter()), 1);
        let many = std::iter::repeat_n(1_000, 1_024);
        assert_eq!(group_len(many.clone()), GROUP_RECORDS_MAX / 1_000);
        assert!(many.count() * 1_000 > PLACES_MAX);
    }
}
