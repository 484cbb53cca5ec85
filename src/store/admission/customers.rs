//! What is remembered of customers: heard with events, changed by calls, forgotten.

use std::collections::HashSet;

use tokio::sync::oneshot;

use super::{Admission, Changed, Refusal, Request, Staged, Step, Ticket, Undo, WithdrawCustomer};
use crate::domain::customer::{Customer, Hearing, NameKind, Toggle};
use crate::domain::endpoint::Plugin;
use crate::store::codec::{Record, StateChange};
use crate::store::state::{StateKey, StateValue};

const KINDS: [NameKind; 2] = [NameKind::Customer, NameKind::Sdk];

impl Admission {
    /// Stages what a request says of a customer. `Done(None)`: there is no such customer, and there must be.
    ///
    /// # Errors
    /// The request is refused, and nothing changed.
    pub(in crate::store) fn change(
        &mut self,
        plugin: Plugin,
        web_token: &str,
        hearing: &Hearing,
        must_exist: bool,
        now_s: u64,
        withdraw: Option<oneshot::Sender<u64>>,
    ) -> Result<Step<Option<Changed>>, Refusal> {
        self.check_open()?;
        let mut missing = HashSet::new();
        self.collect_missing(plugin, web_token, hearing, now_s, &mut missing);
        if !missing.is_empty() {
            return Ok(self.missing(missing));
        }
        if must_exist && self.known(plugin, web_token, now_s).is_none() {
            return Ok(Step::Done(None));
        }
        let rests = self.rests_on_undurable(plugin, web_token, hearing);
        let (after, changes) = self.hear(plugin, web_token, hearing, now_s);
        let (mut request, ticket) = self.begin();
        self.remember(changes, &mut request);
        if let Some(done) = withdraw.filter(|_| after.toggle == Toggle::Off) {
            request.withdraw.push(WithdrawCustomer { plugin, web_token: web_token.to_owned(), done });
        }
        let ticket = self.stage(request, ticket, rests);
        Ok(Step::Done(Some((after, ticket))))
    }

    /// Stages that a customer is forgotten at some plugins, where it need not be known: what waits is withdrawn.
    ///
    /// # Errors
    /// The request is refused, and nothing changed.
    pub(in crate::store) fn forget(
        &mut self,
        plugins: &[Plugin],
        web_token: &str,
        mut withdraw: impl FnMut() -> oneshot::Sender<u64>,
    ) -> Result<Step<Option<Ticket>>, Refusal> {
        self.check_open()?;
        let mut missing = Vec::new();
        let mut all_changes = Vec::new();
        for plugin in plugins {
            // Also of one who is not remembered: a start withdraws what waits by it, should a crash come before.
            let mut changes = vec![StateChange::DropCustomer { plugin: *plugin, web_token: web_token.to_owned() }];
            let key = StateKey::Customer(*plugin, web_token.to_owned());
            match self.cache.get(&key).cloned() {
                Some(StateValue::Customer(Some(customer))) => {
                    for (kind, name) in
                        KINDS.into_iter().filter_map(|kind| customer.name(kind).map(|name| (kind, name)))
                    {
                        let key = StateKey::Name(kind, *plugin, name.to_owned());
                        match self.cache.get(&key) {
                            // It may have gone to another one since this customer was heard of last.
                            Some(StateValue::Name(Some(holder))) if holder == web_token => {
                                changes.push(name_change(kind, *plugin, name, None));
                            }
                            Some(_) => {}
                            None => missing.push(key),
                        }
                    }
                }
                Some(_) => {}
                None => missing.push(key),
            }
            all_changes.push((*plugin, changes));
        }
        if !missing.is_empty() {
            return Ok(self.missing(missing));
        }
        let (mut request, ticket) = self.begin();
        for (plugin, changes) in all_changes {
            self.remember(changes, &mut request);
            let (web_token, done) = (web_token.to_owned(), withdraw());
            request.withdraw.push(WithdrawCustomer { plugin, web_token, done });
        }
        let ticket = self.stage(request, ticket, false);
        Ok(Step::Done(ticket))
    }

    /// A customer that is remembered; the caller has seen to it that the row is here.
    pub(in crate::store) fn known(&mut self, plugin: Plugin, web_token: &str, now_s: u64) -> Option<Customer> {
        let (now_s, forget_after_s) = (self.aging(now_s), self.rules.forget_after_s);
        match self.cache.get(&StateKey::Customer(plugin, web_token.to_owned())) {
            Some(StateValue::Customer(Some(customer))) => {
                Some(customer).filter(|customer| !customer.is_forgotten(now_s, forget_after_s)).map(|it| (**it).clone())
            }
            Some(StateValue::Customer(None) | StateValue::Name(_)) | None => None,
        }
    }

    /// The names that a customer has and, after `hearing`, has no more; the row is in the cache.
    fn former_names(
        &mut self,
        plugin: Plugin,
        web_token: &str,
        hearing: &Hearing,
        now_s: u64,
    ) -> Vec<(NameKind, String)> {
        let (now_s, forget_after_s) = (self.aging(now_s), self.rules.forget_after_s);
        let key = StateKey::Customer(plugin, web_token.to_owned());
        let Some(StateValue::Customer(Some(customer))) = self.cache.get(&key) else { return Vec::new() };
        // Who is as good as forgotten begins anew, without any.
        let is_over = customer.is_forgotten(now_s, forget_after_s);
        let goes = |kind: NameKind, name: &str| match names(hearing).find(|(said, _)| *said == kind) {
            Some((_, said)) => said != name,
            None => is_over,
        };
        let had = KINDS.into_iter().filter_map(|kind| customer.name(kind).map(|name| (kind, name)));
        had.filter(|(kind, name)| goes(*kind, name)).map(|(kind, name)| (kind, name.to_owned())).collect()
    }

