//! What a store says, to be held against the model.

use super::*;

/// What a schedule says waits, read back from disk.
pub(in crate::store) fn waiting(schedule: &Schedule, store: &Store) -> BTreeMap<usize, Vec<String>> {
    let mut all = BTreeMap::new();
    for lane in 0..LANES {
        let events = schedule.events_of(Play::lane(store, lane));
        let ids: Vec<String> = events
            .iter()
            .map(|event| {
                let reader = store.reader(event.slot()).unwrap();
                let stored = reader.read(schedule.backlog.offset(*event)).unwrap().unwrap();
                assert_eq!(stored.seq(), schedule.backlog.seq(*event));
                stored.event().unwrap().event_id().into_owned()
            })
            .collect();
        if !ids.is_empty() {
            all.insert(lane, ids);
        }
    }
    all
}

/// The customers' other names, found by them as well.
pub(in crate::store) fn names(store: &Store) -> BTreeMap<usize, String> {
    let name = |lane: usize| {
        let customer = format!("c{lane}");
        let name = store.customer(Plugin::NONE, &customer, now_s()).unwrap()?.customer_token?;
        assert_eq!(store.customer_named(NameKind::Customer, Plugin::NONE, &name).unwrap(), Some(customer));
        Some((lane, name))
    };
    (0..LANES).filter_map(name).collect()
}
