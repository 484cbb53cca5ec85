//! A wall clock that leaps.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::support::*;

/// A relay whose wall clock can be set.
struct Clock {
    dir: Arc<tempfile::TempDir>,
    ahead: PathBuf,
    library: PathBuf,
}

impl Clock {
    /// `None`, said aloud, where it cannot be compiled.
    fn new() -> Option<Clock> {
        let dir = Arc::new(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
        let library = preload("leaping_clock.c", dir.path())?;
        Some(Clock { ahead: dir.path().join("ahead"), dir, library })
    }

    fn start(&self, config: &str) -> Relay {
        let environment = [("LD_PRELOAD", self.library.clone()), ("CLOCK_AHEAD", self.ahead.clone())];
        Relay::spawn_with(Arc::clone(&self.dir), config, &environment).ready()
    }

    fn set(&self, seconds: i64) {
        let new = self.dir.path().join("new");
        std::fs::write(&new, seconds.to_string()).unwrap();
        std::fs::rename(new, &self.ahead).unwrap();
    }
}

const DAY: i64 = 24 * 60 * 60;

#[test]
fn a_leap_right_after_the_start_makes_nothing_old() {
    let Some(clock) = Clock::new() else { return };
    let receiver = Receiver::start();
    let relay = clock.start(&config(receiver.address, ""));
    relay.queue(&event("a", "m0"));
    clock.set(3 * DAY);
    wait_until("it is noticed", || relay.log().contains("the clock has leapt"));
    std::thread::sleep(Duration::from_millis(1_500));
    assert_eq!(relay.post(&event("a", "m0")).json()["outcome"], "duplicate");
}

#[test]
fn a_clock_that_is_set_back_over_a_restart_makes_no_wait_longer() {
    let Some(clock) = Clock::new() else { return };
    let receiver = Receiver::start();
    let text = config(receiver.address, "");
    receiver.answer(|_| Answer::With(429, "retry-after", "3"));
    let relay = clock.start(&text);
    relay.queue(&event("a", "m0"));
    wait_until("the receiver is left alone", || relay.endpoint("12")["waits_for"] == "receiver");
    // What is acknowledged comes behind what was noted of that.
    relay.queue(&event("b", "m0"));
    drop(relay.kill());
    clock.set(-2 * 60 * 60);
    receiver.answer_status(200);
    let begun = Instant::now();
    let relay = clock.start(&text);
    assert_eq!(relay.endpoint("12")["waits_for"], "receiver");
    receiver.wait_delivered(2);
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}
