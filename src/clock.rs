//! The only reader of the time and of chance.

use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Time since the first call, on the monotonic clock.
#[must_use]
pub fn monotonic() -> Duration {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(now).elapsed()
}

/// Microseconds of [`monotonic`], as the schedule counts.
#[must_use]
pub fn micros() -> u64 {
    u64::try_from(monotonic().as_micros()).unwrap_or(u64::MAX)
}

/// The wall clock, Unix milliseconds.
#[must_use]
pub fn wall_ms() -> u64 {
    u64::try_from(wall().as_millis()).unwrap_or(u64::MAX)
}

/// The wall clock since the epoch.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "the one place that may")]
pub fn wall() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// The monotonic clock, for deadlines.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "the one place that may")]
pub fn now() -> Instant {
    Instant::now()
}

/// A roll of the dice, uniform in 0..1.
#[must_use]
pub fn dice() -> f64 {
    fastrand::f64()
}

/// Unpredictable bytes, for secrets and ids.
#[must_use]
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let filled = rustls::crypto::aws_lc_rs::default_provider().secure_random.fill(&mut bytes);
    assert!(filled.is_ok(), "the system has no randomness");
    bytes
}

/// A number that nothing else has.
#[must_use]
pub fn random_id() -> u128 {
    fastrand::u128(..)
}
