//! Answers: JSON, and the errors of contract §2.

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{self, HeaderValue};
use hyper::{Response, StatusCode};
use serde::Serialize;

use crate::store::Refusal;

/// An answer, whole.
pub(super) type Answer = Response<Full<Bytes>>;

/// An error of §3, §6, §7: its code and what is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ApiError {
    pub code: Code,
    pub message: String,
}

/// The codes of contract §2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Code {
    InvalidRequest,
    InvalidEvent,
    Unauthorized,
    Forbidden,
    NotFound,
    MethodNotAllowed(&'static str),
    RequestTimeout,
    TooLarge,
    UnsupportedMediaType,
    OutboxFull,
    EndpointFull,
    DiskLow,
    Stopping,
}

impl Code {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Code::InvalidRequest => "invalid_request",
            Code::InvalidEvent => "invalid_event",
            Code::Unauthorized => "unauthorized",
            Code::Forbidden => "forbidden",
            Code::NotFound => "not_found",
            Code::MethodNotAllowed(_) => "method_not_allowed",
            Code::RequestTimeout => "request_timeout",
            Code::TooLarge => "too_large",
            Code::UnsupportedMediaType => "unsupported_media_type",
            Code::OutboxFull => "outbox_full",
            Code::EndpointFull => "endpoint_full",
            Code::DiskLow => "disk_low",
            Code::Stopping => "stopping",
        }
    }

    fn status(self) -> StatusCode {
        match self {
            Code::InvalidRequest | Code::InvalidEvent => StatusCode::BAD_REQUEST,
            Code::Unauthorized => StatusCode::UNAUTHORIZED,
            Code::Forbidden => StatusCode::FORBIDDEN,
            Code::NotFound => StatusCode::NOT_FOUND,
            Code::MethodNotAllowed(_) => StatusCode::METHOD_NOT_ALLOWED,
            Code::RequestTimeout => StatusCode::REQUEST_TIMEOUT,
            Code::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Code::UnsupportedMediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Code::OutboxFull | Code::EndpointFull | Code::DiskLow | Code::Stopping => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// When to ask again, seconds.
    fn retry_after(self) -> Option<&'static str> {
        match self {
            Code::Stopping => Some("1"),
            Code::OutboxFull | Code::EndpointFull => Some("5"),
            Code::DiskLow => Some("30"),
            Code::InvalidRequest
            | Code::InvalidEvent
            | Code::Unauthorized
            | Code::Forbidden
            | Code::NotFound
            | Code::MethodNotAllowed(_)
            | Code::RequestTimeout
            | Code::TooLarge
            | Code::UnsupportedMediaType => None,
        }
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> ApiError {
        let code = match refusal {
            Refusal::OutboxFull => Code::OutboxFull,
            Refusal::DiskLow => Code::DiskLow,
            Refusal::Stopping => Code::Stopping,
        };
        error(code, refusal.to_string())
    }
}

pub(super) fn error(code: Code, message: impl Into<String>) -> ApiError {
    ApiError { code, message: message.into() }
}

/// The relay's task does not answer in time: to be asked again.
pub(super) fn busy() -> ApiError {
    error(Code::Stopping, "the relay is busy or stopping")
}

/// An error as it stands in an answer.
#[derive(Debug, Serialize)]
pub(super) struct ErrorBody<'a> {
    pub code: &'a str,
    pub message: &'a str,
}

impl ApiError {
    pub(super) fn body(&self) -> ErrorBody<'_> {
        ErrorBody { code: self.code.as_str(), message: &self.message }
    }

    pub(super) fn into_answer(self) -> Answer {
        #[derive(Serialize)]
        struct Body<'a> {
            error: ErrorBody<'a>,
        }
        let mut answer = json(self.code.status(), &Body { error: self.body() });
        let headers = answer.headers_mut();
        if let Some(seconds) = self.code.retry_after() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static(seconds));
        }
        if let Code::MethodNotAllowed(allow) = self.code {
            headers.insert(header::ALLOW, HeaderValue::from_static(allow));
        }
        if self.code == Code::Unauthorized {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        answer
    }
}

pub(super) fn json(status: StatusCode, body: &impl Serialize) -> Answer {
    // These types serialize.
    let text = serde_json::to_vec(body).unwrap_or_default();
    with_type(status, "application/json", text)
}

pub(super) fn with_type(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}

pub(super) fn text(status: StatusCode, body: &'static str) -> Answer {
    with_type(status, "text/plain; charset=utf-8", body)
}
