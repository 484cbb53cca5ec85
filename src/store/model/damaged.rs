//! A queue that opens and does not read back.

use super::*;

#[test]
fn damage_that_a_caller_meets_has_the_queue_built_anew() {
    let dir = tempfile::tempdir().unwrap();
    let mut play = Play::new(1, dir.path().to_owned(), |_| ());
    play.switch(&play.store(), "other", Toggle::Off);
    // It is in no cache then.
    play.restart(false);
    let store = play.store();
    store.inner.queue().unwrap().spoil_buckets(b'c');
    let customer = || store.customer(Plugin::NONE, "other", now_s());
    assert_eq!(customer(), Err(Refusal::DiskLow));
    let begun = crate::clock::monotonic();
    let found = loop {
        play.hear();
        if let Ok(found) = customer() {
            break found;
        }
        assert!(crate::clock::monotonic() - begun < Duration::from_secs(30), "it stays damaged");
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(found.unwrap().toggle, Toggle::Off);
    drop(store);
    play.restart(false);
}
