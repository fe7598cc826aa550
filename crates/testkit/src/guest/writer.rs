//! A guest program that writes numbered blocks, to prove an exact point in time.
//!
//! The guest writes block 1, 2, 3 ... strictly one after the other, as far as
//! the test permits. So a true point in time of its disks, taken together,
//! holds exactly the blocks up to some number: not one more, not one less.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use super::Guest;
use crate::command::wait_until;

const BLOCK_BYTES: usize = 4096;

/// Which block lies where.
///
/// Block n goes to disk `n % disks`, there to slot `(n / disks) % slots`.
#[derive(Debug, Clone)]
pub struct Numbering {
    /// How many blocks each disk holds before the first is overwritten.
    pub slots: u64,
    /// From one slot to the next: 4096 fills a disk without gaps, 65536 puts
    /// each block into a cluster of its own.
    pub stride_bytes: u64,
    /// The guest's devices, such as `/dev/vdb`.
    pub disks: Vec<String>,
}

/// The writing guest program, kept busy by a thread of the test.
#[derive(Debug)]
pub struct NumberedWriter {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<()>>>,
}

#[derive(Debug, Default)]
struct Shared {
    acknowledged: AtomicU64,
    granted: AtomicU64,
    stop: AtomicBool,
}

impl NumberedWriter {
    /// Lets the guest write, at most `window` blocks ahead of what it has
    /// acknowledged. Returns when it has written the first.
    pub fn start(guest: &Guest, numbering: &Numbering, window: u64) -> Result<Self> {
        let socket = &guest.writer;
        let port = UnixStream::connect(socket)
            .with_context(|| format!("cannot reach the guest at {}", socket.display()))?;
        guest.run(&format!(
            "numbered-writer $WRITER_PORT {} {} {} >/tmp/writer 2>&1 &",
            numbering.slots,
            numbering.stride_bytes,
            numbering.disks.join(" ")
        ))?;
        let shared = Arc::new(Shared::default());
        let thread = {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || keep_granting(port, &shared, window))
        };
        let writer = Self {
            shared,
            thread: Some(thread),
        };
        let started = wait_until("the guest writes", Duration::from_secs(30), || {
            Ok(writer.acknowledged() > 0)
        });
        started.with_context(|| guest.run("cat /tmp/writer").unwrap_or_default())?;
        Ok(writer)
    }

    /// Returns the highest block whose write the guest has seen completed: all
    /// up to it are on the disks for certain.
    pub fn acknowledged(&self) -> u64 {
        self.shared.acknowledged.load(Ordering::SeqCst)
    }

    /// Returns the highest block the guest may have begun to write: nothing
    /// above it is on the disks for certain.
    pub fn granted(&self) -> u64 {
        self.shared.granted.load(Ordering::SeqCst)
    }

    /// Stops granting, waits until all granted blocks are written, and returns
    /// the number of the last.
    pub fn stop(mut self) -> Result<u64> {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("the granting thread panicked"))??;
        }
        Ok(self.acknowledged())
    }
}

impl Drop for NumberedWriter {
    fn drop(&mut self) {
        // The thread ends with the guest's end of the socket at the latest.
        self.shared.stop.store(true, Ordering::SeqCst);
    }
}

fn keep_granting(mut port: UnixStream, shared: &Shared, window: u64) -> Result<()> {
    let mut acks = BufReader::new(port.try_clone()?).lines();
    let mut acknowledged = 0;
    loop {
        if !shared.stop.load(Ordering::SeqCst) {
            let permit = acknowledged + window;
            // Known here before the guest can know it: `granted` is never too low.
            shared.granted.store(permit, Ordering::SeqCst);
            port.write_all(format!("{permit}\n").as_bytes())?;
        } else if acknowledged == shared.granted.load(Ordering::SeqCst) {
            return Ok(());
        }
        let line = acks.next().context("the guest is gone")??;
        let number: u64 = line
            .trim()
            .parse()
            .with_context(|| format!("the guest acknowledged `{line}`"))?;
        ensure!(
            number == acknowledged + 1,
            "the guest wrote block {number} after {acknowledged}"
        );
        acknowledged = number;
        shared.acknowledged.store(number, Ordering::SeqCst);
    }
}

impl Numbering {
    /// Returns how long each disk must be.
    pub const fn disk_bytes(&self) -> u64 {
        self.slots * self.stride_bytes
    }

