//! `receiver`: prints the pushes that it gets.

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context as _;
use hyper::StatusCode;
use serde_json::value::RawValue;
use tokio::net::TcpListener;

use super::http::{self, Received};
use crate::clock;
use crate::domain::signature::{SigningKeys, TOLERANCE_S};

pub(super) fn run(listen: SocketAddr, secret: Option<&str>, fail: Option<u16>) -> anyhow::Result<()> {
    let keys = Arc::new(secret.map(SigningKeys::parse).transpose()?);
    let status = fail.map_or(Ok(StatusCode::OK), StatusCode::from_u16)?;
    super::runtime()?.block_on(async {
        let listener = TcpListener::bind(listen).await.with_context(|| format!("listening on {listen}"))?;
        writeln!(io::stdout(), "receiving on http://{}/ , answering {status}", listener.local_addr()?)?;
        http::receive(listener, move |received| show(&received, keys.as_ref().as_ref(), status)).await
    })
}

fn show(received: &Received, keys: Option<&SigningKeys>, status: StatusCode) -> StatusCode {
    let verdict = keys.map(|keys| verify(received, keys));
    let status = if matches!(verdict, Some(Err(_))) { StatusCode::UNAUTHORIZED } else { status };
    let mut out = io::stdout().lock();
    let signature = match verdict {
        None => "",
        Some(Ok(())) => "  signature valid",
        Some(Err("missing")) => "  NOT SIGNED",
        Some(Err(_)) => "  SIGNATURE WRONG",
    };
    let head = writeln!(
        out,
        "{}  {}  attempt {}  -> {}{signature}",
        received.path,
        received.header("webhook-id"),
        received.header("h5push-attempt"),
        status.as_u16(),
    );
    let lines = lines(&received.body);
    let rest = lines.iter().try_for_each(|line| writeln!(out, "    {line}"));
    // Nobody reads any more: then nothing need be printed.
    drop(head.and(rest));
    status
}

fn verify(received: &Received, keys: &SigningKeys) -> Result<(), &'static str> {
    let [id, timestamp, signature] =
        ["webhook-id", "webhook-timestamp", "webhook-signature"].map(|name| received.header(name));
    if signature.is_empty() {
        return Err("missing");
    }
    let is_fresh =
        timestamp.parse::<u64>().is_ok_and(|seconds| seconds.abs_diff(clock::wall_ms() / 1_000) <= TOLERANCE_S);
    if is_fresh && keys.verify(id, timestamp, &received.body, signature) { Ok(()) } else { Err("wrong") }
}

/// The customer, then a line for each message.
fn lines(body: &[u8]) -> Vec<String> {
    #[derive(serde::Deserialize)]
    struct Push<'a> {
        web_token: String,
        im_web_plugin_id: Option<u64>,
        #[serde(borrow)]
        messages: Vec<&'a RawValue>,
    }
    match serde_json::from_slice::<Push<'_>>(body) {
        Ok(push) => {
            let plugin = push.im_web_plugin_id.map_or(String::new(), |id| format!("  plugin {id}"));
            let messages = push.messages.iter().map(|message| message.get().to_owned());
            std::iter::once(format!("{:?}{plugin}", push.web_token)).chain(messages).collect()
        }
        Err(_) => vec![String::from_utf8_lossy(body).into_owned()],
    }
}
