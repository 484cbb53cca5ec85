//! `demo`: a relay at work, within a minute and with nothing set up.

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use hyper::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

use super::http;
use crate::app::App;
use crate::clock;
use crate::config::Config;

/// How long anything may take that is waited for.
const PATIENCE: Duration = Duration::from_secs(20);
const PLUGIN: u64 = 12;
const CUSTOMER: &str = "wang_xiaoming";

/// The receiver's side: the message ids that came through, in order, and what it answers.
#[derive(Default)]
struct Phone {
    messages: Mutex<Vec<String>>,
    status: AtomicU16,
    failures: AtomicU16,
    surveys: AtomicU16,
    changed: Notify,
}

struct Demo {
    relay: SocketAddr,
    phone: Arc<Phone>,
    sent: Vec<String>,
}

pub(super) fn run() -> anyhow::Result<()> {
    crate::log::start("warn", crate::config::LogFormat::Text);
    let dir = std::env::temp_dir().join(format!("h5push-relay-demo-{:08x}", clock::random_id() as u32));
    let result = super::runtime()?.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hang_up = signal(SignalKind::hangup())?;
        tokio::select! {
            played = play(&dir) => played,
            _ = tokio::signal::ctrl_c() => bail!("interrupted"),
            _ = terminate.recv() => bail!("interrupted"),
            _ = hang_up.recv() => bail!("interrupted"),
        }
    });
    // Throw-away.
    drop(std::fs::remove_dir_all(&dir));
    result
}

async fn play(dir: &Path) -> anyhow::Result<()> {
    let phone = Arc::new(Phone { status: AtomicU16::new(200), ..Phone::default() });
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let receiver = listener.local_addr()?;
    let heard = Arc::clone(&phone);
    tokio::spawn(http::receive(listener, move |received| heard.take(&received)));
    let app = App::start(config(dir, receiver)?).await?;
    let relay = app.local_address.context("the relay listens on TCP")?;
    say(&format!("The relay listens on http://{relay}, the app's server (the receiver) on http://{receiver}/push.\n"));
    let mut demo = Demo { relay, phone, sent: Vec::new() };

    say("1. A customer opens the chat page with h5push=true; an agent says hello. The page is in the background.");
    demo.post("start_session", "Conversation started", true, true, "queued").await?;
    demo.post("message", "您好,小雅为您服务 🚚", true, false, "queued").await?;
    demo.arrive().await?;

    say("2. The customer looks at the page: what it shows needs no push.");
    demo.post("message", "Have you seen our new size chart?", false, false, "customer_online").await?;

    say("3. The app knows better and switches pushing on, then off, then on again.");
    demo.toggle(true).await?;
    demo.post("message", "Online or not, this one is pushed", false, false, "queued").await?;
    demo.arrive().await?;
    demo.toggle(false).await?;
    demo.post("message", "Switched off: not pushed", true, false, "toggled_off").await?;
    demo.toggle(true).await?;

    say("4. The app's server breaks. The relay keeps what is posted, and tries again.");
    demo.phone.status.store(500, Ordering::SeqCst);
    for number in 1..=5 {
        demo.post("message", &format!("During the outage, {number} of 5"), true, false, "queued").await?;
    }
    demo.phone.wait("an attempt to fail", |phone| phone.failures.load(Ordering::SeqCst) >= 2).await?;
    let failures = demo.phone.failures.load(Ordering::SeqCst);
    say(&format!("   {failures} attempts have failed; now the server is well again."));
    demo.phone.status.store(200, Ordering::SeqCst);
    demo.arrive().await?;

    say("5. The agent closes the conversation.");
    demo.post("close", "Conversation closed", true, false, "queued").await?;
    demo.arrive().await?;

    say("6. The customer rates the conversation; the rating reaches the IM server.");
    demo.survey().await?;

    let count = demo.sent.len();
    app.stop().await;
    say(&format!(
        "\nAll {count} messages that were accepted came through, once each and in order, and the rating too.\n\n\
         How to go on:\n\
         - h5push-relay receiver --listen 127.0.0.1:9000      prints the pushes that it gets\n\
         - cp config.example.toml my.toml, give it a data_dir, the address under [endpoints.default], and, for a receiver\n\
           on this host, push.allow_networks = [\"127.0.0.0/8\"]\n\
         - h5push-relay check-config --config my.toml\n\
         - h5push-relay --config my.toml\n\
         README.md shows how to post events with curl, what a receiver must answer, and how to run it under systemd."
    ));
    Ok(())
}

fn config(dir: &Path, receiver: SocketAddr) -> anyhow::Result<Config> {
    let text = format!(
        "data_dir = {dir:?}\n\
         [local]\nlisten = \"127.0.0.1:0\"\n\
         [metrics]\nlisten = \"127.0.0.1:0\"\n\
         [outbox]\nmin_free_disk = 0\n\
         [endpoints.default]\nurl = \"http://{receiver}/push\"\n\
         [im_server]\nsurvey_url = \"http://{receiver}/surveys\"\n\
         [backoff]\ninitial = \"300ms\"\n\
         [push]\nallow_networks = [\"127.0.0.0/8\"]\n"
    );
    Ok(Config::parse(&text, &PathBuf::from("the demo's config"))?)
}

