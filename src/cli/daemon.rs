//! The daemon: starts, says so to systemd, waits for a signal, stops.

use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};

use crate::app::App;
use crate::config::Config;
use crate::log;

pub(super) fn run(config: Config) -> anyhow::Result<()> {
    log::start(&config.log_level, config.log_format);
    super::runtime()?.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        // A hang-up must not end a daemon.
        let mut hang_up = signal(SignalKind::hangup())?;
        let (local, metrics) = (config.local.listen.to_string(), config.metrics_listen);
        let app = App::start(config).await?;
        let shown = app.local_address.map_or(local, |address| address.to_string());
        let metrics = app.metrics_address.unwrap_or(metrics);
        tracing::info!(version = env!("CARGO_PKG_VERSION"), local = shown, %metrics, "ready");
        notify(&[NotifyState::Ready, NotifyState::Status("accepting events")]);
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = hang_up.recv() => tracing::warn!("SIGHUP: this version reads its config at start only"),
            }
        }
        notify(&[NotifyState::Stopping, NotifyState::Status("stopping")]);
        tracing::info!("stopping");
        tokio::select! {
            () = app.stop() => {}
            // Whoever asks twice means it. Nothing that was accepted is lost.
            _ = terminate.recv() => tracing::warn!("stopping at once"),
            _ = interrupt.recv() => tracing::warn!("stopping at once"),
        }
        Ok(())
    })
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "systemd was not told");
    }
}
