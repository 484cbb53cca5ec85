//! The command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    h5push_relay::cli::run()
}
