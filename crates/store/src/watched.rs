//! A store that knows which calls into it have not come back.
//!
//! A call into a dead network file system never returns, and nothing wakes the
//! thread that made it. Whoever looks from another thread sees it here.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::{Listed, ObjectKey, ObjectKind, Store, StoreError, Unfinished};

/// The calls into a store that are under way.
#[derive(Debug, Default)]
pub struct Calls(Mutex<UnderWay>);

#[derive(Debug, Default)]
struct UnderWay {
    next: u64,
    since: BTreeMap<u64, Instant>,
    /// When one has come back, or got on with its work.
    answered: Option<Instant>,
}

/// How long a store has been waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waited {
    /// For how long the oldest call has not come back.
    pub oldest: Duration,
    /// For how long no call has, of all that are under way and others.
    pub silent: Duration,
}

impl Calls {
    /// Returns how long calls have been waited for; `None` if none is under way.
    pub fn waited(&self) -> Option<Waited> {
        let under_way = self.lock();
        let since = *under_way.since.values().min()?;
        let answered = under_way.answered.map_or(since, |it| it.max(since));
        Some(Waited {
            oldest: since.elapsed(),
            silent: answered.elapsed(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, UnderWay> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn during<T>(&self, call: impl FnOnce() -> T) -> T {
        let _under_way = self.begin();
        call()
    }

    fn begin(&self) -> Call<'_> {
        let mut under_way = self.lock();
        let number = under_way.next;
        under_way.next = number.wrapping_add(1);
        under_way.since.insert(number, Instant::now());
        Call {
            calls: self,
            number,
        }
    }
}

/// A call that is under way for as long as this lives.
struct Call<'a> {
    calls: &'a Calls,
    number: u64,
}

impl Call<'_> {
    /// Notes that a call that consists of many got an answer to one of them: what
    /// it waits for now it has waited for since then.
    fn got_on(&self) {
        let now = Instant::now();
        let mut under_way = self.calls.lock();
        under_way.since.insert(self.number, now);
        under_way.answered = Some(now);
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        let mut under_way = self.calls.lock();
        under_way.since.remove(&self.number);
        under_way.answered = Some(Instant::now());
    }
}

/// Passes every call on, and notes it for as long as it is under way.
#[derive(Debug)]
pub struct Watched {
    store: Arc<dyn Store>,
    calls: Arc<Calls>,
}

impl Watched {
    /// Watches a store.
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self {
            store,
            calls: Arc::default(),
        }
    }

    /// Returns what is known of the calls, also while all of them hang.
    pub fn calls(&self) -> Arc<Calls> {
        Arc::clone(&self.calls)
    }
}

impl Store for Watched {
    fn prepare(&self) -> Result<(), StoreError> {
        self.calls.during(|| self.store.prepare())
    }

    fn put(&self, key: &ObjectKey, parts: &[&[u8]]) -> Result<(), StoreError> {
        self.calls.during(|| self.store.put(key, parts))
    }

    fn begin(&self) -> Result<Option<Box<dyn Unfinished>>, StoreError> {
        let begun = self.calls.during(|| self.store.begin())?;
        Ok(begun.map(|object| -> Box<dyn Unfinished> {
            Box::new(WatchedObject {
                object: Some(object),
                calls: self.calls(),
            })
        }))
    }

    fn get(&self, key: &ObjectKey, max_bytes: u64) -> Result<Vec<u8>, StoreError> {
        self.calls.during(|| self.store.get(key, max_bytes))
    }

    fn get_range(&self, key: &ObjectKey, offset: u64, into: &mut [u8]) -> Result<(), StoreError> {
        self.calls
            .during(|| self.store.get_range(key, offset, into))
    }

    fn list(&self, kind: ObjectKind, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        self.list_telling(kind, prefix, &|| {})
    }

