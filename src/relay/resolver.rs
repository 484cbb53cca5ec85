//! Resolves names: one look-up at a time for each, a few in all, the answers kept for a while.
//!
//! A look-up cannot be cancelled: it holds a thread until the name server answers or the system gives up. So nobody waits
//! for it longer than [`LOOKUP_LIMIT`], a name is not asked for again while it lasts, and where a refresh takes long, the
//! answer of before does.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

use crate::domain::address;

/// Look-ups at once.
const LOOKUPS_MAX: usize = 32;
/// How long anybody waits for a look-up that has begun.
const LOOKUP_LIMIT: Duration = Duration::from_secs(5);
/// How long anybody waits for a refresh when there is an answer of before.
const REFRESH_LIMIT: Duration = Duration::from_secs(1);
/// How long an answer, and a failure, is good for.
const KNOWN_FOR: Duration = Duration::from_secs(30);
const UNKNOWN_FOR: Duration = Duration::from_secs(5);
/// How long an answer may stand in for a refresh that fails.
const STANDS_IN_FOR: Duration = Duration::from_secs(600);
/// Names beyond which old answers are looked through.
const NAMES_MAX: usize = 4_096;

type Looked = Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send>>;
type LookUp = Arc<dyn Fn(String) -> Looked + Send + Sync>;

/// Addresses, and when they were found.
type Found = (Instant, Vec<IpAddr>);

/// The resolver.
pub(super) struct Resolver {
    look_up: LookUp,
    permits: Arc<Semaphore>,
    names: Mutex<HashMap<String, Name>>,
}

/// What is known of a name.
struct Name {
    /// Of the last look-up; none until it says something.
    answer: watch::Receiver<Option<Answer>>,
    /// Ends with the look-up itself.
    look_up: tokio::task::JoinHandle<()>,
    /// The last addresses before it.
    before: Option<Found>,
}

#[derive(Clone)]
struct Answer {
    at: Instant,
    addresses: Result<Vec<IpAddr>, String>,
}

impl Answer {
    fn new(found: io::Result<Vec<IpAddr>>) -> Answer {
        let addresses = match found {
            Ok(addresses) if addresses.is_empty() => Err("the host has no address".to_owned()),
            Ok(addresses) => Ok(addresses),
            Err(error) => Err(error.to_string()),
        };
        Answer { at: Instant::now(), addresses }
    }

    fn is_old(&self) -> bool {
        let limit = if self.addresses.is_ok() { KNOWN_FOR } else { UNKNOWN_FOR };
        self.at.elapsed() >= limit
    }
}

impl Name {
    /// Whether it is to be looked up anew.
    fn is_due(&self) -> bool {
        self.look_up.is_finished() && self.answer.borrow().as_ref().is_none_or(Answer::is_old)
    }

    /// The last addresses that were found.
    fn last(&self) -> Option<Found> {
        let answer = self.answer.borrow();
        let found = answer.as_ref().and_then(|answer| Some((answer.at, answer.addresses.clone().ok()?)));
        found.or_else(|| self.before.clone())
    }
}

impl Resolver {
    /// As this host resolves names.
    pub(super) fn system() -> Resolver {
        Resolver::new(|host| {
            Box::pin(async move {
                let found = tokio::net::lookup_host((host, 0)).await?;
                Ok(found.map(|address| address.ip()).collect())
            })
        })
    }

    pub(super) fn new(look_up: impl Fn(String) -> Looked + Send + Sync + 'static) -> Resolver {
        let permits = Arc::new(Semaphore::new(LOOKUPS_MAX));
        Resolver { look_up: Arc::new(look_up), permits, names: Mutex::default() }
    }

    #[cfg(test)]
    pub(super) fn forget(&self) {
        self.names.lock().unwrap().clear();
    }

    /// The addresses of a host.
    ///
    /// # Errors
    /// Why there are none.
    pub(super) async fn resolve(&self, host: &str) -> Result<Vec<IpAddr>, String> {
        if let Some(address) = address::literal(host) {
            return Ok(vec![address]);
        }
        let (mut answer, before) = self.asked(host);
        let found = async {
            let found = answer.wait_for(Option::is_some).await;
            found.ok().and_then(|found| found.clone()).map_or(Err("not looked up".to_owned()), |found| found.addresses)
        };
        let Some((at, addresses)) = before.filter(|(at, _)| at.elapsed() < STANDS_IN_FOR) else { return found.await };
        match tokio::time::timeout(REFRESH_LIMIT, found).await {
            Ok(Ok(addresses)) => Ok(addresses),
            Ok(Err(problem)) => {
                tracing::debug!(host, problem, age = ?at.elapsed(), "the addresses of before stand in");
                Ok(addresses)
            }
            Err(_) => Ok(addresses),
        }
    }

