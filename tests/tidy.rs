//! Who may know whom: the table of the crate's docs, held.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

/// A module and what it may name of the others.
const MAY_USE: [(&str, &[&str]); 9] = [
    ("domain", &[]),
    ("clock", &[]),
    ("metrics", &["domain"]),
    ("config", &["domain"]),
    ("log", &["config"]),
    ("store", &["domain", "metrics", "clock"]),
    ("relay", &["domain", "store", "metrics", "config", "clock"]),
    ("api", &["domain", "store", "relay", "metrics", "config", "clock"]),
    ("app", &["domain", "store", "relay", "api", "metrics", "config", "clock", "log"]),
];

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn all() -> Vec<(String, PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = Vec::new();
    sources(&root, &mut paths);
    assert!(paths.len() > 30);
    paths
        .into_iter()
        .map(|path| {
            let inner = path.strip_prefix(&root).unwrap().to_owned();
            let module = inner.components().next().unwrap().as_os_str().to_str().unwrap().trim_end_matches(".rs");
            let text = std::fs::read_to_string(&path).unwrap();
            // Tests may use what they like.
            let is_test = ["sim.rs", "days.rs", "model.rs", "tests.rs", "fuzz.rs"]
                .contains(&inner.file_name().unwrap().to_str().unwrap());
            let text = if is_test {
                String::new()
            } else {
                text.split("#[cfg(test)]\nmod tests {").next().unwrap().to_owned()
            };
            (module.to_owned(), inner, text)
        })
        .collect()
}

#[test]
fn modules_name_only_those_they_may() {
    for (module, path, text) in all() {
        let Some((_, allowed)) = MAY_USE.iter().find(|(name, _)| *name == module) else { continue };
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//")) {
            for (_, after) in line.match_indices("crate::").map(|(at, word)| line.split_at(at + word.len())) {
                let name: String =
                    after.chars().take_while(|letter| letter.is_alphanumeric() || *letter == '_').collect();
                let is_allowed = name == module || allowed.contains(&name.as_str());
                assert!(is_allowed, "{}:{}: {module} may not use {name}", path.display(), number + 1);
            }
        }
    }
}

#[test]
fn the_domain_reads_no_clock_and_does_no_io() {
    for (module, path, text) in all() {
        if module == "domain" {
            for word in [
                "std::fs",
                "TcpStream",
                "TcpListener",
                "UdpSocket",
                "ToSocketAddrs",
                "std::io",
                "Instant::now",
                "time::Instant",
                "SystemTime",
                "tokio",
                "fastrand",
                "async fn",
            ] {
                assert!(!text.contains(word), "{}: {word}", path.display());
            }
        }
    }
}

#[test]
fn only_the_store_names_sled_or_opens_data_files() {
    for (module, path, text) in all() {
        if !["store", "log", "cli"].contains(&module.as_str()) {
            assert!(!text.contains("sled::") && !text.contains("fs::File"), "{}", path.display());
        }
    }
}
