//! Logs to stderr: text on a terminal, journald's fields under systemd, JSON otherwise. A line for a change of state, not
//! for every event; never a message's content, a secret, or a URL with its query.

use std::io::{self, IsTerminal as _};

use tracing_subscriber::Registry;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Layer, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::config::LogFormat;

type Boxed = Box<dyn Layer<Registry> + Send + Sync>;

/// Starts logging, once.
pub fn start(level: &str, format: LogFormat) {
    // Checked when the config was read.
    let targets: Targets = level.parse().unwrap_or_default();
    // sled speaks of its own matters.
    let targets = targets.with_target("sled", tracing::Level::ERROR);
    let lines: Boxed = match chosen(format) {
        LogFormat::Journald => match tracing_journald::layer() {
            Ok(layer) => layer.boxed(),
            Err(_) => json(),
        },
        LogFormat::Json => json(),
        LogFormat::Text | LogFormat::Auto => {
            tracing_subscriber::fmt::layer().with_writer(io::stderr).with_ansi(io::stderr().is_terminal()).boxed()
        }
    };
    let started = tracing_subscriber::registry().with(lines.with_filter(targets)).try_init();
    if started.is_err() {
        tracing::debug!("logging was started before");
    }
}

fn json() -> Boxed {
    tracing_subscriber::fmt::layer().json().flatten_event(true).with_writer(io::stderr).boxed()
}

fn chosen(format: LogFormat) -> LogFormat {
    match format {
        LogFormat::Auto if is_journal() => LogFormat::Journald,
        LogFormat::Auto if io::stderr().is_terminal() => LogFormat::Text,
        LogFormat::Auto => LogFormat::Json,
        given @ (LogFormat::Text | LogFormat::Json | LogFormat::Journald) => given,
    }
}

/// Whether stderr is the journal's stream, as systemd says in `JOURNAL_STREAM` (device:inode).
fn is_journal() -> bool {
    let Ok(stat) = rustix::fs::fstat(io::stderr()) else { return false };
    std::env::var("JOURNAL_STREAM").is_ok_and(|stream| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}
