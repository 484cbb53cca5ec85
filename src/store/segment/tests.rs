use super::*;

const SEGMENT: u64 = 5;

/// Frames of different sizes, in groups of two that were synced before the next was written.
fn sample() -> (Vec<u8>, Vec<u32>) {
    let mut bytes = Vec::new();
    let mut offsets = Vec::new();
    let mut synced = 0;
    for n in 0..8u64 {
        let offset = bytes.len() as u32;
        if n % 2 == 0 {
            synced = offset;
        }
        offsets.push(offset);
        codec::write_frame(&mut bytes, SEGMENT, offset, synced, n, &vec![n as u8 + 1; 3 + 7 * n as usize]);
    }
    (bytes, offsets)
}

fn scanned(bytes: &[u8], floor: u32) -> (Vec<u64>, Scan) {
    let dir = tempfile::tempdir().unwrap();
    let path = path(dir.path(), SEGMENT);
    std::fs::write(&path, bytes).unwrap();
    let mut seqs = Vec::new();
    let file = File::open(path).unwrap();
    let scan = scan(&file, SEGMENT, 0, floor, |frame| seqs.push(frame.header.seq)).unwrap();
    (seqs, scan)
}

#[test]
fn a_whole_segment_is_read_also_with_preallocated_room_behind_it() {
    let (mut bytes, _) = sample();
    let len = bytes.len() as u32;
    for room in [0, 10, 5_000] {
        bytes.resize(len as usize + room, 0);
        let (seqs, scan) = scanned(&bytes, 0);
        assert_eq!(seqs, (0..8).collect::<Vec<u64>>());
        assert_eq!(scan, Scan { valid_len: u64::from(len), damaged: vec![], is_torn: false });
    }
}

#[test]
fn a_segment_cut_anywhere_keeps_all_whole_records_and_says_when_synced_ones_are_gone() {
    let (bytes, offsets) = sample();
    let floor = offsets[6];
    for cut in 0..bytes.len() {
        let (seqs, scan) = scanned(&bytes[..cut], floor);
        let whole = offsets.iter().skip(1).filter(|offset| **offset as usize <= cut).count() as u64;
        assert_eq!(seqs, (0..whole).collect::<Vec<u64>>(), "cut at {cut}");
        let lost_synced = (cut as u32) < floor;
        assert_eq!(!scan.damaged.is_empty(), lost_synced, "cut at {cut}: {scan:?}");
    }
}

#[test]
fn a_byte_flipped_anywhere_costs_one_record_below_the_mark_and_ends_the_segment_above() {
    let (bytes, offsets) = sample();
    for at in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[at] ^= 0x41;
        let hit = offsets.iter().rposition(|offset| *offset as usize <= at).unwrap();
        let (seqs, scan) = scanned(&flipped, 0);
        if hit < 6 {
            let others: Vec<u64> = (0..8).filter(|n| *n != hit as u64).collect();
            assert_eq!(seqs, others, "byte {at}");
            assert_eq!((scan.damaged.len(), scan.is_torn), (1, false), "byte {at}: {scan:?}");
        } else {
            assert_eq!(seqs, (0..hit as u64).collect::<Vec<u64>>(), "byte {at}");
            assert_eq!((scan.damaged.len(), scan.is_torn), (0, true), "byte {at}: {scan:?}");
            assert_eq!(scan.valid_len, u64::from(offsets[hit]));
        }
    }
}

#[test]
fn frames_are_walked_beyond_four_gibibytes() {
    let (bytes, _) = sample();
    let from = (1 << 32) - bytes.len() as u64 / 2;
    let mut moved = Vec::new();
    for n in 0..8u64 {
        let offset = from + moved.len() as u64;
        codec::write_frame(&mut moved, SEGMENT, offset as u32, 0, n, &[n as u8; 40]);
    }
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&moved, from).unwrap();
    let (mut seqs, mut ends) = (Vec::new(), Vec::new());
    walk(&file, SEGMENT, from, from + moved.len() as u64, &mut |found| match found {
        Found::Frame(frame, behind) => {
            seqs.push(frame.header.seq);
            ends.push(behind);
        }
        Found::Bad(at) => panic!("bad at {at}"),
    })
    .unwrap();
    assert_eq!(seqs, (0..8).collect::<Vec<u64>>());
    assert_eq!(ends.last(), Some(&(from + moved.len() as u64)));
    assert!(from < 1 << 32 && ends[7] > 1 << 32);
}

#[test]
fn a_frame_is_read_by_offset_and_a_bad_one_is_none() {
    let (mut bytes, offsets) = sample();
    bytes.resize(bytes.len() + 100, 0);
    let dir = tempfile::tempdir().unwrap();
    let path = path(dir.path(), SEGMENT);
    bytes[offsets[3] as usize + HEADER_LEN] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let file = File::open(path).unwrap();
    let body = |offset| read_frame(&file, SEGMENT, offset).unwrap().map(|frame| frame.body().to_vec());
    assert_eq!(body(offsets[2]), Some(vec![3; 17]));
    assert_eq!(body(offsets[3]), None);
    assert_eq!(body(offsets[2] + 1), None);
    assert_eq!(body(bytes.len() as u32 - 50), None);
    assert_eq!(read_frame(&file, SEGMENT + 1, offsets[2]).unwrap(), None);
}

#[test]
fn no_bytes_make_the_reader_panic_or_go_round_for_ever() {
    let mut whole = Vec::new();
    for number in 0..4 {
        let offset = whole.len() as u32;
        codec::write_frame(&mut whole, 7, offset, offset, number, &[number as u8; 40]);
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("segment");
    crate::fuzz::fuzz(&[&whole], |bytes| {
        std::fs::write(&path, bytes).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let mut records = 0;
        let scan = scan(&file, 7, 0, 0, |frame| {
            assert!(frame.header.frame_len() <= bytes.len() as u64);
            records += 1;
        });
        assert!(scan.unwrap().valid_len as usize <= bytes.len() && records <= bytes.len() / 36);
    });
}
