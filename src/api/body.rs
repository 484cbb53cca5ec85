//! Reads requests' bodies, bounded in size, time and memory, and says of which type they are.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use hyper::header::HeaderMap;
use hyper::{Request, header};
use tokio::sync::{OwnedSemaphorePermit, SemaphorePermit};

use super::answer::{ApiError, Code, error};
use super::seats::Sitting;
use super::{Api, POSTING_KIB};

/// How long a body may take, whole.
const BODY_LIMIT: Duration = Duration::from_secs(10);

/// Bodies up to this, in bytes, are read without asking for room.
const SMALL_BODY: usize = 64 << 10;

/// Of a body that is too large so many bytes are read on, and for so long.
pub(super) const DISCARD_MAX: usize = 32 << 20;
const DISCARD_LIMIT: Duration = Duration::from_secs(2);

/// A body, and the part of the memory for bodies that it holds while it is looked at.
pub(super) struct Body {
    pub bytes: Bytes,
    _room: Option<OwnedSemaphorePermit>,
}

pub(super) async fn read_body(api: &Api, request: Request<Incoming>, bytes_max: usize) -> Result<Body, ApiError> {
    let too_large = || error(Code::TooLarge, format!("body: must be at most {bytes_max} bytes"));
    let mut incoming = Coming::new(request);
    let hint = incoming.body.size_hint();
    let read = match hint.exact() {
        _ if hint.lower() > bytes_max as u64 => Err(too_large()),
        Some(bytes) => announced(api, &mut incoming, bytes as usize).await,
        None => unannounced(api, &mut incoming, bytes_max).await.and_then(|read| read.ok_or_else(too_large)),
    };
    if read.as_ref().is_err_and(|error| error.code == Code::TooLarge) {
        incoming.discard(DISCARD_MAX).await;
    }
    read
}

/// A body that is coming in.
struct Coming {
    body: Incoming,
    /// The caller waits to be told that it may send it.
    is_expecting: bool,
    seat: Option<Arc<Sitting>>,
}

impl Coming {
    fn new(request: Request<Incoming>) -> Coming {
        let is_expecting = request.headers().contains_key(header::EXPECT);
        let seat = request.extensions().get().cloned();
        Coming { body: request.into_body(), is_expecting, seat }
    }

