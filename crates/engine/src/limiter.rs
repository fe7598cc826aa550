//! Holds reading back to a rate.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What may be read at once after a pause: enough that a thread that was held
/// up elsewhere makes up for it, too little to be seen as a burst.
const BURST: Duration = Duration::from_millis(100);
/// How often a waiting thread looks whether it should stop.
const LOOK: Duration = Duration::from_millis(100);

/// A token bucket that many threads draw from.
#[derive(Debug)]
pub struct Limiter {
    bytes_per_second: u64,
    /// When all that was drawn so far is paid for.
    paid_at: Mutex<Instant>,
}

impl Limiter {
    /// Makes a limiter; a rate of 0 counts as 1.
    pub fn new(bytes_per_second: u64) -> Self {
        Self {
            bytes_per_second: bytes_per_second.max(1),
            paid_at: Mutex::new(Instant::now()),
        }
    }

    /// Draws `bytes` and waits until they may be read, or until `stopped`.
    ///
    /// A draw larger than the bucket is allowed and waited for afterwards, so
    /// that any size of request fits any rate.
    pub fn take(&self, bytes: u64, stopped: &dyn Fn() -> bool) {
        let due = self.draw(bytes, Instant::now());
        loop {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() || stopped() {
                return;
            }
            std::thread::sleep(left.min(LOOK));
        }
    }

    /// Returns when the bytes drawn may be read.
    fn draw(&self, bytes: u64, now: Instant) -> Instant {
        let micros = u128::from(bytes) * 1_000_000 / u128::from(self.bytes_per_second);
        let price = Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX));
        let mut paid_at = self.paid_at.lock().unwrap_or_else(PoisonError::into_inner);
        let oldest = now.checked_sub(BURST).unwrap_or(now);
        let begin = (*paid_at).max(oldest);
        // Beyond what a clock can tell it is for ever anyway.
        *paid_at = begin.checked_add(price).unwrap_or(begin);
        begin
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_drawn_is_paid_for_before_the_next_draw() {
        let limiter = Limiter::new(1000);
        let now = Instant::now();
        let first = limiter.draw(500, now);
        assert!(first <= now, "the first draw does not wait");
        let second = limiter.draw(2000, now);
        assert_eq!(second - first, Duration::from_millis(500));
        assert_eq!(limiter.draw(1, now) - second, Duration::from_secs(2));
    }

    #[test]
    fn a_pause_saves_up_no_more_than_a_burst() {
        let limiter = Limiter::new(1000);
        let later = Instant::now() + Duration::from_mins(1);
        let first = limiter.draw(1000, later);
        assert_eq!(later - first, BURST);
        assert_eq!(limiter.draw(1, later) - later, Duration::from_millis(900));
    }

    #[test]
    fn a_wait_ends_when_everything_stops() {
        let limiter = Limiter::new(1);
        limiter.take(1 << 40, &|| false);
        let began = Instant::now();
        limiter.take(1, &|| true);
        assert!(began.elapsed() < Duration::from_secs(1));
    }
}
