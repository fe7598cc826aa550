//! How long the writes of a guest take, as the guest sees it.

use std::fmt;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::Guest;

/// A guest program that writes small blocks at random places all the time.
#[derive(Debug)]
pub struct LatencyWriter {
    number: u32,
}

/// What the guest saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Latency {
    /// How many writes were done.
    pub writes: u64,
    /// How long the longest took.
    pub longest: Duration,
    /// How long they took on average.
    pub mean: Duration,
}

impl fmt::Display for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} writes, longest {:.1} ms, mean {:.2} ms",
            self.writes,
            self.longest.as_secs_f64() * 1e3,
            self.mean.as_secs_f64() * 1e3
        )
    }
}

impl LatencyWriter {
    /// Begins to write into the first `span_bytes` of `disk` (such as
    /// `/dev/vdb`). `number` is not that of an earlier run in this guest.
    pub fn start(guest: &Guest, number: u32, disk: &str, span_bytes: u64) -> Result<Self> {
        guest.run(&format!(
            "{{ latency-writer {disk} {span_bytes} /tmp/stop{number} >/tmp/latency{number} 2>&1; \
             touch /tmp/done{number}; }} &"
        ))?;
        Ok(Self { number })
    }

    /// Ends it and returns what it saw. A write that does not end is waited
    /// for a minute.
    pub fn stop(self, guest: &Guest) -> Result<Latency> {
        let number = self.number;
        let said = guest.run(&format!(
            "touch /tmp/stop{number}; while [ ! -e /tmp/done{number} ]; do usleep 10000; done; \
             cat /tmp/latency{number}"
        ))?;
        let numbers = said.split_whitespace().map(str::parse::<u64>);
        let numbers: Vec<u64> = numbers
            .collect::<Result<_, _>>()
            .with_context(|| said.clone())?;
        let [writes, longest, sum] = numbers[..] else {
            anyhow::bail!("the guest said: {said}");
        };
        Ok(Latency {
            writes,
            longest: Duration::from_nanos(longest),
            mean: Duration::from_nanos(sum / writes.max(1)),
        })
    }
}
