//! Customers and the toggle (contract §3, §4).

use serde_json::json;

use super::support::*;

fn start() -> (Receiver, Relay) {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, "[backoff]\ninitial = \"100ms\"\nmax = \"300ms\""));
    (receiver, relay)
}

#[test]
fn a_customer_is_registered_shown_changed_and_forgotten() {
    let (_receiver, relay) = start();
    let put = json!({ "web_token": "a", "im_web_plugin_id": 12, "customer_token": "c", "h5push": true });
    let expected = json!({
        "web_token": "a", "im_web_plugin_id": 12, "customer_token": "c", "sdk_token": null,
        "h5push": true, "toggle": "auto", "waiting": 0,
    });
    for _ in 0..2 {
        let response = relay.put_customer(&put);
        assert_eq!((response.status, response.json()), (200, expected.clone()));
    }
    assert_eq!(get(relay.local, "/v1/customers?web_token=a&im_web_plugin_id=12").json(), expected);
    assert_eq!(get(relay.local, "/v1/customers?web_token=a&im_web_plugin_id=13").code(), "not_found");
    assert_eq!(get(relay.local, "/v1/customers").code(), "invalid_request");
    // A name that means another customer moves.
    let other = relay.put_customer(&json!({ "web_token": "b", "im_web_plugin_id": 12, "customer_token": "c" }));
    assert_eq!(other.json()["customer_token"], "c");
    let first = get(relay.local, "/v1/customers?web_token=a&im_web_plugin_id=12").json();
    assert_eq!((first["customer_token"].is_null(), first["h5push"].as_bool()), (true, Some(true)));
    // All of it is there after a crash.
    let dir = relay.kill();
    let relay = Relay::start_in(dir, &config("127.0.0.1:9".parse().unwrap(), ""));
    assert_eq!(get(relay.local, "/v1/customers?web_token=b&im_web_plugin_id=12").json()["customer_token"], "c");
    relay.put_customer(&json!({ "web_token": "b" }));
    let deleted = request(relay.local, "DELETE", "/v1/customers?web_token=b", &[], b"");
    assert_eq!((deleted.status, deleted.json()), (200, json!({ "forgotten": 2, "withdrawn": 0, "dead_letters": 0 })));
    for plugin in ["", "&im_web_plugin_id=12"] {
        assert_eq!(get(relay.local, &format!("/v1/customers?web_token=b{plugin}")).status, 404);
    }
    assert_eq!(relay.toggle("customer_token=c&im_web_plugin_id=12")["status_code"], 3);
}

#[test]
fn wrong_customers_are_refused() {
    let (_receiver, relay) = start();
    let long = "x".repeat(257);
    let wrong = [
        json!({}),
        json!([]),
        json!({ "web_token": "" }),
        json!({ "web_token": long }),
        json!({ "web_token": "a", "customer_token": long }),
        json!({ "web_token": "a", "im_web_plugin_id": -1 }),
        json!({ "web_token": "a", "im_web_plugin_id": "12" }),
        json!({ "web_token": "a", "toggle": "maybe" }),
        json!({ "web_token": "a", "h5push": 1 }),
    ];
    for body in wrong {
        let response = relay.put_customer(&body);
        assert_eq!((response.status, response.code().as_str()), (400, "invalid_request"), "{body}");
    }
    let text = request(relay.local, "PUT", "/v1/customers", &[("content-type", "text/plain")], b"{}");
    assert_eq!(text.status, 415);
    assert_eq!(get(relay.local, "/v1/customers?web_token=a").status, 404);
}

