//! `store`: the data directory of a relay that is stopped.

use std::io::{self, Write as _};

use anyhow::{Context as _, bail};
use clap::Subcommand;
use serde_json::{Value, json};

use super::operate::print_json;
use super::table;
use crate::app;
use crate::config::Config;
use crate::store;

#[derive(Debug, Subcommand)]
pub(super) enum StoreCall {
    /// Reads every record of journal, state log and dead letters, and says what is damaged. Changes nothing.
    Verify,
    /// Says what waits, by endpoint. Recovers the store as a start does.
    Stats,
    /// Prints what waits as NDJSON, each customer's events in order. Recovers the store as a start does.
    Export,
}

impl StoreCall {
    pub(super) fn run(&self, config: &Config, json: bool) -> anyhow::Result<()> {
        let dir = &config.data_dir;
        let Some(owner) = store::owner(dir).with_context(|| dir.display().to_string())? else {
            bail!("{}: no relay has stored anything here (data_dir of the config, --data-dir)", dir.display());
        };
        if !matches!(self, StoreCall::Verify) && owner != rustix::process::geteuid().as_raw() {
            // What it writes would be ours, and the relay could not open it.
            bail!("{}: belongs to user {owner}: do this as that user (sudo -u '#{owner}' …)", dir.display());
        }
        match self {
            StoreCall::Verify => verify(config, json),
            StoreCall::Stats => stats(config, json),
            StoreCall::Export => export(config),
        }
    }
}

fn verify(config: &Config, json: bool) -> anyhow::Result<()> {
    let files = store::verify(&config.data_dir)?;
    let damaged: usize = files.iter().map(|file| file.damaged.len()).sum();
    if json {
        let shown = |file: &store::VerifiedFile| {
            json!({ "file": file.path.display().to_string(), "records": file.records, "bytes": file.bytes,
                    "damaged_at": file.damaged, "torn_at": file.torn })
        };
        let files: Vec<Value> = files.iter().map(shown).collect();
        print_json(&json!({ "files": files, "damaged": damaged }))?;
    } else {
        let row = |file: &store::VerifiedFile| {
            let state = match (file.damaged.first(), file.torn) {
                (Some(at), _) => format!("DAMAGED in {} places, first at byte {at}", file.damaged.len()),
                (None, Some(at)) => format!("ends at byte {at}, behind which nothing is known to have been synced"),
                (None, None) => "whole".to_owned(),
            };
            vec![file.path.display().to_string(), file.records.to_string(), file.bytes.to_string(), state]
        };
        table::print(&["file", "records", "bytes", "state"], &files.iter().map(row).collect::<Vec<_>>())?;
    }
    if damaged > 0 {
        bail!("{damaged} damaged places: what they held is lost, the rest is delivered when the relay is started");
    }
    Ok(())
}

fn stats(config: &Config, json: bool) -> anyhow::Result<()> {
    let stopped = app::open_stopped(config)?;
    let views: Vec<_> = stopped.schedule.endpoints(0).filter(|view| view.events > 0).collect();
    let letters = stopped.store.dead_letters();
    if json {
        let endpoints: Vec<Value> =
            views.iter().map(|view| json!({ "name": view.name.to_string(), "events": view.events })).collect();
        let dead: Vec<Value> =
            letters.iter().map(|(name, count)| json!({ "endpoint": name.to_string(), "count": count })).collect();
        let bytes = stopped.store.bytes();
        let lanes = stopped.schedule.lanes();
        print_json(&json!({ "bytes": bytes, "lanes": lanes, "endpoints": endpoints, "dead_letters": dead }))?;
    } else {
        let row = |name: String, events: u64| {
            let dead = letters.iter().find(|(other, _)| other.to_string() == name).map_or(0, |(_, count)| *count);
            vec![name, events.to_string(), dead.to_string()]
        };
        let mut rows: Vec<Vec<String>> = views.iter().map(|view| row(view.name.to_string(), view.events)).collect();
        let others = letters.iter().filter(|(name, _)| !views.iter().any(|view| view.name == *name));
        rows.extend(others.map(|(name, _)| row(name.to_string(), 0)));
        table::print(&["endpoint", "events", "dead letters"], &rows)?;
        writeln!(io::stdout(), "{} customers wait; {} bytes on disk", stopped.schedule.lanes(), stopped.store.bytes())?;
    }
    stopped.close();
    Ok(())
}

fn export(config: &Config) -> anyhow::Result<()> {
    let stopped = app::open_stopped(config)?;
    let mut out = io::BufWriter::new(io::stdout().lock());
    let mut unreadable = 0;
    for lane in stopped.schedule.lanes_from(0) {
        for handle in stopped.schedule.events_of(lane.key) {
            let reader = stopped.store.reader(handle.slot());
            let read = reader.map(|reader| reader.read(stopped.schedule.backlog.offset(handle))).transpose()?.flatten();
            let Some(event) = read.as_ref().and_then(store::Stored::event) else {
                unreadable += 1;
                continue;
            };
            writeln!(
                out,
                "{{\"endpoint\":{},\"event_id\":{},\"web_token\":{},\"im_web_plugin_id\":{},\"accepted_ms\":{},\"messages\":[{}]}}",
                json!(event.endpoint.to_string()),
                json!(event.event_id()),
                json!(event.web_token),
                event.plugin.id(),
                event.accepted_ms,
                event.messages
            )?;
        }
    }
    out.flush()?;
    drop(out);
    stopped.close();
    if unreadable > 0 {
        bail!("{unreadable} events cannot be read back");
    }
    Ok(())
}
