//! What the store tells the relay, in the order of the journal.

use super::Relay;
use super::withdrawals::Withdrawing;
use crate::clock;
use crate::store::{Compacted, Item, Notice, Snapshot};

impl Relay {
    pub(super) fn hear(&mut self, notice: Notice) {
        match notice {
            Notice::SegmentBegun { slot, segment } => {
                if let Some(before) = self.newest_slot.replace(slot) {
                    self.schedule.backlog.seal(before);
                }
                self.schedule.backlog.open(slot, segment);
            }
            Notice::Durable { items, end, answers } => {
                let now = clock::micros();
                for item in items {
                    match item {
                        Item::Appended(event) => {
                            let backlog = &mut self.schedule.backlog;
                            let handle = backlog.append(event.slot, None, event.offset, event.second, event.len);
                            match handle {
                                Some(handle) => {
                                    self.schedule.appended(handle, event.lane, event.endpoint, now);
                                }
                                None => tracing::error!(slot = event.slot, "an event in no segment"),
                            }
                        }
                        Item::Withdraw(customer) => {
                            self.withdraw(Withdrawing { customer, withdrawn: 0, until: u64::MAX });
                        }
                    }
                }
                self.heard = end;
                answers.send();
            }
            // A switch whose withdrawal waits for a burial lies before the snapshot's place, and a start would not withdraw
            // by it again: there is none now.
            Notice::Snapshot(_) if !self.withdrawing.is_empty() => {}
            Notice::Snapshot(reply) => {
                let marks = self.schedule.backlog.marks().collect();
                // The store has given up waiting.
                drop(reply.send(Snapshot { position: self.heard, marks }));
            }
            Notice::SegmentRemoved(slot) => self.schedule.backlog.close(slot),
            Notice::SegmentCompacted(compacted) => self.move_events(compacted),
        }
    }

    fn move_events(&mut self, compacted: Compacted) {
        self.schedule.move_events(compacted.old_slot, compacted.new_slot, compacted.segment, &compacted.events);
        // The store has ended.
        compacted.done.send(()).ok();
    }
}
