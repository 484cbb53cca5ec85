//! What is wrong with a file, said without showing what stands in it: the line may hold a secret.

/// Where it is and what it is: `line 3, column 9: …`.
pub(super) fn describe(text: &str, error: &toml::de::Error) -> String {
    let what = without_value(error.message());
    let Some(before) = error.span().and_then(|span| text.get(..span.start)) else { return what };
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
}
