use super::*;
use crate::domain::endpoint::Limits;

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(text, Path::new("test.toml")).map_err(|error| error.to_string())
}

#[test]
fn the_example_shows_every_key_with_its_default() {
    let example = include_str!("../../config.example.toml");
    let plain = parse("# Nothing is set.").unwrap();
    let shown = parse(example).unwrap();
    assert_eq!(format!("{plain:?}"), format!("{shown:?}"), "the example as it is");
    // With what is commented out switched on, it is complete and still right.
    let all: String = example
        .lines()
        .map(|line| line.strip_prefix("#: ").unwrap_or(line))
        // What names something of the host must be there.
        .filter(|line| !line.contains("_file") && !line.starts_with("socket_group"))
        .fold(String::new(), |text, line| text + line + "\n");
    let all = parse(&all).unwrap();
    assert_eq!(all.endpoints.len(), 3, "two, and the one for surveys");
    assert_eq!(all.open_api.accounts.len(), 1);
    for key in KEYS {
        let (table, name) = key.rsplit_once('.').unwrap_or(("", key));
        let at = if table.is_empty() { Some(0) } else { example.find(&format!("[{table}]")) };
        let at = at.unwrap_or_else(|| panic!("no table {table}"));
        assert!(example[at..].contains(&format!("{name} = ")), "{key} is not in the example");
    }
}

const KEYS: [&str; 55] = [
    "data_dir",
    "shutdown_timeout",
    "local.listen",
    "local.token",
    "local.token_file",
    "local.allowed_hosts",
    "local.socket_mode",
    "local.socket_group",
    "local.max_body_bytes",
    "local.max_connections",
    "metrics.listen",
    "metrics.max_endpoints",
    "outbox.max_events",
    "outbox.max_event_bytes",
    "outbox.min_free_disk",
    "outbox.dedupe_window",
    "outbox.dedupe_max",
    "gate.require_h5push",
    "gate.forget_after",
    "defaults.max_events",
    "defaults.rate_per_second",
    "defaults.burst",
    "defaults.concurrency",
    "push.timeout",
    "push.max_messages",
    "push.max_bytes",
    "push.max_age",
    "push.max_attempts",
    "push.max_refusals",
    "push.max_in_flight",
    "push.allow_http",
    "push.allow_networks",
    "backoff.initial",
    "backoff.multiplier",
    "backoff.max",
    "backoff.randomization",
    "breaker.failures",
    "dead_letters.keep",
    "dead_letters.max",
    "tls.extra_ca_file",
    "log.level",
    "log.format",
    "log.attempts",
    "endpoints.12.client_cert_file",
    "endpoints.12.client_key_file",
    "im_server.survey_url",
    "open_api.listen",
    "open_api.tls",
    "open_api.behind_tls_proxy",
    "open_api.accounts",
    "open_api.rate_limit_per_minute",
    "open_api.timestamp_tolerance",
    "open_api.max_connections",
    "endpoints.default.url",
    "endpoints.12.secret",
];

#[test]
fn what_is_wrong_is_said_with_its_place() {
    let table = [
        ("[push]\ntimeot = \"1s\"", "line 2, column 1", "timeot"),
        ("[push]\ntimeout = \"soon\"", "line 2, column 11", "duration"),
        ("[push]\ntimeout = \"0s\"", "", "push.timeout"),
        ("[push]\ntimeout = \"101years\"", "line 2, column 11", "100 years"),
        ("shutdown_timeout = \"500000000years\"", "line 1, column 20", "100 years"),
        ("[outbox]\nmin_free_disk = \"1 ton\"", "line 2, column 17", "size"),
        ("[endpoints.0]\nurl = \"http://a/\"", "line 1, column 12", "plugin id"),
        ("[endpoints.12]\nurl = \"ftp://a/\"", "line 2, column 7", "https://"),
        ("[endpoints.12]\nurl = \"http://u:p@a/\"", "line 2, column 7", "user name"),
        ("[endpoints.12]\nurl = \"http://a/#x\"", "line 2, column 7", "fragment"),
        ("[endpoints.12]\nurl = \"/x\"", "line 2, column 7", "https://"),
        ("[endpoints.12]\nrate_per_second = 1", "", "url is required"),
        ("[endpoints.12]\nurl = \"http://a/\"\nrate_per_second = 0", "line 3, column 19", "above 0"),
        ("[endpoints.12]\nurl = \"http://a/\"\nconcurrency = 0", "line 3, column 15", "from 1"),
        ("[push]\nallow_networks = [\"10.0.0.0/33\"]", "line 2", "networks"),
        ("[endpoints.12]\nurl = \"http://a/\"\nheaders = { Host = \"x\" }", "", "set by the relay"),
        ("[endpoints.12]\nurl = \"http://a/\"\nsecret = \"abc\"", "", "whsec_"),
        ("[local]\nlisten = \"0.0.0.0:80\"", "", "token_file"),
        ("[local]\nlisten = \"localhost\"", "line 2, column 10", "address"),
        ("[backoff]\nmultiplier = 0.5", "", "at least 1"),
        ("[push]\nallow_http = false\n[endpoints.1]\nurl = \"http://a/\"", "", "not allowed"),
        ("[log]\nlevel = \"warning\"", "", "log.level"),
        ("nonsense", "line 1", ""),
    ];
    for (text, place, problem) in table {
        let error = parse(text).unwrap_err();
        assert!(error.starts_with("test.toml: "), "{error}");
        assert!(error.contains(place) && error.contains(problem), "{text}: {error}");
    }
}

