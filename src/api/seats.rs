//! As many connections as there may be. When seats run short, connections that have been without a request for longest
//! make room; when all are busy, some close after the answer they are at, and what has not come of their bodies is not
//! waited for. So idle, dripping and flooding clients, however many, keep nobody out.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::clock;

/// One seat in so many is kept free for who comes next.
const SPARE_SHARE: usize = 8;
/// How long a connection that is to make room waits for a request that may be on its way.
pub(super) const GRACE: Duration = Duration::from_millis(15);
/// How long the rest of a request's body may take then.
const BODY_GRACE: Duration = Duration::from_millis(250);
/// How long those that are to make room may take, before others are asked.
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// The seats of one listener.
pub(super) struct Seats {
    free: Arc<Semaphore>,
    /// How many are to be free or on their way to be.
    spare: usize,
    /// How many have been asked to leave and are there still.
    leaving: AtomicUsize,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    next: u64,
    seats: HashMap<u64, Arc<Sitting>>,
}

pub(super) struct Sitting {
    /// Since when there is no request, microseconds of [`clock::micros`]; [`BUSY`] while there is one.
    idle_since: AtomicU64,
    is_wanted: AtomicBool,
    wanted: Notify,
    begun: Notify,
    hurried: Notify,
}

impl Sitting {
    /// Waits until somebody else has waited for this seat for a moment: for a body that does not come.
    pub(super) async fn hurried(&self) {
        self.hurried.notified().await;
        tokio::time::sleep(BODY_GRACE).await;
    }
}

const BUSY: u64 = u64::MAX;

impl Seats {
    /// `max` at once, at least one.
    pub(super) fn new(max: usize) -> Arc<Seats> {
        Arc::new(Seats {
            free: Arc::new(Semaphore::new(max)),
            spare: max.div_ceil(SPARE_SHARE),
            leaving: AtomicUsize::new(0),
            taken: Mutex::default(),
        })
    }

    /// Waits for a seat.
    pub(super) async fn take(self: &Arc<Seats>) -> Seat {
        let permit = loop {
            self.make_room();
            if let Ok(Ok(permit)) = timeout(ASK_AGAIN, Arc::clone(&self.free).acquire_owned()).await {
                break permit;
            }
            // Those that were asked take their time.
            self.leaving.store(0, Ordering::Relaxed);
        };
        let seat = Arc::new(Sitting {
            idle_since: AtomicU64::new(clock::micros()),
            is_wanted: AtomicBool::new(false),
            wanted: Notify::new(),
            begun: Notify::new(),
            hurried: Notify::new(),
        });
        let mut taken = self.taken();
        let number = taken.next;
        taken.next += 1;
        taken.seats.insert(number, Arc::clone(&seat));
        drop(taken);
        Seat { seats: Arc::clone(self), seat, number, _permit: permit }
    }

    fn make_room(&self) {
        let free = self.free.available_permits();
        let coming = free + self.leaving.load(Ordering::Relaxed);
        let Some(short) = self.spare.checked_sub(coming).filter(|short| *short > 0) else { return };
        let taken = self.taken();
        let stays = taken.seats.iter().filter(|(_, seat)| !seat.is_wanted.load(Ordering::Relaxed));
        let mut stayers: Vec<(u64, u64)> =
            stays.map(|(number, seat)| (seat.idle_since.load(Ordering::Relaxed), *number)).collect();
        let idle = stayers.iter().filter(|(since, _)| *since != BUSY).count();
        // When there is no seat at all many go, busy ones too, each after an answer: so all have their turn.
        let leavers = if free > 0 { idle.min(short) } else { stayers.len().div_ceil(2) };
        if leavers < stayers.len() {
            stayers.select_nth_unstable(leavers);
            stayers.truncate(leavers);
        }
        self.leaving.fetch_add(stayers.len(), Ordering::Relaxed);
        for seat in stayers.iter().filter_map(|(_, number)| taken.seats.get(number)) {
            seat.is_wanted.store(true, Ordering::Relaxed);
            seat.wanted.notify_one();
            seat.hurried.notify_one();
        }
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's seat.
pub(super) struct Seat {
    seats: Arc<Seats>,
    seat: Arc<Sitting>,
    number: u64,
    _permit: OwnedSemaphorePermit,
}

impl Seat {
    /// For whoever reads its request's body.
    pub(super) fn sitting(&self) -> Arc<Sitting> {
        Arc::clone(&self.seat)
    }

    /// A request is being served.
    pub(super) fn begin(&self) {
        self.seat.idle_since.store(BUSY, Ordering::Relaxed);
        if self.is_wanted() {
            self.seat.begun.notify_one();
        }
    }

    /// It is answered.
    pub(super) fn end(&self) {
        self.seat.idle_since.store(clock::micros(), Ordering::Relaxed);
    }

    /// Waits until another connection wants the seat.
    pub(super) async fn wanted(&self) {
        self.seat.wanted.notified().await;
    }

    pub(super) fn is_wanted(&self) -> bool {
        self.seat.is_wanted.load(Ordering::Relaxed)
    }

    /// Whether there is a request still to be answered, or comes within that grace. From here on this seat is one of
    /// those that are to be free.
    pub(super) async fn last_request(&self, grace: Duration) -> bool {
        if !self.seat.is_wanted.swap(true, Ordering::Relaxed) {
            self.seats.leaving.fetch_add(1, Ordering::Relaxed);
        }
        let is_busy = self.seat.idle_since.load(Ordering::Relaxed) == BUSY;
        is_busy || timeout(grace, self.seat.begun.notified()).await.is_ok()
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.seats.taken().seats.remove(&self.number);
        if self.is_wanted() {
            let left = |leaving: usize| Some(leaving.saturating_sub(1));
            // Never an error: there is always a next value.
            self.seats.leaving.fetch_update(Ordering::Relaxed, Ordering::Relaxed, left).ok();
        }
    }
}
