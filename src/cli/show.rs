//! Answers of the relay, for people.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::time::Duration;

use serde_json::Value;
use serde_json::value::RawValue;

use super::table::{self, moment, span, state};
use crate::clock;

pub(super) fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value.get(name).and_then(Value::as_str).unwrap_or("")
}

/// The same, its texts as [`table::visible`] has them: names and ids come from anywhere.
pub(super) fn visible(value: &Value) -> Value {
    match value {
        Value::String(text) => Value::String(table::visible(text)),
        Value::Array(items) => items.iter().map(visible).collect(),
        Value::Object(fields) => fields.iter().map(|(name, value)| (name.clone(), visible(value))).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) => value.clone(),
    }
}

pub(super) fn number(value: &Value, name: &str) -> u64 {
    value.get(name).and_then(Value::as_u64).unwrap_or(0)
}

pub(super) fn real(value: &Value, name: &str) -> f64 {
    value.get(name).and_then(Value::as_f64).unwrap_or(0.0)
}

pub(super) fn items<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value.get(name).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

pub(super) fn show_status(status: &Value) -> io::Result<()> {
    let part = |name: &str| status.get(name).cloned().unwrap_or_default();
    let (outbox, disk, config) = (part("outbox"), part("disk"), part("config"));
    let size = |bytes: u64| match bytes >> 30 {
        0 => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
        _ => format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)),
    };
    let mut out = io::stdout();
    writeln!(out, "h5push-relay {}, up for {}", text(status, "version"), span(real(status, "uptime_seconds")))?;
    writeln!(
        out,
        "{} events wait, the oldest for {}; {} dead letters; {} free, events are refused below {}",
        number(&outbox, "events"),
        span(real(&outbox, "oldest_age_seconds")),
        number(status, "dead_letters"),
        size(number(&disk, "free_bytes")),
        size(number(&disk, "floor_bytes")),
    )?;
    if number(&disk, "free_bytes") < number(&disk, "floor_bytes") {
        writeln!(out, "Events are refused: the disk is nearly full.")?;
    }
    if !text(&config, "error").is_empty() {
        writeln!(out, "The last reload failed, and the config of before is in effect: {}", text(&config, "error"))?;
    }
    let needs_restart: Vec<&str> = items(&config, "needs_restart").iter().filter_map(Value::as_str).collect();
    if !needs_restart.is_empty() {
        writeln!(out, "Changed in the config, and in effect after a restart: {}", needs_restart.join(", "))?;
    }
    writeln!(out)?;
    let now = clock::wall();
    let row = |endpoint: &Value| {
        vec![
            text(endpoint, "name").to_owned(),
            state(if endpoint.get("configured") == Some(&Value::Bool(false)) {
                "removed"
            } else {
                text(endpoint, "state")
            }),
            number(endpoint, "events").to_string(),
            span(real(endpoint, "oldest_age_seconds")),
            number(endpoint, "in_flight").to_string(),
            number(endpoint, "dead_letters").to_string(),
            waits(endpoint, "waits_until", now),
            text(endpoint, "last_error").to_owned(),
        ]
    };
    let rows: Vec<Vec<String>> = items(status, "endpoints").iter().map(row).collect();
    if rows.is_empty() {
        return writeln!(out, "There is no endpoint yet: h5push-relay endpoints set default --url https://…");
    }
    table::print(&["endpoint", "state", "events", "oldest", "in flight", "dead", "waits for", "last error"], &rows)
}

pub(super) fn show_endpoints(list: &Value) -> io::Result<()> {
    let row = |endpoint: &Value| {
        let headers: Vec<&str> = items(endpoint, "headers").iter().filter_map(Value::as_str).collect();
        vec![
            text(endpoint, "name").to_owned(),
            if endpoint.get("url").is_some_and(Value::is_null) {
                "-".to_owned()
            } else {
                state(text(endpoint, "state"))
            },
            text(endpoint, "source").to_owned(),
            real(endpoint, "rate_per_second").to_string(),
            number(endpoint, "burst").to_string(),
            number(endpoint, "concurrency").to_string(),
            if endpoint.get("signed") == Some(&Value::Bool(true)) { "yes" } else { "no" }.to_owned(),
            headers.join(","),
            endpoint.get("url").and_then(Value::as_str).unwrap_or("no push").to_owned(),
        ]
    };
    let rows: Vec<Vec<String>> = items(list, "endpoints").iter().map(row).collect();
    table::print(&["name", "state", "source", "rate/s", "burst", "concurrency", "signed", "headers", "url"], &rows)
}

