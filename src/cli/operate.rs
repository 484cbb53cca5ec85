//! The subcommands that speak with a running relay over `[local]` (contract §6).

use std::io::{self, IsTerminal as _, Write as _};
use std::time::Duration;

use anyhow::{Context as _, bail};
use hyper::{Method, StatusCode};
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::calls::{Customers, DeadLetters, Endpoints, Filter, Lanes, Operate, Toggle};
use super::http::Client;
use super::show::{
    items, number, show_endpoints, show_fields, show_lanes, show_letter, show_letters, show_status, text, visible,
};
use super::table;
use crate::config::Local;

/// Replays and burials of many events take their time.
const PATIENCE: Duration = Duration::from_secs(120);
/// Letters replayed by one call, so that progress can be shown.
const REPLAYED_AT_ONCE: usize = 500;

/// Speaks with the relay, and prints.
struct Relay {
    client: Client,
    json: bool,
}

impl Operate {
    pub(super) fn run(self, local: Local, json: bool) -> anyhow::Result<()> {
        let client = Client { listen: local.listen, token: local.token, patience: PATIENCE };
        let relay = Relay { client, json };
        super::runtime()?.block_on(relay.carry_out(self))
    }
}

impl Relay {
    async fn carry_out(&self, call: Operate) -> anyhow::Result<()> {
        match call {
            Operate::Status => {
                let status = self.get("/v1/status").await?;
                self.show(&status, show_status)
            }
            Operate::Endpoints(call) => self.endpoints(call).await,
            Operate::Lanes(Lanes::List(filter)) => {
                let lanes = self.get(&filter.path("/v1/lanes")).await?;
                self.show(&lanes, show_lanes)
            }
            Operate::Lanes(Lanes::Bury { endpoint, web_token, first_only }) => {
                let body = json!({ "endpoint": endpoint, "web_token": web_token, "first_only": first_only });
                let done = self.call(Method::POST, "/v1/lanes/bury", &body).await?;
                self.say(&done, format!("{} events became dead letters.", number(&done, "buried")))
            }
            Operate::DeadLetters(call) => self.dead_letters(call).await,
            Operate::Toggle(call) => self.toggle(call).await,
            Operate::Customers(call) => self.customers(call).await,
            Operate::Event { event_id, plugin } => {
                let plugin = plugin.map_or(String::new(), |plugin| format!("?im_web_plugin_id={plugin}"));
                let fate = self.get(&format!("/v1/events/{}{plugin}", escaped(&event_id))).await?;
                self.show(&fate, show_fields)
            }
        }
    }

    async fn endpoints(&self, call: Endpoints) -> anyhow::Result<()> {
        let path = |name: &str, action: &str| format!("/v1/endpoints/{}{action}", escaped(name));
        let (name, action) = match call {
            Endpoints::List => {
                let list = self.get("/v1/endpoints").await?;
                return self.show(&list, show_endpoints);
            }
            Endpoints::Set(set) => {
                let shown = self.call(Method::PUT, &path(&set.name, ""), &set.body()?).await?;
                return self.show(&shown, show_fields);
            }
            Endpoints::Delete { name } => {
                let done = self.call(Method::DELETE, &path(&name, ""), &Value::Null).await?;
                let line = format!("The saved address of {name} is deleted; what the config file says of it counts.");
                return self.say(&done, line);
            }
            Endpoints::Pause { name } => (name, "pause"),
            Endpoints::Resume { name } => (name, "resume"),
            Endpoints::Retry { name } => (name, "retry"),
            Endpoints::Test { name } => (name, "test"),
        };
        let done = self.call(Method::POST, &path(&name, &format!("/{action}")), &Value::Null).await?;
        if action == "test" {
            self.show(&done, show_fields)?;
            if text(&done, "result") != "ok" {
                bail!("the test of {name} failed");
            }
            return Ok(());
        }
        self.say(&done, format!("{name} is {}.", text(&done, "state")))
    }

    async fn dead_letters(&self, call: DeadLetters) -> anyhow::Result<()> {
        match call {
            DeadLetters::List(filter) => {
                let letters = self.get(&filter.path("/v1/dead-letters")).await?;
                self.show(&letters, show_letters)
            }
            DeadLetters::Show { id } => {
                let path = format!("/v1/dead-letters/{}", escaped(&id));
                let letter = self.answer(Method::GET, &path, String::new()).await?;
                // Its messages are shown as they were posted.
                if self.json { Ok(writeln!(io::stdout(), "{letter}")?) } else { show_letter(&letter) }
            }
            DeadLetters::Purge(selection) => {
                let done = self.call(Method::DELETE, "/v1/dead-letters", &selection.body()).await?;
                self.say(&done, format!("{} dead letters are gone for good.", number(&done, "purged")))
            }
            DeadLetters::Replay(selection) => {
                let done = match selection.ids.is_empty() {
                    true => self.replay_all(selection.endpoint.as_deref()).await?,
                    false => self.call(Method::POST, "/v1/dead-letters/replay", &selection.body()).await?,
                };
                let (replayed, skipped) = (number(&done, "replayed"), number(&done, "skipped"));
                let why = match skipped {
                    0 => "",
                    _ => ": not found, their customer is switched off, or no endpoint takes them",
                };
                self.say(&done, format!("{replayed} dead letters are back in the outbox; {skipped} stay{why}."))
            }
        }
    }

