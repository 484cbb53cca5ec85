//! How letters are named.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A letter's name: its file and its place there. Later letters have greater names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LetterId {
    pub(super) file: u64,
    pub(super) place: u32,
}

impl LetterId {
    /// Before every letter.
    pub const FIRST: LetterId = LetterId { file: 0, place: 0 };

    /// The first name after this one.
    pub(in crate::store) fn next(self) -> LetterId {
        match self.place.checked_add(1) {
            Some(place) => LetterId { place, ..self },
            None => LetterId { file: self.file.saturating_add(1), place: 0 },
        }
    }
}

impl fmt::Display for LetterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.file, self.place)
    }
}

/// The text is no name of a letter.
#[derive(Debug, thiserror::Error)]
#[error("a dead letter is named like 3-17")]
pub struct BadLetterId;

impl FromStr for LetterId {
    type Err = BadLetterId;

    fn from_str(text: &str) -> Result<LetterId, BadLetterId> {
        let (file, place) = text.split_once('-').ok_or(BadLetterId)?;
        let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        if !is_number(file) || !is_number(place) {
            return Err(BadLetterId);
        }
        Ok(LetterId { file: file.parse().map_err(|_| BadLetterId)?, place: place.parse().map_err(|_| BadLetterId)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back_as_they_are_shown() {
        let id = LetterId { file: 3, place: 17 };
        assert_eq!(id.to_string().parse::<LetterId>().unwrap(), id);
        for text in ["", "3", "3-", "-1", "3-17-1", "a-b", "3-+1"] {
            assert!(text.parse::<LetterId>().is_err(), "{text}");
        }
    }
}
