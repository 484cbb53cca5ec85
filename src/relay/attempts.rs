//! The tasks that make attempts. Each makes one after the other: beginning and ending one for each attempt took a
//! twentieth of the CPU of an event.

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::attempt::{Done, Job};

/// Tasks that are kept while there is nothing for them to do, some 3 KB each.
const IDLE_MAX: usize = 64;

/// The attempts under way, and the tasks that make them, which end with it.
#[derive(Debug)]
pub(super) struct Attempts {
    under_way: usize,
    tasks: JoinSet<()>,
    idle: Vec<Idle>,
    report: mpsc::UnboundedSender<(Done, Idle)>,
    reports: mpsc::UnboundedReceiver<(Done, Idle)>,
}

/// A task that waits for its next attempt; it ends when this is dropped.
type Idle = oneshot::Sender<Job>;

impl Attempts {
    pub(super) fn new() -> Attempts {
        #[expect(clippy::disallowed_methods, reason = "no more reports than attempts in flight")]
        let (report, reports) = mpsc::unbounded_channel();
        Attempts { under_way: 0, tasks: JoinSet::new(), idle: Vec::new(), report, reports }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.under_way == 0
    }

    pub(super) fn start(&mut self, job: Job) {
        self.under_way += 1;
        let job = match self.idle.pop() {
            None => Some(job),
            // Never an error: a task ends only when it is given up here.
            Some(idle) => idle.send(job).err(),
        };
        if let Some(job) = job {
            // One that has ended keeps its memory until it is joined, and a drain ends and begins thousands a second.
            self.reap();
            self.tasks.spawn(work(job, self.report.clone()));
        }
    }

    /// What came of an attempt; waits for one to end.
    pub(super) async fn next(&mut self) -> Option<Done> {
        let ended = self.reports.recv().await?;
        Some(self.take(ended))
    }

    /// What came of an attempt that has ended, if there is one.
    pub(super) fn try_next(&mut self) -> Option<Done> {
        let ended = self.reports.try_recv().ok()?;
        Some(self.take(ended))
    }

    /// Gives back the memory of tasks that have ended.
    pub(super) fn reap(&mut self) {
        while self.tasks.try_join_next().is_some() {}
    }

    fn take(&mut self, (done, idle): (Done, Idle)) -> Done {
        self.under_way -= 1;
        if self.idle.len() < IDLE_MAX {
            self.idle.push(idle);
        }
        done
    }
}

async fn work(mut job: Job, report: mpsc::UnboundedSender<(Done, Idle)>) {
    loop {
        let done = job.run().await;
        let (idle, next) = oneshot::channel();
        if report.send((done, idle)).is_err() {
            return;
        }
        match next.await {
            Ok(next) => job = next,
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;
    use std::time::Duration;

    use tokio::sync::Semaphore;

    use super::*;
    use crate::config::Config;
    use crate::domain::keys::HashKey;
    use crate::domain::push::PushBounds;
    use crate::relay::attempt::Stage;
    use crate::relay::{Network, Rules};

    /// A drain over many endpoints begins more at once than are kept, again and again.
    #[tokio::test]
    async fn tasks_that_have_ended_are_not_heaped_up() {
        let config = Config::parse("[endpoints.12]\nurl = \"http://127.0.0.1:9/\"", Path::new("test.toml")).unwrap();
        let endpoint = config.endpoints.values().next().unwrap().clone();
        let name = endpoint.name;
        let target = Arc::new(Network::new(&[], 1).unwrap().target(endpoint, &Arc::new(config.url_rule)));
        let bounds = PushBounds { messages_max: 1, bytes_max: 1 };
        let rules = Arc::new(Rules { timeout: Duration::ZERO, bounds, logs_attempts: false });
        let room = Arc::new(Semaphore::new(1));
        let mut attempts = Attempts::new();
        for _ in 0..10 {
            for lane in 0..4 * IDLE_MAX as u32 {
                attempts.start(Job {
                    lane,
                    key: None,
                    endpoint: name,
                    events: Vec::new(),
                    is_fixed: false,
                    attempt: 1,
                    target: Arc::clone(&target),
                    is_on_new: false,
                    stage: Arc::new(Stage::new(name)),
                    hashing: HashKey([0; 16]),
                    rules: Arc::clone(&rules),
                    bodies: Arc::clone(&room),
                    cold_reads: Arc::clone(&room),
                });
            }
            while !attempts.is_empty() {
                attempts.next().await.unwrap();
            }
        }
        assert_eq!(attempts.idle.len(), IDLE_MAX);
        assert!(attempts.tasks.len() < 8 * IDLE_MAX, "{} tasks", attempts.tasks.len());
    }
}
