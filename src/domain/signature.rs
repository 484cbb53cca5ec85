//! Signed pushes: Standard Webhooks 1.0.0 (`webhook-signature`, scheme `v1`).

use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// Receivers refuse pushes whose timestamp is further away from now than so many seconds, as Standard Webhooks says.
pub const TOLERANCE_S: u64 = 300;

/// Keys that a push is signed with: the first is the newest, the others are on their way out.
#[derive(Clone)]
pub struct SigningKeys(Vec<hmac::Key>);

impl std::fmt::Debug for SigningKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SigningKeys({})", self.0.len())
    }
}

/// Why a text is no signing secret. The text itself is not repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a signing secret is `whsec_` and the base64 of 24 to 64 random bytes; several are separated by spaces")]
pub struct BadSecret;

impl SigningKeys {
    /// Reads one or several secrets, separated by spaces.
    ///
    /// # Errors
    /// One of them is none.
    pub fn parse(text: &str) -> Result<SigningKeys, BadSecret> {
        let keys: Vec<hmac::Key> = text.split_whitespace().map(key).collect::<Result<_, _>>()?;
        if keys.is_empty() { Err(BadSecret) } else { Ok(SigningKeys(keys)) }
    }

    /// The value of `webhook-signature`: one signature for each key.
    #[must_use]
    pub fn sign(&self, id: &str, timestamp_s: u64, body: &[u8]) -> String {
        let signatures: Vec<String> = self
            .0
            .iter()
            .map(|key| {
                let mut context = hmac::Context::with_key(key);
                context.update(format!("{id}.{timestamp_s}.").as_bytes());
                context.update(body);
                format!("v1,{}", STANDARD.encode(context.sign()))
            })
            .collect();
        signatures.join(" ")
    }
}

impl SigningKeys {
    /// Whether one of the signatures in a `webhook-signature` was made with one of these keys.
    #[must_use]
    pub fn verify(&self, id: &str, timestamp: &str, body: &[u8], signatures: &str) -> bool {
        let content = [id.as_bytes(), b".", timestamp.as_bytes(), b".", body].concat();
        let given = signatures.split(' ').filter_map(|signature| signature.strip_prefix("v1,"));
        let given: Vec<Vec<u8>> = given.filter_map(|signature| STANDARD.decode(signature).ok()).collect();
        self.0.iter().any(|key| given.iter().any(|tag| hmac::verify(key, &content, tag).is_ok()))
    }
}

fn key(secret: &str) -> Result<hmac::Key, BadSecret> {
    let bytes = secret.strip_prefix("whsec_").and_then(|text| STANDARD.decode(text).ok()).ok_or(BadSecret)?;
    if !(24..=64).contains(&bytes.len()) {
        return Err(BadSecret);
    }
    Ok(hmac::Key::new(hmac::HMAC_SHA256, &bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

    #[test]
    fn the_official_vector_is_reproduced_also_while_keys_rotate() {
        let (id, body) = ("msg_p5jXN8AQM9LWM0D4loKWxJek", br#"{"test": 2432232314}"#);
        let expected = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";
        assert_eq!(SigningKeys::parse(SECRET).unwrap().sign(id, 1_614_265_330, body), expected);
        let other = format!("whsec_{}", STANDARD.encode([7; 32]));
        let both = SigningKeys::parse(&format!("{other} {SECRET}")).unwrap().sign(id, 1_614_265_330, body);
        assert_eq!(both.split(' ').nth(1), Some(expected));
        let keys = SigningKeys::parse(SECRET).unwrap();
        assert!(keys.verify(id, "1614265330", body, &both));
        assert!(!keys.verify(id, "1614265331", body, &both));
        assert!(!keys.verify(id, "1614265330", b"{}", &both));
        assert!(!keys.verify(id, "1614265330", body, "v1,AAAA v2,x"));
    }

    #[test]
    fn what_is_no_secret_is_refused_and_not_repeated() {
        for text in ["", "whsec_", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_c2hvcnQ=", "whsec_%%%%"] {
            assert_eq!(SigningKeys::parse(text).err(), Some(BadSecret), "{text}");
        }
    }
}
