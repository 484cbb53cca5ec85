//! Customers who were switched off or forgotten: what waits for them is settled, whatever it is at just now.

use super::Relay;
use crate::clock;
use crate::store::{Ending, Note, WithdrawCustomer};

/// A customer whose events are being withdrawn.
#[derive(Debug)]
pub(super) struct Withdrawing {
    pub customer: WithdrawCustomer,
    /// Events so far.
    pub withdrawn: u64,
    /// Sequence number of the last that is meant.
    pub until: u64,
}

impl Relay {
    /// Withdraws what waits of a customer, and answers when that is durable; where some are being made dead letters, when
    /// that has ended too.
    pub(super) fn withdraw(&mut self, Withdrawing { customer, mut withdrawn, until }: Withdrawing) {
        let mut burying_until = None;
        let hashing = self.store.hashing();
        for (endpoint, lane) in hashing.lanes(customer.plugin, &customer.web_token) {
            let id = self.schedule.lane_id(lane);
            let found = self.schedule.withdraw(lane, until, clock::micros());
            if let Some(id) = id {
                self.lane_errors.remove(&id);
                self.unread.remove(&id);
                self.count_buried(id, 0);
            }
            burying_until = burying_until.max(found.burying_until);
            if found.events.is_empty() && !found.had_retry {
                continue;
            }
            if let Some(id) = id
                && let Some(stage) = self.stages.get(&id)
            {
                stage.withdraw();
            }
            *self.ended.entry(endpoint).or_default() += found.events.len() as u64;
            // What is in flight may be delivered yet.
            let count = found.events.len() as u64 - u64::from(found.in_flight);
            self.metrics.withdrawn.inc_by(count);
            withdrawn += count;
            let seqs = self.seqs(&found.events);
            self.notes.push(Note::Settled { lane, ending: Ending::Withdrawn, retry_is_over: found.had_retry, seqs });
        }
        self.write_notes();
        if let Some(until) = burying_until {
            // What comes meanwhile may be wanted again.
            return self.withdrawing.push(Withdrawing { customer, withdrawn, until });
        }
        let synced = self.store.sync();
        tokio::spawn(async move {
            if synced.await.is_ok() {
                // The caller has gone.
                customer.done.send(withdrawn).ok();
            }
        });
    }
}