    /// Reads for so long, and less where others wait for the seat.
    async fn within<T>(
        &mut self,
        limit: Duration,
        read: impl AsyncFnOnce(&mut Incoming) -> Result<T, ApiError>,
    ) -> Result<T, ApiError> {
        let Coming { body, seat, .. } = self;
        let hurried = async {
            match seat {
                Some(seat) => seat.hurried().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            read = read(body) => read,
            () = hurried => Err(error(Code::RequestTimeout, "body: did not come, and others wait")),
            () = tokio::time::sleep(limit) => Err(too_slow(limit)),
        }
    }

    /// Reads on for a while: who sends all before looking for an answer would find the connection broken instead.
    async fn discard(&mut self, bytes_max: usize) {
        if self.is_expecting {
            return;
        }
        let mut left = bytes_max;
        let rest = async |body: &mut Incoming| {
            while let Some(Ok(frame)) = body.frame().await {
                match left.checked_sub(frame.data_ref().map_or(0, Bytes::len)) {
                    Some(less) => left = less,
                    None => break,
                }
            }
            Ok(())
        };
        // Whatever came of it.
        drop(self.within(DISCARD_LIMIT, rest).await);
    }
}

/// Lets a request that is refused by its head finish, up to so many bytes, and hands its error on.
pub(super) async fn refused<E>(request: Request<Incoming>, bytes_max: usize, error: E) -> E {
    Coming::new(request).discard(bytes_max).await;
    error
}

/// A body of so many bytes.
async fn announced(api: &Api, incoming: &mut Coming, bytes: usize) -> Result<Body, ApiError> {
    // Small ones are bounded by the number of connections: large and slow ones never keep them waiting.
    let room = if bytes > SMALL_BODY { Some(room(api, bytes).await?) } else { None };
    #[expect(clippy::disallowed_methods, reason = "hyper reads no more than was announced; time is bounded")]
    let read = incoming.within(BODY_LIMIT, async |body| body.collect().await.map_err(|_| broken_off())).await?;
    Ok(Body { bytes: read.to_bytes(), _room: room })
}

/// A body whose size is known when it is there; `None`: it is too large.
async fn unannounced(api: &Api, incoming: &mut Coming, bytes_max: usize) -> Result<Option<Body>, ApiError> {
    let mut read = BytesMut::new();
    let mut held = None;
    let small = bytes_max.min(SMALL_BODY);
    let mut is_whole = incoming.within(BODY_LIMIT, async |body| fill(&mut read, body, small).await).await?;
    if !is_whole && read.len() <= bytes_max {
        // Not before: many that never come to it would keep the large ones out.
        held = Some(room(api, bytes_max).await?);
        is_whole = incoming.within(BODY_LIMIT, async |body| fill(&mut read, body, bytes_max).await).await?;
    }
    Ok(is_whole.then(|| Body { bytes: read.freeze(), _room: held }))
}

/// Reads on to the end, which it says, or until it is more than so many bytes.
async fn fill(read: &mut BytesMut, body: &mut Incoming, bytes_max: usize) -> Result<bool, ApiError> {
    while read.len() <= bytes_max {
        let Some(frame) = body.frame().await else { return Ok(true) };
        read.extend_from_slice(frame.map_err(|_| broken_off())?.data_ref().unwrap_or(&Bytes::new()));
    }
    Ok(false)
}

/// Waits for room: who has it gives it back in time.
async fn room(api: &Api, bytes: usize) -> Result<OwnedSemaphorePermit, ApiError> {
    let kib = u32::try_from(bytes / 1_024 + 1).unwrap_or(u32::MAX);
    let room = tokio::time::timeout(BODY_LIMIT, Arc::clone(&api.bodies).acquire_many_owned(kib)).await;
    match room {
        Ok(Ok(room)) => Ok(room),
        Ok(Err(_)) => Err(error(Code::Stopping, "the relay is stopping")),
        Err(_) => Err(too_slow(BODY_LIMIT)),
    }
}

fn too_slow(limit: Duration) -> ApiError {
    error(Code::RequestTimeout, format!("body: took longer than {} s", limit.as_secs()))
}

fn broken_off() -> ApiError {
    error(Code::InvalidRequest, "body: broken off")
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

/// The media types of the bodies that are understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MediaType {
    Json,
    Ndjson,
    Form,
    Other,
}

/// Of which type the body is; `None`: not said. Only UTF-8 is understood.
pub(super) fn media_type(headers: &HeaderMap) -> Result<Option<MediaType>, ApiError> {
    const KNOWN: [(&str, MediaType); 3] = [
        ("application/json", MediaType::Json),
        ("application/x-ndjson", MediaType::Ndjson),
        ("application/x-www-form-urlencoded", MediaType::Form),
    ];
    let Some(value) = headers.get(header::CONTENT_TYPE) else { return Ok(None) };
    let value = value.to_str().map_err(|_| unsupported("a readable content type"))?;
    let mut parts = value.split(';').map(str::trim);
    let name = parts.next().unwrap_or("");
    for parameter in parts {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        let charset = value.trim().trim_matches('"');
        if name.trim().eq_ignore_ascii_case("charset") && !charset.eq_ignore_ascii_case("utf-8") {
            return Err(error(Code::UnsupportedMediaType, "content-type: charset must be utf-8"));
        }
    }
    let known = KNOWN.iter().find(|(known, _)| name.eq_ignore_ascii_case(known));
    Ok(Some(known.map_or(MediaType::Other, |(_, media_type)| *media_type)))
}

pub(super) fn unsupported(expected: &str) -> ApiError {
    error(Code::UnsupportedMediaType, format!("content-type: must be {expected}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::HeaderValue;

    #[test]
    fn content_types_are_read_with_their_charset() {
        let table = [
            ("application/json", Ok(MediaType::Json)),
            ("Application/JSON; charset=\"UTF-8\"", Ok(MediaType::Json)),
            ("application/x-ndjson;charset=utf-8", Ok(MediaType::Ndjson)),
            ("application/x-www-form-urlencoded", Ok(MediaType::Form)),
            ("application/json; charset=gbk", Err(())),
            ("text/plain", Ok(MediaType::Other)),
        ];
        for (value, expected) in table {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(value));
            assert_eq!(media_type(&headers).map_err(|_| ()), expected.map(Some), "{value}");
        }
    }
}
