//! Power cuts: after every single step on the disk.
//!
//! A run of the model is recorded, write by write and sync by sync (`recorder.c`, which stands between the process and
//! the C library). Whatever a power cut after any of these steps may have left is then built and opened: what was synced
//! is there; of what was not, nothing, all, or a part, writes torn in the middle included. Names appear in the order in
//! which they were made, as file systems with ordered metadata have it.

#![allow(clippy::wildcard_enum_match_arm, reason = "most rules are about one kind of step")]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsStr;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::model::{LANES, Play, Told, empty_schedule, names, options, waiting};
use super::*;
use crate::metrics::Metrics;

/// Steps of the model in a recording.
const STEPS: usize = 300;
const SELF: &str = "store::power::nothing_acknowledged_is_lost_by_a_power_cut_after_any_step";

/// A step on the disk, or a word to the outside between two.
#[derive(Debug)]
enum Step {
    Create {
        file: u32,
        path: PathBuf,
    },
    Write {
        file: u32,
        offset: u64,
        bytes: Vec<u8>,
    },
    Truncate {
        file: u32,
        len: u64,
    },
    SyncFile(u32),
    SyncDir(PathBuf),
    Rename {
        from: PathBuf,
        to: PathBuf,
    },
    Unlink(PathBuf),
    MakeDir(PathBuf),
    /// Of an event, or of a customer's name: which is the file then.
    Told {
        what: u8,
        customer: u32,
        event: String,
    },
}

const ACCEPTED: u8 = b'A';
const ENDED: u8 = b'E';
const NOTED: u8 = b'N';
const WITHDRAWN: u8 = b'W';
const NAMING: u8 = b'n';
const NAMED: u8 = b'M';

fn record(kind: u8, file: u32, offset: u64, bytes: &[u8]) -> Vec<u8> {
    let mut record = vec![kind];
    record.extend(file.to_ne_bytes());
    record.extend(offset.to_ne_bytes());
    record.extend((bytes.len() as u32).to_ne_bytes());
    record.extend(bytes);
    record
}

fn steps(mut log: &[u8]) -> Vec<Step> {
    let mut steps = Vec::new();
    let path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
    while let Some((head, rest)) = log.split_first_chunk::<17>() {
        let file = u32::from_ne_bytes(head[1..5].try_into().unwrap());
        let offset = u64::from_ne_bytes(head[5..13].try_into().unwrap());
        let (bytes, rest) = rest.split_at(u32::from_ne_bytes(head[13..17].try_into().unwrap()) as usize);
        log = rest;
        steps.push(match head[0] {
            b'c' => Step::Create { file, path: path(bytes) },
            b'w' => Step::Write { file, offset, bytes: bytes.to_vec() },
            b't' => Step::Truncate { file, len: offset },
            b's' => Step::SyncFile(file),
            b'd' => Step::SyncDir(path(bytes)),
            b'r' => {
                let at = bytes.iter().position(|byte| *byte == b'\n').unwrap();
                Step::Rename { from: path(&bytes[..at]), to: path(&bytes[at + 1..]) }
            }
            b'u' => Step::Unlink(path(bytes)),
            b'k' => Step::MakeDir(path(bytes)),
            what @ (ACCEPTED | ENDED | NOTED | WITHDRAWN | NAMING | NAMED) => {
                Step::Told { what, customer: file, event: String::from_utf8(bytes.to_vec()).unwrap() }
            }
            other => panic!("a step of kind {other}"),
        });
    }
    steps
}

/// What becomes of steps that were not synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unsynced {
    Gone,
    Kept,
    Some,
}

