//! What an attempt's outcome means: the one table of statuses (contract §5).

use std::time::Duration;

/// A `Retry-After` is believed up to this.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(3_600);

/// What was seen of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// The head of an answer.
    Status {
        /// The HTTP status.
        code: u16,
        /// `Retry-After`, already clamped to [`RETRY_AFTER_MAX`].
        retry_after: Option<Duration>,
    },
    /// No head within the deadline.
    Timeout,
    /// No connection, or no address for the host.
    Connect,
    /// No TLS session, or a certificate that is not trusted.
    Tls,
    /// Every address of the host is forbidden, or http is.
    BlockedAddress,
    /// The connection was reset, closed, or spoke no HTTP.
    Io,
    /// A pooled connection broke before anything of an answer came, mostly because it had been closed while it was idle: to
    /// be sent again at once, as it was, on a new one.
    StaleConnection,
    /// The IM server answered a survey with a 2xx and a code other than 1000 (contract §4).
    SurveyCode(i64),
}

/// The label of an attempt in metrics and logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AttemptResult {
    /// A 2xx.
    Ok,
    /// A refusal.
    Refused,
    /// Any other non-2xx, or a survey's 2xx with another code than 1000 and those that are refusals.
    ErrorStatus,
    /// No head in time.
    Timeout,
    /// No connection.
    Connect,
    /// No TLS session.
    Tls,
    /// Forbidden address.
    BlockedAddress,
    /// Reset, closed or malformed.
    Io,
}

impl AttemptResult {
    /// Every label, for metrics that start at 0.
    pub const ALL: [AttemptResult; 8] = [
        AttemptResult::Ok,
        AttemptResult::Refused,
        AttemptResult::ErrorStatus,
        AttemptResult::Timeout,
        AttemptResult::Connect,
        AttemptResult::Tls,
        AttemptResult::BlockedAddress,
        AttemptResult::Io,
    ];

    /// The contract's word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            AttemptResult::Ok => "ok",
            AttemptResult::Refused => "refused",
            AttemptResult::ErrorStatus => "error_status",
            AttemptResult::Timeout => "timeout",
            AttemptResult::Connect => "connect",
            AttemptResult::Tls => "tls",
            AttemptResult::BlockedAddress => "blocked_address",
            AttemptResult::Io => "io",
        }
    }
}

/// What follows from an attempt, before the schedule's own rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Delivered.
    Delivered,
    /// The endpoint is gone: its events become dead letters at once.
    Gone,
    /// The endpoint may refuse just these events.
    Refused,
    /// The whole endpoint is to be left alone, for the time it said or one backoff delay.
    Throttled(Option<Duration>),
    /// Failed; the whole endpoint is to be left alone at least so long.
    Failed {
        /// `Retry-After` of a 503.
        hold: Option<Duration>,
        /// A timeout or failed connection, which halves the earned concurrency.
        halves: bool,
    },
    /// The IM server will never take this survey: it becomes a dead letter at once.
    Rejected,
    /// Not an outcome at all: try again at once.
    Again,
    /// The first event's record does not read back: nothing was sent.
    Damaged,
    /// The journal cannot be read just now: nothing was sent, nothing counts, and it is tried again after a while.
    Unread,
}

/// Codes of the IM server that no repetition changes: no such session, and a parameter is missing.
const SURVEY_REJECTED: [i64; 2] = [9_200, 2_062];

impl Report {
    /// What a 2xx to a survey means, by the `code` in its body; one without is a success.
    #[must_use]
    pub fn survey(status: u16, body: &[u8]) -> Report {
        let code = serde_json::from_slice::<serde_json::Value>(body).ok().and_then(|body| {
            let code = body.as_object()?.get("code")?;
            let text = code.as_str().and_then(|code| code.parse().ok());
            let real = code.as_f64().filter(|code| code.fract() == 0.0).map(|code| code as i64);
            Some(code.as_i64().or(real).or(text).unwrap_or(-1))
        });
        match code {
            None | Some(1_000) => Report::Status { code: status, retry_after: None },
            Some(code) => Report::SurveyCode(code),
        }
    }

