//! Parameters in the query of the calls of contract §6.

use std::borrow::Cow;

use super::answer::{ApiError, Code, error};
use crate::domain::endpoint::EndpointName;

/// Items of a page, unless asked for fewer or more.
const LIMIT: usize = 100;
/// Most items of a page.
const LIMIT_MAX: usize = 1_000;

/// Which items of a list are asked for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Query {
    pub endpoint: Option<EndpointName>,
    pub web_token: Option<String>,
    pub limit: usize,
    pub after: Option<String>,
}

impl Query {
    pub(super) fn read(query: &str) -> Result<Query, ApiError> {
        let wrong = |name: &str, problem: String| error(Code::InvalidRequest, format!("{name}: {problem}"));
        let mut read = Query { endpoint: None, web_token: None, limit: LIMIT, after: None };
        for (name, value) in form_urlencoded::parse(query.as_bytes()).filter(|(_, value)| !value.is_empty()) {
            match &*name {
                "endpoint" => {
                    let endpoint = EndpointName::any(&value).map_err(|bad| wrong("endpoint", bad.to_string()))?;
                    read.endpoint = Some(endpoint);
                }
                "web_token" => read.web_token = Some(value.into_owned()),
                "after" => read.after = Some(value.into_owned()),
                "limit" => {
                    let limit = value.parse().ok().filter(|limit| (1..=LIMIT_MAX).contains(limit));
                    read.limit = limit.ok_or_else(|| wrong("limit", format!("must be from 1 to {LIMIT_MAX}")))?;
                }
                _ => {}
            }
        }
        Ok(read)
    }
}

/// Whether a query or a form is UTF-8, percent-encoded: else another name would be read than was meant.
pub(super) fn is_utf8(encoded: &[u8]) -> bool {
    percent_encoding::percent_decode(encoded).decode_utf8().is_ok()
}

/// What a path names, percent-decoded.
pub(super) fn decoded(text: &str) -> Result<Cow<'_, str>, ApiError> {
    percent_encoding::percent_decode_str(text)
        .decode_utf8()
        .map_err(|_| error(Code::InvalidRequest, "path: must be UTF-8, percent-encoded"))
}

/// The wall clock as RFC 3339 in UTC.
pub(super) fn rfc3339(ms: u64) -> String {
    let at = std::time::UNIX_EPOCH + std::time::Duration::from_millis(ms);
    humantime::format_rfc3339_millis(at).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_bounded_and_wrong_parameters_are_named() {
        let read = Query::read("endpoint=default&web_token=a%26b&limit=7&after=3-1&other=1").unwrap();
        assert_eq!(read.endpoint, Some(EndpointName::DEFAULT));
        assert_eq!((read.web_token.as_deref(), read.limit, read.after.as_deref()), (Some("a&b"), 7, Some("3-1")));
        assert_eq!(Query::read("").unwrap().limit, LIMIT);
        for query in ["limit=0", "limit=1001", "limit=x", "endpoint=x", "endpoint=012"] {
            let name = query.split('=').next().unwrap();
            assert!(Query::read(query).unwrap_err().message.starts_with(name), "{query}");
        }
        assert_eq!(rfc3339(1_795_000_000_123), "2026-11-18T11:06:40.123Z");
        assert_eq!(decoded("a%2Fb").unwrap(), "a/b");
        assert!(decoded("%ff").is_err());
        assert!(is_utf8(b"a=%E5%A5%BD&b=+") && !is_utf8(b"a=1&b=%ff") && !is_utf8(b"a=%E5&b=%A5%BD"));
    }
}
