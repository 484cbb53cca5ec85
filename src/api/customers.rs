//! `/v1/customers` (contract §3).

use hyper::{Method, StatusCode};
use serde::{Deserialize, Serialize};

use super::answer::{self, Answer, ApiError, Code, error};
use super::{Api, dead_letters};
use crate::clock;
use crate::domain::customer::{Customer, Hearing, TOKEN_BYTES_MAX, Toggle};
use crate::domain::endpoint::Plugin;
use crate::json;

pub(super) const BAD_PLUGIN: &str = "im_web_plugin_id: must be an integer from 0 to 2^63-1";

#[derive(Deserialize)]
struct Put {
    web_token: String,
    #[serde(default)]
    im_web_plugin_id: Option<u64>,
    #[serde(default)]
    customer_token: Option<String>,
    #[serde(default)]
    sdk_token: Option<String>,
    #[serde(default)]
    h5push: Option<bool>,
    #[serde(default)]
    toggle: Option<Toggle>,
}

#[derive(Serialize)]
struct Shown<'a> {
    web_token: &'a str,
    im_web_plugin_id: u64,
    customer_token: Option<&'a str>,
    sdk_token: Option<&'a str>,
    h5push: Option<bool>,
    toggle: &'static str,
    waiting: u64,
}

pub(super) async fn put(api: &Api, body: &[u8]) -> Result<Answer, ApiError> {
    let put: Put = json::object(body).map_err(invalid)?;
    check_token("web_token", &put.web_token)?;
    let plugin = put.im_web_plugin_id.map_or(Some(Plugin::NONE), Plugin::new);
    let plugin = plugin.ok_or_else(|| invalid(BAD_PLUGIN))?;
    let name = |field, name: Option<String>| -> Result<Option<String>, ApiError> {
        let name = name.filter(|name| !name.is_empty());
        name.map(|name| check_token(field, &name).map(|()| name)).transpose()
    };
    let hearing = Hearing {
        customer_token: name("customer_token", put.customer_token)?,
        sdk_token: name("sdk_token", put.sdk_token)?,
        h5push: put.h5push,
        toggle: put.toggle,
    };
    let now_s = clock::wall_ms() / 1_000;
    let customer = api.store.change_customer(plugin, &put.web_token, &hearing, false, now_s).await?;
    if let Some(toggle) = put.toggle {
        api.metrics.count_toggle(toggle.as_str());
    }
    let customer = customer.ok_or_else(not_found)?;
    show(api, &customer).await
}

pub(super) async fn get_or_delete(api: &Api, method: &Method, query: &str) -> Result<Answer, ApiError> {
    let is_delete = method == Method::DELETE;
    let (mut web_token, mut plugin) = (None, None);
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        match name.as_ref() {
            // What is forgotten does not come back: a slip of the pen must not widen it.
            "web_token" if web_token.is_some() && is_delete => return Err(invalid("web_token: must be given once")),
            "im_web_plugin_id" if plugin.is_some() && is_delete => {
                return Err(invalid("im_web_plugin_id: must be given once"));
            }
            "im_web_plugin_id" if value.is_empty() && is_delete => return Err(invalid(BAD_PLUGIN)),
            "web_token" => web_token = Some(value.into_owned()),
            "im_web_plugin_id" if !value.is_empty() => {
                plugin = Some(Plugin::parse(&value).ok_or_else(|| invalid(BAD_PLUGIN))?);
            }
            "im_web_plugin_id" => {}
            unknown if is_delete => return Err(invalid(format!("{unknown}: unknown parameter"))),
            _ => {}
        }
    }
    let web_token = web_token.ok_or_else(|| invalid("web_token: is required"))?;
    check_token("web_token", &web_token)?;
    let now_s = clock::wall_ms() / 1_000;
    if is_delete {
        // No letter of theirs is put back meanwhile.
        let _replaying = api.replaying.lock().await;
        let (forgotten, withdrawn) = api.store.forget(plugin, &web_token, now_s).await?;
        // What was being given up just now is a dead letter by then.
        let dead_letters = dead_letters::forget(api, plugin, &web_token).await?;
        if forgotten == 0 && withdrawn == 0 && dead_letters == 0 {
            return Err(not_found());
        }
        #[derive(Serialize)]
        struct Forgotten {
            forgotten: u64,
            withdrawn: u64,
            dead_letters: u64,
        }
        return Ok(answer::json(StatusCode::OK, &Forgotten { forgotten, withdrawn, dead_letters }));
    }
    let customer = api.store.customer(plugin.unwrap_or_default(), &web_token, now_s)?;
    show(api, &customer.ok_or_else(not_found)?).await
}

async fn show(api: &Api, customer: &Customer) -> Result<Answer, ApiError> {
    let waiting = api.waiting(customer.plugin, &customer.web_token).await;
    let shown = Shown {
        web_token: &customer.web_token,
        im_web_plugin_id: customer.plugin.id(),
        customer_token: customer.customer_token.as_deref(),
        sdk_token: customer.sdk_token.as_deref(),
        h5push: customer.h5push,
        toggle: customer.toggle.as_str(),
        waiting: waiting.ok_or_else(|| error(Code::Stopping, "the relay does not answer"))?,
    };
    Ok(answer::json(StatusCode::OK, &shown))
}

fn check_token(field: &str, token: &str) -> Result<(), ApiError> {
    match token.len() {
        0 => Err(invalid(format!("{field}: must not be empty"))),
        1..=TOKEN_BYTES_MAX => Ok(()),
        _ => Err(invalid(format!("{field}: must be at most {TOKEN_BYTES_MAX} bytes long"))),
    }
}

fn invalid(message: impl Into<String>) -> ApiError {
    error(Code::InvalidRequest, message)
}

fn not_found() -> ApiError {
    error(Code::NotFound, "web_token: no such customer")
}