    /// The table.
    #[must_use]
    pub fn verdict(self) -> Verdict {
        match self {
            Report::Status { code: 200..=299, .. } => Verdict::Delivered,
            Report::Status { code: 410, .. } => Verdict::Gone,
            Report::Status { code: 429, retry_after } => Verdict::Throttled(retry_after),
            Report::Status { code: 408 | 425, .. } => Verdict::Failed { hold: None, halves: false },
            Report::Status { code: 400..=499, .. } => Verdict::Refused,
            Report::Status { code: 503, retry_after } => Verdict::Failed { hold: retry_after, halves: false },
            Report::Status { .. } | Report::Io | Report::Tls | Report::BlockedAddress => {
                Verdict::Failed { hold: None, halves: false }
            }
            Report::Timeout | Report::Connect => Verdict::Failed { hold: None, halves: true },
            Report::StaleConnection => Verdict::Again,
            Report::SurveyCode(code) if SURVEY_REJECTED.contains(&code) => Verdict::Rejected,
            Report::SurveyCode(_) => Verdict::Failed { hold: None, halves: false },
        }
    }

    /// The HTTP status that was answered.
    #[must_use]
    pub fn status(self) -> Option<u16> {
        match self {
            Report::Status { code, .. } => Some(code),
            Report::SurveyCode(_)
            | Report::Timeout
            | Report::Connect
            | Report::Tls
            | Report::BlockedAddress
            | Report::Io
            | Report::StaleConnection => None,
        }
    }

    /// The label.
    #[must_use]
    pub fn result(self) -> AttemptResult {
        match self {
            Report::Status { .. } | Report::SurveyCode(_) => match self.verdict() {
                Verdict::Delivered => AttemptResult::Ok,
                Verdict::Refused | Verdict::Gone | Verdict::Rejected => AttemptResult::Refused,
                Verdict::Throttled(_)
                | Verdict::Failed { .. }
                | Verdict::Again
                | Verdict::Damaged
                | Verdict::Unread => AttemptResult::ErrorStatus,
            },
            Report::Timeout => AttemptResult::Timeout,
            Report::Connect => AttemptResult::Connect,
            Report::Tls => AttemptResult::Tls,
            Report::BlockedAddress => AttemptResult::BlockedAddress,
            Report::Io | Report::StaleConnection => AttemptResult::Io,
        }
    }
}

/// Reads `Retry-After`: seconds or a date (RFC 9110 §10.2.3), clamped to [`RETRY_AFTER_MAX`]; `None` when it says
/// nothing usable. `now` is the wall clock, since the epoch.
#[must_use]
pub fn retry_after(value: &str, now: Duration) -> Option<Duration> {
    let value = value.trim();
    if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        // More digits than fit are more than the clamp.
        let seconds: u64 = value.parse().unwrap_or(u64::MAX);
        return Some(Duration::from_secs(seconds.min(RETRY_AFTER_MAX.as_secs())));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    let since_epoch = date.duration_since(std::time::UNIX_EPOCH).ok()?;
    Some(since_epoch.saturating_sub(now).min(RETRY_AFTER_MAX))
}

/// Why an event was given up (contract §5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub enum DeathReason {
    /// Older than `push.max_age`.
    Expired,
    /// `push.max_attempts` reached.
    Attempts,
    /// The receiver refused it `push.max_refusals` times.
    Refused,
    /// The receiver answered 410.
    Gone,
    /// Its endpoint is no longer configured.
    EndpointRemoved,
    /// An operator gave it up.
    Buried,
    /// Its record could not be read back.
    Damaged,
}

impl DeathReason {
    /// Every reason, for metrics that start at 0.
    pub const ALL: [DeathReason; 7] = [
        DeathReason::Expired,
        DeathReason::Attempts,
        DeathReason::Refused,
        DeathReason::Gone,
        DeathReason::EndpointRemoved,
        DeathReason::Buried,
        DeathReason::Damaged,
    ];

