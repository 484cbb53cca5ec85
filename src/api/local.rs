//! The local listener: who may call, and what there is (contract §2, §3, §4).

use std::borrow::Cow;
use std::net::IpAddr;

use hyper::body::{Body as _, Incoming};
use hyper::header::{self, HeaderMap};
use hyper::{Method, Request, Uri};
use subtle::ConstantTimeEq as _;

use super::answer::{Answer, ApiError, Code, error};
use super::body::{Body, DISCARD_MAX, MediaType, media_type, read_body, refused, turn, unsupported};
use super::events::Form;
use super::query::{Query, decoded, is_utf8};
use super::udesk::{self, BodyForm};
use super::{Api, customers, dead_letters, endpoints, events, h5push, metrics, operate, page, status, survey};
use crate::config::Secret;
use crate::metrics::{EVENTS, H5PUSH, Metrics, SURVEY};

/// A route, as counted in metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    Page,
    OpenApiDocument,
    Events,
    Event,
    Customers,
    Endpoints,
    Endpoint,
    EndpointAction,
    Status,
    Lanes,
    BuryLanes,
    DeadLetters,
    DeadLetter,
    Replay,
    H5push,
    Survey,
    Healthz,
    Readyz,
    Metrics,
}

/// Every route with its path, what a path names in braces, and its methods.
const ROUTES: [(Route, &str, &str); 19] = [
    (Route::Page, "/", "GET, HEAD"),
    (Route::OpenApiDocument, "/openapi.json", "GET, HEAD"),
    (Route::Events, EVENTS, "POST"),
    (Route::Event, "/v1/events/{event_id}", "GET, HEAD"),
    (Route::Customers, "/v1/customers", "GET, HEAD, PUT, DELETE"),
    (Route::Endpoints, "/v1/endpoints", "GET, HEAD"),
    (Route::Endpoint, "/v1/endpoints/{name}", "GET, HEAD, PUT, DELETE"),
    (Route::EndpointAction, "/v1/endpoints/{name}/{action}", "POST"),
    (Route::Status, "/v1/status", "GET, HEAD"),
    (Route::Lanes, "/v1/lanes", "GET, HEAD"),
    (Route::BuryLanes, "/v1/lanes/bury", "POST"),
    (Route::DeadLetters, "/v1/dead-letters", "GET, HEAD, DELETE"),
    (Route::Replay, "/v1/dead-letters/replay", "POST"),
    (Route::DeadLetter, "/v1/dead-letters/{id}", "GET, HEAD"),
    (Route::H5push, H5PUSH, "POST"),
    (Route::Survey, SURVEY, "POST"),
    (Route::Healthz, "/healthz", "GET, HEAD"),
    (Route::Readyz, "/readyz", "GET, HEAD"),
    (Route::Metrics, "/metrics", "GET, HEAD"),
];

/// What may be done with an endpoint.
const ACTIONS: [&str; 4] = ["/pause", "/resume", "/retry", "/test"];

/// Every path that is no route, as counted in metrics.
const OTHER: &str = "other";

/// What a route may answer beside its success.
const ERRORS: [u16; 9] = [400, 401, 403, 404, 405, 408, 413, 415, 503];

/// Makes the counters of all routes be there from the start (contract §7).
pub(super) fn show_routes(metrics: &Metrics) {
    for code in ERRORS {
        metrics.show_requests(OTHER, code);
    }
    for (route, path, _) in ROUTES {
        let success = if route == Route::Events { 202 } else { 200 };
        for code in ERRORS.into_iter().chain([success]) {
            metrics.show_requests(path, code);
        }
    }
}

impl Route {
    /// The route of a path, and what the path names.
    fn of(path: &str) -> Option<(Route, &str)> {
        if let Some((route, ..)) = ROUTES.iter().find(|(_, known, _)| *known == path) {
            return Some((*route, ""));
        }
        if let Some(id) = path.strip_prefix("/v1/events/") {
            return Some((Route::Event, id));
        }
        if let Some(id) = path.strip_prefix("/v1/dead-letters/") {
            return Some((Route::DeadLetter, id));
        }
        let rest = path.strip_prefix("/v1/endpoints/")?;
        match rest.matches('/').count() {
            0 => Some((Route::Endpoint, rest)),
            1 if ACTIONS.iter().any(|action| rest.ends_with(action)) => Some((Route::EndpointAction, rest)),
            _ => None,
        }
    }

