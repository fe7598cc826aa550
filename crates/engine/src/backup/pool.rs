//! The read buffers: a fixed number of them, shared by all disks.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Hands out buffers, the one given back last first: it is still in a
/// processor's cache, and the ones at the bottom never cost memory while there
/// is no need for them.
pub(super) struct Pool {
    buffers: Mutex<Vec<Vec<u8>>>,
    given: Condvar,
}

impl Pool {
    /// Makes `count` buffers, which take memory only when they are filled.
    pub(super) fn new(count: usize) -> Self {
        Self {
            buffers: Mutex::new(vec![Vec::new(); count]),
            given: Condvar::new(),
        }
    }

    /// Takes a buffer if there is one.
    pub(super) fn take(&self) -> Option<Vec<u8>> {
        self.lock().pop()
    }

    /// Takes a buffer; waits for it no longer than `limit`.
    pub(super) fn take_within(&self, limit: Duration) -> Option<Vec<u8>> {
        let end = Instant::now() + limit;
        let mut buffers = self.lock();
        loop {
            if let Some(buffer) = buffers.pop() {
                return Some(buffer);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            (buffers, _) = self
                .given
                .wait_timeout(buffers, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Gives a buffer back.
    pub(super) fn give(&self, buffer: Vec<u8>) {
        self.lock().push(buffer);
        self.given.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts the buffers that one reader has under way, and replaces those that
/// are lost with its connection: other disks wait for them.
pub(super) struct UnderWay<'a> {
    pool: &'a Pool,
    count: usize,
}

impl<'a> UnderWay<'a> {
    /// Counts from nothing.
    pub(super) const fn new(pool: &'a Pool) -> Self {
        Self { pool, count: 0 }
    }

    /// One more buffer is with the connection.
    pub(super) const fn add(&mut self) {
        self.count += 1;
    }

    /// One has come back, and somebody else gives it to the pool.
    pub(super) const fn remove(&mut self) {
        self.count -= 1;
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        (0..self.count).for_each(|_| self.pool.give(Vec::new()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_never_more_buffers_and_the_last_one_given_comes_first() {
        let pool = Pool::new(2);
        let (one, other) = (pool.take().unwrap(), pool.take().unwrap());
        assert_eq!(pool.take(), None);
        assert_eq!(pool.take_within(Duration::from_millis(1)), None);
        pool.give(one);
        pool.give([other, vec![7]].concat());
        assert_eq!(pool.take().unwrap(), [7]);
        std::thread::scope(|scope| {
            pool.take().unwrap();
            let waiting = scope.spawn(|| pool.take_within(Duration::from_mins(1)));
            pool.give(vec![8]);
            assert_eq!(waiting.join().unwrap().unwrap(), [8]);
        });
    }

    #[test]
    fn buffers_that_are_lost_with_a_connection_are_replaced() {
        let pool = Pool::new(3);
        let mut under_way = UnderWay::new(&pool);
        for _ in 0..3 {
            drop(pool.take().unwrap());
            under_way.add();
        }
        under_way.remove();
        pool.give(vec![9]);
        drop(under_way);
        let left: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(left, [vec![], vec![], vec![9]]);
    }
}
