//! Logs to stderr: text on a terminal, journald's fields under systemd, JSON otherwise. A line for a change of state, not
//! for every event; never a message's content, a secret, or a URL with its query.

use std::io::{self, IsTerminal as _};
use std::sync::OnceLock;

use tracing_subscriber::Registry;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Layer, SubscriberExt as _};
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::config::LogFormat;

type Boxed = Box<dyn Layer<Registry> + Send + Sync>;

static LEVEL: OnceLock<reload::Handle<Targets, Registry>> = OnceLock::new();

/// Changes the level of a running log.
pub fn set_level(level: &str) {
    if let Some(handle) = LEVEL.get()
        && let Err(error) = handle.reload(targets(level))
    {
        tracing::warn!(%error, "the log level stays as it was");
    }
}

fn targets(level: &str) -> Targets {
    // Checked when the config was read. sled speaks of its own matters.
    level.parse::<Targets>().unwrap_or_default().with_target("sled", tracing::Level::ERROR)
}

/// Starts logging, once.
pub fn start(level: &str, format: LogFormat) {
    let (filter, handle) = reload::Layer::new(targets(level));
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
    match tracing_subscriber::registry().with(lines.with_filter(filter)).try_init() {
        Ok(()) => drop(LEVEL.set(handle)),
        Err(_) => tracing::debug!("logging was started before"),
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
