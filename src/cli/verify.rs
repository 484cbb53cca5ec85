//! `verify`: whether a push is signed rightly.

use std::io::{self, Read as _, Write as _};

use anyhow::bail;

use crate::clock;
use crate::domain::signature::{SigningKeys, TOLERANCE_S};

/// What a receiver got.
#[derive(Debug, clap::Args)]
pub(super) struct Verify {
    /// The endpoint's secret (whsec_…); several, separated by spaces.
    #[arg(long)]
    secret: String,
    /// The header webhook-id.
    #[arg(long)]
    id: String,
    /// The header webhook-timestamp.
    #[arg(long)]
    timestamp: String,
    /// The header webhook-signature.
    #[arg(long)]
    signature: String,
}

impl Verify {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let mut body = Vec::new();
        io::stdin().lock().read_to_end(&mut body)?;
        self.check(&body, clock::wall_ms() / 1_000)?;
        writeln!(io::stdout(), "valid")?;
        Ok(())
    }

    fn check(&self, body: &[u8], now_s: u64) -> anyhow::Result<()> {
        let keys = SigningKeys::parse(&self.secret)?;
        let Ok(at) = self.timestamp.parse::<u64>() else { bail!("webhook-timestamp is no number of seconds") };
        if !self.signature.split(' ').any(|signature| signature.starts_with("v1,")) {
            bail!("webhook-signature has no part that begins with \"v1,\"");
        }
        if !keys.verify(&self.id, &self.timestamp, body, &self.signature) {
            bail!(
                "the signature is not one of this secret over this id, timestamp and body of {} bytes: is the body just \
                 as it came, before any parsing?",
                body.len()
            );
        }
        let away = at.abs_diff(now_s);
        if away > TOLERANCE_S {
            bail!("signed rightly, but {away} s away from now: receivers refuse more than {TOLERANCE_S} s");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_official_vector_is_valid_in_its_time_and_each_fault_is_named() {
        let official = || Verify {
            secret: "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".to_owned(),
            id: "msg_p5jXN8AQM9LWM0D4loKWxJek".to_owned(),
            timestamp: "1614265330".to_owned(),
            signature: "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=".to_owned(),
        };
        let body = br#"{"test": 2432232314}"#;
        official().check(body, 1_614_265_330 + 300).unwrap();
        let faults = [
            (official(), body.as_slice(), 1_614_265_631, "301 s away"),
            (official(), b"{}", 1_614_265_330, "not one of this secret"),
            (Verify { timestamp: "soon".to_owned(), ..official() }, body, 0, "no number"),
            (Verify { signature: "g0hM9S".to_owned(), ..official() }, body, 0, "v1,"),
            (Verify { secret: "abc".to_owned(), ..official() }, body, 0, "whsec_"),
        ];
        for (verify, body, now_s, problem) in faults {
            let error = verify.check(body, now_s).unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
        }
    }
}
