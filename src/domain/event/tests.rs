//! Events as they are posted: what is read, and what is refused.

use super::*;

fn field_of_error(text: &str) -> String {
    Event::parse(text).unwrap_err().field.into_owned()
}

#[test]
fn a_whole_event_is_read_and_its_messages_stay_as_they_are() {
    let text = r#" {"web_token":"a","im_web_plugin_id":12,"h5push":true,"offline":false,"customer_token":"c",
        "sdk_token":"","event_id":"e-1","unknown":[1,{"x":null}],
        "messages": [ {"type":"close", "im_sub_session_id":"17","message_id":"m1","data":1.50} ,{"message_id":"m\u0032"} ] } "#;
    let event = Event::parse(text).unwrap();
    assert_eq!(event.web_token, "a");
    assert_eq!(event.plugin.id(), 12);
    assert_eq!(event.hearing.h5push, Some(true));
    assert_eq!(event.hearing.customer_token.as_deref(), Some("c"));
    assert_eq!(event.hearing.sdk_token, None);
    assert!(!event.offline);
    assert_eq!(event.event_id.as_deref(), Some("e-1"));
    assert_eq!(event.messages.count, 2);
    assert!(event.messages.has_session && event.messages.has_close);
    assert_eq!(event.messages.ids.as_deref(), Some(&[Cow::from("m1"), Cow::from("m2")][..]));
    assert_eq!(
        event.messages.text,
        r#"{"type":"close", "im_sub_session_id":"17","message_id":"m1","data":1.50} ,{"message_id":"m\u0032"}"#
    );
}

