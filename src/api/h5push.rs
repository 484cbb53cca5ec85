//! `POST /open_api_v1/im/h5push` (contract §4): asks for a customer's switch, or sets it.

use super::Api;
use super::answer::Answer;
use super::udesk::{self, Failure, Parameters, missing, unavailable, wrong};
use crate::clock;
use crate::domain::customer::{Customer, Hearing, NameKind, Toggle};
use crate::domain::endpoint::Plugin;

/// What was asked, checked.
#[derive(Debug, PartialEq, Eq)]
struct Call {
    token: Token,
    plugin: Plugin,
    h5push: Option<bool>,
}

#[derive(Debug, PartialEq, Eq)]
enum Token {
    Web(String),
    Name(NameKind, String),
}

/// Answers a call. `plugins`: the only ones that the caller may ask about.
pub(super) async fn post(api: &Api, parameters: &Parameters, plugins: Option<&[Plugin]>) -> Result<Answer, Failure> {
    let call = check(parameters)?;
    let is_theirs = plugins.is_none_or(|plugins| plugins.contains(&call.plugin));
    let status_code = if is_theirs { carry_out(api, call).await? } else { UNKNOWN };
    let status = match status_code {
        0 => "无推送",
        1 => "推送中",
        _ => "无效客户",
    };
    Ok(udesk::done(Some((status_code, status))))
}

const UNKNOWN: u8 = 3;

async fn carry_out(api: &Api, call: Call) -> Result<u8, Failure> {
    let now_s = clock::wall_ms() / 1_000;
    let web_token = match call.token {
        Token::Web(web_token) => Some(web_token),
        Token::Name(kind, name) => api.store.customer_named(kind, call.plugin, &name).map_err(unavailable)?,
    };
    let Some(web_token) = web_token else { return Ok(UNKNOWN) };
    let customer: Option<Customer> = match call.h5push {
        None => api.store.customer(call.plugin, &web_token, now_s).map_err(unavailable)?,
        Some(is_on) => {
            let toggle = if is_on { Toggle::On } else { Toggle::Off };
            let hearing = Hearing { toggle: Some(toggle), ..Hearing::default() };
            let customer = api.store.change_customer(call.plugin, &web_token, &hearing, true, now_s).await;
            let customer = customer.map_err(unavailable)?;
            if customer.is_some() {
                api.metrics.count_toggle(toggle.as_str());
            }
            customer
        }
    };
    Ok(customer.map_or(UNKNOWN, |customer| u8::from(api.would_push(&customer))))
}

fn check(parameters: &Parameters) -> Result<Call, Failure> {
    let value = |name: &str| parameters.get(name).map(String::as_str);
    let web = value("web_token").map(|token| Token::Web(token.to_owned()));
    let named = |kind, name| value(name).map(|token| Token::Name(kind, token.to_owned()));
    let tokens = [web, named(NameKind::Customer, "customer_token"), named(NameKind::Sdk, "sdk_token")];
    let mut tokens = tokens.into_iter().flatten();
    let token = tokens.next().ok_or_else(|| missing("customer_token、web_token 或 sdk_token"))?;
    if tokens.next().is_some() {
        return Err(wrong("参数错误:customer_token、web_token、sdk_token 只能有一个"));
    }
    let plugin = value("im_web_plugin_id").ok_or_else(|| missing("im_web_plugin_id"))?;
    let plugin = Plugin::parse(plugin).ok_or_else(|| wrong("参数错误:im_web_plugin_id 必须是数字"))?;
    let h5push = match value("h5push") {
        None => None,
        Some("true") => Some(true),
        Some("false") => Some(false),
        Some(_) => return Err(wrong("参数错误:h5push 必须是 true 或 false")),
    };
    Ok(Call { token, plugin, h5push })
}

#[cfg(test)]
mod tests {
    use super::super::udesk::{BodyForm, parameters};
    use super::*;

    fn call(query: &str, form: BodyForm, body: &str) -> Result<Call, u32> {
        parameters(query, form, body.as_bytes())
            .and_then(|parameters| check(&parameters))
            .map_err(|failure| failure.code)
    }

    #[test]
    fn parameters_come_from_query_json_and_form_alike() {
        let expected = Call {
            token: Token::Name(NameKind::Sdk, "é 1".to_owned()),
            plugin: Plugin::new(12).unwrap(),
            h5push: Some(false),
        };
        let forms = [
            ("sdk_token=%C3%A9+1&im_web_plugin_id=12&h5push=false", BodyForm::None, ""),
            ("", BodyForm::Form, "sdk_token=%C3%A9%201&im_web_plugin_id=12&h5push=false&web_token="),
            ("", BodyForm::Json, r#"{"sdk_token":"é 1","im_web_plugin_id":12,"h5push":false,"web_token":null}"#),
            ("im_web_plugin_id=12", BodyForm::Json, r#"{"sdk_token":"é 1","im_web_plugin_id":"12","h5push":"false"}"#),
        ];
        for (query, form, body) in forms {
            assert_eq!(call(query, form, body).as_ref(), Ok(&expected), "{query} {body}");
        }
    }

    #[test]
    fn what_is_missing_or_wrong_has_its_code() {
        let table = [
            ("", BodyForm::None, "", 2_062),
            ("im_web_plugin_id=12", BodyForm::None, "", 2_062),
            ("web_token=&im_web_plugin_id=12", BodyForm::None, "", 2_062),
            ("web_token=a", BodyForm::None, "", 2_062),
            ("web_token=a&sdk_token=b&im_web_plugin_id=12", BodyForm::None, "", 2_000),
            ("web_token=a&im_web_plugin_id=x", BodyForm::None, "", 2_000),
            ("web_token=a&im_web_plugin_id=-1", BodyForm::None, "", 2_000),
            ("web_token=a&im_web_plugin_id=%2B1", BodyForm::None, "", 2_000),
            ("web_token=a&im_web_plugin_id=12&h5push=yes", BodyForm::None, "", 2_000),
            ("web_token=a&im_web_plugin_id=12", BodyForm::Json, r#"{"web_token":"b"}"#, 2_000),
            ("web_token=a&web_token=b&im_web_plugin_id=12", BodyForm::None, "", 2_000),
            ("web_token=a&im_web_plugin_id=12", BodyForm::Json, "{", 2_000),
            ("web_token=a&im_web_plugin_id=12", BodyForm::Json, "[]", 2_000),
            ("im_web_plugin_id=12", BodyForm::Json, r#"{"web_token":["a"]}"#, 2_000),
            ("web_token=a&im_web_plugin_id=12", BodyForm::Json, r#"{"h5push":true,"h5push":false}"#, 2_000),
            ("im_web_plugin_id=12", BodyForm::Json, r#"{"web_token":"a","im_web_plugin_id":1.5}"#, 2_000),
        ];
        for (query, form, body, code) in table {
            assert_eq!(call(query, form, body), Err(code), "{query} {body}");
        }
    }

    #[test]
    fn no_parameters_make_it_panic() {
        let query = b"web_token=a%20b&im_web_plugin_id=12&h5push=true&email=a&timestamp=1&nonce=n";
        let json = br#"{"sdk_token":"x","im_web_plugin_id":"12","h5push":false,"other":[1,{"a":null}]}"#;
        crate::fuzz::fuzz(&[query, json], |bytes| {
            let text = String::from_utf8_lossy(bytes);
            for form in [BodyForm::None, BodyForm::Form, BodyForm::Json] {
                drop(parameters(&text, form, bytes).and_then(|parameters| check(&parameters)));
            }
        });
    }
}
