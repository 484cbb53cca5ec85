//! An operator tests an address: one push beside the lanes, on a connection of its own.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::json;
use tokio::sync::oneshot;
use tokio::task::JoinError;

use super::Relay;
use super::delivery::{self, Connection, Push, Seen};
use super::target::Target;
use crate::clock;
use crate::domain::endpoint::EndpointName;
use crate::domain::verdict::Verdict;

/// What came of a test.
#[derive(Debug)]
pub enum Tested {
    /// There is no such endpoint.
    Unknown,
    /// The endpoint's rate forbids it for so long.
    NotBefore(Duration),
    /// The attempt was made: its result, the status where there was one, and how long it took.
    Made {
        /// As in metrics.
        result: &'static str,
        /// The HTTP status.
        status: Option<u16>,
        /// How long.
        took: Duration,
        /// What there is to say of a failure.
        detail: Option<String>,
    },
}

/// A test that was made, and who waits for what came of it.
pub(super) struct Trial {
    endpoint: EndpointName,
    target: Arc<Target>,
    seen: Option<Seen>,
    took: Duration,
    reply: oneshot::Sender<Tested>,
}

impl Relay {
    pub(super) fn test(&mut self, endpoint: EndpointName, reply: oneshot::Sender<Tested>) {
        let Some(target) = self.targets.get(&endpoint).cloned() else {
            reply.send(Tested::Unknown).ok();
            return;
        };
        if self.is_draining {
            // Unanswered: it is stopping.
            return;
        }
        if let Err(wait) = self.schedule.take_permit(endpoint, clock::micros()) {
            reply.send(Tested::NotBefore(wait)).ok();
            return;
        }
        let id = clock::random_id();
        let body = json!({
            "web_token": "h5push-relay-test",
            "messages": [{
                "type": "test",
                "message_id": format!("test_{id:032x}"),
                "data": { "content": "A test of h5push-relay: your address works." },
            }],
        });
        let push = Push { id: format!("msg_test_{id:032x}"), attempt: 1, body: Bytes::from(body.to_string()) };
        self.reap_later();
        let timeout = self.rules.timeout;
        let (logs_attempts, webhook_id) = (self.rules.logs_attempts, push.id.clone());
        self.trials.spawn(async move {
            let begun = clock::now();
            // One attempt: that a connection was closed while it was kept would say nothing of the address.
            let seen = delivery::attempt(&target, push, Connection::New, timeout, || true).await;
            let took = begun.elapsed();
            if let Some(Seen { report, .. }) = seen.as_ref().filter(|_| logs_attempts) {
                let (result, status, seconds) = (report.result().as_str(), report.status(), took.as_secs_f64());
                tracing::info!(%endpoint, webhook_id, events = "", attempt = 1, result, status, seconds, "attempt");
            }
            Trial { endpoint, target, seen, took, reply }
        });
    }

    /// Counts a test, and leaves the receiver alone if it asked for that, before it is answered.
    pub(super) fn take_trial(&mut self, tried: Result<Trial, JoinError>) {
        let Ok(Trial { endpoint, target, seen: Some(Seen { report, detail }), took, reply }) = tried else { return };
        let result = report.result();
        self.metrics_of(endpoint).attempt(result);
        self.metrics.push_seconds.observe(took.as_secs_f64());
        let wait = match report.verdict() {
            Verdict::Throttled(wait) => wait,
            Verdict::Failed { hold, .. } => hold,
            Verdict::Delivered
            | Verdict::Gone
            | Verdict::Refused
            | Verdict::Rejected
            | Verdict::Again
            | Verdict::Damaged
            | Verdict::Unread => None,
        };
        let is_its_own = self.targets.get(&endpoint).is_some_and(|now| now.endpoint.url == target.endpoint.url);
        if let Some(wait) = wait.filter(|wait| is_its_own && !wait.is_zero())
            && self.schedule.hold(endpoint, wait, clock::micros())
        {
            self.keep_hold(endpoint, wait);
        }
        reply.send(Tested::Made { result: result.as_str(), status: report.status(), took, detail }).ok();
    }
}
