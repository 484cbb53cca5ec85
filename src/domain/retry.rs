//! How long a failed attempt waits: `min(initial·multiplier^(n−1), max)` × a factor in 1 ± randomization
//! (contract §5).

use std::time::Duration;

use backoff::backoff::Backoff as _;
use backoff::{ExponentialBackoff, SystemClock};

/// Backoff as configured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Backoff {
    /// Wait after the first failure.
    pub initial: Duration,
    /// Growth from one failure to the next, at least 1.
    pub multiplier: f64,
    /// Longest wait before the random factor.
    pub max: Duration,
    /// Half width of the random factor around 1, from 0 to 1.
    pub randomization: f64,
}

/// The delays, expanded once: the n-th failure waits the n-th delay, later ones the last.
#[derive(Clone, Debug, PartialEq)]
pub struct Delays {
    steps: Vec<Duration>,
    randomization: f64,
}

/// More steps than any sensible table has; a multiplier of 1 needs one only.
const STEPS_MAX: usize = 1_000;

impl Delays {
    /// Expands the configured backoff.
    #[must_use]
    pub fn new(backoff: &Backoff) -> Delays {
        let mut series = ExponentialBackoff {
            current_interval: backoff.initial.min(backoff.max),
            initial_interval: backoff.initial.min(backoff.max),
            randomization_factor: 0.0,
            multiplier: backoff.multiplier,
            max_interval: backoff.max,
            max_elapsed_time: None,
            // A clock is read and dice are rolled here too; without a time limit and with a factor of 0 neither matters.
            clock: SystemClock::default(),
            ..ExponentialBackoff::default()
        };
        let mut steps: Vec<Duration> = Vec::new();
        while let Some(delay) = series.next_backoff().map(|delay| delay.min(backoff.max)) {
            if steps.last() == Some(&delay) || steps.len() == STEPS_MAX {
                break;
            }
            steps.push(delay);
        }
        Delays { steps, randomization: backoff.randomization }
    }

    /// The wait after the `failures`-th failure (from 1). `dice` is uniform in 0..1.
    #[must_use]
    pub fn delay(&self, failures: u32, dice: f64) -> Duration {
        let step = (failures.max(1) as usize - 1).min(self.steps.len().saturating_sub(1));
        let factor = 1.0 + self.randomization * (2.0 * dice.clamp(0.0, 1.0) - 1.0);
        self.steps.get(step).copied().unwrap_or_default().mul_f64(factor.max(0.0))
    }

    /// The table without chance, for people.
    #[must_use]
    pub fn steps(&self) -> &[Duration] {
        &self.steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn defaults() -> Backoff {
        Backoff { initial: Duration::from_secs(1), multiplier: 2.0, max: Duration::from_secs(300), randomization: 0.5 }
    }

    #[test]
    fn delays_follow_the_contracts_formula() {
        let delays = Delays::new(&defaults());
        for n in 1..40u32 {
            let expected = 2f64.powi(n as i32 - 1).min(300.0);
            let delay = delays.delay(n, 0.5).as_secs_f64();
            assert!((delay - expected).abs() < 1e-6, "{n}: {delay} not {expected}");
            assert!((delays.delay(n, 0.0).as_secs_f64() - expected * 0.5).abs() < 1e-6);
            assert!((delays.delay(n, 1.0).as_secs_f64() - expected * 1.5).abs() < 1e-6);
        }
        assert_eq!(delays.steps().len(), 10);
        assert_eq!(delays.delay(u32::MAX, 1.0), Duration::from_secs(450));
    }

    #[test]
    fn odd_settings_give_a_table_all_the_same() {
        let flat = Delays::new(&Backoff { multiplier: 1.0, randomization: 0.0, ..defaults() });
        assert_eq!(flat.steps(), [Duration::from_secs(1)]);
        let capped = Delays::new(&Backoff { initial: Duration::from_secs(900), ..defaults() });
        assert_eq!(capped.steps(), [Duration::from_secs(300)]);
        assert_eq!(flat.delay(0, 0.3), Duration::from_secs(1));
    }
}
