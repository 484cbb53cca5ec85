//! Where the events' records begin in their segment: 4 bytes each while it is written, about 2 once it is complete.

/// Offsets of one base: as many as fit 64 KiB where a record has up to 4 KiB.
const BLOCK: usize = 16;

/// Ascending offsets, by place.
#[derive(Debug)]
pub(super) enum Offsets {
    Wide(Vec<u32>),
    /// The first offset of each block, and how far behind it each offset is.
    Narrow {
        bases: Vec<u32>,
        behind: Vec<u16>,
    },
}

impl Default for Offsets {
    fn default() -> Self {
        Offsets::Wide(Vec::new())
    }
}

impl Offsets {
    /// Adds the next one.
    pub(super) fn push(&mut self, offset: u32) {
        if let Offsets::Narrow { .. } = self {
            let places = (0..).map_while(|place| self.get(place));
            *self = Offsets::Wide(places.collect());
        }
        if let Offsets::Wide(offsets) = self {
            offsets.push(offset);
        }
    }

    /// The offset at a place; `None` when there is none.
    pub(super) fn get(&self, place: usize) -> Option<u32> {
        match self {
            Offsets::Wide(offsets) => offsets.get(place).copied(),
            Offsets::Narrow { bases, behind } => Some(bases.get(place / BLOCK)? + u32::from(*behind.get(place)?)),
        }
    }

    /// Takes as little room as these offsets can do with, now that they are all there. Where a block spans 64 KiB or
    /// more they stay as they are.
    pub(super) fn seal(&mut self) {
        let Offsets::Wide(offsets) = self else { return };
        let firsts = offsets.chunks(BLOCK).filter_map(<[u32]>::first);
        let behind: Option<Vec<u16>> = offsets
            .chunks(BLOCK)
            .flat_map(|block| block.iter().map(|offset| u16::try_from(offset.checked_sub(*block.first()?)?).ok()))
            .collect();
        match behind {
            Some(mut behind) => {
                behind.shrink_to_fit();
                *self = Offsets::Narrow { bases: firsts.copied().collect(), behind };
            }
            None => offsets.shrink_to_fit(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sealed_offsets_are_the_same_and_more_can_follow() {
        for widest in [10, 4_095, 4_400, 5_000, 1 << 20] {
            let mut rng = fastrand::Rng::with_seed(u64::from(widest));
            for len in [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 1_000] {
                let mut at = 32;
                let step = |_| {
                    at += rng.u32(1..=widest);
                    at
                };
                let plain: Vec<u32> = (0..len).map(step).collect();
                let mut offsets = Offsets::default();
                plain.iter().for_each(|offset| offsets.push(*offset));
                offsets.seal();
                let read = |offsets: &Offsets| (0..).map_while(|place| offsets.get(place)).collect::<Vec<u32>>();
                assert_eq!(read(&offsets), plain);
                if widest <= 4_095 {
                    assert!(matches!(offsets, Offsets::Narrow { .. }), "{len} steps of up to {widest}");
                }
                offsets.push(u32::MAX);
                assert_eq!(read(&offsets), [plain, vec![u32::MAX]].concat());
            }
        }
    }
}