    fn row(self) -> (&'static str, &'static str) {
        ROUTES.iter().find(|(route, ..)| *route == self).map_or((OTHER, ""), |(_, path, methods)| (*path, *methods))
    }

    fn path(self) -> &'static str {
        self.row().0
    }

    fn methods(self) -> &'static str {
        self.row().1
    }

    /// Whether it answers also those who do not know the token.
    fn is_open(self) -> bool {
        matches!(self, Route::Healthz | Route::Page)
    }
}

/// Answers one request. `is_tcp`: it came over TCP, so that a browser may have sent it.
pub(super) async fn answer(api: &Api, request: Request<Incoming>, is_tcp: bool) -> Answer {
    let path = request.uri().path().to_owned();
    let route = Route::of(&path);
    let handled = match admit(api, route, &request, is_tcp) {
        Ok((route, named)) => handle(api, route, &named, request).await,
        Err(error) => Err(refused(request, DISCARD_MAX, error).await),
    };
    let answer = handled.unwrap_or_else(ApiError::into_answer);
    let counted = route.map_or(OTHER, |(route, _)| route.path());
    api.metrics.count_request(counted, answer.status().as_u16());
    answer
}

/// Whether a request may be made, by its head.
fn admit<'a>(
    api: &Api,
    route: Option<(Route, &'a str)>,
    request: &Request<Incoming>,
    is_tcp: bool,
) -> Result<(Route, Cow<'a, str>), ApiError> {
    let config = api.config.load();
    if is_tcp {
        check_browser(request.headers(), request.uri(), &config.local.allowed_hosts)?;
    }
    if !route.is_some_and(|(route, _)| route.is_open()) {
        check_token(config.local.token.as_ref(), request.headers())?;
    }
    let (route, named) = route.ok_or_else(|| error(Code::NotFound, "path: nothing is here"))?;
    if !route.methods().split(", ").any(|allowed| allowed == request.method().as_str()) {
        let allowed = route.methods();
        return Err(error(Code::MethodNotAllowed(allowed), format!("method: {allowed} only")));
    }
    // Also where no body is read: a form that a page sends does nothing here.
    let is_udesk = matches!(route, Route::H5push | Route::Survey);
    if !request.body().is_end_stream() && !is_udesk {
        match media_type(request.headers())? {
            Some(MediaType::Json | MediaType::Ndjson) => {}
            Some(MediaType::Form | MediaType::Other) | None => {
                return Err(unsupported("application/json or application/x-ndjson"));
            }
        }
    }
    let named = decoded(named)?;
    if !is_udesk && !request.uri().query().is_none_or(|query| is_utf8(query.as_bytes())) {
        return Err(error(Code::InvalidRequest, "query: must be UTF-8, percent-encoded"));
    }
    if route == Route::Endpoint && request.method() == Method::PUT {
        endpoints::name(&named)?;
    }
    Ok((route, named))
}

