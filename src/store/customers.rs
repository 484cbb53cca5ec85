//! What is remembered of customers, for callers.

use tokio::sync::oneshot;

use super::admission::Step;
use super::state::{self, StateKey};
use super::{Refusal, Store, lock};
use crate::domain::customer::{Customer, Hearing, NameKind};
use crate::domain::endpoint::Plugin;

impl Store {
    /// Records what is said of a customer. Where that sets the switch to off, what waits is withdrawn, and this returns when
    /// that is done and durable. `None`: there is no such customer and there must be.
    ///
    /// # Errors
    /// Nothing was stored; or it was, and what waited is not known to be withdrawn durably: a start withdraws it.
    pub async fn change_customer(
        &self,
        plugin: Plugin,
        web_token: &str,
        hearing: &Hearing,
        must_exist: bool,
        now_s: u64,
    ) -> Result<Option<Customer>, Refusal> {
        self.wait_for_rows().await?;
        let mut withdrawn = None;
        let decided = self.decided(|admission| {
            let (done, receiver) = oneshot::channel();
            withdrawn = Some(receiver);
            let withdraws = hearing.toggle.is_some().then_some(done);
            admission.change(plugin, web_token, hearing, must_exist, now_s, withdraws)
        })?;
        let Some((customer, ticket)) = decided else { return Ok(None) };
        self.wait(ticket).await?;
        if let Some(withdrawn) = withdrawn.filter(|_| hearing.toggle == Some(crate::domain::customer::Toggle::Off)) {
            withdrawn.await.map_err(|_| Refusal::DiskLow)?;
        }
        Ok(Some(customer))
    }

    /// Forgets a customer, at one plugin or at all. Answers at how many plugins it was known, and how many events were
    /// withdrawn; when this returns, that is durable.
    ///
    /// # Errors
    /// Nothing was forgotten; or it was, and what waited is not known to be withdrawn durably: a start withdraws it.
    pub async fn forget(&self, plugin: Option<Plugin>, web_token: &str, now_s: u64) -> Result<(u64, u64), Refusal> {
        self.wait_for_rows().await?;
        let plugins = match plugin {
            Some(plugin) => vec![plugin],
            None => self.plugins_of(web_token)?,
        };
        let mut known = 0;
        for plugin in &plugins {
            known += u64::from(self.customer(*plugin, web_token, now_s)?.is_some());
        }
        let mut receivers = Vec::new();
        let ticket = self.decided(|admission| {
            receivers.clear();
            admission.forget(&plugins, web_token, || {
                let (done, receiver) = oneshot::channel();
                receivers.push(receiver);
                done
            })
        })?;
        self.wait(ticket).await?;
        let mut withdrawn = 0;
        for receiver in receivers {
            withdrawn += receiver.await.map_err(|_| Refusal::DiskLow)?;
        }
        Ok((known, withdrawn))
    }

    /// The plugins at which a customer may be known.
    ///
    /// # Errors
    /// It cannot be read just now.
    pub fn plugins_of(&self, web_token: &str) -> Result<Vec<Plugin>, Refusal> {
        let mut plugins = lock(&self.inner.admission).cache.customers_of(web_token);
        let queue = self.inner.queue().ok_or(Refusal::DiskLow)?;
        let known = state::plugins_of(&queue, &self.hashing(), web_token);
        plugins.extend(known.map_err(|error| self.inner.queue_failed("read", &error))?);
        plugins.sort_unstable();
        plugins.dedup();
        Ok(plugins)
    }

    /// A customer as remembered.
    ///
    /// # Errors
    /// It cannot be read just now.
    pub fn customer(&self, plugin: Plugin, web_token: &str, now_s: u64) -> Result<Option<Customer>, Refusal> {
        let key = StateKey::Customer(plugin, web_token.to_owned());
        self.decided(|admission| {
            Ok(match admission.cache.get(&key) {
                None => Step::Missing(vec![(key.clone(), admission.cache.version(&key))]),
                Some(_) => Step::Done(admission.known(plugin, web_token, now_s)),
            })
        })
    }

    /// The customer that another name means.
    ///
    /// # Errors
    /// It cannot be read just now.
    pub fn customer_named(&self, kind: NameKind, plugin: Plugin, name: &str) -> Result<Option<String>, Refusal> {
        let key = StateKey::Name(kind, plugin, name.to_owned());
        self.decided(|admission| {
            Ok(match admission.cache.get(&key) {
                None => Step::Missing(vec![(key.clone(), admission.cache.version(&key))]),
                Some(state::StateValue::Name(web_token)) => Step::Done(web_token.clone()),
                Some(state::StateValue::Customer(_)) => Step::Done(None),
            })
        })
    }
}
