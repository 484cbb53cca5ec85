//! What is known of events after they have ended.

use super::*;

#[test]
fn what_was_recorded_of_an_event_outlives_a_withdrawal_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut play = Play::new(1, dir.path().to_owned(), |_| ());
    play.post();
    play.hear();
    let (lane, ids) = play.model.pop_first().unwrap();
    let store = play.store();
    let key = Play::lane(&store, lane);
    let seqs: Vec<u64> = play.schedule.events_of(key).iter().map(|event| play.schedule.backlog.seq(*event)).collect();
    // In flight when the switch comes, and delivered while that is being stored.
    play.switch(&store, &format!("c{lane}"), Toggle::Off);
    store.note(vec![Note::Settled { lane: key, ending: Ending::Delivered, retry_is_over: false, seqs }]);
    play.wait_for(store.sync()).unwrap();
    drop(store);
    play.restart(true);
    // All that the start noted is in the rows then.
    play.restart(false);
    let store = play.store();
    for id in ids {
        let fate = store.fate(store.hashing().given_event(Plugin::NONE, &id), now_s()).unwrap().unwrap();
        assert_eq!(fate.ended.map(|(ending, _)| ending), Some(Ending::Delivered), "{id}");
    }
}

#[test]
fn nobody_is_forgotten_by_a_clock_that_leaps() {
    let dir = tempfile::tempdir().unwrap();
    let mut play = Play::new(1, dir.path().to_owned(), |_| ());
    let store = play.store();
    let now = now_s();
    let later = now + 2 * options(dir.path()).rules.forget_after_s;
    let on = Hearing { toggle: Some(Toggle::On), ..Hearing::default() };
    play.wait_for(store.change_customer(Plugin::NONE, "c", &on, false, now)).unwrap();
    let heard = play.wait_for(store.change_customer(Plugin::NONE, "c", &Hearing::default(), false, later)).unwrap();
    assert_eq!(heard.unwrap().toggle, Toggle::On);
    assert_eq!(store.customer(Plugin::NONE, "c", later).unwrap().unwrap().toggle, Toggle::On);
}

/// The one before it does, and the segments that the damaged one would have freed are there yet.
#[test]
fn a_damaged_checkpoint_loses_and_repeats_nothing() {
    for seed in 0..6 {
        let dir = tempfile::tempdir().unwrap();
        let mut play = Play::new(seed, dir.path().to_owned(), |_| ());
        while play.removals < 5 {
            play.step();
        }
        let (store, threads, notices) = play.open.take().unwrap();
        drop(notices);
        store.crash(threads);
        let path = dir.path().join("checkpoint");
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let (tell, _notices) = mpsc::channel(1_024);
        let (metrics, mut schedule) = (Metrics::new(10).unwrap(), empty_schedule());
        let opened = Store::open(options(dir.path()), metrics.store.clone(), &mut schedule, |_, _| (), tell);
        let (store, threads) = opened.unwrap();
        let damage = |what| metrics.store.damage.with_label_values(&[what]).get();
        assert_eq!((damage("checkpoint"), damage("journal"), damage("queue")), (1, 0, 0), "seed {seed}");
        assert_eq!(waiting(&schedule, &store), play.model, "seed {seed}");
        store.crash(threads);
    }
}
