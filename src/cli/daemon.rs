//! The daemon: starts, says so to systemd, waits for signals, reloads, stops.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};

use crate::app::App;
use crate::config::Config;
use crate::log;

/// While a large store is opened, systemd is asked for so much more time, this often.
const STARTING: Duration = Duration::from_secs(10);
/// How long threads that hang are waited for at the end.
const LAST_LIMIT: Duration = Duration::from_secs(1);
/// Without a watchdog, how often systemd's status line is brought up to date.
const STATUS_EVERY: Duration = Duration::from_secs(20);

/// Runs until a signal. `read` reads the config anew at SIGHUP, with the arguments of this start.
pub(super) fn run(config: Config, read: impl Fn() -> Result<Config, crate::config::ConfigError>) -> anyhow::Result<()> {
    log::start(&config.log_level, config.log_format);
    let runtime = super::runtime()?;
    let ended = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hang_up = signal(SignalKind::hangup())?;
        let (local, metrics) = (config.local.listen.to_string(), config.metrics_listen);
        let app = started(App::start(config)).await?;
        let shown = app.local_address.map_or(local, |address| address.to_string());
        let metrics = app.metrics_address.unwrap_or(metrics);
        let open_api = app.open_api_address.map(|address| address.to_string());
        tracing::info!(version = env!("CARGO_PKG_VERSION"), local = shown, %metrics, open_api, "ready");
        notify(&[NotifyState::Ready, NotifyState::Status(&app.summary())]);
        // Often enough that one ping may be late.
        let every = sd_notify::watchdog_enabled().map_or(STATUS_EVERY, |limit| limit / 3);
        let mut tick = tokio::time::interval_at(tokio::time::Instant::now() + every, every);
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = hang_up.recv() => reload(&app, &read).await,
                _ = tick.tick() => {
                    // Not from a bare timer: the ping says that the relay's own task goes round.
                    if app.is_alive().await {
                        notify(&[NotifyState::Watchdog, NotifyState::Status(&app.summary())]);
                    } else {
                        tracing::error!("the relay's task does not go round");
                    }
                }
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
    });
    // A look-up of a name may hang for long: what is to be kept is kept by now.
    runtime.shutdown_timeout(LAST_LIMIT);
    ended
}

/// Asks systemd for more time while it takes.
async fn started<T>(start: impl Future<Output = T>) -> T {
    let mut start = std::pin::pin!(start);
    let more = u32::try_from((3 * STARTING).as_micros()).unwrap_or(u32::MAX);
    loop {
        tokio::select! {
            started = start.as_mut() => return started,
            () = tokio::time::sleep(STARTING) => {
                notify(&[NotifyState::ExtendTimeoutUsec(more), NotifyState::Status("opening the store")]);
            }
        }
    }
}

async fn reload(app: &App, read: &impl Fn() -> Result<Config, crate::config::ConfigError>) {
    let now = NotifyState::monotonic_usec_now();
    match now {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(_) => notify(&[NotifyState::Reloading]),
    }
    let status = match app.reload(read()).await {
        Ok(()) => app.summary(),
        Err(_) => "the last reload failed: running the config of before".to_owned(),
    };
    notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "systemd was not told");
    }
}