    fn list_telling(
        &self,
        kind: ObjectKind,
        prefix: &str,
        on_entry: &dyn Fn(),
    ) -> Result<Vec<Listed>, StoreError> {
        let call = self.calls.begin();
        self.store.list_telling(kind, prefix, &|| {
            call.got_on();
            on_entry();
        })
    }

    fn size(&self, key: &ObjectKey) -> Result<u64, StoreError> {
        self.calls.during(|| self.store.size(key))
    }

    fn delete(&self, key: &ObjectKey) -> Result<(), StoreError> {
        self.calls.during(|| self.store.delete(key))
    }

    fn location(&self) -> String {
        self.store.location()
    }
}

/// An unfinished object whose calls are noted, its end included: to give it up
/// may be a call into the file system as well.
#[derive(Debug)]
struct WatchedObject {
    /// Taken by whatever ends it.
    object: Option<Box<dyn Unfinished>>,
    calls: Arc<Calls>,
}

impl Unfinished for WatchedObject {
    fn append(&mut self, parts: &[&[u8]]) -> Result<(), StoreError> {
        let object = self.object.as_mut().expect("only its end takes it");
        self.calls.during(|| object.append(parts))
    }

    fn finish(mut self: Box<Self>, key: &ObjectKey) -> Result<(), StoreError> {
        let object = self.object.take().expect("only its end takes it");
        self.calls.during(|| object.finish(key))
    }
}