#[test]
fn errors_name_the_field() {
    let table = [
        (r#"[]"#, "event"),
        (r#"{"web_token":"a""#, "event"),
        (r#"{"messages":[{}]}"#, "web_token"),
        (r#"{"web_token":null,"messages":[{}]}"#, "web_token"),
        (r#"{"web_token":"","messages":[{}]}"#, "web_token"),
        (r#"{"web_token":1,"messages":[{}]}"#, "web_token"),
        (r#"{"web_token":"a"}"#, "messages"),
        (r#"{"web_token":"a","messages":{}}"#, "messages"),
        (r#"{"web_token":"a","messages":[ ]}"#, "messages"),
        (r#"{"web_token":"a","messages":[1]}"#, "messages"),
        (r#"{"web_token":"a","messages":[["close"]]}"#, "messages"),
        (r#"{"web_token":"a","messages":[{}],"im_web_plugin_id":-1}"#, "im_web_plugin_id"),
        (r#"{"web_token":"a","messages":[{}],"im_web_plugin_id":1.5}"#, "im_web_plugin_id"),
        (r#"{"web_token":"a","messages":[{}],"im_web_plugin_id":"12"}"#, "im_web_plugin_id"),
        (r#"{"web_token":"a","messages":[{}],"h5push":"true"}"#, "h5push"),
        (r#"{"web_token":"a","messages":[{}],"offline":1}"#, "offline"),
        (r#"{"web_token":"a","messages":[{}],"assign_type":"human"}"#, "assign_type"),
        (r#"{"web_token":"a","messages":[{}],"event_id":""}"#, "event_id"),
        (r#"{"web_token":"a","messages":[{}],"customer_token":7}"#, "customer_token"),
    ];
    for (text, field) in table {
        assert_eq!(field_of_error(text), field, "{text}");
    }
}

#[test]
fn lengths_at_their_bounds() {
    let event = |web_token: usize, event_id: usize, messages: usize| {
        let text = format!(
            r#"{{"web_token":"{}","event_id":"{}","messages":[{}]}}"#,
            "t".repeat(web_token),
            "e".repeat(event_id),
            vec!["{}"; messages].join(",")
        );
        Event::parse(&text).map(|_| ()).map_err(|error| error.field.into_owned())
    };
    assert_eq!(event(256, 128, 1_000), Ok(()));
    assert_eq!(event(257, 128, 1_000), Err("web_token".into()));
    assert_eq!(event(256, 129, 1_000), Err("event_id".into()));
    assert_eq!(event(256, 128, 1_001), Err("messages".into()));
}

#[test]
fn nesting_is_allowed_to_128_levels() {
    // The event, the array and the message are three levels.
    let nested = |levels: usize| {
        let (open, close) = ("[".repeat(levels - 3), "]".repeat(levels - 3));
        format!(r#"{{"web_token":"a","messages":[{{"d":"]]{{{{","x":{open}{close}}}]}}"#)
    };
    assert!(Event::parse(&nested(128)).is_ok());
    assert_eq!(field_of_error(&nested(129)), "event");
}

#[test]
fn sessions_count_above_zero_also_in_decimal_strings() {
    let table = [
        ("1", true),
        ("0", false),
        ("-1", false),
        ("1.5", true),
        ("5.0", true),
        ("1e2", true),
        ("0.0", false),
        ("-1.5", false),
        ("18446744073709551616", true),
        ("null", false),
        ("true", false),
        ("[1]", false),
        (r#""3001""#, true),
        (r#""000""#, false),
        (r#""007""#, true),
        (r#""-1""#, false),
        (r#"""#.to_owned().as_str(), false),
        (r#""1x""#, false),
        ("18446744073709551615", true),
        ("1e999", true),
        ("-1e999", false),
    ]
    .map(|(value, counts)| (if value == "\"" { "\"\"".to_owned() } else { value.to_owned() }, counts));
    for (value, counts) in table {
        let text = format!(r#"{{"web_token":"a","messages":[{{"im_sub_session_id":{value}}}]}}"#);
        assert_eq!(Event::parse(&text).unwrap().messages.has_session, counts, "{value}");
    }
}

#[test]
fn what_json_allows_in_a_message_is_no_reason_to_refuse_it() {
    for odd in [r#""\ud800":1"#, r#""x":"\ud800""#, r#""type":"\ud800""#, r#""type":1e999"#, r#""message_id":1e999"#] {
        let text = format!(r#"{{"web_token":"a","messages":[{{"im_sub_session_id":1,{odd}}}]}}"#);
        let event = Event::parse(&text).unwrap();
        assert!(event.messages.has_session && event.messages.text.contains(odd), "{odd}");
    }
}

#[test]
fn a_robots_messages_are_not_looked_at() {
    for messages in ["{\"sessionId\":1}", "[]", "7", "[1]"] {
        let text = format!(r#"{{"web_token":"a","assign_type":"urobot","messages":{messages}}}"#);
        assert_eq!(Event::parse(&text).unwrap().assign, Assign::Robot);
    }
}

#[test]
fn keys_are_given_or_made_of_every_message_id() {
    let hashing = HashKey([1; 16]);
    let key = |text: &str| Event::parse(text).unwrap().key(&hashing);
    let derived = key(r#"{"web_token":"a","messages":[{"message_id":"m"}]}"#);
    assert!(derived.is_some());
    assert_eq!(derived, key(r#"{"web_token":"a","im_web_plugin_id":0,"messages":[{"x":1,"message_id":"m"}]}"#));
    assert_ne!(derived, key(r#"{"web_token":"b","messages":[{"message_id":"m"}]}"#));
    assert_eq!(key(r#"{"web_token":"a","messages":[{"message_id":"m"},{}]}"#), None);
    assert_eq!(key(r#"{"web_token":"a","messages":[{"message_id":""}]}"#), None);
    assert_eq!(key(r#"{"web_token":"a","messages":[{"message_id":7}]}"#), None);
}

#[test]
fn no_text_makes_the_parser_panic_and_what_it_takes_is_relayed_as_it_stands() {
    let conversation = include_str!("../../../tests/it/conversation.ndjson");
    let examples: Vec<&[u8]> = conversation.lines().map(str::as_bytes).collect();
    crate::fuzz::fuzz(&examples, |bytes| {
        let Ok(text) = std::str::from_utf8(bytes) else { return };
        if let Ok(event) = Event::parse(text) {
            assert!(!event.web_token.is_empty() && text.contains(event.messages.text));
            let body = format!("[{}]", event.messages.text);
            // By its grammar: an escaped half of a surrogate pair is valid JSON, and the receiver's affair.
            let is_array = serde_json::from_str::<Vec<&serde_json::value::RawValue>>(&body).is_ok();
            assert!(event.messages.count == 0 || is_array);
        }
    });
}
