//! The checkpoint file: which segments there are, which of their events still wait, and from where the journal is to be
//! replayed. Written whole, synced, and put in place by rename; the one before is kept.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Position;
use super::dead_letters::DeadMark;
use super::segment;

const NAME: &str = "checkpoint";
const NAME_BEFORE: &str = "checkpoint.before";
/// Begins the file; the last byte is the version of the format.
const MAGIC: [u8; 4] = [b'H', b'5', b'C', 2];

/// The state of the data directory at one place of the journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Checkpoint {
    pub identity: [u8; 32],
    /// Everything before this is in the marks and in the queue's rows.
    pub position: Position,
    pub segments: Vec<SegmentMark>,
    /// The state log that belongs to it.
    pub state_log: u64,
    /// Its length: what follows is in the journal after the position too.
    pub state_len: u64,
    pub dead: DeadMark,
    /// The number of the queue's directory.
    pub queue: u64,
}

/// A segment at that place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct SegmentMark {
    pub number: u64,
    pub live: Live,
}

/// Which events of a segment wait, by their place when the segment was written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Live {
    /// Few: their places, each as the distance to the one before.
    Few(Vec<u32>),
    /// Many: a settled bit for each place, first place in the lowest bit.
    Many(Vec<u8>),
}

impl Live {
    /// Packs settled bits, 64 to a word, of `places` places.
    pub(super) fn pack(settled: &[u64], places: u32) -> Live {
        let is_settled = |place: u32| settled.get(place as usize / 64).is_none_or(|word| word >> (place % 64) & 1 == 1);
        let live = (0..places).filter(|place| !is_settled(*place));
        if live.clone().nth(places as usize / 64).is_some() {
            let bytes = settled.iter().flat_map(|word| word.to_le_bytes());
            let mut bits: Vec<u8> = bytes.take((places as usize).div_ceil(8)).collect();
            if let Some(last) = bits.last_mut().filter(|_| !places.is_multiple_of(8)) {
                *last |= 0xff << (places % 8);
            }
            return Live::Many(bits);
        }
        let mut last = 0;
        Live::Few(live.map(|place| place - std::mem::replace(&mut last, place)).collect())
    }

    /// One more than the highest place that may wait.
    pub(super) fn highest(&self) -> u64 {
        match self {
            Live::Few(distances) if distances.is_empty() => 0,
            Live::Few(distances) => distances.iter().map(|distance| u64::from(*distance)).sum::<u64>() + 1,
            Live::Many(bits) => {
                let last = bits.iter().rposition(|byte| *byte != 0xff);
                last.map_or(0, |last| {
                    let byte = bits.get(last).copied().unwrap_or(0xff);
                    last as u64 * 8 + u64::from(8 - (!byte).leading_zeros())
                })
            }
        }
    }

    /// Whether nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        match self {
            Live::Few(distances) => distances.is_empty(),
            Live::Many(_) => false,
        }
    }

    /// Says of each place whether it waits. Places beyond those packed do not.
    pub(super) fn unpack(&self) -> impl Fn(u64) -> bool + use<> {
        let mut bits = Vec::new();
        match self {
            Live::Many(packed) => bits.clone_from(packed),
            Live::Few(distances) => {
                let mut place = 0usize;
                for distance in distances {
                    place += *distance as usize;
                    if bits.len() <= place / 8 {
                        bits.resize(place / 8 + 1, 0xff);
                    }
                    if let Some(byte) = bits.get_mut(place / 8) {
                        *byte &= !(1 << (place % 8));
                    }
                }
            }
        }
        move |place| bits.get(place as usize / 8).is_some_and(|byte| byte >> (place % 8) & 1 == 0)
    }
}

impl Checkpoint {
    /// Puts it in place of the last one.
    pub(super) fn write(&self, dir: &Path) -> io::Result<()> {
        let body = postcard::to_stdvec(self).map_err(io::Error::other)?;
        let new = dir.join("checkpoint.new");
        let mut file = File::create(&new)?;
        file.write_all(&MAGIC)?;
        file.write_all(&crc32c::crc32c(&body).to_le_bytes())?;
        file.write_all(&body)?;
        file.sync_all()?;
        let path = dir.join(NAME);
        match std::fs::rename(&path, dir.join(NAME_BEFORE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        std::fs::rename(&new, &path)?;
        segment::sync_dir(dir)
    }

    /// The last one that reads back, and whether a later one was damaged.
    pub(super) fn read(dir: &Path) -> io::Result<(Option<Checkpoint>, bool)> {
        let mut is_damaged = false;
        for name in [NAME, NAME_BEFORE] {
            match std::fs::read(dir.join(name)) {
                Ok(bytes) => match decode(&bytes) {
                    Some(checkpoint) => return Ok((Some(checkpoint), is_damaged)),
                    None => is_damaged = true,
                },
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok((None, is_damaged))
    }
}

fn decode(bytes: &[u8]) -> Option<Checkpoint> {
    let rest = bytes.strip_prefix(&MAGIC)?;
    let (crc, body) = rest.split_at_checked(4)?;
    let crc = u32::from_le_bytes(crc.try_into().ok()?);
    (crc32c::crc32c(body) == crc).then(|| postcard::from_bytes(body).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Checkpoint {
        Checkpoint {
            identity: [4; 32],
            position: Position { segment: 3, offset: 99 },
            segments: vec![SegmentMark { number: 2, live: Live::Few(vec![7]) }],
            state_log: 1,
            state_len: 700,
            dead: DeadMark::default(),
            queue: 3,
        }
    }

    #[test]
    fn places_that_wait_read_back_packed_either_way() {
        for (count, step) in [(1_000u32, 1u32), (1_000, 3), (1_000, 100), (1_000, 999), (8, 9)] {
            let places: Vec<u32> = (0..count).filter(|place| place % step == step / 2).collect();
            let mut settled = vec![u64::MAX; count.div_ceil(64) as usize];
            places.iter().for_each(|place| settled[*place as usize / 64] &= !(1 << (place % 64)));
            let waits = Live::pack(&settled, count).unpack();
            assert_eq!(Live::pack(&settled, count).highest(), places.last().map_or(0, |last| u64::from(*last) + 1));
            for place in 0..count + 20 {
                assert_eq!(waits(u64::from(place)), places.contains(&place), "{count} {step} {place}");
            }
        }
    }

    /// Of format 2, frozen: a data directory written by any released version is read by every later one.
    #[test]
    fn a_checkpoint_is_written_as_in_its_first_version() {
        let dir = tempfile::tempdir().unwrap();
        sample().write(dir.path()).unwrap();
        let bytes = std::fs::read(dir.path().join(NAME)).unwrap();
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let frozen = concat!(
            "48354302f4c43a280404040404040404040404040404040404040404040404040404040404040404",
            "0363010200010701bc05000003"
        );
        assert_eq!(hex, frozen);
    }

    #[test]
    fn the_last_good_one_is_read_and_a_damaged_one_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Checkpoint::read(dir.path()).unwrap(), (None, false));
        let first = sample();
        let second = Checkpoint { state_log: 2, ..sample() };
        first.write(dir.path()).unwrap();
        second.write(dir.path()).unwrap();
        assert_eq!(Checkpoint::read(dir.path()).unwrap(), (Some(second), false));
        let path = dir.path().join(NAME);
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(Checkpoint::read(dir.path()).unwrap(), (Some(first), true));
    }
}
