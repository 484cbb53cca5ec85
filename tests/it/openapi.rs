//! The description at `/openapi.json`, held against a running relay by schemathesis.

use std::process::{Command, Stdio};

use crate::support::*;

#[test]
fn the_relay_does_what_its_description_says() {
    let receiver = Receiver::start();
    let surveys = format!("[im_server]\nsurvey_url = \"http://{}/\"\n", receiver.address);
    let relay = Relay::start(&config(receiver.address, &surveys));
    let description = get(relay.local, "/openapi.json").json();
    assert_eq!(description["openapi"], "3.1.0");
    // schemathesis comes from PyPI, into the build's own directory.
    let dir = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("schemathesis");
    let tool = dir.join("bin/st");
    let quietly = |command: &mut Command| {
        command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
    };
    let is_there = tool.exists()
        || (quietly(Command::new("python3").args(["-m", "venv"]).arg(&dir))
            && quietly(Command::new(dir.join("bin/pip")).args(["install", "--quiet", "schemathesis==4.32.5"])));
    if !is_there {
        println!("SKIPPED: schemathesis could not be installed (python3 with venv, PyPI)");
        return;
    }
    let checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,\
                  response_headers_conformance";
    let done = Command::new(tool)
        .args(["run", &format!("http://{}/openapi.json", relay.local)])
        // It leaves a cache where it runs.
        .current_dir(env!("CARGO_TARGET_TMPDIR"))
        // With more than one worker its generators fall over each other now and then.
        .args(["--max-examples", "15", "--workers", "1", "--no-color", "--checks", checks])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "{said}\n{}", relay.log());
    assert_eq!(get(relay.local, "/healthz").status, 200);
}