/// Builds in `to` what a cut after `steps` leaves of what was below `from`.
fn build(steps: &[Step], unsynced: Unsynced, rng: &mut fastrand::Rng, from: &Path, to: &Path) {
    let mut synced_to: HashMap<u32, usize> = HashMap::new();
    let mut dirs_synced_to: HashMap<&Path, usize> = HashMap::new();
    for (at, step) in steps.iter().enumerate() {
        match step {
            Step::SyncFile(file) => drop(synced_to.insert(*file, at)),
            Step::SyncDir(dir) => drop(dirs_synced_to.insert(dir, at)),
            _ => {}
        }
    }
    let dir_synced_to = |path: &Path| dirs_synced_to.get(path.parent().unwrap()).copied().unwrap_or(0);
    // Up to where names are durable: a later one that is takes all before it along.
    let named_to = steps
        .iter()
        .enumerate()
        .filter(|(at, step)| match step {
            Step::Create { file, path } => {
                dir_synced_to(path) > *at || synced_to.get(file).is_some_and(|synced| synced > at)
            }
            Step::Rename { to: path, .. } | Step::Unlink(path) => dir_synced_to(path) > *at,
            _ => false,
        })
        .map(|(at, _)| at + 1)
        .next_back()
        .unwrap_or(0);
    let named_to = match unsynced {
        Unsynced::Gone => named_to,
        Unsynced::Kept => steps.len(),
        Unsynced::Some => rng.usize(named_to..=steps.len()),
    };
    let mut contents: HashMap<u32, Vec<u8>> = HashMap::new();
    let mut names: BTreeMap<&Path, u32> = BTreeMap::new();
    for (at, step) in steps.iter().enumerate() {
        let is_synced = |file: &u32| synced_to.get(file).is_some_and(|synced| *synced > at);
        match step {
            Step::Create { file, path } if at < named_to => drop(names.insert(path, *file)),
            Step::Rename { from, to } if at < named_to => {
                if let Some(file) = names.remove(from.as_path()) {
                    names.insert(to, file);
                }
            }
            Step::Unlink(path) if at < named_to => drop(names.remove(path.as_path())),
            Step::Write { file, offset, bytes } => {
                let len = match unsynced {
                    _ if is_synced(file) => bytes.len(),
                    Unsynced::Gone => 0,
                    Unsynced::Kept => bytes.len(),
                    Unsynced::Some => [0, rng.usize(0..=bytes.len()), bytes.len()][rng.usize(0..3)],
                };
                let content = contents.entry(*file).or_default();
                let offset = *offset as usize;
                if len > 0 && content.len() < offset + len {
                    content.resize(offset + len, 0);
                }
                if len > 0 {
                    content[offset..offset + len].copy_from_slice(&bytes[..len]);
                }
            }
            Step::Truncate { file, len }
                if is_synced(file) || unsynced == Unsynced::Kept || (unsynced == Unsynced::Some && rng.bool()) =>
            {
                contents.entry(*file).or_default().resize(*len as usize, 0);
            }
            Step::MakeDir(path) => std::fs::create_dir_all(to.join(path.strip_prefix(from).unwrap())).unwrap(),
            _ => {}
        }
    }
    for (path, file) in names {
        let path = to.join(path.strip_prefix(from).unwrap());
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, contents.get(&file).map_or(&[][..], Vec::as_slice)).unwrap();
    }
}

fn number(event: &str) -> u64 {
    event[1..].parse().unwrap()
}

