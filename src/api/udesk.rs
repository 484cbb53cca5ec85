//! What the Udesk-compatible calls have in common (contract §4): parameters from query, JSON or form; HTTP status 200
//! and a code; messages in Chinese.

use std::collections::BTreeMap;
use std::fmt;

use hyper::StatusCode;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::answer::{self, Answer, ApiError, Code};
use super::query::is_utf8;
use crate::store::Refusal;

/// Parameters by name. An empty value is an absent one.
pub(super) type Parameters = BTreeMap<String, String>;

/// How the body is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BodyForm {
    None,
    Json,
    Form,
}

/// An error of this API: its code and what is wrong, in Chinese.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub code: u32,
    pub message: String,
}

#[derive(Serialize)]
struct Body<'a> {
    code: u32,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status_code: Option<u8>,
}

/// The code of a call that succeeded.
pub(super) const DONE: u32 = 1_000;

/// A success, with a status where the call has one.
pub(super) fn done(status: Option<(u8, &'static str)>) -> Answer {
    let (status_code, status) = status.unzip();
    answer::json(StatusCode::OK, &Body { code: DONE, message: "请求成功", status, status_code })
}

impl Failure {
    pub(super) fn into_answer(self) -> Answer {
        let body = Body { code: self.code, message: &self.message, status: None, status_code: None };
        answer::json(StatusCode::OK, &body)
    }
}

/// The code of "not just now".
pub(super) const UNAVAILABLE: u32 = 5_000;

pub(super) fn unsigned() -> Failure {
    Failure { code: 2_059, message: "签名错误、已过期或 nonce 已使用".to_owned() }
}

pub(super) fn too_many() -> Failure {
    Failure { code: 2_060, message: "请求过于频繁,请稍后重试".to_owned() }
}

pub(super) fn full() -> Failure {
    Failure { code: UNAVAILABLE, message: "等待发送的数据过多,请稍后重试".to_owned() }
}

pub(super) fn unavailable(_: Refusal) -> Failure {
    Failure { code: UNAVAILABLE, message: "服务暂时无法保存,请稍后重试".to_owned() }
}

pub(super) fn wrong(message: impl Into<String>) -> Failure {
    Failure { code: 2_000, message: message.into() }
}

pub(super) fn missing(name: &str) -> Failure {
    Failure { code: 2_062, message: format!("缺少参数:{name}") }
}

/// A body that was not read (contract §4: HTTP status 200 and a code).
pub(super) fn unread(error: ApiError) -> Failure {
    match error.code {
        Code::TooLarge | Code::InvalidRequest => wrong("参数错误:请求体过大或不完整"),
        Code::RequestTimeout => wrong("参数错误:请求体接收超时"),
        Code::InvalidEvent
        | Code::Unauthorized
        | Code::Forbidden
        | Code::NotFound
        | Code::MethodNotAllowed(_)
        | Code::UnsupportedMediaType
        | Code::OutboxFull
        | Code::EndpointFull
        | Code::DiskLow
        | Code::Stopping => Failure { code: UNAVAILABLE, message: "服务暂时不可用,请稍后重试".to_owned() },
    }
}

/// Collects the parameters of query and body. An empty value is an absent one; two that differ are an error.
pub(super) fn parameters(query: &str, form: BodyForm, body: &[u8]) -> Result<Parameters, Failure> {
    let mut all = Parameters::new();
    let mut add = |name: String, value: String| match all.get(&name) {
        _ if value.is_empty() => Ok(()),
        Some(other) if *other != value => Err(wrong(format!("参数错误:{name} 的值前后不一致"))),
        _ => {
            all.insert(name, value);
            Ok(())
        }
    };
    if !is_utf8(query.as_bytes()) || form == BodyForm::Form && !is_utf8(body) {
        return Err(wrong("参数错误:必须是 UTF-8 编码"));
    }
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        add(name.into_owned(), value.into_owned())?;
    }
    match form {
        BodyForm::None => {}
        BodyForm::Form => {
            for (name, value) in form_urlencoded::parse(body) {
                add(name.into_owned(), value.into_owned())?;
            }
        }
        BodyForm::Json if body.trim_ascii().is_empty() => {}
        BodyForm::Json => {
            let Pairs(pairs) = serde_json::from_slice(body).map_err(|error| {
                wrong(if error.is_data() {
                    "参数错误:请求体必须是 JSON 对象"
                } else {
                    "参数错误:请求体不是合法的 JSON"
                })
            })?;
            for (name, value) in pairs {
                let value = match value {
                    Value::Null => String::new(),
                    Value::String(text) => text,
                    Value::Number(number) => number.to_string(),
                    Value::Bool(is_true) => is_true.to_string(),
                    Value::Array(_) | Value::Object(_) if USED.contains(&name.as_str()) => {
                        return Err(wrong(format!("参数错误:{name}")));
                    }
                    Value::Array(_) | Value::Object(_) => continue,
                };
                add(name, value)?;
            }
        }
    }
    Ok(all)
}

/// A JSON object's members, also those of one name: a map would keep the last of them.
struct Pairs(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Pairs, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Pairs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = members.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

/// Every parameter of these calls: a list or an object is wrong there, and ignored elsewhere.
const USED: [&str; 8] = [
    "customer_token",
    "web_token",
    "sdk_token",
    "im_web_plugin_id",
    "h5push",
    "im_sub_session_id",
    "option_id",
    "remark",
];
