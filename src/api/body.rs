//! Reads requests' bodies, bounded in size, time and memory.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::Request;
use hyper::body::{Body as _, Incoming};
use tokio::sync::{OwnedSemaphorePermit, SemaphorePermit};

use super::answer::{ApiError, Code, error};
use super::{Api, POSTING_KIB};

/// How long a body may take, whole.
const BODY_LIMIT: Duration = Duration::from_secs(10);

/// Bodies up to this, in bytes, are read without asking for room.
const SMALL_BODY: usize = 64 << 10;

/// A body, and the part of the memory for bodies that it holds while it is looked at.
pub(super) struct Body {
    pub bytes: Bytes,
    _room: Option<OwnedSemaphorePermit>,
}

pub(super) async fn read_body(api: &Api, request: Request<Incoming>, bytes_max: usize) -> Result<Body, ApiError> {
    let too_large = || error(Code::TooLarge, format!("body: must be at most {bytes_max} bytes"));
    let hint = request.body().size_hint();
    if hint.lower() > bytes_max as u64 {
        return Err(too_large());
    }
    let expected = hint.exact().map_or(bytes_max, |exact| exact as usize);
    let read = async {
        let room = u32::try_from(expected / 1_024 + 1).unwrap_or(u32::MAX);
        // Small ones are bounded by the number of connections: large and slow ones never keep them waiting.
        let room = match expected {
            0..=SMALL_BODY => None,
            _ => Some(Arc::clone(&api.bodies).acquire_many_owned(room).await),
        };
        let room = room.transpose().map_err(|_| error(Code::Stopping, "the relay is stopping"))?;
        #[expect(clippy::disallowed_methods, reason = "the one place that may: bounded in size and time")]
        match Limited::new(request.into_body(), bytes_max).collect().await {
            Ok(body) => Ok(Body { bytes: body.to_bytes(), _room: room }),
            Err(problem) if problem.is::<LengthLimitError>() => Err(too_large()),
            Err(_) => Err(error(Code::InvalidRequest, "body: broken off")),
        }
    };
    let too_slow = || error(Code::RequestTimeout, format!("body: took longer than {} s", BODY_LIMIT.as_secs()));
    tokio::time::timeout(BODY_LIMIT, read).await.unwrap_or_else(|_| Err(too_slow()))
}

/// Waits until a large request may be worked at. Together they take so much memory at once, and a few of them keep the
/// disk busy.
pub(super) async fn turn(api: &Api, bytes: usize) -> Result<Option<SemaphorePermit<'_>>, ApiError> {
    if bytes <= SMALL_BODY {
        return Ok(None);
    }
    let share = u32::try_from((bytes / 1_024).min(POSTING_KIB)).unwrap_or(u32::MAX);
    match tokio::time::timeout(BODY_LIMIT, api.posting.acquire_many(share)).await {
        Ok(Ok(turn)) => Ok(Some(turn)),
        Ok(Err(_)) | Err(_) => Err(super::answer::busy()),
    }
}