    /// Where the answer comes, and what it was before.
    fn asked(&self, host: &str) -> (watch::Receiver<Option<Answer>>, Option<Found>) {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        if names.len() >= NAMES_MAX {
            names.retain(|_, name| !name.is_due());
        }
        let before = match names.get(host) {
            Some(name) if !name.is_due() => return (name.answer.clone(), name.before.clone()),
            Some(name) => name.last(),
            None => None,
        };
        let name = self.ask(host.to_owned(), before.clone());
        let answer = name.answer.clone();
        names.insert(host.to_owned(), name);
        (answer, before)
    }

    /// Begins a look-up.
    fn ask(&self, host: String, before: Option<Found>) -> Name {
        let (tell, answer) = watch::channel(None);
        let (permits, look_up) = (Arc::clone(&self.permits), Arc::clone(&self.look_up));
        let look_up = tokio::spawn(async move {
            let Ok(_permit) = permits.acquire_owned().await else { return };
            let mut found = look_up(host);
            let answer = match tokio::time::timeout(LOOKUP_LIMIT, &mut found).await {
                Ok(found) => found,
                Err(_) => {
                    let problem = format!("no answer within {} s", LOOKUP_LIMIT.as_secs());
                    tell.send_replace(Some(Answer::new(Err(io::Error::other(problem)))));
                    found.await
                }
            };
            tell.send_replace(Some(Answer::new(answer)));
        });
        Name { answer, look_up, before }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn counted(look_up: impl Fn(usize, &str) -> Looked + Send + Sync + 'static) -> (Arc<Resolver>, Arc<AtomicUsize>) {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let resolver = Resolver::new(move |host| look_up(count.fetch_add(1, Ordering::SeqCst), &host));
        (Arc::new(resolver), asked)
    }

    fn found(address: &str) -> Looked {
        let address = address.parse().unwrap();
        Box::pin(std::future::ready(Ok(vec![address])))
    }

    fn failed() -> Looked {
        Box::pin(std::future::ready(Err(io::Error::other("no such name"))))
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_is_looked_up_once_for_many_and_again_when_its_answer_is_old() {
        let (resolver, asked) = counted(|count, _| if count == 0 { failed() } else { found("192.0.2.1") });
        let (one, two) = tokio::join!(resolver.resolve("a.test"), resolver.resolve("a.test"));
        assert!(one.is_err() && two.is_err());
        assert_eq!(asked.load(Ordering::SeqCst), 1, "one look-up for both");
        assert!(resolver.resolve("a.test").await.is_err(), "the failure is kept");
        tokio::time::sleep(UNKNOWN_FOR).await;
        assert!(resolver.resolve("a.test").await.is_ok() && resolver.resolve("a.test").await.is_ok());
        assert_eq!(asked.load(Ordering::SeqCst), 2);
        tokio::time::sleep(KNOWN_FOR).await;
        assert!(resolver.resolve("a.test").await.is_ok());
        assert_eq!(asked.load(Ordering::SeqCst), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_server_that_hangs_costs_five_seconds_and_one_look_up_at_a_time() {
        let (resolver, asked) = counted(|_, _| Box::pin(std::future::pending()));
        let begun = Instant::now();
        assert!(resolver.resolve("a.test").await.is_err());
        assert_eq!(begun.elapsed(), LOOKUP_LIMIT);
        tokio::time::sleep(10 * UNKNOWN_FOR).await;
        assert!(resolver.resolve("a.test").await.is_err());
        assert_eq!(asked.load(Ordering::SeqCst), 1, "the first look-up still holds its thread");
    }

    #[tokio::test(start_paused = true)]
    async fn names_that_hang_do_not_take_those_that_were_known_with_them() {
        let (resolver, _) = counted(|count, host| match host {
            "well.test" if count == 0 => found("192.0.2.1"),
            "well.test" | "hanging.test" => Box::pin(std::future::pending()),
            _ => failed(),
        });
        let known = resolver.resolve("well.test").await;
        tokio::time::sleep(KNOWN_FOR).await;
        let begun = Instant::now();
        assert_eq!(resolver.resolve("well.test").await, known);
        assert_eq!(begun.elapsed(), REFRESH_LIMIT);
        assert_eq!(resolver.resolve("well.test").await, known, "also when its refresh has failed");
        tokio::time::sleep(STANDS_IN_FOR).await;
        assert!(resolver.resolve("well.test").await.is_err(), "but not for ever");
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_a_free_look_up_has_its_five_seconds_after_that() {
        let (resolver, _) = counted(|_, host| match host {
            "well.test" => found("192.0.2.1"),
            _ => Box::pin(async {
                tokio::time::sleep(Duration::from_secs(12)).await;
                Err(io::Error::other("the system gave up"))
            }),
        });
        for number in 0..LOOKUPS_MAX {
            let resolver = Arc::clone(&resolver);
            tokio::spawn(async move { resolver.resolve(&format!("{number}.test")).await });
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(resolver.resolve("well.test").await.is_ok());
    }
}
