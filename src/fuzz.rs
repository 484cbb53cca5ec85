//! Mutated inputs for parsers: seeded, from examples. `H5PUSH_FUZZ_CASES` sets how many a target gets.

/// Pieces that parsers trip over.
const PIECES: [&[u8]; 18] = [
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b"{",
    b"}",
    b"[",
    b"]",
    b"\"",
    b"\\u0000",
    b"\\ud800",
    b",",
    b":",
    b"&",
    b"=",
    b"%",
    b"-9223372036854775809",
    b"1e999",
    b"\xef\xbb\xbf",
];

/// Calls `target` with mutations of the examples. It fails by panicking; the case is printed then.
pub(crate) fn fuzz(examples: &[&[u8]], target: impl Fn(&[u8]) + std::panic::RefUnwindSafe) {
    let cases = std::env::var("H5PUSH_FUZZ_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(20_000);
    let seed = std::env::var("H5PUSH_FUZZ_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0x5eed);
    let mut random = fastrand::Rng::with_seed(seed);
    for case in 0..cases {
        let mut bytes = examples[random.usize(..examples.len())].to_vec();
        for _ in 0..random.usize(1..6) {
            mutate(&mut bytes, examples, &mut random);
        }
        let outcome = std::panic::catch_unwind(|| target(&bytes));
        assert!(outcome.is_ok(), "seed {seed}, case {case}: {:?}", String::from_utf8_lossy(&bytes));
    }
}

fn mutate(bytes: &mut Vec<u8>, examples: &[&[u8]], random: &mut fastrand::Rng) {
    let at = random.usize(..=bytes.len());
    match random.u8(..7) {
        0 if at < bytes.len() => bytes[at] ^= 1 << random.u8(..8),
        1 => bytes.truncate(at),
        2 => drop(bytes.splice(at..at, PIECES[random.usize(..PIECES.len())].iter().copied())),
        3 => {
            let end = random.usize(at..=bytes.len());
            bytes.drain(at..end);
        }
        4 => {
            let other = examples[random.usize(..examples.len())];
            let from = random.usize(..=other.len());
            bytes.truncate(at);
            bytes.extend_from_slice(&other[from..]);
        }
        5 => {
            let end = random.usize(at..=bytes.len());
            let copy = bytes[at..end].repeat(random.usize(1..4));
            drop(bytes.splice(at..at, copy));
        }
        _ => {
            let piece = PIECES[random.usize(..PIECES.len())].repeat(random.usize(1..200));
            drop(bytes.splice(at..at, piece));
        }
    }
    bytes.truncate(1 << 16);
}
