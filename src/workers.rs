//! Threads that each run one thing's tasks: callers do not wait for pushes, nor pushes for callers, and what belongs
//! together stays on one processor.

use std::io;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// Threads at most for what blocks (reads of the disk, look-ups of names), beside the worker's own.
const BLOCKING_MAX: usize = 64;

/// A thread with a runtime of its own, until it is dropped.
#[derive(Debug)]
pub struct Worker {
    handle: Handle,
    /// Dropped: the thread ends, and what it ran.
    _end: oneshot::Sender<()>,
}

impl Worker {
    /// Starts a thread of this name.
    ///
    /// # Errors
    /// The system gives no thread, or no descriptor.
    pub fn start(name: &str) -> io::Result<Worker> {
        let runtime = runtime()?;
        let handle = runtime.handle().clone();
        let (end, ended) = oneshot::channel();
        std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            // Nothing is ever sent: the sender is dropped.
            runtime.block_on(ended).ok();
            // What still reads the disk or looks up a name is not waited for.
            runtime.shutdown_background();
        })?;
        Ok(Worker { handle, _end: end })
    }

    /// Where to spawn its tasks.
    #[must_use]
    pub fn handle(&self) -> &Handle {
        &self.handle
    }
}

/// A runtime of one thread.
///
/// # Errors
/// The system gives no descriptor.
pub fn runtime() -> io::Result<tokio::runtime::Runtime> {
    Builder::new_current_thread().max_blocking_threads(BLOCKING_MAX).enable_all().build()
}
