//! Names of plugins and endpoints, and an endpoint's limits.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A web plugin (`im_web_plugin_id`). Absent and 0 are the same, everywhere (contract §1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Plugin(u64);

impl Plugin {
    /// Largest id that is accepted: what a signed 64-bit integer can hold.
    pub const MAX: u64 = i64::MAX as u64;

    /// No plugin.
    pub const NONE: Plugin = Plugin(0);

    /// The plugin of that id; `None` beyond [`Plugin::MAX`].
    #[must_use]
    pub fn new(id: u64) -> Option<Plugin> {
        (id <= Plugin::MAX).then_some(Plugin(id))
    }

    /// The plugin that a parameter names: decimal digits and nothing else.
    #[must_use]
    pub fn parse(text: &str) -> Option<Plugin> {
        let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse().ok().filter(|_| is_number).and_then(Plugin::new)
    }

    /// The id, 0 for none.
    #[must_use]
    pub fn id(self) -> u64 {
        self.0
    }

    /// The id when there is one, as a push carries it.
    #[must_use]
    pub fn given(self) -> Option<u64> {
        (self.0 != 0).then_some(self.0)
    }
}

/// An endpoint's name: a plugin id, `default`, or `survey`. Stored as one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct EndpointName(u64);

impl EndpointName {
    /// Takes the events of every plugin without an entry of its own.
    pub const DEFAULT: EndpointName = EndpointName(0);

    /// The IM server's own address for ratings (`im_server.survey_url`); never one for pushes.
    pub const SURVEY: EndpointName = EndpointName(u64::MAX);

    /// The endpoint of one plugin; the plugin "none" has only the default.
    #[must_use]
    pub fn of(plugin: Plugin) -> EndpointName {
        EndpointName(plugin.0)
    }

    /// Which endpoints may take a plugin's events, the first one that there is: its own, then the default.
    pub fn that_take(plugin: Plugin) -> impl Iterator<Item = EndpointName> {
        let own = Some(EndpointName::of(plugin)).filter(|own| *own != EndpointName::DEFAULT);
        own.into_iter().chain([EndpointName::DEFAULT])
    }

    /// Reads a name of any endpoint there may be, `survey` included.
    ///
    /// # Errors
    /// It is none.
    pub fn any(text: &str) -> Result<EndpointName, BadEndpointName> {
        if text == "survey" { Ok(EndpointName::SURVEY) } else { text.parse() }
    }

    /// As it stands in stored records.
    #[must_use]
    pub fn number(self) -> u64 {
        self.0
    }

    /// From a stored record.
    #[must_use]
    pub fn from_number(number: u64) -> EndpointName {
        EndpointName(number)
    }
}

impl fmt::Display for EndpointName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("default"),
            u64::MAX => f.write_str("survey"),
            id => write!(f, "{id}"),
        }
    }
}

/// Why a text is no endpoint name.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("an endpoint is named `default` or by a plugin id from 1 to {max}, not `{given}`", max = Plugin::MAX)]
pub struct BadEndpointName {
    given: String,
}

impl FromStr for EndpointName {
    type Err = BadEndpointName;

    fn from_str(text: &str) -> Result<EndpointName, BadEndpointName> {
        let bad = || BadEndpointName { given: text.chars().take(40).collect() };
        if text == "default" {
            return Ok(EndpointName::DEFAULT);
        }
        let digits = text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0');
        let id: u64 = text.parse().ok().filter(|_| digits).ok_or_else(bad)?;
        Plugin::new(id).map(EndpointName::of).ok_or_else(bad)
    }
}

/// Longest entry of an endpoint that calls have set, bytes as stored.
pub const ENTRY_BYTES_MAX: usize = 3_500;

/// What an endpoint's owner allows (contract §5).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Attempts a second, above 0.
    pub rate_per_second: f64,
    /// Attempts that may begin at once beyond the rate, at least 1.
    pub burst: u32,
    /// Attempts in flight, at least 1.
    pub concurrency: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back_as_written() {
        for name in ["default", "1", "12", "9223372036854775807"] {
            assert_eq!(name.parse::<EndpointName>().unwrap().to_string(), name);
        }
    }

    #[test]
    fn a_plugin_in_a_parameter_is_digits() {
        assert_eq!(Plugin::parse("12"), Plugin::new(12));
        assert_eq!(Plugin::parse("0"), Some(Plugin::NONE));
        for text in ["", "+12", "-1", " 12", "12x", "9223372036854775808", "１２"] {
            assert_eq!(Plugin::parse(text), None, "{text}");
        }
    }

    #[test]
    fn zero_padded_signed_and_foreign_names_are_refused() {
        for name in ["", "0", "012", "+1", "-1", "Default", "9223372036854775808", "12x", " 12"] {
            assert!(name.parse::<EndpointName>().is_err(), "{name}");
        }
    }
}
