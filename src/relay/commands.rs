//! What the rest of the program asks of the relay: views, and what an operator does.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::oneshot;

use super::target::Network;
use super::{Relay, Rules, Tested};
use crate::clock;
use crate::config::{Endpoints, UrlRule};
use crate::domain::endpoint::{EndpointName, Plugin};
use crate::domain::keys::LaneKey;
use crate::domain::schedule::{self, EndpointView, LaneId, LaneView, Pauses, Waits};
use crate::store::Reader;

/// What the rest of the program asks. Whoever asked may have gone when it is answered.
#[derive(Debug)]
pub enum Command {
    /// How everything stands.
    View(oneshot::Sender<View>),
    /// How many events of a customer wait.
    Waiting {
        /// The customer's plugin.
        plugin: Plugin,
        /// The customer.
        web_token: String,
        /// Answered with the number.
        reply: oneshot::Sender<u64>,
    },
    /// Some of the lanes in which something waits.
    Lanes {
        /// Only of this endpoint.
        endpoint: Option<EndpointName>,
        /// Only these.
        keys: Option<Vec<LaneKey>>,
        /// After this one.
        after: Option<LaneId>,
        /// Most of them.
        most: usize,
        /// Answered with them.
        reply: oneshot::Sender<Vec<LaneShown>>,
    },
    /// Give up what waits in lanes.
    Bury {
        /// All lanes of this endpoint …
        endpoint: EndpointName,
        /// … or only these.
        keys: Option<Vec<LaneKey>>,
        /// Only the first event of each.
        first_only: bool,
        /// Answered with how many events, when that is done; `None`: not all of it can be stored just now. The rest is done
        /// when it can be, unless the relay has ended by then.
        reply: oneshot::Sender<Option<u64>>,
    },
    /// An endpoint is paused, or goes on.
    Pause {
        /// Which.
        endpoint: EndpointName,
        /// When it was, and whether it is.
        pauses: Pauses,
        /// Answered.
        reply: oneshot::Sender<()>,
    },
    /// All lanes of an endpoint are due now.
    RetryNow(EndpointName, oneshot::Sender<()>),
    /// One push at once, to see what comes of it.
    Test(EndpointName, oneshot::Sender<Tested>),
    /// From now on there are these endpoints and rules; answered when that is so.
    Configure(Box<Configure>),
    /// Whether the relay's task goes round.
    Ping(oneshot::Sender<()>),
    /// Start nothing more; answered when nothing is in flight.
    Drain(oneshot::Sender<()>),
    /// Gives up the attempts in flight, after `Drain`; answered when what came of them is noted.
    GiveUp(oneshot::Sender<()>),
}

/// What the relay is to go by from now on.
#[derive(Debug)]
pub struct Configure {
    /// All endpoints.
    pub endpoints: Arc<Endpoints>,
    /// What may be connected to.
    pub rule: Arc<UrlRule>,
    /// With certificates read anew, and other rules: after a reload.
    pub reloaded: Option<(Network, Rules, schedule::Rules)>,
    /// Answered.
    pub reply: oneshot::Sender<()>,
}

/// How everything stands.
#[derive(Debug)]
pub struct View {
    /// Every endpoint that is configured or has events.
    pub endpoints: Vec<EndpointView>,
    /// What those of them wait for that may begin nothing just now.
    pub waits: HashMap<EndpointName, Waits>,
    /// What was seen of attempts lately.
    pub seen: AttemptsSeen,
    /// Bytes of records that wait, about.
    pub outbox_bytes: u64,
}

/// What was seen of attempts lately.
#[derive(Clone, Debug, Default)]
pub struct AttemptsSeen {
    /// What the last attempt of an endpoint failed with; nothing after a success.
    pub last_errors: HashMap<EndpointName, Arc<str>>,
    /// What an attempt takes, seconds: a mean that forgets.
    pub attempt_seconds: HashMap<EndpointName, f64>,
}

impl AttemptsSeen {
    /// Counts the time of an attempt in.
    pub(super) fn took(&mut self, endpoint: EndpointName, seconds: f64) {
        const SHARE: f64 = 0.1;
        let mean = self.attempt_seconds.entry(endpoint).or_insert(seconds);
        *mean += SHARE * (seconds - *mean);
    }