    /// Replays what there is now, some at a time, with a line of progress on a terminal.
    async fn replay_all(&self, endpoint: Option<&str>) -> anyhow::Result<Value> {
        let (mut replayed, mut skipped) = (0, 0);
        let status = self.get("/v1/status").await?;
        let is_meant = |found: &&Value| endpoint.is_none_or(|endpoint| text(found, "name") == endpoint);
        let total: u64 =
            items(&status, "endpoints").iter().filter(is_meant).map(|found| number(found, "dead_letters")).sum();
        let limit = REPLAYED_AT_ONCE as u32;
        let mut filter = Filter { endpoint: endpoint.map(str::to_owned), web_token: None, limit, after: None };
        let mut left = total;
        while left > 0 {
            let page = self.get(&filter.path("/v1/dead-letters")).await?;
            let found = items(&page, "dead_letters").iter().map(|letter| text(letter, "id"));
            let ids: Vec<&str> = found.take(left as usize).collect();
            left = left.saturating_sub(ids.len() as u64);
            let done = self.call(Method::POST, "/v1/dead-letters/replay", &json!({ "ids": ids })).await?;
            replayed += number(&done, "replayed");
            skipped += number(&done, "skipped");
            // A page of letters that do not read back is empty, and not the last.
            filter.after = page.get("next").and_then(Value::as_str).map(str::to_owned);
            if filter.after.is_none() {
                break;
            }
            if io::stderr().is_terminal() {
                eprint!("\r{} of {total} …", replayed + skipped);
            }
        }
        if io::stderr().is_terminal() && total > 0 {
            eprintln!();
        }
        Ok(json!({ "replayed": replayed, "skipped": skipped }))
    }

    async fn toggle(&self, call: Toggle) -> anyhow::Result<()> {
        let (who, to) = match call {
            Toggle::Get(who) => (who, None),
            Toggle::Set { who, to } if to == "auto" => {
                // It must be there: a call would remember a new one.
                self.get(&customer_path(&who.web_token, Some(who.plugin))).await?;
                let body = json!({ "web_token": who.web_token, "im_web_plugin_id": who.plugin, "toggle": to });
                let customer = self.call(Method::PUT, "/v1/customers", &body).await?;
                return self.show(&customer, show_fields);
            }
            Toggle::Set { who, to } => (who, Some(to == "on")),
        };
        let mut body = json!({ "web_token": who.web_token, "im_web_plugin_id": who.plugin });
        if let (Some(to), Some(body)) = (to, body.as_object_mut()) {
            body.insert("h5push".to_owned(), Value::Bool(to));
        }
        let answer = self.call(Method::POST, "/open_api_v1/im/h5push", &body).await?;
        if number(&answer, "code") != 1_000 {
            bail!("{}", text(&answer, "message"));
        }
        if body.get("h5push").is_some() && answer.get("status_code").and_then(Value::as_u64) == Some(3) {
            bail!("there is no such customer for that plugin: nothing was stored");
        }
        let meaning = match answer.get("status_code").and_then(Value::as_u64) {
            Some(1) => "The next offline message would be pushed.",
            Some(0) => "The next offline message would not be pushed.",
            _ => "There is no such customer for that plugin.",
        };
        self.say(&answer, format!("{} {meaning}", text(&answer, "status")))
    }

    async fn customers(&self, call: Customers) -> anyhow::Result<()> {
        match call {
            Customers::Show { web_token, plugin } => {
                let customer = self.get(&customer_path(&web_token, plugin)).await?;
                self.show(&customer, show_fields)
            }
            Customers::Forget { web_token, plugin } => {
                let done = self.call(Method::DELETE, &customer_path(&web_token, plugin), &Value::Null).await?;
                let (withdrawn, letters) = (number(&done, "withdrawn"), number(&done, "dead_letters"));
                self.say(&done, format!("Forgotten, with {withdrawn} waiting events and {letters} dead letters."))
            }
        }
    }

    async fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.call(Method::GET, path, &Value::Null).await
    }

    async fn call(&self, method: Method, path: &str, body: &Value) -> anyhow::Result<Value> {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        Ok(serde_json::from_str(&self.answer(method, path, body).await?)?)
    }

    /// What is answered, as it was written.
    async fn answer(&self, method: Method, path: &str, body: String) -> anyhow::Result<String> {
        let (status, text_of_it) = self.client.call(method, path, "application/json", body).await?;
        // By its grammar: messages are shown as they were posted, whatever of JSON is in them.
        let text_of_it = String::from_utf8(text_of_it.into()).ok();
        let text_of_it = text_of_it.filter(|text| serde_json::from_str::<&RawValue>(text).is_ok());
        let text_of_it = text_of_it.context("the answer is no JSON: is this the relay?")?;
        if status == StatusCode::UNAUTHORIZED {
            bail!(
                "the relay takes no such token: give its local.token_file, or local.token, in the config that --config names"
            );
        }
        if !status.is_success() {
            let answer: Value = serde_json::from_str(&text_of_it)?;
            let error = answer.get("error").unwrap_or(&answer);
            bail!("{} ({status})", text(error, "message"));
        }
        Ok(text_of_it)
    }

    fn show(&self, answer: &Value, people: impl FnOnce(&Value) -> io::Result<()>) -> anyhow::Result<()> {
        if self.json { Ok(print_json(answer)?) } else { Ok(people(&visible(answer))?) }
    }

    fn say(&self, answer: &Value, line: String) -> anyhow::Result<()> {
        self.show(answer, |_| writeln!(io::stdout(), "{}", table::visible(&line)))
    }
}

fn customer_path(web_token: &str, plugin: Option<u64>) -> String {
    let plugin = plugin.map_or(String::new(), |plugin| format!("&im_web_plugin_id={plugin}"));
    format!("/v1/customers?web_token={}{plugin}", escaped(web_token))
}

fn escaped(text: &str) -> String {
    percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
}

pub(super) fn print_json(answer: &Value) -> io::Result<()> {
    writeln!(io::stdout(), "{answer:#}")
}