/// Opens what a cut left; says what is wrong with it.
fn check(steps: &[Step], unsynced: Unsynced, dir: &Path) -> Result<(), String> {
    let mut schedule = empty_schedule();
    // As many as come before anybody listens.
    let (tell, notices) = mpsc::channel(1_024);
    let metrics = Metrics::new(10).unwrap();
    let opened = Store::open(options(dir), metrics.store.clone(), &mut schedule, |_, _| (), tell);
    let (store, threads) = opened.map_err(|error| format!("it does not open: {error}"))?;
    let waiting: Vec<Vec<u64>> =
        waiting(&schedule, &store).values().map(|ids| ids.iter().map(|id| number(id)).collect()).collect();
    drop(notices);
    let names = names(&store);
    store.crash(threads);
    let mut problems = Vec::new();
    // What was synced is whole. (A tail that was not is no damage to what was promised.)
    for what in ["journal", "checkpoint", "dead_letters", "state_log"] {
        let count = metrics.store.damage.with_label_values(&[what]).get();
        if count > 0 {
            problems.push(format!("{count} times damage: {what}"));
        }
    }
    let told = |kind: u8| -> BTreeSet<u64> {
        let of_it = steps.iter().filter_map(|step| match step {
            Step::Told { what, event, .. } if *what == kind => Some(number(event)),
            _ => None,
        });
        of_it.collect()
    };
    let all: BTreeSet<u64> = waiting.iter().flatten().copied().collect();
    let lost: Vec<u64> =
        told(ACCEPTED).difference(&told(ENDED)).filter(|event| !all.contains(event)).copied().collect();
    if !lost.is_empty() {
        problems.push(format!("acknowledged and lost: {lost:?}"));
    }
    if waiting.iter().any(|lane| !lane.is_sorted() || lane.windows(2).any(|pair| pair[0] == pair[1])) {
        problems.push(format!("out of order: {waiting:?}"));
    }
    let again: Vec<u64> = told(NOTED).intersection(&all).copied().collect();
    if unsynced == Unsynced::Kept && !again.is_empty() {
        problems.push(format!("known to have ended, and waiting again: {again:?}"));
    }
    let back: Vec<u64> = told(WITHDRAWN).intersection(&all).copied().collect();
    if !back.is_empty() {
        problems.push(format!("withdrawn, and waiting again: {back:?}"));
    }
    for customer in 0..LANES {
        // The last name that was acknowledged, or one that was on its way.
        let mut may_be = vec![None];
        for step in steps {
            match step {
                Step::Told { what: NAMING, customer: of, event } if *of as usize == customer => {
                    may_be.push(Some(event))
                }
                Step::Told { what: NAMED, customer: of, event } if *of as usize == customer => {
                    may_be = vec![Some(event)]
                }
                _ => {}
            }
        }
        if !may_be.contains(&names.get(&customer)) {
            problems.push(format!("c{customer} is named {:?}, not one of {may_be:?}", names.get(&customer)));
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(problems.join("; ")) }
}

/// What the recorded process does.
fn play(dir: PathBuf, log: &Path, seed: u64) {
    let mut log = File::options().append(true).open(log).unwrap();
    let tell = move |told: Told<'_>| {
        let (what, customer, event) = match told {
            Told::Accepted(event) => (ACCEPTED, 0, event),
            Told::Ended(event) => (ENDED, 0, event),
            Told::Noted(event) => (NOTED, 0, event),
            Told::Withdrawn(event) => (WITHDRAWN, 0, event),
            Told::Naming(customer, name) => (NAMING, customer, name),
            Told::Named(customer, name) => (NAMED, customer, name),
        };
        log.write_all(&record(what, customer as u32, 0, event.as_bytes())).unwrap();
    };
    let is_copied = || (1..9).any(|number| dir.join(format!("queue-{number}")).exists());
    let mut play = Play::new(seed, dir.clone(), tell);
    for _ in 0..STEPS {
        play.step();
    }
    // The keeper looks once a second whether the queue is to be copied: a fast machine plays on for a while.
    for _ in 0..100 {
        if is_copied() {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
        play.step();
    }
}

/// `H5PUSH_POWER_CUTS`: how many cuts of each recording are tried, `all` for each step; `H5PUSH_POWER_SEEDS`: how many
/// recordings.
#[test]
fn nothing_acknowledged_is_lost_by_a_power_cut_after_any_step() {
    let variable = |name: &str| std::env::var(name).ok();
    if let (Some(dir), Some(log), Some(seed)) =
        (variable("RECORD_DIR"), variable("RECORD_LOG"), variable("RECORD_SEED"))
    {
        return play(dir.into(), Path::new(&log), seed.parse().unwrap());
    }
    let work = tempfile::tempdir().unwrap();
    let recorder = work.path().join("recorder.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/src/store/power/recorder.c");
    let compiled =
        Command::new("cc").args(["-O1", "-shared", "-fPIC", "-o"]).arg(&recorder).arg(source).arg("-ldl").status();
    if !compiled.is_ok_and(|status| status.success()) {
        return eprintln!("SKIPPED: power cuts: no C compiler");
    }
    let seeds = variable("H5PUSH_POWER_SEEDS").map_or(1, |seeds| seeds.parse().unwrap());
    let mut tried = 0;
    for seed in 0..seeds {
        let (dir, log) = (work.path().join(format!("data-{seed}")), work.path().join(format!("log-{seed}")));
        std::fs::create_dir(&dir).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg0(SELF).args([SELF, "--exact", "--nocapture"]);
        command.env("LD_PRELOAD", &recorder).env("RECORD_DIR", &dir).env("RECORD_LOG", &log);
        let output = command.env("RECORD_SEED", seed.to_string()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let steps = steps(&std::fs::read(&log).unwrap());
        let told = steps.iter().filter(|step| matches!(step, Step::Told { .. })).count();
        assert!(told > STEPS && steps.len() > 2 * told, "{} steps, {told} of them words", steps.len());
        let copies = steps.iter().filter(|step| matches!(step, Step::MakeDir(path) if path.ends_with("queue-1")));
        assert!(copies.count() > 0, "the queue was not copied");
        let mut rng = fastrand::Rng::with_seed(seed);
        let cuts: Vec<usize> = match variable("H5PUSH_POWER_CUTS").as_deref() {
            Some("all") => (1..=steps.len()).collect(),
            count => {
                let count = count.map_or(60, |count| count.parse().unwrap());
                (0..count).map(|_| rng.usize(1..=steps.len())).collect()
            }
        };
        for cut in cuts {
            for unsynced in [Unsynced::Gone, Unsynced::Kept, Unsynced::Some] {
                let left = tempfile::tempdir().unwrap();
                build(&steps[..cut], unsynced, &mut rng, &dir, left.path());
                if let Err(problem) = check(&steps[..cut], unsynced, left.path()) {
                    let kept = left.keep();
                    panic!(
                        "seed {seed}, cut after step {cut} ({:?}), unsynced {unsynced:?}: {problem}; {kept:?}",
                        steps[cut - 1]
                    );
                }
                tried += 1;
            }
        }
        println!("seed {seed}: {} steps", steps.len());
    }
    println!("{tried} power cuts");
}
