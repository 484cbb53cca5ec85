//! What is wrong with a file, said without showing what stands in it: the line may hold a secret.

use std::ops::Range;

use toml::de::{DeTable, DeValue};

/// Where it is and what it is: `line 3, column 9: …`.
pub(super) fn describe(text: &str, error: &toml::de::Error) -> String {
    at(text, error.span(), &without_value(error.message()))
}

/// Says where the value stands of the key that a problem begins with, or the table that it is to be in.
pub(super) fn locate(text: &str, problem: &str) -> String {
    let names = problem.split(": ").flat_map(|part| part.split('.'));
    let mut place = None;
    let mut within = DeTable::parse(text).ok().map(|table| DeValue::Table(table.into_inner()));
    for name in names {
        let Some(found) = within.as_ref().and_then(|value| value.as_table()?.get(name)) else { break };
        place = Some(found.span());
        within = Some(found.get_ref().clone());
    }
    at(text, place, problem)
}

fn at(text: &str, place: Option<Range<usize>>, what: &str) -> String {
    let Some(before) = place.and_then(|place| text.get(..place.start)) else { return what.to_owned() };
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or(before).chars().count() + 1;
    format!("line {line}, column {column}: {what}")
}

/// serde says `invalid type: string "…", expected …`: the kind is kept, the value is not.
fn without_value(message: &str) -> String {
    let value = message
        .strip_prefix("invalid type: ")
        .or_else(|| message.strip_prefix("invalid value: "))
        .and_then(|rest| rest.rsplit_once(", expected "));
    match value {
        Some((found, expected)) => {
            let kind = found.split(['"', '`']).next().unwrap_or(found).trim_end();
            format!("expected {}, not this {kind}", expected.replace("a nonzero u32", "a whole number from 1"))
        }
        // Of a prefix that is too long, too.
        None if message == "invalid IP address syntax" => "expected networks, like \"10.0.0.0/8\"".to_owned(),
        None => message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_is_named_and_the_value_is_not() {
        let described = |text: &str| {
            let error = toml::from_str::<std::collections::BTreeMap<String, u16>>(text).unwrap_err();
            describe(text, &error)
        };
        assert_eq!(
            described("a = 1\n\"密\" = \"planted, expected x\""),
            "line 2, column 7: expected u16, not this string"
        );
        assert_eq!(described("a = 70000"), "line 1, column 5: expected u16, not this integer");
        for broken in ["a = \"planted", "a = planted", "a = 1 planted"] {
            let described = described(broken);
            assert!(described.starts_with("line 1, column ") && !described.contains("planted"), "{described}");
        }
    }

    #[test]
    fn the_key_that_a_problem_begins_with_is_found() {
        let text = "data_dir = \"\"\n\n[push]\nallow_http = true\n  timeout = \"0s\"\n[endpoints.12]\nurl = \"x\"\n";
        for (problem, place) in [
            ("data_dir: must not be empty", "line 1, column 12: "),
            ("push.timeout: must be longer than 0", "line 5, column 13: "),
            ("endpoints.12: url: not a URL", "line 7, column 7: "),
            ("endpoints.12: a secret is needed", "line 6, column 1: "),
            ("push.max_age: missing", "line 3, column 1: "),
            ("no such key", ""),
        ] {
            assert_eq!(locate(text, problem), format!("{place}{problem}"));
        }
    }
}
