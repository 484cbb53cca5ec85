//! Customers' other names under random calls: each name means one customer, the last who was said to have it.

use super::*;

const CUSTOMERS: [&str; 3] = ["p0", "p1", "p2"];
const NAMES: [&str; 3] = ["x", "y", "z"];
const KINDS: [NameKind; 2] = [NameKind::Customer, NameKind::Sdk];

#[test]
fn a_name_means_one_customer_who_shows_it() {
    for seed in 0..20 {
        let dir = tempfile::tempdir().unwrap();
        let mut play = Play::new(seed, dir.path().to_owned(), |_| ());
        let mut holders: BTreeMap<(NameKind, &str), &str> = BTreeMap::new();
        for step in 0..40 {
            let customer = CUSTOMERS[play.rng.usize(..CUSTOMERS.len())];
            match play.rng.u8(0..10) {
                0 => {
                    let store = play.store();
                    play.wait_for(store.forget(Some(Plugin::NONE), customer, now_s())).unwrap();
                    holders.retain(|_, holder| *holder != customer);
                }
                1 => {
                    let crashes = play.rng.bool();
                    play.restart(crashes);
                }
                _ => {
                    let names = KINDS.map(|_| play.rng.bool().then(|| NAMES[play.rng.usize(..NAMES.len())]));
                    let [customer_token, sdk_token] = names.map(|name| name.map(str::to_owned));
                    let hearing = Hearing { customer_token, sdk_token, ..Hearing::default() };
                    let store = play.store();
                    play.wait_for(store.change_customer(Plugin::NONE, customer, &hearing, false, now_s())).unwrap();
                    for (kind, name) in KINDS.into_iter().zip(names).filter_map(|(kind, name)| Some((kind, name?))) {
                        holders.retain(|(of, _), holder| (*of, *holder) != (kind, customer));
                        holders.insert((kind, name), customer);
                    }
                }
            }
            check(&play.store(), &holders, (seed, step));
        }
    }
}

fn check(store: &Store, holders: &BTreeMap<(NameKind, &str), &str>, at: (u64, u32)) {
    for (kind, name) in KINDS.into_iter().flat_map(|kind| NAMES.map(|name| (kind, name))) {
        let found = store.customer_named(kind, Plugin::NONE, name).unwrap();
        assert_eq!(found.as_deref(), holders.get(&(kind, name)).copied(), "{kind:?} {name} at {at:?}");
    }
    for customer in CUSTOMERS {
        let known = store.customer(Plugin::NONE, customer, now_s()).unwrap();
        for kind in KINDS {
            let shown = known.as_ref().and_then(|known| known.name(kind));
            let held = holders.iter().find(|((of, _), holder)| (*of, **holder) == (kind, customer));
            assert_eq!(shown, held.map(|((_, name), _)| *name), "{kind:?} of {customer} at {at:?}");
        }
    }
}

/// The clock comes back, or `gate.forget_after` is made longer.
#[test]
fn who_was_as_good_as_forgotten_takes_no_name_along_that_has_gone_to_another() {
    let dir = tempfile::tempdir().unwrap();
    let mut play = Play::new(1, dir.path().to_owned(), |_| ());
    let store = play.store();
    let named = |name: &str| Hearing { customer_token: Some(name.to_owned()), ..Hearing::default() };
    let now = now_s();
    let then = now - 2 * options(dir.path()).rules.forget_after_s;
    let holder = |name| store.customer_named(NameKind::Customer, Plugin::NONE, name).unwrap();
    play.wait_for(store.change_customer(Plugin::NONE, "former", &named("n"), false, then)).unwrap();
    // The former one has not been heard of for so long that it is as good as forgotten.
    play.wait_for(store.change_customer(Plugin::NONE, "holder", &named("n"), false, now)).unwrap();
    play.wait_for(store.change_customer(Plugin::NONE, "former", &named("m"), false, then)).unwrap();
    assert_eq!((holder("n").as_deref(), holder("m").as_deref()), (Some("holder"), Some("former")));
    play.wait_for(store.forget(Some(Plugin::NONE), "former", now)).unwrap();
    assert_eq!((holder("n").as_deref(), holder("m")), (Some("holder"), None));
}

#[test]
fn who_comes_back_after_being_forgotten_is_found_by_no_former_name() {
    let dir = tempfile::tempdir().unwrap();
    let mut play = Play::new(1, dir.path().to_owned(), |_| ());
    let store = play.store();
    let named = Hearing { customer_token: Some("n".to_owned()), ..Hearing::default() };
    let then = now_s() - 2 * options(dir.path()).rules.forget_after_s;
    play.wait_for(store.change_customer(Plugin::NONE, "c", &named, false, then)).unwrap();
    play.wait_for(store.change_customer(Plugin::NONE, "c", &Hearing::default(), false, now_s())).unwrap();
    let customer = store.customer(Plugin::NONE, "c", now_s()).unwrap().unwrap();
    assert_eq!(customer.customer_token, None);
    assert_eq!(store.customer_named(NameKind::Customer, Plugin::NONE, "n").unwrap(), None);
}
