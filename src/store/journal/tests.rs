use super::*;
use crate::store::Ending;
use crate::store::codec::{DeferredRecord, Settled};

#[test]
fn a_group_without_records_begins_no_segment_while_there_is_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::new(dir.path().to_owned(), [7; 32], 60, 1, None);
    assert!(writer.wants_roll(0), "there is none");
    writer.roll(&mut Segments::default()).unwrap();
    assert!(writer.wants_roll(1), "it is full already");
    assert!(!writer.wants_roll(0));
}

#[test]
fn what_was_noted_within_or_behind_a_group_that_is_given_up_is_noted_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut segments = Segments::default();
    let mut writer = Writer::new(dir.path().to_owned(), [7; 32], 1 << 20, 1, None);
    let settled = |seq: u64| {
        let lane = LaneKey(seq);
        let record = Settled { lane, ending: Ending::Withdrawn, retry_is_over: false, second: 1, seqs: vec![seq] };
        Record::Settled(record).encode()
    };
    // One owed from before the segment, which goes within the group; one behind it, while it is being synced.
    writer.note(vec![settled(1)]).unwrap();
    writer.roll(&mut segments).unwrap();
    let written = writer.write_group(&[]).unwrap();
    writer.note(vec![settled(2)]).unwrap();
    writer.abandon(&written);
    // One more that has no segment to go to.
    writer.note(vec![settled(3)]).unwrap();
    let begun = writer.roll(&mut segments).unwrap();
    let again = writer.write_group(&[]).unwrap();
    let mut seqs = Vec::new();
    segment::scan(&again.file, begun.segment, 0, 0, |frame| {
        if let Some(Record::Settled(settled)) = Record::decode(frame.body()) {
            seqs.extend(settled.seqs);
        }
    })
    .unwrap();
    assert_eq!(seqs, [1, 2, 3]);
}

#[test]
fn of_many_delays_that_wait_for_the_disk_the_last_of_each_lane_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::new(dir.path().to_owned(), [7; 32], 1 << 20, 1, None);
    writer.owed_max = 100;
    let deferred = |lane: u64, due_ms: u64| {
        let retry = crate::domain::schedule::Retry::default();
        Record::Deferred(DeferredRecord { lane: LaneKey(lane), head: lane, retry, due_ms }).encode()
    };
    for round in 0..1_000 {
        writer.note(vec![deferred(round % 7, round)]).unwrap();
    }
    assert!(writer.owed.len() < 1_000, "{}", writer.owed.len());
    writer.thin_out();
    let kept: Vec<(u64, u64)> = writer
        .owed
        .iter()
        .filter_map(|body| match Record::decode(body) {
            Some(Record::Deferred(deferred)) => Some((deferred.lane.0, deferred.due_ms)),
            _ => None,
        })
        .collect();
    assert_eq!(kept, (993..1_000).map(|round| (round % 7, round)).collect::<Vec<_>>());
}