#[test]
fn limits_fall_back_to_the_defaults_and_bursts_to_a_tenth_of_the_rate() {
    let config = parse(
        "[defaults]\nrate_per_second = 50\n[endpoints.default]\nurl = \"http://a/\"\n\
         [endpoints.12]\nurl = \"https://b/\"\nrate_per_second = 0.5\nmax_events = 3",
    )
    .unwrap();
    let limits = |name: &str| config.endpoints[&name.parse().unwrap()].limits;
    assert_eq!(limits("default"), Limits { rate_per_second: 50.0, burst: 5, concurrency: 32 });
    assert_eq!(limits("12"), Limits { rate_per_second: 0.5, burst: 1, concurrency: 32 });
    assert_eq!(config.endpoints[&"12".parse().unwrap()].max_events, 3);
}

#[test]
fn secrets_come_from_files_and_are_never_shown() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("token");
    std::fs::write(&path, "s3cret-planted\n").unwrap();
    let config = parse(&format!("[local]\ntoken_file = {path:?}")).unwrap();
    assert_eq!(config.local.token.as_ref().map(Secret::expose), Some("s3cret-planted"));
    assert!(!format!("{config:?}").contains("planted"));
    assert!(parse("[local]\ntoken = \"a\"\ntoken_file = \"/nowhere\"").unwrap_err().contains("either"));
    assert!(parse("[local]\ntoken_file = \"/nowhere\"").unwrap_err().contains("/nowhere"));
}

#[test]
fn no_text_makes_the_reader_panic() {
    let example = include_bytes!("../../config.example.toml");
    let small = b"[endpoints.12]\nurl = \"https://a/\"\nrate_per_second = 1e3\n[backoff]\ninitial = \"1s\"\nmax = \"9999999999years\"\n";
    // Few of them: the example is long.
    crate::fuzz::fuzz(&[small, small, small, small, small, small, small, example], |bytes| {
        let Ok(text) = std::str::from_utf8(bytes) else { return };
        if let Ok(config) = parse(text) {
            assert!(!crate::domain::retry::Delays::new(&config.backoff).steps().is_empty());
        }
    });
}

/// A panic's text and a log line can only hold what `Debug` and `Display` give.
#[test]
fn no_secret_is_in_what_a_panic_or_an_error_could_show() {
    let secret = "whsec_cGxhbnRlZC1zaWduaW5nLXNlY3JldC0xMjM0NTY3ODkw";
    let lines = [
        "token = \"planted-local\"",
        "url = \"https://a.example/push?planted-query\"",
        &format!("secret = \"{secret}\""),
        "headers = { x-key = \"planted-header\" }",
        "listen = \"127.0.0.1:9\"\naccounts = [{ email = \"a@b\", token = \"planted-account\" }]",
        "survey_url = \"http://127.0.0.1/?planted-query\"",
    ];
    let [token, url, secret_line, headers, open_api, survey] = lines;
    let text = format!(
        "[local]\n{token}\n[endpoints.12]\n{url}\n{secret_line}\n{headers}\n[open_api]\n{open_api}\n[im_server]\n{survey}\n"
    );
    let config = parse(&text).unwrap();
    let mut shown = vec![format!("{config:?} {config:#?}")];
    // The file cut at every byte, and with a value of another type at every line, is wrong in many ways.
    shown.extend((0..text.len()).filter_map(|end| parse(text.get(..end)?).err()));
    for line in lines {
        let (key, value) = line.rsplit_once(" = ").unwrap();
        for other in [
            format!("[{value}]"),
            format!("{{ planted = {value} }}"),
            "\"planted\"".to_owned(),
            format!("{value} {value}"),
        ] {
            shown.extend(parse(&text.replace(line, &format!("{key} = {other}"))).err());
        }
    }
    assert!(shown.len() > 100);
    for text in shown {
        let at = ["planted-", "planted\"", "whsec_c", "cGxhbnRlZ"].iter().find_map(|planted| text.find(planted));
        assert_eq!(at, None, "{text}");
    }
}

#[test]
fn push_addresses_are_what_will_be_connected_to() {
    let good = [
        "https://app.example/push",
        "http://app_1.example:8080/a?b=c",
        "http://localhost/",
        "http://10.0.0.1:1/",
        "http://[::1]:65535/",
        "https://app.example./",
        "https://xn--fiq228c.example/",
        "http://3com.example/",
        "http://010.0.0.1/",
        "http://127.1/",
        "http://2130706433/",
        "http://0x7f000001/",
    ];
    for url in good {
        assert!(url.parse::<PushUrl>().is_ok(), "{url}");
    }
    let bad = [
        "http://a.example:65536/",
        "http://a.example:0/",
        "http://a.example:/",
        "http://a.example:80x/",
        "http://a.example:+80/",
        "http://a..example/",
        "http://256.1.1.1/",
        "http://1.2.3.4.5/",
        "http://127.0.0.0.1/",
        "https://2130706433/",
        "https://127.0.0.1./",
        "http://[fe80::1%25eth0]/",
        "http://[::1/",
        "http://[::1]x/",
        "http:///path",
        "ftp://a.example/",
        "http://u:p@a.example/",
        "https://a.example/#x",
    ];
    for url in bad {
        assert!(url.parse::<PushUrl>().is_err(), "{url}");
    }
}
