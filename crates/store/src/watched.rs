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
}

impl Calls {
    /// Returns for how long the oldest call has not come back; `None` if none
    /// is under way.
    pub fn oldest(&self) -> Option<Duration> {
        let under_way = self.lock();
        // Calls are numbered as they begin.
        let (_, since) = under_way.since.first_key_value()?;
        Some(since.elapsed())
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

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.calls.lock().since.remove(&self.number);
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
        self.calls.during(|| self.store.list(kind, prefix))
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
        assert_eq!(calls.oldest(), None);
        let first = calls.begin();
        let between = Instant::now();
        let second = calls.begin();
        let least = between.elapsed();
        assert!(calls.oldest().unwrap() >= least);
        drop(first);
        assert!(calls.oldest().unwrap() <= between.elapsed());
        drop(second);
        assert_eq!(calls.oldest(), None);
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
                assert!(calls.oldest().is_some(), "call {number} was not seen");
                go.send(()).unwrap();
            }
            caller.join().unwrap();
        });
        assert_eq!(calls.oldest(), None);
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