    /// Checks that raw copies of the disks, in order, hold all blocks up to some
    /// number and none beyond, and returns that number.
    ///
    /// It must be at least `acked_before`, read before the point in time, and at
    /// most `granted_after`, read after it.
    pub fn check_prefix(
        &self,
        images: &[&Path],
        acked_before: u64,
        granted_after: u64,
    ) -> Result<u64> {
        ensure!(images.len() == self.disks.len(), "one image for each disk");
        let mut found = Vec::new();
        for image in images {
            found.push(self.read_numbers(image)?);
        }
        let last = found.iter().flatten().copied().max().unwrap_or(0);
        for (disk, numbers) in found.iter().enumerate() {
            for (slot, number) in numbers.iter().enumerate() {
                let expected = self.newest(disk as u64, slot as u64, last);
                if *number != expected {
                    bail!(
                        "not a point in time: block {last} is there, but slot {slot} of {} \
                         holds {number} instead of {expected}",
                        images[disk].display()
                    );
                }
            }
        }
        ensure!(
            last >= acked_before,
            "blocks {} to {acked_before} are lost: they were acknowledged before the point in time",
            last + 1
        );
        ensure!(
            last <= granted_after,
            "block {last} is from the future: only {granted_after} were granted"
        );
        Ok(last)
    }

    /// Returns the highest number up to `last` that goes to this slot; 0 if none does.
    fn newest(&self, disk: u64, slot: u64, last: u64) -> u64 {
        let disks = self.disks.len() as u64;
        let first = slot * disks + disk;
        let round = self.slots * disks;
        if last < first {
            return 0;
        }
        first + (last - first) / round * round
    }

    fn read_numbers(&self, image: &Path) -> Result<Vec<u64>> {
        let file = File::open(image).with_context(|| format!("cannot open {}", image.display()))?;
        let mut block = [0; BLOCK_BYTES];
        let mut numbers = Vec::new();
        for slot in 0..self.slots {
            file.read_exact_at(&mut block, slot * self.stride_bytes)
                .with_context(|| format!("cannot read slot {slot} of {}", image.display()))?;
            let first = &block[..8];
            ensure!(
                block.chunks_exact(8).all(|chunk| chunk == first),
                "torn: slot {slot} of {} holds parts of several blocks",
                image.display()
            );
            numbers.push(u64::from_le_bytes(first.try_into()?));
        }
        Ok(numbers)
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    /// Two disks of four slots, written up to `last` as the guest would.
    fn disks(dir: &Path, numbering: &Numbering, last: u64) -> Vec<PathBuf> {
        let paths: Vec<_> = ["a.raw", "b.raw"]
            .iter()
            .map(|name| dir.join(name))
            .collect();
        for path in &paths {
            File::create(path)
                .unwrap()
                .set_len(numbering.disk_bytes())
                .unwrap();
        }
        for n in 1..=last {
            write(&paths[(n % 2) as usize], n / 2 % 4, n);
        }
        paths
    }

    fn write(path: &Path, slot: u64, number: u64) {
        let file = File::options().write(true).open(path).unwrap();
        let block = number.to_le_bytes().repeat(BLOCK_BYTES / 8);
        file.write_all_at(&block, slot * 8192).unwrap();
    }

    /// Writes 13 blocks, spoils them, and says what the check finds.
    fn found(spoil: impl Fn(&[PathBuf]), acked: u64, granted: u64) -> String {
        let numbering = Numbering {
            slots: 4,
            stride_bytes: 8192,
            disks: vec!["/dev/vdb".to_owned(), "/dev/vdc".to_owned()],
        };
        let dir = tempfile::tempdir().unwrap();
        let paths = disks(dir.path(), &numbering, 13);
        spoil(&paths);
        let images: Vec<_> = paths.iter().map(PathBuf::as_path).collect();
        match numbering.check_prefix(&images, acked, granted) {
            Ok(last) => format!("ok {last}"),
            Err(error) => format!("{error}").split(':').next().unwrap().to_owned(),
        }
    }

    #[test]
    fn a_point_in_time_is_a_prefix_and_nothing_else_is() {
        assert_eq!(found(|_| {}, 13, 13), "ok 13");
        assert_eq!(found(|_| {}, 10, 20), "ok 13");
        assert_eq!(found(|_| {}, 14, 20), "blocks 14 to 14 are lost");
        assert_eq!(found(|_| {}, 10, 12), "block 13 is from the future");
        // Block 11 is lost: its slot still holds 3.
        assert_eq!(
            found(|disks| write(&disks[1], 1, 3), 1, 20),
            "not a point in time"
        );
        // The second disk is older than the first.
        let older = |disks: &[PathBuf]| write(&disks[1], 0, 1);
        assert_eq!(found(older, 1, 20), "not a point in time");
        // Without its last block it is an earlier point, and as good.
        assert_eq!(found(|disks| write(&disks[1], 2, 5), 12, 20), "ok 12");
        // A write from after the point, while 14 is missing.
        let newer = |disks: &[PathBuf]| write(&disks[1], 3, 15);
        assert_eq!(found(newer, 1, 20), "not a point in time");
        let torn = |disks: &[PathBuf]| {
            let file = File::options().write(true).open(&disks[0]).unwrap();
            file.write_all_at(&99_u64.to_le_bytes(), 512).unwrap();
        };
        assert_eq!(found(torn, 1, 20), "torn");
    }
}
