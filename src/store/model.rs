//! The store against a plain model: random posts, deliveries, withdrawals, crashes and stops, small segments.

mod damaged;
mod ended;
mod names;
mod seen;

use std::collections::BTreeMap;

use tokio::sync::mpsc;

pub(super) use self::seen::{names, waiting};
use super::queue;
use super::*;
use crate::domain::customer::{Hearing, NameKind, Toggle};
use crate::domain::endpoint::Plugin;
use crate::domain::event::Event;
use crate::domain::keys::LaneKey;
use crate::domain::retry::{Backoff, Delays};
use crate::domain::schedule::{self, Moment, Schedule};
use crate::domain::verdict::Verdict;
use crate::metrics::Metrics;

/// Customers.
pub(super) const LANES: usize = 8;

pub(super) fn options(dir: &std::path::Path) -> Options {
    Options {
        is_relaying: true,
        dir: dir.to_owned(),
        segment_bytes: 24 << 10,
        queue_bytes_min: 64 << 10,
        free_min: 0,
        checkpoint_every: Duration::from_millis(20),
        rules: Rules {
            events_max: 100_000,
            dedupe_window_s: 3_600,
            dedupe_max: 1_000,
            require_h5push: true,
            forget_after_s: 1_000_000,
        },
        dead_keep_s: 1_000,
        dead_max: 0,
    }
}

/// Customers who were heard of long ago are forgotten by the wall clock.
pub(super) fn now_s() -> u64 {
    crate::clock::wall_ms() / 1_000
}

pub(super) fn empty_schedule() -> Schedule {
    let backoff =
        Backoff { initial: Duration::from_secs(1), multiplier: 2.0, max: Duration::from_secs(9), randomization: 0.0 };
    let mut schedule = Schedule::new(schedule::Rules {
        delays: Delays::new(&backoff),
        max_age_s: 1_000_000,
        max_attempts: 0,
        max_refusals: 5,
        breaker_failures: 1_000,
        max_in_flight: 1_000,
        events_per_push: 3,
    });
    let limits = crate::domain::endpoint::Limits { rate_per_second: 1e6, burst: 100_000, concurrency: 1_000 };
    schedule.put_endpoint(EndpointName::DEFAULT, limits, 0);
    schedule
}

