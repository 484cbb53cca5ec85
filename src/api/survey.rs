//! `POST /open_api_v1/im/sessions/survey` (contract §4): the customer's rating after a close push, kept durably and
//! delivered to the IM server.

use serde::Serialize;

use super::Api;
use super::answer::Answer;
use super::udesk::{self, Failure, Parameters, missing, unavailable, wrong};
use crate::clock;
use crate::domain::endpoint::{EndpointName, Plugin};
use crate::store::Accepted;

/// What the IM server gets, field by field as it was given.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Survey<'a> {
    im_sub_session_id: u64,
    option_id: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    remark: Option<&'a str>,
}

pub(super) async fn post(api: &Api, parameters: &Parameters) -> Result<Answer, Failure> {
    let outcome = store(api, parameters).await;
    api.metrics.count_survey(match &outcome {
        Ok(()) => "queued",
        Err(failure) if failure.code == udesk::UNAVAILABLE => "refused",
        Err(_) => "rejected",
    });
    outcome.map(|()| udesk::done(None))
}

async fn store(api: &Api, parameters: &Parameters) -> Result<(), Failure> {
    let survey = check(parameters)?;
    let endpoints = api.endpoints.load_full();
    let endpoint = endpoints.get(&EndpointName::SURVEY).and_then(Option::as_ref);
    let endpoint = endpoint.ok_or_else(|| wrong("参数错误:未配置满意度调查的接收地址"))?;
    let body = serde_json::to_string(&survey).map_err(|_| wrong("参数错误:remark"))?;
    if body.len() > api.config.load().max_event_bytes {
        return Err(wrong("参数错误:remark 过长"));
    }
    let hashing = api.store.hashing();
    let session = survey.im_sub_session_id.to_string();
    let event_id = format!("evt_{:032x}", clock::random_id());
    let event = Accepted {
        endpoint: endpoint.name,
        plugin: Plugin::NONE,
        lane: hashing.lane(endpoint.name, Plugin::NONE, &session),
        key: hashing.given_event(Plugin::NONE, &event_id),
        accepted_ms: clock::wall_ms(),
        given_id: Some(&event_id),
        web_token: &session,
        count: 1,
        messages: &body,
    };
    match api.store.post_ungated(&event, endpoint.max_events).await {
        Ok(true) => Ok(()),
        Ok(false) => Err(udesk::full()),
        Err(refusal) => Err(unavailable(refusal)),
    }
}

fn check(parameters: &Parameters) -> Result<Survey<'_>, Failure> {
    let value = |name: &str| parameters.get(name).map(String::as_str);
    let session = value("im_sub_session_id").ok_or_else(|| missing("im_sub_session_id"))?;
    let option = value("option_id").ok_or_else(|| missing("option_id"))?;
    let is_number = session.bytes().all(|byte| byte.is_ascii_digit());
    let session = session.parse().ok().filter(|id| is_number && *id > 0);
    let digits = option.strip_prefix('-').unwrap_or(option);
    let is_number = digits.bytes().all(|byte| byte.is_ascii_digit());
    let option = option.parse().ok().filter(|_| is_number);
    Ok(Survey {
        im_sub_session_id: session.ok_or_else(|| wrong("参数错误:im_sub_session_id 必须是正整数"))?,
        option_id: option.ok_or_else(|| wrong("参数错误:option_id 必须是整数"))?,
        remark: value("remark"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn session_and_option_are_required_integers_and_a_remark_is_free_text() {
        let call = |text: &str| {
            let parameters: Parameters = form_urlencoded::parse(text.as_bytes()).into_owned().collect();
            check(&parameters).map(|survey| serde_json::to_string(&survey).unwrap()).map_err(|failure| failure.code)
        };
        for (text, expected) in [
            ("im_sub_session_id=3001&option_id=2", Ok(r#"{"im_sub_session_id":3001,"option_id":2}"#)),
            (
                "im_sub_session_id=3001&option_id=-1&remark=%E5%A5%BD%22",
                Ok(r#"{"im_sub_session_id":3001,"option_id":-1,"remark":"好\""}"#),
            ),
            ("option_id=2", Err(2_062)),
            ("im_sub_session_id=3001", Err(2_062)),
            ("im_sub_session_id=0&option_id=2", Err(2_000)),
            ("im_sub_session_id=-3&option_id=2", Err(2_000)),
            ("im_sub_session_id=%2B3&option_id=2", Err(2_000)),
            ("im_sub_session_id=3001&option_id=1.5", Err(2_000)),
            ("im_sub_session_id=3001&option_id=x", Err(2_000)),
            ("im_sub_session_id=99999999999999999999&option_id=1", Err(2_000)),
        ] {
            assert_eq!(call(text), expected.map(str::to_owned), "{text}");
        }
    }
}
