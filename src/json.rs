//! Bodies of calls: JSON objects. What is wrong with one names the field (contract §2).

use serde::Deserialize;

/// Reads an object. A derived reader alone would also take an array of its fields' values.
///
/// # Errors
/// What is wrong, beginning with the field.
pub fn object<'de, T: Deserialize<'de>>(body: &'de [u8]) -> Result<T, String> {
    if !body.trim_ascii_start().starts_with(b"{") {
        return Err("body: must be a JSON object".to_owned());
    }
    let mut reader = serde_json::Deserializer::from_slice(body);
    let read = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let path = error.path().to_string();
        let field = if path == "." || path == "?" { "body" } else { &path };
        format!("{field}: {}", error.inner())
    })?;
    reader.end().map_err(|error| format!("body: {error}"))?;
    Ok(read)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Read {
        #[serde(default)]
        burst: Option<u32>,
        #[serde(default)]
        ids: Vec<String>,
    }

    #[test]
    fn only_objects_are_read_and_what_is_wrong_names_the_field() {
        let read = |body: &str| object::<Read>(body.as_bytes());
        assert_eq!(read(" {\"burst\":5} "), Ok(Read { burst: Some(5), ids: Vec::new() }));
        let table = [
            ("[5,[]]", "body: must be a JSON object"),
            ("", "body: must be a JSON object"),
            ("{", "body: EOF"),
            ("{} {}", "body: trailing"),
            (r#"{"burst":"5"}"#, "burst: invalid type"),
            (r#"{"burst":-1}"#, "burst: invalid value"),
            (r#"{"ids":["a",7]}"#, "ids[1]: invalid type"),
            (r#"{"rate":7}"#, "rate: unknown field"),
            ("{\"ids\":[\"\u{1}\"]}", "ids[0]: control character"),
        ];
        for (body, problem) in table {
            let found = read(body).unwrap_err();
            assert!(found.starts_with(problem), "{body}: {found}");
        }
    }
}
