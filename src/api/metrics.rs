//! The metrics listener: `/metrics`, `/healthz`, `/readyz`, nothing else (contract §2). The local listener has them too.

use hyper::{Method, StatusCode};

use super::Api;
use super::answer::{self, Answer, Code, error};
use crate::metrics::CONTENT_TYPE;

pub(super) async fn answer(api: &Api, method: &Method, path: &str) -> Answer {
    if !matches!(path, "/metrics" | "/healthz" | "/readyz") {
        return error(Code::NotFound, "path: nothing is here").into_answer();
    }
    if method != Method::GET && method != Method::HEAD {
        return error(Code::MethodNotAllowed("GET, HEAD"), "method: GET only").into_answer();
    }
    match path {
        "/healthz" => healthz(),
        "/readyz" => readyz(api),
        _ => exposition(api).await,
    }
}

pub(super) async fn exposition(api: &Api) -> Answer {
    match api.now().await.map(|(now, _)| api.metrics.expose(&now)) {
        Some(Ok(text)) => answer::with_type(StatusCode::OK, CONTENT_TYPE, text),
        Some(Err(_)) | None => answer::text(StatusCode::SERVICE_UNAVAILABLE, "the relay does not answer\n"),
    }
}

pub(super) fn healthz() -> Answer {
    answer::text(StatusCode::OK, "ok\n")
}

pub(super) fn readyz(api: &Api) -> Answer {
    match api.is_ready() {
        Ok(()) => answer::text(StatusCode::OK, "ready\n"),
        Err(why) => answer::text(StatusCode::SERVICE_UNAVAILABLE, why),
    }
}
