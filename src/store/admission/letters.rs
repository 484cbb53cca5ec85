//! Dead letters that are put back or are gone.

use std::collections::HashSet;

use super::{Admission, Refusal, Replayed, Staged, Step, Ticket};
use crate::domain::customer::Toggle;
use crate::domain::endpoint::EndpointName;
use crate::store::Replay;
use crate::store::codec::{Accepted, Record};
use crate::store::dead_letters::LetterId;
use crate::store::state::StateKey;

impl Admission {
    /// Stages dead letters that are put back, as far as their customers are not switched off and their endpoints not
    /// full; answers which.
    ///
    /// # Errors
    /// The request is refused, and nothing changed.
    pub(in crate::store) fn replay(&mut self, replays: &[&Replay<'_>], now_s: u64) -> Result<Step<Replayed>, Refusal> {
        self.check_open()?;
        if self.is_disk_low {
            return Err(Refusal::DiskLow);
        }
        if self.waiting + replays.len() as u64 > self.rules.events_max {
            return Err(Refusal::OutboxFull);
        }
        let key = |event: &Accepted<'_>| StateKey::Customer(event.plugin, event.web_token.to_owned());
        let of_customers = || replays.iter().filter(|replay| replay.event.endpoint != EndpointName::SURVEY);
        let missing: HashSet<StateKey> =
            of_customers().map(|replay| key(&replay.event)).filter(|key| self.cache.get(key).is_none()).collect();
        if !missing.is_empty() {
            return Ok(self.missing(missing));
        }
        let (mut request, ticket) = self.begin();
        let mut replayed = Vec::new();
        for Replay { id, event, events_max } in replays {
            let is_off = event.endpoint != EndpointName::SURVEY
                && self
                    .known(event.plugin, event.web_token, now_s)
                    .is_some_and(|customer| customer.toggle == Toggle::Off);
            if is_off || self.waiting_by_endpoint.get(&event.endpoint).is_some_and(|count| count >= events_max) {
                continue;
            }
            let record = Record::Accepted(event.clone()).encode();
            let (lane, endpoint, second) = (event.lane, event.endpoint, now_s as u32);
            self.append(&mut request, event.key, Staged::Event { record, lane, endpoint, second });
            replayed.push(*id);
        }
        if !replayed.is_empty() {
            request.staged.push(Staged::Other(Record::Gone(replayed.clone()).encode()));
        }
        let ticket = self.stage(request, ticket, false);
        Ok(Step::Done((replayed, ticket)))
    }

    /// Stages that dead letters are gone.
    ///
    /// # Errors
    /// The request is refused, and nothing changed.
    pub(in crate::store) fn stage_gone(&mut self, ids: &[LetterId]) -> Result<Option<Ticket>, Refusal> {
        self.check_open()?;
        let (mut request, ticket) = self.begin();
        if !ids.is_empty() {
            request.staged.push(Staged::Other(Record::Gone(ids.to_vec()).encode()));
        }
        Ok(self.stage(request, ticket, false))
    }
}