impl Demo {
    async fn post(
        &mut self,
        kind: &str,
        content: &str,
        is_offline: bool,
        is_opening: bool,
        expected: &str,
    ) -> anyhow::Result<()> {
        let id = format!("{:08}-demo", self.sent.len() + 1);
        let message = json!({
            "type": kind,
            "message_id": id,
            "agent_id": 3,
            "agent_name": "小雅",
            "im_sub_session_id": 3001,
            "data": { "content": content },
        });
        let mut event = json!({
            "web_token": CUSTOMER,
            "im_web_plugin_id": PLUGIN,
            "offline": is_offline,
            "messages": [message],
        });
        if is_opening && let Some(event) = event.as_object_mut() {
            event.insert("h5push".to_owned(), Value::Bool(true));
        }
        let (status, answer) = self.call("/v1/events", event.to_string()).await?;
        let said = answer.get("reason").or_else(|| answer.get("outcome")).and_then(Value::as_str).unwrap_or("?");
        say(&format!("   POST /v1/events  {content:?} -> {status}, {said}"));
        if said != expected {
            bail!("the relay said {said}, not {expected}: {answer}");
        }
        if expected == "queued" {
            self.sent.push(id);
        }
        Ok(())
    }

    async fn toggle(&self, is_on: bool) -> anyhow::Result<()> {
        let body = json!({ "web_token": CUSTOMER, "im_web_plugin_id": PLUGIN, "h5push": is_on });
        let (_, answer) = self.call("/open_api_v1/im/h5push", body.to_string()).await?;
        let status = answer.get("status").and_then(Value::as_str).unwrap_or("?");
        say(&format!("   POST /open_api_v1/im/h5push  h5push={is_on} -> {status}"));
        Ok(())
    }

    async fn survey(&self) -> anyhow::Result<()> {
        let body = json!({ "im_sub_session_id": 3001, "option_id": 5, "remark": "很好" });
        let (_, answer) = self.call("/open_api_v1/im/sessions/survey", body.to_string()).await?;
        say(&format!("   POST /open_api_v1/im/sessions/survey -> {answer}"));
        self.phone.wait("the survey to arrive", |phone| phone.surveys.load(Ordering::SeqCst) > 0).await
    }

    async fn call(&self, path: &str, body: String) -> anyhow::Result<(StatusCode, Value)> {
        let (status, answer) = http::Client::of(self.relay).call(Method::POST, path, "application/json", body).await?;
        Ok((status, serde_json::from_slice(&answer)?))
    }

    /// Waits until everything that was accepted has come through, and checks the order.
    async fn arrive(&self) -> anyhow::Result<()> {
        let sent = self.sent.clone();
        self.phone.wait("the messages to arrive", move |phone| phone.messages().len() >= sent.len()).await?;
        let messages = self.phone.messages();
        if messages != self.sent {
            bail!("came through: {messages:?}\nwas accepted: {:?}", self.sent);
        }
        Ok(())
    }
}

impl Phone {
    fn take(&self, received: &http::Received) -> StatusCode {
        let status = StatusCode::from_u16(self.status.load(Ordering::SeqCst)).unwrap_or(StatusCode::OK);
        let body: Value = serde_json::from_slice(&received.body).unwrap_or_default();
        if received.path == "/surveys" {
            say(&format!("   <- survey {body}"));
            self.surveys.fetch_add(1, Ordering::SeqCst);
            self.changed.notify_one();
            return status;
        }
        let messages = body.get("messages").and_then(Value::as_array).cloned().unwrap_or_default();
        if status == StatusCode::OK {
            say(&format!(
                "   <- push {} with {} message(s), attempt {}",
                received.header("webhook-id").get(..12).unwrap_or(""),
                messages.len(),
                received.header("h5push-attempt"),
            ));
            let ids = messages.iter().filter_map(|message| message.get("message_id")?.as_str().map(str::to_owned));
            self.messages.lock().unwrap_or_else(PoisonError::into_inner).extend(ids);
        } else {
            self.failures.fetch_add(1, Ordering::SeqCst);
        }
        self.changed.notify_one();
        status
    }

    fn messages(&self) -> Vec<String> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn wait(&self, what: &str, is_there: impl Fn(&Phone) -> bool) -> anyhow::Result<()> {
        let wait = async {
            while !is_there(self) {
                self.changed.notified().await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.with_context(|| format!("waited in vain for {what}"))
    }
}

fn say(line: &str) {
    // Nobody reads any more: the demo ends by itself.
    drop(writeln!(io::stdout(), "{line}"));
}
