//! The status page at `GET /`, and the description of the calls at `GET /openapi.json`.

use std::sync::LazyLock;

use aws_lc_rs::digest;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::StatusCode;
use hyper::header::{self, HeaderValue};

use super::answer::{self, Answer};

const PAGE: &str = include_str!("page.html");
const OPEN_API: &str = include_str!("openapi.json");

/// Only the page's own style and script run, and it speaks to nobody but the relay.
static POLICY: LazyLock<String> = LazyLock::new(|| {
    let hash = |open: &str, close: &str| {
        let text = PAGE.split_once(open).and_then(|(_, rest)| rest.split_once(close)).map_or("", |(text, _)| text);
        STANDARD.encode(digest::digest(&digest::SHA256, text.as_bytes()))
    };
    format!(
        "default-src 'none'; connect-src 'self'; style-src 'sha256-{}'; script-src 'sha256-{}'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        hash("<style>", "</style>"),
        hash("<script>", "</script>")
    )
});

pub(super) fn answer() -> Answer {
    let mut answer = answer::with_type(StatusCode::OK, "text/html; charset=utf-8", PAGE);
    let headers = answer.headers_mut();
    if let Ok(policy) = HeaderValue::try_from(POLICY.as_str()) {
        headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}

pub(super) fn open_api_document() -> Answer {
    answer::with_type(StatusCode::OK, "application/json", OPEN_API)
}