async fn handle(api: &Api, route: Route, named: &str, request: Request<Incoming>) -> Result<Answer, ApiError> {
    // An Arc, not a guard: few guards are cheap, and this one would be held while the request waits for the disk.
    let config = api.config.load_full();
    let method = request.method().clone();
    let query = request.uri().query().unwrap_or("").to_owned();
    let bytes_max = config.local.max_body_bytes;
    match route {
        Route::Page => Ok(page::answer()),
        Route::OpenApiDocument => Ok(page::open_api_document()),
        Route::Healthz => Ok(metrics::healthz()),
        Route::Readyz => Ok(metrics::readyz(api)),
        Route::Metrics => Ok(metrics::exposition(api).await),
        Route::Status => status::show(api).await,
        Route::Lanes => operate::lanes(api, &Query::read(&query)?).await,
        Route::BuryLanes => {
            let body = json_body(api, request, bytes_max).await?;
            operate::bury(api, &body.bytes).await
        }
        Route::DeadLetters if method == Method::DELETE => {
            let body = json_body(api, request, bytes_max).await?;
            dead_letters::purge(api, &body.bytes).await
        }
        Route::DeadLetters => dead_letters::list(api, &Query::read(&query)?).await,
        Route::DeadLetter => dead_letters::show(api, named).await,
        Route::Replay => {
            let body = json_body(api, request, bytes_max).await?;
            dead_letters::replay(api, &body.bytes).await
        }
        Route::EndpointAction => operate::act(api, named).await,
        Route::Event => events::show(api, named, &query).await,
        Route::Events => {
            let form = match media_type(request.headers())? {
                Some(MediaType::Json) => Form::Json,
                Some(MediaType::Ndjson) => Form::Ndjson,
                Some(MediaType::Form | MediaType::Other) | None => {
                    return Err(
                        refused(request, DISCARD_MAX, unsupported("application/json or application/x-ndjson")).await
                    );
                }
            };
            let body = read_body(api, request, bytes_max).await?;
            let _turn = turn(api, body.bytes.len()).await?;
            events::post(api, form, &body.bytes).await
        }
        Route::Customers if method == Method::PUT => {
            let body = json_body(api, request, bytes_max).await?;
            customers::put(api, &body.bytes).await
        }
        Route::Customers => customers::get_or_delete(api, &method, &query).await,
        Route::Endpoints => endpoints::list(api).await,
        Route::Endpoint => {
            if method == Method::PUT {
                let name = endpoints::name(named)?;
                let body = json_body(api, request, bytes_max).await?;
                return endpoints::put(api, name, &body.bytes).await;
            }
            let name = endpoints::known_name(named)?;
            if method == Method::DELETE { endpoints::delete(api, name).await } else { endpoints::show(api, name).await }
        }
        Route::H5push | Route::Survey => {
            let form = match body_form(&request) {
                Ok(form) => form,
                Err(error) => return Err(refused(request, DISCARD_MAX, error).await),
            };
            let answered = async {
                let body = read_body(api, request, bytes_max).await.map_err(udesk::unread)?;
                let parameters = udesk::parameters(&query, form, &body.bytes)?;
                if route == Route::Survey {
                    survey::post(api, &parameters).await
                } else {
                    h5push::post(api, &parameters, None).await
                }
            };
            Ok(answered.await.unwrap_or_else(udesk::Failure::into_answer))
        }
    }
}

/// How the parameters of a Udesk-compatible call are written.
pub(super) fn body_form(request: &Request<Incoming>) -> Result<BodyForm, ApiError> {
    match media_type(request.headers())? {
        None if request.body().is_end_stream() => Ok(BodyForm::None),
        Some(MediaType::Json) => Ok(BodyForm::Json),
        Some(MediaType::Form) => Ok(BodyForm::Form),
        Some(MediaType::Ndjson | MediaType::Other) | None => {
            Err(unsupported("application/json or application/x-www-form-urlencoded"))
        }
    }
}

async fn json_body(api: &Api, request: Request<Incoming>, bytes_max: usize) -> Result<Body, ApiError> {
    match media_type(request.headers())? {
        Some(MediaType::Json) => read_body(api, request, bytes_max).await,
        None if request.body().is_end_stream() => Err(error(Code::InvalidRequest, "body: is required")),
        Some(MediaType::Ndjson | MediaType::Form | MediaType::Other) | None => {
            Err(refused(request, DISCARD_MAX, unsupported("application/json")).await)
        }
    }
}