/// A store, a relay played by hand, and what should be waiting.
pub(super) struct Play {
    rng: fastrand::Rng,
    runtime: tokio::runtime::Runtime,
    dir: PathBuf,
    /// Told of every step that somebody outside sees.
    tell: Box<dyn FnMut(Told<'_>)>,
    open: Option<(Store, Threads, mpsc::Receiver<Notice>)>,
    schedule: Schedule,
    heard: Position,
    now: u64,
    model: BTreeMap<usize, Vec<String>>,
    posted: u64,
    /// The customers' other names.
    names: BTreeMap<usize, String>,
    compactions: u32,
    removals: u32,
}

/// What somebody outside sees of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Told<'a> {
    /// It is acknowledged.
    Accepted(&'a str),
    /// It has been delivered or withdrawn; the store is not told yet.
    Ended(&'a str),
    /// The store has been told.
    Noted(&'a str),
    /// Its customer was switched off or forgotten, and that is acknowledged.
    Withdrawn(&'a str),
    /// A customer is to have this other name: `e` and a number, as all that is told.
    Naming(usize, &'a str),
    /// It is acknowledged.
    Named(usize, &'a str),
}

impl Play {
    pub(super) fn new(seed: u64, dir: PathBuf, tell: impl FnMut(Told<'_>) + 'static) -> Play {
        let mut play = Play {
            rng: fastrand::Rng::with_seed(seed),
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(),
            dir,
            tell: Box::new(tell),
            open: None,
            schedule: empty_schedule(),
            heard: Position::default(),
            now: 1,
            model: BTreeMap::new(),
            posted: 0,
            names: BTreeMap::new(),
            compactions: 0,
            removals: 0,
        };
        play.start();
        play
    }

    fn start(&mut self) {
        self.schedule = empty_schedule();
        let (tell, notices) = mpsc::channel(1_024);
        let metrics = Metrics::new(10).unwrap();
        let (store, threads) =
            Store::open(options(&self.dir), metrics.store.clone(), &mut self.schedule, |_, _| (), tell).unwrap();
        for what in ["journal", "torn_tail", "queue", "checkpoint", "dead_letters", "state_log"] {
            assert_eq!(metrics.store.damage.with_label_values(&[what]).get(), 0, "{what}");
        }
        self.heard = store.durable();
        assert_eq!(waiting(&self.schedule, &store), self.model, "what waits after the start");
        assert_eq!(store.waiting(), self.schedule.events());
        assert_eq!(names(&store), self.names, "the customers' other names after the start");
        self.open = Some((store, threads, notices));
    }

    fn store(&self) -> Store {
        self.open.as_ref().unwrap().0.clone()
    }

    pub(super) fn lane(store: &Store, lane: usize) -> LaneKey {
        store.hashing().lane(EndpointName::DEFAULT, Plugin::NONE, &format!("c{lane}"))
    }

    fn hear(&mut self) {
        let Some((store, _, notices)) = self.open.as_mut() else { return };
        while let Ok(notice) = notices.try_recv() {
            match notice {
                Notice::SegmentBegun { slot, segment } => self.schedule.backlog.open(slot, segment),
                Notice::Durable { items, end, answers } => {
                    for item in items {
                        let event = match item {
                            Item::Appended(event) => event,
                            // What the relay notes of it afterwards is lost in the crash that follows.
                            Item::Withdraw(customer) => {
                                for (_, lane) in store.hashing().lanes(customer.plugin, &customer.web_token) {
                                    self.schedule.withdraw(lane, u64::MAX, self.now);
                                }
                                customer.done.send(0).unwrap();
                                continue;
                            }
                        };
                        let backlog = &mut self.schedule.backlog;
                        let handle = backlog.append(event.slot, None, event.offset, event.second, event.len).unwrap();
                        self.schedule.appended(handle, event.lane, event.endpoint, self.now);
                    }
                    self.heard = end;
                    answers.send();
                }
                Notice::Snapshot(reply) => {
                    let marks = self.schedule.backlog.marks().collect();
                    reply.send(Snapshot { position: self.heard, marks }).ok();
                }
                Notice::SegmentRemoved(slot) => {
                    self.removals += 1;
                    assert_eq!(self.schedule.backlog.group(slot).map_or(0, |group| group.live()), 0);
                    self.schedule.backlog.close(slot);
                }
                Notice::SegmentCompacted(moved) => {
                    self.compactions += 1;
                    self.schedule.move_events(moved.old_slot, moved.new_slot, moved.segment, &moved.events);
                    moved.done.send(()).ok();
                }
            }
        }
    }

    fn post(&mut self) {
        let store = self.store();
        let lane = self.rng.usize(0..LANES);
        let count = self.rng.usize(1..6);
        let mut items = Vec::new();
        for _ in 0..count {
            let id = format!("e{}", self.posted);
            self.posted += 1;
            let content = "x".repeat(self.rng.usize(0..900));
            items.push((id.clone(), format!(
                r#"{{"web_token":"c{lane}","h5push":true,"event_id":"{id}","messages":[{{"im_sub_session_id":1,"x":"{content}"}}]}}"#
            )));
        }
        let events: Vec<Event<'_>> = items.iter().map(|(_, text)| Event::parse(text).unwrap()).collect();
        let posts: Vec<Post<'_>> = events
            .iter()
            .map(|event| {
                let key = event.key(&store.hashing()).unwrap();
                let lane = Self::lane(&store, lane);
                let record = encode_event(Accepted {
                    endpoint: EndpointName::DEFAULT,
                    plugin: Plugin::NONE,
                    lane,
                    key,
                    accepted_ms: now_s() * 1_000,
                    given_id: event.event_id.as_deref(),
                    web_token: &event.web_token,
                    count: event.messages.count,
                    messages: event.messages.text,
                });
                Post { event, key, endpoint: Some((EndpointName::DEFAULT, u64::MAX)), lane, record }
            })
            .collect();
        let posted = self.wait_for(store.post(posts, false, now_s() * 1_000)).unwrap();
        assert!(posted.iter().all(|posted| *posted == Posted::Queued));
        for (id, _) in &items {
            (self.tell)(Told::Accepted(id));
        }
        self.model.entry(lane).or_default().extend(items.iter().map(|(id, _)| id.clone()));
    }

    /// Plays the relay while a call waits.
    fn wait_for<T>(&mut self, call: impl Future<Output = T>) -> T {
        let mut call = Box::pin(call);
        loop {
            let step = async { tokio::time::timeout(Duration::from_millis(1), &mut call).await };
            if let Ok(answer) = self.runtime.block_on(step) {
                return answer;
            }
            self.hear();
        }
    }

    fn name(&mut self) {
        let store = self.store();
        let lane = self.rng.usize(0..LANES);
        let name = format!("e{}", self.posted);
        self.posted += 1;
        (self.tell)(Told::Naming(lane, &name));
        let hearing = Hearing { customer_token: Some(name.clone()), ..Hearing::default() };
        let customer = format!("c{lane}");
        self.wait_for(store.change_customer(Plugin::NONE, &customer, &hearing, false, now_s())).unwrap();
        (self.tell)(Told::Named(lane, &name));
        self.names.insert(lane, name);
    }

    fn deliver(&mut self) {
        self.now += 1_000_000;
        let store = self.store();
        let Some(start) = self.schedule.next(self.now) else { return };
        let key = self.schedule.lane_key(start.lane).unwrap();
        let lane = (0..LANES).find(|lane| Self::lane(&store, *lane) == key).unwrap();
        let taken = self.rng.usize(1..=start.events.len());
        let seqs = start.events[..taken].iter().map(|event| self.schedule.backlog.seq(*event)).collect();
        let moment = Moment { now: self.now, second: 1_000, dice: 0.5 };
        let verdict = if self.rng.bool() { Verdict::Delivered } else { Verdict::Failed { hold: None, halves: false } };
        let outcome = self.schedule.reported(start.lane, taken as u32, verdict, moment);
        if verdict == Verdict::Delivered {
            let retry_is_over = outcome.retry_is_over;
            let waiting = self.model.get_mut(&lane).unwrap();
            let ended: Vec<String> = waiting.drain(..taken).collect();
            if waiting.is_empty() {
                self.model.remove(&lane);
            }
            self.note_ended(&ended, Note::Settled { lane: key, ending: Ending::Delivered, retry_is_over, seqs });
            store.uncount(EndpointName::DEFAULT, taken as u64);
        } else if let Some(deferred) = outcome.deferred {
            let head = self.schedule.backlog.seq(deferred.head);
            store.note(vec![Note::Deferred { lane: key, head, retry: deferred.retry, due_ms: 1_000_000 }]);
        }
    }

    fn withdraw(&mut self) {
        let store = self.store();
        let lane = self.rng.usize(0..LANES);
        let key = Self::lane(&store, lane);
        let withdrawn = self.schedule.withdraw(key, u64::MAX, 0);
        let seqs: Vec<u64> = withdrawn.events.iter().map(|event| self.schedule.backlog.seq(*event)).collect();
        store.uncount(EndpointName::DEFAULT, seqs.len() as u64);
        let retry_is_over = withdrawn.had_retry;
        let ended = self.model.remove(&lane).unwrap_or_default();
        self.note_ended(&ended, Note::Settled { lane: key, ending: Ending::Withdrawn, retry_is_over, seqs });
    }

    fn note_ended(&mut self, ids: &[String], note: Note) {
        for id in ids {
            (self.tell)(Told::Ended(id));
        }
        self.store().note(vec![note]);
        for id in ids {
            (self.tell)(Told::Noted(id));
        }
    }

    /// Switches a customer off, or forgets it: a crash right after the answer brings nothing of theirs back.
    fn end_and_crash(&mut self) {
        let store = self.store();
        let lane = self.rng.usize(0..LANES);
        let customer = format!("c{lane}");
        let ended = self.model.remove(&lane).unwrap_or_default();
        for id in &ended {
            (self.tell)(Told::Ended(id));
        }
        if self.rng.bool() || self.names.contains_key(&lane) {
            self.switch(&store, &customer, Toggle::Off);
        } else {
            self.wait_for(store.forget(Some(Plugin::NONE), &customer, now_s())).unwrap();
        }
        for id in &ended {
            (self.tell)(Told::Withdrawn(id));
        }
        drop(store);
        self.restart(true);
        self.switch(&self.store(), &customer, Toggle::On);
    }

    fn switch(&mut self, store: &Store, customer: &str, toggle: Toggle) {
        let hearing = Hearing { toggle: Some(toggle), ..Hearing::default() };
        self.wait_for(store.change_customer(Plugin::NONE, customer, &hearing, false, now_s())).unwrap();
    }

    fn restart(&mut self, crashes: bool) {
        let (store, threads, mut notices) = self.open.take().unwrap();
        let ending = std::thread::spawn(move || if crashes { store.crash(threads) } else { store.end(threads) });
        // The relay answers until the end.
        while !ending.is_finished() {
            if let Ok(Notice::Snapshot(reply)) = notices.try_recv() {
                let marks = self.schedule.backlog.marks().collect();
                reply.send(Snapshot { position: self.heard, marks }).ok();
            }
            std::thread::yield_now();
        }
        ending.join().unwrap();
        drop(notices);
        self.start();
    }
}

impl Play {
    /// Does one of the things that happen, at random. Says whether it was a start.
    pub(super) fn step(&mut self) -> bool {
        let what = self.rng.u8(0..40);
        match what {
            0 => self.restart(false),
            22 => self.restart(true),
            21 => self.end_and_crash(),
            1 => self.withdraw(),
            18..=20 => self.name(),
            2..=16 => self.post(),
            17 => std::thread::sleep(Duration::from_millis(25)),
            _ => self.deliver(),
        }
        self.hear();
        matches!(what, 0 | 21 | 22)
    }
}

#[test]
fn the_store_agrees_with_a_model_over_crashes_stops_checkpoints_and_compactions() {
    let (mut compactions, mut removals, mut restarts, mut copies) = (0, 0, 0, 0);
    for seed in 0..12 {
        let dir = tempfile::tempdir().unwrap();
        let mut play = Play::new(seed, dir.path().to_owned(), |_| ());
        for _ in 0..400 {
            restarts += u32::from(play.step());
        }
        assert_eq!(waiting(&play.schedule, &play.store()), play.model);
        compactions += play.compactions;
        removals += play.removals;
        copies += queue::highest(dir.path());
    }
    println!("{restarts} restarts, {removals} segments removed, {compactions} compacted, {copies} copies of the queue");
    assert!(restarts > 20 && removals > 20 && compactions > 0 && copies > 0);
}
