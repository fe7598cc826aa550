//! The open packs of one kind, shared by all lanes.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::RepoError;
use crate::writer::open_pack::OpenPack;

/// Hands out open packs, each to one thread at a time, and bounds how many
/// there are, those on their way into the store included.
///
/// So neither the memory nor the number of half-full packs at the end follows
/// the number of lanes.
pub(crate) struct Shelf {
    idle: Mutex<Vec<OpenPack>>,
    slots: Arc<Slots>,
}

/// How many packs there are.
struct Slots {
    used: Mutex<usize>,
    /// A slot is free, or a pack lies on the shelf.
    changed: Condvar,
    max: usize,
}

impl Slots {
    fn lock(&self) -> MutexGuard<'_, usize> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right of one pack to be there; whoever drops the pack gives it back.
pub(crate) struct Slot(Arc<Slots>);

impl Drop for Slot {
    fn drop(&mut self) {
        let mut used = self.0.lock();
        *used = used.saturating_sub(1);
        self.0.changed.notify_one();
    }
}

impl Shelf {
    /// Allows at most `max` packs at once, and at least one.
    pub(crate) fn new(max: usize) -> Self {
        let slots = Slots {
            used: Mutex::default(),
            changed: Condvar::new(),
            max: max.max(1),
        };
        Self {
            idle: Mutex::default(),
            slots: Arc::new(slots),
        }
    }

    /// Takes an open pack, or starts one with `start`; waits while there are
    /// as many as there may be and all are in use.
    pub(crate) fn take(
        &self,
        start: impl FnOnce(Slot) -> Result<OpenPack, RepoError>,
    ) -> Result<OpenPack, RepoError> {
        let mut used = self.slots.lock();
        loop {
            // The one used last: the others are seldom needed, and stay few.
            if let Some(open) = self.idle().pop() {
                return Ok(open);
            }
            if *used < self.slots.max {
                *used = used.saturating_add(1);
                drop(used);
                return start(Slot(Arc::clone(&self.slots)));
            }
            used = self
                .slots
                .changed
                .wait(used)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Puts an open pack back for whoever needs one next.
    pub(crate) fn put_back(&self, open: OpenPack) {
        self.idle().push(open);
        // Who waits looks at the shelf under this lock.
        drop(self.slots.lock());
        self.slots.changed.notify_one();
    }

    /// Takes all packs off, so that they can be closed.
    pub(crate) fn clear(&self) -> Vec<OpenPack> {
        std::mem::take(&mut *self.idle())
    }

    fn idle(&self) -> MutexGuard<'_, Vec<OpenPack>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use super::*;
    use crate::pack::PackKind;
    use crate::writer::open_pack::Body;

    #[test]
    fn however_many_threads_want_packs_there_are_never_more_than_allowed() {
        let shelf = Shelf::new(3);
        let (there, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|scope| {
            for number in 0..8 {
                let (shelf, there, most) = (&shelf, &there, &most);
                scope.spawn(move || {
                    for turn in 0..500 {
                        let open = shelf
                            .take(|slot| {
                                let now = there.fetch_add(1, Ordering::SeqCst) + 1;
                                most.fetch_max(now, Ordering::SeqCst);
                                let body = Body::Whole(Vec::new());
                                Ok(OpenPack::new(PackKind::Chunks, None, body, Some(slot)))
                            })
                            .unwrap();
                        thread::yield_now();
                        if (number + turn) % 5 == 0 {
                            there.fetch_sub(1, Ordering::SeqCst);
                            drop(open);
                        } else {
                            shelf.put_back(open);
                        }
                    }
                });
            }
        });
        assert_eq!(shelf.clear().len(), there.into_inner());
        assert!((2..=3).contains(&most.into_inner()));
    }
}