/// A web page in a browser on this host can do nothing here.
fn check_browser(headers: &HeaderMap, uri: &Uri, allowed_hosts: &[String]) -> Result<(), ApiError> {
    let forbidden = |message: &str| error(Code::Forbidden, message);
    // What is said twice is nothing to go by.
    let text = |name: &str| {
        let mut all = headers.get_all(name).iter();
        let first = all.next()?.to_str().ok();
        Some(first.filter(|_| all.next().is_none()).unwrap_or("\u{fffd}"))
    };
    let host = uri.authority().map(|authority| authority.as_str()).or_else(|| text("host"));
    let host = host.ok_or_else(|| forbidden("host: is required"))?;
    if headers.get_all(header::HOST).iter().count() > 1 || !is_allowed_host(host, allowed_hosts) {
        return Err(forbidden("host: not a loopback name, nor in local.allowed_hosts"));
    }
    if let Some(origin) = text("origin") {
        let own = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
        if !own.is_some_and(|own| own.eq_ignore_ascii_case(host)) {
            return Err(forbidden("origin: not this listener"));
        }
    }
    if text("sec-fetch-site").is_some_and(|site| !matches!(site, "same-origin" | "none")) {
        return Err(forbidden("sec-fetch-site: not the same origin"));
    }
    Ok(())
}

fn is_allowed_host(host: &str, allowed_hosts: &[String]) -> bool {
    let is_port = |port: &str| port.parse::<u16>().is_ok();
    let name = match host.rsplit_once(':') {
        Some((name, port)) if is_port(port) && (!name.contains(':') || name.ends_with(']')) => name,
        _ => host,
    };
    if allowed_hosts.iter().any(|allowed| allowed.eq_ignore_ascii_case(name) || allowed.eq_ignore_ascii_case(host)) {
        return true;
    }
    let literal = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    name.eq_ignore_ascii_case("localhost")
        || literal.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

fn check_token(token: Option<&Secret>, headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(token) = token else { return Ok(()) };
    let given = headers.get(header::AUTHORIZATION).map_or(&b""[..], |value| value.as_bytes());
    let (scheme, given) = given.split_at_checked(7).unwrap_or_default();
    let is_bearer = scheme.eq_ignore_ascii_case(b"bearer ");
    if is_bearer && bool::from(given.ct_eq(token.expose().as_bytes())) {
        Ok(())
    } else {
        Err(error(Code::Unauthorized, "authorization: a bearer token is required"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::{HeaderName, HeaderValue};

    #[test]
    fn only_loopback_names_and_allowed_ones_are_hosts() {
        let allowed = ["relay.internal".to_owned()];
        let table = [
            ("localhost", true),
            ("LOCALHOST:8460", true),
            ("127.0.0.1:8460", true),
            ("127.9.9.9", true),
            ("[::1]:8460", true),
            ("[::1]", true),
            ("relay.internal:8460", true),
            ("relay.internal", true),
            ("evil.example", false),
            ("localhost.evil.example", false),
            ("127.0.0.1.evil.example", false),
            ("10.0.0.1", false),
            ("", false),
        ];
        for (host, is_allowed) in table {
            assert_eq!(is_allowed_host(host, &allowed), is_allowed, "{host}");
        }
    }

    #[test]
    fn browsers_of_other_pages_are_refused() {
        let table: [(&[(&str, &str)], bool); 10] = [
            (&[("host", "localhost:8460")], true),
            (&[("host", "localhost:8460"), ("origin", "http://localhost:8460")], true),
            (&[("host", "localhost:8460"), ("origin", "http://localhost:9999")], false),
            (&[("host", "localhost:8460"), ("origin", "null")], false),
            (
                &[("host", "localhost:8460"), ("origin", "http://localhost:8460"), ("origin", "http://evil.example")],
                false,
            ),
            (&[("host", "localhost:8460"), ("sec-fetch-site", "none")], true),
            (&[("host", "localhost:8460"), ("sec-fetch-site", "same-origin")], true),
            (&[("host", "localhost:8460"), ("sec-fetch-site", "same-site")], false),
            (&[("host", "localhost:8460"), ("sec-fetch-site", "cross-site")], false),
            (&[], false),
        ];
        for (given, is_allowed) in table {
            let mut headers = HeaderMap::new();
            for (name, value) in given {
                headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
            }
            let uri = Uri::from_static("/v1/events");
            assert_eq!(check_browser(&headers, &uri, &[]).is_ok(), is_allowed, "{given:?}");
        }
    }
}
