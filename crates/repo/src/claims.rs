//! What this session has stored but no index file shows yet.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use highwater_model::ObjectId;

const SHARDS: usize = 64;

/// The ids of objects that some lane of this session has taken on.
///
/// Split by id, so that lanes rarely wait for each other. An id stays here
/// until its index segment is written, which bounds the size.
pub(crate) struct Claims {
    shards: [Mutex<HashSet<ObjectId>>; SHARDS],
}

impl Claims {
    pub(crate) fn new() -> Self {
        Self {
            shards: std::array::from_fn(|_| Mutex::default()),
        }
    }

    pub(crate) fn contains(&self, id: &ObjectId) -> bool {
        self.shard(id).contains(id)
    }

    /// Takes an object on; returns false if somebody else has it.
    pub(crate) fn claim(&self, id: ObjectId) -> bool {
        self.shard(&id).insert(id)
    }

    /// Forgets an object that the index shows now.
    pub(crate) fn release(&self, id: &ObjectId) {
        self.shard(id).remove(id);
    }

    fn shard(&self, id: &ObjectId) -> MutexGuard<'_, HashSet<ObjectId>> {
        let [first, ..] = *id.as_bytes();
        let at = usize::from(first) % SHARDS;
        let shard = self
            .shards
            .get(at)
            .expect("the remainder is below the number of shards");
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
