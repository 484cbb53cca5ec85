//! `check-config`: what the config comes to.

use std::io::{self, Write as _};

use crate::config::Config;
use crate::domain::endpoint::EndpointName;
use crate::domain::retry::Delays;

pub(super) fn print(config: &Config) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "data_dir  {}", config.data_dir.display())?;
    writeln!(out, "local     {}", config.local.listen)?;
    writeln!(out, "metrics   {}", config.metrics_listen)?;
    writeln!(out)?;
    if config.endpoints.keys().all(|name| *name == EndpointName::SURVEY) {
        writeln!(
            out,
            "No push address in this file: unless calls have saved one, every event will be answered `suppressed`, \
             `no_push_address`."
        )?;
    }
    if !config.endpoints.is_empty() {
        writeln!(out, "{:<20} {:>8} {:>6} {:>12} {:>7}  url", "endpoint", "rate/s", "burst", "concurrency", "signed")?;
    }
    for endpoint in config.endpoints.values() {
        writeln!(
            out,
            "{:<20} {:>8} {:>6} {:>12} {:>7}  {}",
            endpoint.name.to_string(),
            endpoint.limits.rate_per_second,
            endpoint.limits.burst,
            endpoint.limits.concurrency,
            if endpoint.signing.is_some() { "yes" } else { "no" },
            endpoint.url.shown(),
        )?;
    }
    let delays = Delays::new(&config.backoff);
    let spread = config.backoff.randomization;
    writeln!(out)?;
    writeln!(out, "A failed push is tried again after (each wait times {:.2} to {:.2}):", 1.0 - spread, 1.0 + spread)?;
    let steps: Vec<String> =
        delays.steps().iter().map(|delay| humantime::format_duration(*delay).to_string()).collect();
    writeln!(out, "  {}, and so on", steps.join(", "))?;
    writeln!(out, "until it is {} old.", humantime::format_duration(config.max_age))?;
    if config.max_attempts > 0 {
        writeln!(out, "It is given up after {} failed attempts.", config.max_attempts)?;
    }
    for warning in &config.warnings {
        writeln!(out, "warning: {warning}")?;
    }
    Ok(())
}