    /// Forgets an endpoint that is gone, or what another receiver did in its place.
    pub(super) fn forget(&mut self, endpoint: EndpointName) {
        self.last_errors.remove(&endpoint);
        self.attempt_seconds.remove(&endpoint);
    }
}

/// A lane, with where its first event is.
#[derive(Debug)]
pub struct LaneShown {
    /// How it stands.
    pub lane: LaneView,
    /// Its first event's segment and offset.
    pub head: (Option<Reader>, u32),
    /// What it waits for; `None`: it is due.
    pub waits: Option<Waits>,
    /// What its last attempt failed with.
    pub last_error: Option<Arc<str>>,
}

impl Relay {
    pub(super) fn answer(&mut self, command: Command) {
        match command {
            Command::View(reply) => drop(reply.send(self.view())),
            Command::Waiting { plugin, web_token, reply } => {
                let hashing = self.store.hashing();
                let lanes = hashing.lanes(plugin, &web_token);
                let waiting = lanes.map(|(_, lane)| u64::from(self.schedule.waiting(lane))).sum();
                reply.send(waiting).ok();
            }
            Command::Lanes { endpoint, keys, after, most, reply } => {
                reply.send(self.lanes(endpoint, keys, after, most)).ok();
            }
            Command::Bury { endpoint, keys, first_only, reply } => self.bury_lanes(endpoint, keys, first_only, reply),
            Command::Pause { endpoint, pauses, reply } => {
                self.schedule.set_pauses(endpoint, pauses, clock::micros());
                reply.send(()).ok();
            }
            Command::RetryNow(endpoint, reply) => {
                self.schedule.retry_now(endpoint, clock::micros());
                self.drop_hold(endpoint);
                reply.send(()).ok();
            }
            Command::Ping(reply) => drop(reply.send(())),
            Command::Test(endpoint, reply) => self.test(endpoint, reply),
            Command::Configure(configure) => {
                let Configure { endpoints, rule, reloaded, reply } = *configure;
                let is_reload = reloaded.is_some();
                if let Some((network, rules, of_schedule)) = reloaded {
                    self.network = network.with_names_of(&self.network);
                    self.rules = Arc::new(rules);
                    self.schedule.set_rules(of_schedule);
                }
                self.configure(&endpoints, &rule, is_reload);
                reply.send(()).ok();
            }
            Command::Drain(reply) => {
                self.is_draining = true;
                self.drain = Some(reply);
            }
            Command::GiveUp(reply) => {
                self.stages.values().for_each(|stage| stage.give_up());
                self.trials.abort_all();
                self.drain = Some(reply);
            }
        }
    }

    fn view(&mut self) -> View {
        let now = clock::micros();
        let is_shown = |view: &EndpointView| self.targets.contains_key(&view.name) || view.events > 0;
        let views: Vec<EndpointView> = self.schedule.endpoints(now).filter(is_shown).collect();
        for view in &views {
            let before = self.rate_limited.insert(view.name, view.rate_limited).unwrap_or(0);
            self.metrics_of(view.name).rate_limited(view.rate_limited.saturating_sub(before));
        }
        let waits = |view: &EndpointView| Some((view.name, self.schedule.endpoint_waits(view.name, now)?));
        let waits = views.iter().filter_map(waits).collect();
        let seen = self.seen.clone();
        View { endpoints: views, waits, seen, outbox_bytes: self.schedule.backlog.live_bytes() }
    }

    fn lanes(
        &self,
        endpoint: Option<EndpointName>,
        keys: Option<Vec<LaneKey>>,
        after: Option<LaneId>,
        most: usize,
    ) -> Vec<LaneShown> {
        let now = clock::micros();
        let first = after.map_or(0, |after| after.saturating_add(1));
        let is_asked = |lane: &LaneView| {
            endpoint.is_none_or(|endpoint| endpoint == lane.endpoint)
                && keys.as_ref().is_none_or(|keys| keys.contains(&lane.key))
        };
        let shown = |lane: LaneView| LaneShown {
            head: (self.store.reader(lane.head.slot()), self.schedule.backlog.offset(lane.head)),
            waits: self.schedule.lane_waits(&lane, now),
            last_error: self.lane_errors.get(&lane.id).cloned(),
            lane,
        };
        self.schedule.lanes_from(first).filter(is_asked).take(most).map(shown).collect()
    }
}