#[test]
fn the_toggle_answers_as_that_api_does() {
    let (_receiver, relay) = start();
    let unknown = relay.toggle("web_token=a&im_web_plugin_id=12&h5push=true");
    assert_eq!(unknown, json!({ "code": 1000, "message": "请求成功", "status": "无效客户", "status_code": 3 }));
    assert_eq!(get(relay.local, "/v1/customers?web_token=a&im_web_plugin_id=12").status, 404, "nothing is stored");
    relay.put_customer(&json!({
        "web_token": "a", "im_web_plugin_id": 12, "customer_token": "c", "sdk_token": "s", "h5push": true,
    }));
    let on = json!({ "code": 1000, "message": "请求成功", "status": "推送中", "status_code": 1 });
    let off = json!({ "code": 1000, "message": "请求成功", "status": "无推送", "status_code": 0 });
    assert_eq!(relay.toggle("web_token=a&im_web_plugin_id=12"), on);
    assert_eq!(relay.toggle("customer_token=c&im_web_plugin_id=12&h5push=false"), off);
    assert_eq!(relay.toggle("sdk_token=s&im_web_plugin_id=12"), off);
    let post = |content_type: &str, body: &str| {
        let headers = [("content-type", content_type)];
        request(relay.local, "POST", "/open_api_v1/im/h5push", &headers, body.as_bytes()).json()
    };
    let form = "application/x-www-form-urlencoded";
    assert_eq!(post(form, "web_token=a&im_web_plugin_id=12&h5push=true"), on);
    assert_eq!(post("application/json", r#"{"web_token":"a","im_web_plugin_id":"12","h5push":false}"#), off);
    // A customer whose page was not opened with h5push=true, and one with nowhere to push to.
    relay.put_customer(&json!({ "web_token": "b", "im_web_plugin_id": 12 }));
    assert_eq!(relay.toggle("web_token=b&im_web_plugin_id=12&h5push=true"), off);
    relay.put_customer(&json!({ "web_token": "b", "im_web_plugin_id": 99, "h5push": true }));
    assert_eq!(relay.toggle("web_token=b&im_web_plugin_id=99&h5push=true"), off);
    let code = |query: &str| relay.toggle(query)["code"].as_u64().unwrap();
    assert_eq!(code("im_web_plugin_id=12"), 2062);
    assert_eq!(code("web_token=a"), 2062);
    assert_eq!(code("web_token=a&sdk_token=s&im_web_plugin_id=12"), 2000);
    assert_eq!(code("web_token=a&im_web_plugin_id=zwölf"), 2000);
    assert_eq!(relay.metric("h5push_toggles_total", &[("state", "on")]), 3.0);
}

#[test]
fn switching_off_withdraws_what_waits_and_stops_a_lane_that_is_in_trouble() {
    let (receiver, relay) = start();
    receiver.answer_status(500);
    for number in 0..5 {
        relay.queue(&event("a", &format!("a{number}")));
    }
    relay.queue(&event("b", "b0"));
    receiver.wait("both to be tried", |pushes| {
        let tried = |customer| pushes.iter().filter(|push| push.customer() == customer).count();
        tried("a") >= 2 && tried("b") >= 1
    });
    assert!(
        relay.put_customer(&json!({ "web_token": "a", "im_web_plugin_id": 12 })).json()["waiting"].as_u64() > Some(0)
    );
    assert_eq!(relay.toggle("web_token=a&im_web_plugin_id=12&h5push=false")["status_code"], 0);
    let after = std::time::Instant::now();
    assert_eq!(get(relay.local, "/v1/customers?web_token=a&im_web_plugin_id=12").json()["waiting"], 0);
    assert_eq!(relay.post(&event("a", "a9")).json()["reason"], "toggled_off");
    // The other customer goes on; of this one nothing begins any more.
    let tried = receiver.pushes().iter().filter(|push| push.customer() == "b").count();
    receiver
        .wait("b to be tried again", |pushes| pushes.iter().filter(|push| push.customer() == "b").count() >= tried + 3);
    // One that had begun before the answer may be seen after it.
    let late = receiver.pushes().iter().filter(|push| push.customer() == "a" && push.at >= after).count();
    assert!(late <= 1, "{late}");
    relay.wait_metric("h5push_withdrawn_total", &[], |count| count == 5.0);
    // Nor after a crash; and switched on again, only what is new.
    // (Well before the start: what waits may be due at once.)
    let dir = relay.kill();
    receiver.answer_status(200);
    let relay = Relay::start_in(dir, &config(receiver.address, ""));
    assert_eq!(relay.toggle("web_token=a&im_web_plugin_id=12&h5push=true")["status_code"], 1);
    relay.queue(&event("a", "a10"));
    receiver.wait("everything", |pushes| pushes.iter().filter(|push| push.status == 200).count() >= 2);
    let mut delivered = receiver.delivered_ids();
    delivered.sort();
    assert_eq!(delivered, ["a10", "b0"]);
}

#[test]
fn a_push_in_flight_when_its_customer_is_switched_off_is_not_repeated() {
    let (receiver, relay) = start();
    receiver.answer(|_| Answer::After(std::time::Duration::from_millis(500), 500));
    relay.queue(&event("a", "a0"));
    relay.wait_metric("h5push_in_flight", &[("endpoint", "12")], |count| count == 1.0);
    relay.toggle("web_token=a&im_web_plugin_id=12&h5push=false");
    receiver.wait_pushes(1);
    relay.wait_metric("h5push_withdrawn_total", &[], |count| count == 1.0);
    receiver.answer_status(200);
    relay.queue(&event("b", "b0"));
    assert_eq!(receiver.wait_delivered(1), ["b0"]);
    assert_eq!(receiver.pushes().len(), 2);
}

#[test]
fn a_forgotten_customer_is_never_pushed_to_again() {
    let (receiver, relay) = start();
    receiver.answer_status(500);
    relay.queue(&event("a", "a0"));
    relay.queue(&event("a", "a1"));
    receiver.wait_pushes(1);
    let deleted = request(relay.local, "DELETE", "/v1/customers?web_token=a&im_web_plugin_id=12", &[], b"");
    assert_eq!(deleted.json(), json!({ "forgotten": 1, "withdrawn": 2, "dead_letters": 0 }));
    receiver.answer_status(200);
    relay.queue(&event("b", "b0"));
    receiver.wait_delivered(1);
    assert_eq!(receiver.delivered_ids(), ["b0"]);
    relay.wait_metric("h5push_outbox_events", &[("endpoint", "12")], |count| count == 0.0);
    let again = request(relay.local, "DELETE", "/v1/customers?web_token=a&im_web_plugin_id=12", &[], b"");
    assert_eq!(again.status, 404);
}

#[test]
fn a_customer_not_heard_of_is_forgotten() {
    let receiver = Receiver::start();
    let relay = Relay::start(&config(receiver.address, "[gate]\nforget_after = \"2s\""));
    relay.put_customer(&json!({ "web_token": "a", "im_web_plugin_id": 12, "h5push": true }));
    assert_eq!(relay.toggle("web_token=a&im_web_plugin_id=12")["status_code"], 1);
    wait_until("the customer to be forgotten", || relay.toggle("web_token=a&im_web_plugin_id=12")["status_code"] == 3);
}