    /// The contract's word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            DeathReason::Expired => "expired",
            DeathReason::Attempts => "attempts",
            DeathReason::Refused => "refused",
            DeathReason::Gone => "gone",
            DeathReason::EndpointRemoved => "endpoint_removed",
            DeathReason::Buried => "buried",
            DeathReason::Damaged => "damaged",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(code: u16) -> Report {
        Report::Status { code, retry_after: Some(Duration::from_secs(7)) }
    }

    #[test]
    fn a_survey_is_judged_by_the_code_in_the_answer() {
        let failed = Verdict::Failed { hold: None, halves: false };
        for (body, expected) in [
            (r#"{"code":1000,"message":"ok"}"#, Verdict::Delivered),
            (r#"{"code":"1000"}"#, Verdict::Delivered),
            (r#"{"code":1000.0}"#, Verdict::Delivered),
            ("", Verdict::Delivered),
            ("<html>", Verdict::Delivered),
            ("[]", Verdict::Delivered),
            ("{}", Verdict::Delivered),
            (r#"{"code":9200}"#, Verdict::Rejected),
            (r#"{"code":2062}"#, Verdict::Rejected),
            (r#"{"code":5000}"#, failed),
            (r#"{"code":0}"#, failed),
            (r#"{"code":null}"#, failed),
        ] {
            assert_eq!(Report::survey(200, body.as_bytes()).verdict(), expected, "{body}");
        }
    }

    #[test]
    fn every_status_has_its_verdict() {
        let seven = Some(Duration::from_secs(7));
        for code in 100..=599u16 {
            let expected = match code {
                200..=299 => Verdict::Delivered,
                410 => Verdict::Gone,
                429 => Verdict::Throttled(seven),
                503 => Verdict::Failed { hold: seven, halves: false },
                408 | 425 => Verdict::Failed { hold: None, halves: false },
                400..=499 => Verdict::Refused,
                _ => Verdict::Failed { hold: None, halves: false },
            };
            assert_eq!(status(code).verdict(), expected, "{code}");
            let label = match code {
                200..=299 => "ok",
                408 | 425 | 429 => "error_status",
                400..=499 => "refused",
                _ => "error_status",
            };
            assert_eq!(status(code).result().as_str(), label, "{code}");
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_date_and_clamped() {
        let now = Duration::from_secs(1_700_000_000); // 2023-11-14T22:13:20Z
        let table = [
            ("0", Some(0)),
            ("120", Some(120)),
            (" 5 ", Some(5)),
            ("3601", Some(3_600)),
            ("99999999999", Some(3_600)),
            ("99999999999999999999999999999999", Some(3_600)),
            ("Tue, 14 Nov 2023 22:14:20 GMT", Some(60)),
            ("Tue, 14 Nov 2023 22:12:20 GMT", Some(0)),
            ("Tue, 14 Nov 2034 22:14:20 GMT", Some(3_600)),
            ("", None),
            ("-1", None),
            ("1.5", None),
            ("soon", None),
            ("１０", None),
        ];
        for (value, seconds) in table {
            assert_eq!(retry_after(value, now), seconds.map(Duration::from_secs), "{value:?}");
        }
    }

    #[test]
    fn no_retry_after_is_longer_than_an_hour_or_panics() {
        let examples: [&[u8]; 4] = [b"120", b"Wed, 18 Nov 2026 11:06:40 GMT", b"99999999999999999999", b"-1"];
        crate::fuzz::fuzz(&examples, |bytes| {
            let Ok(text) = std::str::from_utf8(bytes) else { return };
            let wait = retry_after(text, Duration::from_secs(1_795_000_000));
            assert!(wait.is_none_or(|wait| wait <= RETRY_AFTER_MAX));
        });
        crate::fuzz::fuzz(&[br#"{"code":1000,"message":"ok"}"#, br#"{"code":"9200"}"#], |bytes| {
            assert_ne!(Report::survey(200, bytes).verdict(), Verdict::Again);
        });
    }
}
