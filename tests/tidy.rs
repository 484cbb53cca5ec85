//! Who may know whom: the table of the crate's docs, held.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

/// Each module, and what it may name of the others.
fn may_use() -> Vec<(String, Vec<String>)> {
    let docs = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let rows = docs.lines().filter_map(|line| line.strip_prefix("//! | [`")?.strip_suffix(" |"));
    let table: Vec<_> = rows
        .map(|row| {
            let (module, rest) = row.split_once("`]").unwrap();
            let used = rest.rsplit(" | ").next().unwrap().split(", ");
            (module.to_owned(), used.filter(|name| *name != "nothing").map(str::to_owned).collect())
        })
        .collect();
    assert_eq!(table.len(), 11, "{table:?}");
    table
}

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
            let is_test = ["sim.rs", "sim_checks.rs", "days.rs", "model.rs", "tests.rs", "fuzz.rs"]
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
    let table = may_use();
    for (module, path, text) in all() {
        let Some((_, allowed)) = table.iter().find(|(name, _)| *name == module) else { continue };
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//")) {
            for (_, after) in line.match_indices("crate::").map(|(at, word)| line.split_at(at + word.len())) {
                let name: String =
                    after.chars().take_while(|letter| letter.is_alphanumeric() || *letter == '_').collect();
                let is_allowed = name == module || allowed.contains(&name);
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

/// Whoever opens a file can take it in.
#[test]
fn no_file_is_long() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = Vec::new();
    ["src", "tests", "benches"].iter().for_each(|dir| sources(&root.join(dir), &mut paths));
    for path in paths {
        let lines = std::fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines <= 400, "{}: {lines} lines", path.display());
    }
}
