//! Dead letters over starts, expiry and bounds.

use std::path::Path;

use super::*;
use crate::domain::verdict::DeathReason;

fn letter(seq: u64, endpoint: u64, buried_ms: u64) -> Dead<'static> {
    Dead {
        seq,
        reason: DeathReason::Gone,
        buried_ms,
        attempts: 1,
        event: None,
        endpoint: EndpointName::from_number(endpoint),
        problem: None,
    }
}

fn open(path: &Path, mark: &DeadMark, max: u64) -> (DeadLetters, DeadFound) {
    DeadLetters::open(path.to_owned(), mark, HashKey([7; 16]), (1_400, max)).unwrap()
}

#[test]
fn letters_are_counted_expire_and_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dead");
    let (mut letters, _) = open(&path, &DeadMark::default(), 3);
    letters.bury(&[letter(1, 7, 0), letter(2, 0, 0)], 0).unwrap();
    let mark = letters.mark();
    for n in 0..5 {
        letters.bury(&[letter(10 + n, 7, 200_000 * n)], 200_000 * n).unwrap();
    }
    assert_eq!(letters.counts(), BTreeMap::from([(0, 1), (7, 6)]));
    drop(letters);
    // What came after the mark is found again.
    let (mut letters, found) = open(&path, &mark, 3);
    let seqs: Vec<u64> = found.events.iter().map(|(_, _, seq)| *seq).collect();
    assert_eq!(seqs, [10, 11, 12, 13, 14]);
    assert_eq!(letters.expire(0).unwrap(), BTreeMap::from([(7, 3)]), "too many, whatever the clock says");
    assert_eq!(letters.expire(800_000).unwrap(), BTreeMap::new());
    assert_eq!(letters.counts(), BTreeMap::from([(0, 1), (7, 3)]));
    let gone = letters.expire(2_000_000).unwrap();
    assert_eq!(gone.get(&0), Some(&1));
    letters.expire(10_000_000).unwrap();
    assert!(letters.counts().values().all(|count| *count == 0));
    assert_eq!(std::fs::read_dir(&path).unwrap().count(), 0);
}

#[test]
fn a_letter_is_taken_once_and_stays_gone_over_a_start() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dead");
    let (mut letters, _) = open(&path, &DeadMark::default(), 0);
    let all: Vec<Dead<'_>> = (0..200).map(|n| letter(n, n % 3, 0)).collect();
    letters.bury(&all, 0).unwrap();
    let of = |endpoint: u64| LetterFilter { endpoint: Some(EndpointName::from_number(endpoint)), web_token: None };
    let ids = letters.find(&of(1), LetterId::FIRST, 1_000).unwrap();
    assert_eq!(ids.len(), 67);
    let (first, offset) = ids[0];
    assert_eq!(letters.offset(first).unwrap(), Some(offset));
    assert!(letters.take(first).unwrap() && !letters.take(first).unwrap());
    letters.put_back(first);
    assert!(letters.take(first).unwrap(), "it was put back");
    letters.write_gone(&[first]).unwrap();
    letters.sync_gone().unwrap();
    assert_eq!(letters.counts().get(&1), Some(&66));
    let mark = letters.mark();
    drop(letters);
    let index = segment::path(&path, 1).with_extension("idx");
    let whole = std::fs::read(&index).unwrap();
    assert_eq!(whole.len(), 200 * ENTRY);
    for has_index in [true, false, true] {
        if !has_index {
            std::fs::remove_file(&index).unwrap();
        }
        let (letters, found) = open(&path, &mark, 0);
        assert!(found.events.is_empty());
        assert_eq!(letters.counts(), BTreeMap::from([(0, 67), (1, 66), (2, 66)]), "with its index: {has_index}");
        assert_eq!(letters.find(&of(1), LetterId::FIRST, 1).unwrap()[0].0, ids[1].0);
        assert_eq!(letters.offset(first).unwrap(), None);
        assert_eq!(std::fs::read(&index).unwrap(), whole, "with its index: {has_index}");
        // The next start finds zeros where its end was.
        let zeros = [&whole[..50 * ENTRY], &[0; 150 * ENTRY]].concat();
        std::fs::write(&index, zeros).unwrap();
    }
}
