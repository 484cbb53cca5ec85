//! What the process may hold open.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors that attempts do not get: files of the store, listeners, requests, host look-ups.
const KEPT_BACK: u64 = 512;

/// Attempts that there is always room for.
const ROOM_MIN: u32 = 16;

/// Raises the soft limit of file descriptors to the hard one, and says how many attempts may be in flight: as many as
/// are asked for, fewer where `connections` of callers and the rest leave less room.
#[must_use]
pub fn max_in_flight(asked: u32, connections: u32) -> u32 {
    let limit = getrlimit(Resource::Nofile);
    let wanted = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let now = match setrlimit(Resource::Nofile, wanted) {
        Ok(()) => limit.maximum,
        Err(_) => limit.current,
    };
    let Some(descriptors) = now else { return asked };
    // Each attempt may leave an idle connection beside it.
    let room = descriptors.saturating_sub(KEPT_BACK + u64::from(connections)) / 2;
    let fits = asked.min(u32::try_from(room).unwrap_or(u32::MAX).max(ROOM_MIN));
    if fits < asked {
        tracing::warn!(asked, fits, descriptors, "push.max_in_flight is lowered to fit the file descriptors");
    }
    fits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_as_are_asked_for_are_never_made_more() {
        for asked in [1, 4, 15, 16, 100] {
            assert_eq!(max_in_flight(asked, 10), asked);
        }
        assert_eq!(max_in_flight(u32::MAX, u32::MAX), ROOM_MIN);
    }
}