impl Drop for WatchedObject {
    fn drop(&mut self) {
        let object = self.object.take();
        self.calls.during(|| drop(object));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;
    use crate::LocalStore;

    #[test]
    fn a_call_is_under_way_until_it_comes_back() {
        let calls = Calls::default();
        assert_eq!(calls.waited(), None);
        let first = calls.begin();
        let between = Instant::now();
        let second = calls.begin();
        let least = between.elapsed();
        assert!(calls.waited().unwrap().oldest >= least);
        drop(first);
        assert!(calls.waited().unwrap().oldest <= between.elapsed());
        drop(second);
        assert_eq!(calls.waited(), None);
    }

    #[test]
    fn a_store_is_silent_since_any_of_its_calls_came_back_or_got_on() {
        let tick = || std::thread::sleep(Duration::from_millis(2));
        let calls = Calls::default();
        let slow = calls.begin();
        tick();
        let waited = calls.waited().unwrap();
        assert!(waited.silent >= Duration::from_millis(2), "{waited:?}");
        let before = Instant::now();
        drop(calls.begin());
        let waited = calls.waited().unwrap();
        assert!(waited.silent <= before.elapsed(), "{waited:?}");
        assert!(waited.oldest > waited.silent, "{waited:?}");
        tick();
        let before = Instant::now();
        slow.got_on();
        let waited = calls.waited().unwrap();
        assert!(waited.oldest <= before.elapsed(), "{waited:?}");
        drop(slow);
        tick();
        // What nobody asked for was not waited for.
        let begun = Instant::now();
        let _fresh = calls.begin();
        assert!(calls.waited().unwrap().silent <= begun.elapsed());
    }

    #[test]
    fn a_listing_gets_on_with_every_entry() {
        let dir = tempfile::tempdir().unwrap();
        let watched = Watched::new(Arc::new(LocalStore::new(dir.path().join("repo"))));
        watched.prepare().unwrap();
        for name in ["a1", "b2", "c3"] {
            let name = name.repeat(32);
            let key = ObjectKey::new(ObjectKind::Pack, name).unwrap();
            watched.put(&key, &[b"x"]).unwrap();
        }
        let told = std::cell::Cell::new(0);
        let tell = || {
            told.set(told.get() + 1);
            assert!(watched.calls().waited().is_some());
        };
        let found = watched.list_telling(ObjectKind::Pack, "", &tell).unwrap();
        assert_eq!((found.len(), told.get()), (3, 3));
        assert_eq!(watched.list(ObjectKind::Pack, "").unwrap(), found);
    }

    /// A store whose every call tells that it came, and waits.
    #[derive(Debug)]
    struct Slow {
        came: Mutex<Sender<()>>,
        go: Mutex<Receiver<()>>,
    }

    impl Slow {
        fn call<T>(&self, answer: T) -> T {
            self.came.lock().unwrap().send(()).unwrap();
            self.go.lock().unwrap().recv().unwrap();
            answer
        }
    }

    impl Store for Arc<Slow> {
        fn prepare(&self) -> Result<(), StoreError> {
            self.call(Ok(()))
        }
        fn put(&self, _: &ObjectKey, _: &[&[u8]]) -> Result<(), StoreError> {
            self.call(Ok(()))
        }
        fn begin(&self) -> Result<Option<Box<dyn Unfinished>>, StoreError> {
            self.call(Ok(Some(Box::new(SlowObject(Arc::clone(self))))))
        }
        fn get(&self, _: &ObjectKey, _: u64) -> Result<Vec<u8>, StoreError> {
            self.call(Ok(Vec::new()))
        }
        fn get_range(&self, _: &ObjectKey, _: u64, _: &mut [u8]) -> Result<(), StoreError> {
            self.call(Ok(()))
        }
        fn list(&self, _: ObjectKind, _: &str) -> Result<Vec<Listed>, StoreError> {
            self.call(Ok(Vec::new()))
        }
        fn size(&self, _: &ObjectKey) -> Result<u64, StoreError> {
            self.call(Ok(0))
        }
        fn delete(&self, _: &ObjectKey) -> Result<(), StoreError> {
            self.call(Ok(()))
        }
        fn location(&self) -> String {
            String::new()
        }
    }

    #[derive(Debug)]
    struct SlowObject(Arc<Slow>);

    impl Unfinished for SlowObject {
        fn append(&mut self, _: &[&[u8]]) -> Result<(), StoreError> {
            self.0.call(Ok(()))
        }
        fn finish(self: Box<Self>, _: &ObjectKey) -> Result<(), StoreError> {
            Ok(())
        }
    }

    impl Drop for SlowObject {
        fn drop(&mut self) {
            self.0.call(());
        }
    }

    #[test]
    fn no_call_into_a_watched_store_goes_unseen() {
        let (came_give, came) = channel();
        let (go, go_take) = channel();
        let slow = Arc::new(Slow {
            came: Mutex::new(came_give),
            go: Mutex::new(go_take),
        });
        let watched = Watched::new(Arc::new(slow));
        let calls = watched.calls();
        let key = ObjectKey::new(ObjectKind::Config, "config").unwrap();
        std::thread::scope(|scope| {
            let caller = scope.spawn(|| {
                watched.prepare().unwrap();
                watched.put(&key, &[]).unwrap();
                watched.get(&key, 0).unwrap();
                watched.get_range(&key, 0, &mut []).unwrap();
                watched.list(ObjectKind::Pack, "").unwrap();
                watched.size(&key).unwrap();
                watched.delete(&key).unwrap();
                let mut given_up = watched.begin().unwrap().unwrap();
                given_up.append(&[]).unwrap();
                drop(given_up);
                watched.begin().unwrap().unwrap().finish(&key).unwrap();
            });
            // Dropped where this fails, or the caller would wait for ever.
            let go = go;
            // Finishing one drops it, which is the last call that waits.
            for number in 0..12 {
                came.recv().unwrap();
                assert!(calls.waited().is_some(), "call {number} was not seen");
                go.send(()).unwrap();
            }
            caller.join().unwrap();
        });
        assert_eq!(calls.waited(), None);
    }

    #[test]
    fn a_watched_store_keeps_what_it_is_given() {
        let dir = tempfile::tempdir().unwrap();
        let watched = Watched::new(Arc::new(LocalStore::new(dir.path().join("repo"))));
        watched.prepare().unwrap();
        let key = ObjectKey::new(ObjectKind::Config, "config").unwrap();
        watched.put(&key, &[b"a", b"b"]).unwrap();
        assert_eq!(watched.get(&key, 2).unwrap(), b"ab");
    }
}