    /// Whether what is known of a customer comes of a request that may yet fail.
    pub(super) fn rests_on_undurable(&self, plugin: Plugin, web_token: &str, hearing: &Hearing) -> bool {
        let customer = StateKey::Customer(plugin, web_token.to_owned());
        let named = names(hearing).map(|(kind, name)| StateKey::Name(kind, plugin, name.to_owned()));
        std::iter::once(customer).chain(named).any(|key| self.cache.changed_by(&key) > self.durable_ticket)
    }

    /// Which rows must be in the cache before a request about this customer can be decided.
    pub(super) fn collect_missing(
        &mut self,
        plugin: Plugin,
        web_token: &str,
        hearing: &Hearing,
        now_s: u64,
        missing: &mut HashSet<StateKey>,
    ) {
        let former = self.former_names(plugin, web_token, hearing, now_s);
        // What a name stands for, if it is here.
        let mut need = |key: StateKey| match self.cache.get(&key) {
            Some(StateValue::Name(holder)) => holder.clone(),
            Some(StateValue::Customer(_)) => None,
            None => {
                missing.insert(key);
                None
            }
        };
        need(StateKey::Customer(plugin, web_token.to_owned()));
        for (kind, name) in former {
            need(StateKey::Name(kind, plugin, name));
        }
        for (kind, name) in names(hearing) {
            let holder = need(StateKey::Name(kind, plugin, name.to_owned()));
            if let Some(other) = holder.filter(|holder| holder != web_token) {
                need(StateKey::Customer(plugin, other));
            }
        }
    }

    /// The customer after `hearing`, and what changes. The rows are in the cache.
    pub(super) fn hear(
        &mut self,
        plugin: Plugin,
        web_token: &str,
        hearing: &Hearing,
        now_s: u64,
    ) -> (Customer, Vec<StateChange>) {
        let before = self.known(plugin, web_token, now_s);
        let is_new = before.is_none();
        let base = before.unwrap_or_else(|| Customer::new(web_token, plugin));
        let after = base.after(hearing, now_s, self.rules.forget_after_s);
        // In such an order that a crash in the middle leaves everybody to be found by the name that was acknowledged.
        let mut changes = Vec::new();
        let mut bereft: Vec<Customer> = Vec::new();
        for (kind, name) in names(hearing) {
            let holder = self.holder(kind, plugin, name);
            if holder.as_deref() == Some(web_token) && base.name(kind) == Some(name) {
                continue;
            }
            if let Some(holder) = holder.filter(|holder| holder != web_token) {
                // Who loses both names loses the second as one who has lost the first.
                let known = bereft.iter().find(|other| other.web_token == holder).cloned();
                if let Some(mut other) = known.or_else(|| self.known(plugin, &holder, now_s))
                    && other.name(kind) == Some(name)
                {
                    other.set_name(kind, None);
                    changes.push(StateChange::PutCustomer(other.clone()));
                    bereft.push(other);
                }
            }
            changes.push(name_change(kind, plugin, name, Some(web_token.to_owned())));
        }
        if is_new || after != base {
            changes.push(StateChange::PutCustomer(after.clone()));
        }
        for (kind, name) in self.former_names(plugin, web_token, hearing, now_s) {
            // It may have gone to another one since this customer was heard of last.
            if self.holder(kind, plugin, &name).as_deref() == Some(web_token) {
                changes.push(name_change(kind, plugin, &name, None));
            }
        }
        (after, changes)
    }

    /// Who is found by a name; the row is in the cache.
    fn holder(&mut self, kind: NameKind, plugin: Plugin, name: &str) -> Option<String> {
        match self.cache.get(&StateKey::Name(kind, plugin, name.to_owned())) {
            Some(StateValue::Name(holder)) => holder.clone(),
            Some(StateValue::Customer(_)) | None => None,
        }
    }

    /// Applies changes to the cache and stages them.
    pub(super) fn remember(&mut self, changes: Vec<StateChange>, request: &mut Request) {
        for change in changes {
            let (key, value) = match &change {
                StateChange::PutCustomer(customer) => (
                    StateKey::Customer(customer.plugin, customer.web_token.clone()),
                    StateValue::Customer(Some(Box::new(customer.clone()))),
                ),
                StateChange::DropCustomer { plugin, web_token } => {
                    (StateKey::Customer(*plugin, web_token.clone()), StateValue::Customer(None))
                }
                StateChange::Name { kind, plugin, name, web_token } => {
                    (StateKey::Name(*kind, *plugin, name.clone()), StateValue::Name(web_token.clone()))
                }
                // Held whole, not in the cache: `set` and `use_nonce` see to them.
                StateChange::Setting { .. } | StateChange::Nonce { .. } => continue,
            };
            request.undo.push(Undo::State(self.cache.put(key, value, request.ticket)));
            request.staged.push(Staged::Other(Record::State(change).encode()));
        }
    }
}

fn name_change(kind: NameKind, plugin: Plugin, name: &str, web_token: Option<String>) -> StateChange {
    StateChange::Name { kind, plugin, name: name.to_owned(), web_token }
}

fn names(hearing: &Hearing) -> impl Iterator<Item = (NameKind, &str)> {
    [(NameKind::Customer, &hearing.customer_token), (NameKind::Sdk, &hearing.sdk_token)]
        .into_iter()
        .filter_map(|(kind, name)| name.as_deref().map(|name| (kind, name)))
}
