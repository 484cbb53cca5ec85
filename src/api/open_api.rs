//! `[open_api]`: the two calls of contract §4 over the network, signed, and nothing else.
//!
//! An unknown account, a wrong token and a wrong sign look the same from outside: the same hash is computed and compared
//! whoever calls, and there is one answer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use aws_lc_rs::digest;
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use hyper::body::Incoming;
use hyper::{Method, Request};
use subtle::ConstantTimeEq as _;

use super::answer::{Answer, ApiError, Code, error};
use super::udesk::{self, Failure, Parameters};
use super::{Api, body, h5push, local, survey};
use crate::clock;
use crate::config::{Account, OpenApi};
use crate::metrics::{H5PUSH, SURVEY};

/// Largest body, bytes.
const BODY_MAX: usize = 64 << 10;

/// How often each account has called lately. Kept over a reload while the limit is the same.
#[derive(Debug, Default)]
pub struct Callers(Mutex<HashMap<String, (u32, Arc<DefaultDirectRateLimiter>)>>);

impl Callers {
    /// Whether this account may call once more; 0 is no limit.
    fn may_call(&self, email: &str, per_minute: u32) -> bool {
        let Some(limit) = std::num::NonZeroU32::new(per_minute) else { return true };
        let limiter = {
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let (known, limiter) = all
                .entry(email.to_owned())
                .or_insert_with(|| (per_minute, Arc::new(RateLimiter::direct(Quota::per_minute(limit)))));
            if *known != per_minute {
                (*known, *limiter) = (per_minute, Arc::new(RateLimiter::direct(Quota::per_minute(limit))));
            }
            Arc::clone(limiter)
        };
        limiter.check().is_ok()
    }
}

#[derive(Clone, Copy)]
enum Call {
    H5push,
    Survey,
}

impl Call {
    fn of(path: &str) -> Option<Call> {
        Some(match path {
            H5PUSH => Call::H5push,
            SURVEY => Call::Survey,
            _ => return None,
        })
    }

    fn path(self) -> &'static str {
        match self {
            Call::H5push => H5PUSH,
            Call::Survey => SURVEY,
        }
    }
}

/// Answers one request.
pub(super) async fn answer(api: &Api, request: Request<Incoming>) -> Answer {
    let Some(call) = Call::of(request.uri().path()) else {
        let answer = refused(request, error(Code::NotFound, "path: nothing is here")).await.into_answer();
        api.metrics.count_open_api("other", u32::from(answer.status().as_u16()));
        return answer;
    };
    let (answer, code) = match handle(api, call, request).await {
        Ok(Ok(answer)) => (answer, udesk::DONE),
        Ok(Err(failure)) => {
            let code = failure.code;
            (failure.into_answer(), code)
        }
        Err(error) => {
            let answer = error.into_answer();
            let status = u32::from(answer.status().as_u16());
            (answer, status)
        }
    };
    api.metrics.count_open_api(call.path(), code);
    answer
}

async fn handle(api: &Api, call: Call, request: Request<Incoming>) -> Result<Result<Answer, Failure>, ApiError> {
    if request.method() != Method::POST {
        return Err(refused(request, error(Code::MethodNotAllowed("POST"), "method: POST only")).await);
    }
    let form = match local::body_form(&request) {
        Ok(form) => form,
        Err(_) => return Ok(Err(refused(request, udesk::wrong("参数错误:Content-Type")).await)),
    };
    let query = request.uri().query().unwrap_or("").to_owned();
    // Not a guard: it would be held while others wait.
    let config = api.config.load_full();
    let verified = udesk::parameters(&query, udesk::BodyForm::None, &[])
        .and_then(|signed| verify(&config.open_api, &signed, clock::wall_ms() / 1_000));
    // Nobody's body is kept before it is known whose it is.
    let signed = match verified {
        Ok(signed) => signed,
        Err(failure) => return Ok(Err(refused(request, failure).await)),
    };
    let answered = async {
        let body = body::read_body(api, request, BODY_MAX).await.map_err(udesk::unread)?;
        let account = authorize(api, &config.open_api, signed).await?;
        let parameters = udesk::parameters(&query, form, &body.bytes)?;
        match call {
            Call::H5push => h5push::post(api, &parameters, account.plugins.as_deref()).await,
            Call::Survey => survey::post(api, &parameters).await,
        }
    };
    Ok(answered.await)
}

/// Lets a request that is refused by its head finish: a sender who is not done looks for no answer.
async fn refused<E>(request: Request<Incoming>, error: E) -> E {
    body::refused(request, BODY_MAX, error).await
}

/// Counts a rightly signed call, and uses its nonce up.
async fn authorize<'a>(api: &Api, open_api: &OpenApi, signed: Signed<'a>) -> Result<&'a Account, Failure> {
    let Signed { account, nonce, signed_at } = signed;
    let key = api.store.hashing().nonce(&account.email, &nonce);
    // Only calls that are rightly signed count, once each, so that nobody else can use an account's calls up.
    let now_s = clock::wall_ms() / 1_000;
    if api.store.is_nonce_used(key, now_s) {
        return Err(udesk::unsigned());
    }
    if !api.callers.may_call(&account.email, open_api.rate_limit_per_minute) {
        return Err(udesk::too_many());
    }
    let until_s = signed_at + open_api.timestamp_tolerance.as_secs();
    let is_fresh = api.store.use_nonce(key, until_s, now_s).await.map_err(udesk::unavailable)?;
    if is_fresh { Ok(account) } else { Err(udesk::unsigned()) }
}