pub(super) fn show_lanes(list: &Value) -> io::Result<()> {
    let now = clock::wall();
    let row = |lane: &Value| {
        let next = match text(lane, "next_attempt_at") {
            _ if lane.get("in_flight") == Some(&Value::Bool(true)) => "in flight".to_owned(),
            "" if text(lane, "waits_for").is_empty() => "now".to_owned(),
            _ => waits(lane, "next_attempt_at", now),
        };
        vec![
            text(lane, "endpoint").to_owned(),
            text(lane, "web_token").to_owned(),
            number(lane, "events").to_string(),
            moment(text(lane, "accepted_at"), now),
            number(lane, "attempts").to_string(),
            next,
            text(lane, "last_error").to_owned(),
        ]
    };
    let rows: Vec<Vec<String>> = items(list, "lanes").iter().map(row).collect();
    table::print(&["endpoint", "customer", "events", "oldest", "attempts", "next", "last error"], &rows)?;
    show_next(list)
}

/// What is waited for, and until when.
fn waits(value: &Value, until: &str, now: Duration) -> String {
    let what = match text(value, "waits_for") {
        "resume" => return "resume (paused)".to_owned(),
        "receiver" => "receiver (429 or 503)",
        other => other,
    };
    match text(value, until) {
        "" => what.to_owned(),
        at => format!("{what}, {}", moment(at, now)),
    }
}

pub(super) fn show_letters(list: &Value) -> io::Result<()> {
    let now = clock::wall();
    let row = |letter: &Value| {
        vec![
            text(letter, "id").to_owned(),
            text(letter, "endpoint").to_owned(),
            text(letter, "web_token").to_owned(),
            text(letter, "reason").to_owned(),
            moment(text(letter, "buried_at"), now),
            number(letter, "attempts").to_string(),
            text(letter, "last_error").to_owned(),
        ]
    };
    let rows: Vec<Vec<String>> = items(list, "dead_letters").iter().map(row).collect();
    table::print(&["id", "endpoint", "customer", "reason", "given up", "attempts", "last error"], &rows)?;
    show_next(list)
}

pub(super) fn show_next(list: &Value) -> io::Result<()> {
    match text(list, "next") {
        "" => Ok(()),
        next => writeln!(io::stdout(), "{}", table::dim(&format!("There are more: --after {next}"))),
    }
}

/// One dead letter, its messages as they were posted.
pub(super) fn show_letter(text: &str) -> anyhow::Result<()> {
    let mut fields: BTreeMap<&str, &RawValue> = serde_json::from_str(text)?;
    let messages = fields.remove("messages");
    show_fields(&visible(&serde_json::to_value(fields)?))?;
    let mut out = io::stdout().lock();
    let Some(messages) = messages else { return Ok(()) };
    let messages: Vec<&RawValue> = serde_json::from_str(messages.get())?;
    writeln!(out, "messages")?;
    Ok(messages.iter().try_for_each(|message| {
        // Between what JSON is made of, lines and tabs are what they were.
        let lines =
            message.get().split('\n').map(|line| line.split('\t').map(table::visible).collect::<Vec<_>>().join("\t"));
        writeln!(out, "  {}", lines.collect::<Vec<_>>().join("\n"))
    })?)
}

/// One thing, a field a line.
pub(super) fn show_fields(value: &Value) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for (name, value) in value.as_object().into_iter().flatten() {
        if let Some(text) = value.as_str() {
            writeln!(out, "{name:<18} {text}")?;
        } else {
            writeln!(out, "{name:<18} {value}")?;
        }
    }
    Ok(())
}
