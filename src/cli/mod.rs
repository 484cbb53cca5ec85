//! Arguments, subcommands, exit codes: 0 done, 1 failed, 2 usage, 78 configuration.

mod check;
mod daemon;
mod demo;
mod http;
mod receiver;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::{Config, ConfigError};

/// The configuration is wrong: starting again cannot cure that (`EX_CONFIG` of sysexits.h).
const EXIT_CONFIG: u8 = 78;

/// Relays IM offline messages from localhost to H5 push addresses: durably, in order, and never waiting on someone
/// else's broken server. Without a subcommand it runs the daemon.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Arguments {
    /// The config file.
    #[arg(long, global = true, value_name = "FILE", default_value = "/etc/h5push-relay/config.toml")]
    config: PathBuf,
    /// Where the data is, instead of the config's data_dir.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Call>,
}

#[derive(Debug, Subcommand)]
enum Call {
    /// Checks the config file and prints the endpoints and the retry table that come of it.
    CheckConfig,
    /// Shows the relay at work: a relay on free ports and a throw-away directory, a receiver, a conversation.
    Demo,
    /// Receives pushes and prints them: for trying things out.
    Receiver {
        /// Where to listen.
        #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9000")]
        listen: SocketAddr,
        /// Checks signatures with this secret (whsec_…).
        #[arg(long, value_name = "SECRET")]
        secret: Option<String>,
        /// Answers with this status instead of 200.
        #[arg(long, value_name = "STATUS", value_parser = clap::value_parser!(u16).range(200..600))]
        fail: Option<u16>,
    },
}

/// Runs what the arguments say.
#[must_use]
pub fn run() -> ExitCode {
    let arguments = Arguments::parse();
    std::panic::set_hook(Box::new(|panic| {
        // sled's own threads, and calls into sled, are caught where they are made.
        let is_sled = std::thread::current().name().is_some_and(|name| name.starts_with("sled"));
        if is_sled || crate::store::is_guarded() {
            return;
        }
        tracing::error!(%panic, "a mistake in the program: ending, so that it is started again");
        eprintln!("{panic}");
        std::process::abort();
    }));
    let result = match arguments.command {
        None => read_config(&arguments)
            .map_err(anyhow::Error::from)
            .and_then(|config| daemon::run(config, || read_config(&arguments))),
        Some(Call::CheckConfig) => {
            read_config(&arguments).map_err(anyhow::Error::from).and_then(|config| check::print(&config))
        }
        Some(Call::Demo) => demo::run(),
        Some(Call::Receiver { listen, secret, fail }) => receiver::run(listen, secret.as_deref(), fail),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("h5push-relay: {error:#}");
            match error.is::<ConfigError>() {
                true => ExitCode::from(EXIT_CONFIG),
                false => ExitCode::FAILURE,
            }
        }
    }
}

fn read_config(arguments: &Arguments) -> Result<Config, ConfigError> {
    let mut config = Config::read(&arguments.config)?;
    if let Some(dir) = &arguments.data_dir {
        config.data_dir.clone_from(dir);
    }
    Ok(config)
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    let workers = std::thread::available_parallelism().map_or(2, std::num::NonZero::get).clamp(2, 4);
    Ok(tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .max_blocking_threads(64)
        .enable_all()
        .build()?)
}