/// What a right signature says.
struct Signed<'a> {
    account: &'a Account,
    nonce: String,
    /// Unix seconds.
    signed_at: u64,
}

/// Checks account, signature and timestamp, in the same time whichever of them is wrong.
fn verify<'a>(open_api: &'a OpenApi, signed: &Parameters, now_s: u64) -> Result<Signed<'a>, Failure> {
    let value = |name: &str| signed.get(name).map(String::as_str).ok_or_else(|| udesk::missing(name));
    let (email, timestamp, nonce) = (value("email")?, value("timestamp")?, value("nonce")?);
    let (version, sign) = (value("sign_version")?, value("sign")?);
    let known = open_api.accounts.iter().find(|account| account.email == email);
    // For an unknown account somebody else's token, so that it is as long as one.
    let token = known.or(open_api.accounts.first()).map_or("", |account| account.token.expose());
    let is_right = bool::from(signature(email, token, timestamp, nonce).as_bytes().ct_eq(sign.as_bytes()));
    let is_number = timestamp.bytes().all(|byte| byte.is_ascii_digit());
    let signed_at: Option<u64> = timestamp.parse().ok().filter(|_| is_number);
    let is_fresh = signed_at.is_some_and(|at| at.abs_diff(now_s) <= open_api.timestamp_tolerance.as_secs());
    match (known, signed_at) {
        (Some(account), Some(signed_at)) if is_right && is_fresh && version == "v2" => {
            Ok(Signed { account, nonce: nonce.to_owned(), signed_at })
        }
        _ => Err(udesk::unsigned()),
    }
}

/// Lower-case hex SHA-256 of `email&token&timestamp&nonce&v2`.
fn signature(email: &str, token: &str, timestamp: &str, nonce: &str) -> String {
    let content = format!("{email}&{token}&{timestamp}&{nonce}&v2");
    let hash = digest::digest(&digest::SHA256, content.as_bytes());
    hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signature_is_the_hash_of_its_parts() {
        // printf 'admin@example.com&s3cret&1795000000&n-1&v2' | sha256sum
        let expected = "d9f50a9b1300e862cf80794567aaf4affacb26a2f25f7aacf5291a48914d4550";
        assert_eq!(signature("admin@example.com", "s3cret", "1795000000", "n-1"), expected);
    }

    #[test]
    fn an_account_has_its_calls_a_minute_and_zero_is_no_limit() {
        let callers = Callers::default();
        assert_eq!((0..5).filter(|_| callers.may_call("a", 3)).count(), 3);
        assert_eq!((0..5).filter(|_| callers.may_call("b", 3)).count(), 3);
        assert_eq!((0..5).filter(|_| callers.may_call("a", 0)).count(), 5);
        assert!(callers.may_call("a", 4), "a new limit begins anew");
    }
    #[test]
    fn refusals_take_the_same_time_whatever_is_wrong() {
        const NOW: u64 = 1_795_000_000;
        let account = |number: u32| {
            format!("{{ email = \"app{number}@example.com\", token = \"0123456789abcdef0123456789abcdef\" }}")
        };
        let accounts: Vec<String> = (0..3).map(account).collect();
        let text = format!("[open_api]\nlisten = \"127.0.0.1:1\"\naccounts = [{}]\n", accounts.join(", "));
        let config = crate::config::Config::parse(&text, std::path::Path::new("test")).unwrap();
        let call = |email: &str, token: &str, at: u64, sign: Option<&str>| -> Parameters {
            let right = signature(email, token, &at.to_string(), "n");
            [("email", email), ("nonce", "n"), ("sign_version", "v2"), ("sign", sign.unwrap_or(&right))]
                .into_iter()
                .chain([("timestamp", at.to_string().as_str())])
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect()
        };
        let token = "0123456789abcdef0123456789abcdef";
        let almost = signature("app1@example.com", token, &NOW.to_string(), "n").replace(['0', '1', '2'], "3");
        let wrong = [
            ("an unknown account", call("nobo@example.com", token, NOW, None)),
            ("a wrong token", call("app1@example.com", "f123456789abcdef0123456789abcdef", NOW, None)),
            ("a wrong sign", call("app1@example.com", token, NOW, Some(&"0".repeat(64)))),
            ("a sign that is nearly right", call("app1@example.com", token, NOW, Some(&almost))),
            ("an old timestamp", call("app1@example.com", token, NOW - 3_600, None)),
        ];
        assert!(verify(&config.open_api, &call("app1@example.com", token, NOW, None), NOW).is_ok());
        // Taken in turns, so that what else the machine does meets all; of each the faster half, for the same reason.
        let mut times = wrong.each_ref().map(|_| Vec::new());
        for _ in 0..4_000 {
            for ((_, call), times) in wrong.iter().zip(&mut times) {
                let begun = crate::clock::now();
                let is_refused = verify(&config.open_api, std::hint::black_box(call), NOW).is_err();
                times.push(begun.elapsed());
                assert!(is_refused);
            }
        }
        let typical = times.map(|mut times| {
            times.sort();
            times[times.len() / 4].as_nanos() as f64
        });
        for ((what, _), time) in wrong.iter().zip(typical) {
            let ratio = time / typical[1];
            assert!((0.9..1.1).contains(&ratio), "{what}: {time} ns, a wrong token: {} ns", typical[1]);
        }
    }
}
