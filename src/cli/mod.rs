//! Arguments, subcommands, exit codes: 0 done, 1 failed, 2 usage, 78 configuration.

mod calls;
mod check;
mod daemon;
mod demo;
mod http;
mod operate;
mod receiver;
mod show;
mod store;
mod table;
mod verify;

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};

use crate::app::StartError;
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
    #[arg(long, global = true, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Prints JSON, for machines, where a subcommand has an answer of the relay or of a stopped store.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Option<Call>,
}

#[derive(Debug, Subcommand)]
enum Call {
    #[command(flatten)]
    Operate(calls::Operate),
    /// Looks at the data directory of a relay that is stopped.
    #[command(subcommand)]
    Store(store::StoreCall),
    /// Prints a completion script for a shell.
    Completions {
        /// Which.
        shell: clap_complete::Shell,
    },
    /// Prints the man page, or writes one for each subcommand into a directory.
    Man {
        /// Where to.
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
    /// Checks the config file and prints the endpoints and the retry table that come of it.
    CheckConfig,
    /// Shows the relay at work: a relay on free ports and a throw-away directory, a receiver, a conversation.
    Demo,
    /// Says whether a push is signed rightly, or why not: for whoever builds a receiver. The body is read from standard
    /// input, byte for byte as it came.
    Verify(verify::Verify),
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
    let shared = Shared { config: arguments.config, data_dir: arguments.data_dir };
    let result = match arguments.command {
        None => read_config(&shared)
            .map_err(anyhow::Error::from)
            .and_then(|config| daemon::run(config, || read_config(&shared))),
        Some(Call::CheckConfig) => {
            read_config(&shared).map_err(anyhow::Error::from).and_then(|config| check::print(&config))
        }
        Some(Call::Operate(operate)) => Config::read_local(&shared.config)
            .map_err(anyhow::Error::from)
            .and_then(|local| operate.run(local, arguments.json)),
        Some(Call::Store(call)) => {
            read_config(&shared).map_err(anyhow::Error::from).and_then(|config| call.run(&config, arguments.json))
        }
        Some(Call::Completions { shell }) => {
            // It panics where it cannot write.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "h5push-relay", &mut script);
            io::stdout().write_all(&script).map_err(Into::into)
        }
        Some(Call::Man { dir }) => man(dir),
        Some(Call::Demo) => demo::run(),
        Some(Call::Verify(verify)) => verify.run(),
        Some(Call::Receiver { listen, secret, fail }) => receiver::run(listen, secret.as_deref(), fail),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("h5push-relay: {error:#}");
            let is_config =
                error.is::<ConfigError>() || matches!(error.downcast_ref::<StartError>(), Some(StartError::Exposed(_)));
            match is_config {
                true => ExitCode::from(EXIT_CONFIG),
                false => ExitCode::FAILURE,
            }
        }
    }
}

/// Where config and data are.
struct Shared {
    config: PathBuf,
    data_dir: Option<PathBuf>,
}

/// Administration commands.
const MAN_SECTION: &str = "8";

fn man(dir: Option<PathBuf>) -> anyhow::Result<()> {
    let mut command = Arguments::command().disable_help_subcommand(true);
    command.build();
    let Some(dir) = dir else {
        return Ok(clap_mangen::Man::new(command).section(MAN_SECTION).render(&mut io::stdout())?);
    };
    write_man_pages(command, &dir)
}

fn write_man_pages(command: clap::Command, dir: &Path) -> anyhow::Result<()> {
    for subcommand in command.get_subcommands().cloned() {
        write_man_pages(subcommand, dir)?;
    }
    clap_mangen::Man::new(command).section(MAN_SECTION).generate_to(dir)?;
    Ok(())
}

fn read_config(arguments: &Shared) -> Result<Config, ConfigError> {
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
