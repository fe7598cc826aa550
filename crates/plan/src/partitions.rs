//! Which places of a disk does every mount change?
//!
//! The superblock of whatever lies in a partition, and the tables themselves.
//! What is read here was written by the guest: every number is checked before
//! it is used, and the worst a wrong one can do is to have some other place
//! looked at.

/// More partitions than any guest mounts; each costs a few reads.
const PARTITIONS_MAX: usize = 32;
/// UEFI wants room for at least as many; entries beyond are passed over.
const GPT_ENTRIES_MAX: usize = 128;
/// btrfs keeps its superblock 64 KiB from the start, the others earlier.
const BTRFS_SUPERBLOCK: u64 = 64 << 10;
/// Sizes of a sector that partition tables count in.
const SECTOR_SIZES: [u64; 2] = [512, 4096];

/// A partition, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Partition {
    start: u64,
    end: u64,
}

/// Returns offsets of places that any mount changes, each below `size_bytes`,
/// most telling first. `head` is the beginning of the disk as it is now.
pub fn mounted_places(head: &[u8], size_bytes: u64) -> Vec<u64> {
    // The tables (the second copy of GPT's lies at the end), and the file
    // system of a disk without partitions.
    let mut places = vec![0, size_bytes.saturating_sub(1), BTRFS_SUPERBLOCK];
    for partition in partitions(head, size_bytes) {
        let Partition { start, end } = partition;
        places.push(start);
        let second = start.saturating_add(BTRFS_SUPERBLOCK);
        places.extend([second, end.saturating_sub(1)].map(|place| place.min(end.max(start))));
    }
    places.retain(|place| *place < size_bytes);
    places
}

fn partitions(head: &[u8], size_bytes: u64) -> Vec<Partition> {
    let mut found = Vec::new();
    for sector in SECTOR_SIZES {
        let gpt = gpt(head, sector);
        let table = if gpt.is_empty() {
            mbr(head, sector)
        } else {
            gpt
        };
        for partition in table {
            let is_inside = partition.start < partition.end && partition.start < size_bytes;
            if is_inside && !found.contains(&partition) && found.len() < PARTITIONS_MAX {
                found.push(Partition {
                    end: partition.end.min(size_bytes),
                    ..partition
                });
            }
        }
    }
    found
}

/// The four entries of a master boot record.
fn mbr(head: &[u8], sector: u64) -> Vec<Partition> {
    const TABLE: usize = 446;
    const ENTRY: usize = 16;
    const PROTECTIVE: u8 = 0xee;
    if head.get(510..512) != Some(&[0x55, 0xaa]) {
        return Vec::new();
    }
    (0..4)
        .filter_map(|number| {
            let entry = head.get(TABLE + number * ENTRY..)?.get(..ENTRY)?;
            let kind = *entry.get(4)?;
            let first = u64::from(u32_at(entry, 8)?);
            let count = u64::from(u32_at(entry, 12)?);
            (kind != 0 && kind != PROTECTIVE).then(|| Partition {
                start: first.saturating_mul(sector),
                end: first.saturating_add(count).saturating_mul(sector),
            })
        })
        .collect()
}

/// The entries of a GUID partition table, as far as they are in `head`.
fn gpt(head: &[u8], sector: u64) -> Vec<Partition> {
    let read = || {
        let header = slice(head, sector, 92)?;
        if header.get(..8)? != b"EFI PART" {
            return None;
        }
        let table = u64_at(header, 72)?.checked_mul(sector)?;
        let count = usize::try_from(u32_at(header, 80)?).ok()?;
        let size = u64::from(u32_at(header, 84)?);
        if !(128..=4096).contains(&size) {
            return None;
        }
        let entries = (0..count.min(GPT_ENTRIES_MAX) as u64).map_while(|number| {
            let at = number.checked_mul(size)?.checked_add(table)?;
            slice(head, at, 128)
        });
        let partitions = entries.filter_map(|entry| {
            let is_used = entry.iter().take(16).any(|byte| *byte != 0);
            let first = u64_at(entry, 32)?;
            let last = u64_at(entry, 40)?;
            is_used.then(|| Partition {
                start: first.saturating_mul(sector),
                end: last.saturating_add(1).saturating_mul(sector),
            })
        });
        Some(partitions.collect())
    };
    read().unwrap_or_default()
}

fn slice(bytes: &[u8], at: u64, len: usize) -> Option<&[u8]> {
    bytes.get(usize::try_from(at).ok()?..)?.get(..len)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_le_bytes(*bytes))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u64::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const SIZE: u64 = 64 * MIB;

    fn put(head: &mut [u8], at: usize, bytes: &[u8]) {
        head[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn mbr_disk() -> Vec<u8> {
        let mut head = vec![0; 64 << 10];
        put(&mut head, 510, &[0x55, 0xaa]);
        put(&mut head, 446 + 4, &[0x83]);
        put(&mut head, 446 + 8, &2048_u32.to_le_bytes());
        put(&mut head, 446 + 12, &4096_u32.to_le_bytes());
        head
    }

    fn gpt_disk(sector: usize) -> Vec<u8> {
        let mut head = vec![0; 64 << 10];
        put(&mut head, 510, &[0x55, 0xaa]);
        put(&mut head, 446 + 4, &[0xee]);
        put(&mut head, sector, b"EFI PART");
        put(&mut head, sector + 72, &2_u64.to_le_bytes());
        put(&mut head, sector + 80, &128_u32.to_le_bytes());
        put(&mut head, sector + 84, &128_u32.to_le_bytes());
        let first = MIB / sector as u64;
        for (number, start) in [(0, first), (5, 8 * first)] {
            let entry = 2 * sector + number * 128;
            put(&mut head, entry, &[7; 16]);
            put(&mut head, entry + 32, &start.to_le_bytes());
            put(&mut head, entry + 40, &(start + first - 1).to_le_bytes());
        }
        head
    }

    #[test]
    fn tables_of_both_kinds_and_both_sector_sizes_lead_to_superblocks() {
        let plain = [0, SIZE - 1, 64 << 10];
        assert_eq!(mounted_places(&[], SIZE), plain);
        assert_eq!(mounted_places(&[0; 512], 100), [0, 99]);
        let places = mounted_places(&mbr_disk(), SIZE);
        assert_eq!(places[3..6], [MIB, MIB + (64 << 10), 3 * MIB - 1]);
        for sector in [512, 4096] {
            let places = mounted_places(&gpt_disk(sector), SIZE);
            let two = [MIB, MIB + (64 << 10), 2 * MIB - 1];
            let eight = [8 * MIB, 8 * MIB + (64 << 10), 9 * MIB - 1];
            assert_eq!(places[3..], [two, eight].concat(), "{sector}");
        }
    }

    #[test]
    fn whatever_the_guest_writes_the_places_are_few_and_inside_the_disk() {
        let mut seed = 1_u64;
        let mut next = move || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            seed >> 24
        };
        for round in 0..4000_u64 {
            let mut head = match round % 3 {
                0 => mbr_disk(),
                1 => gpt_disk(512),
                _ => gpt_disk(4096),
            };
            for _ in 0..40 {
                let at = usize::try_from(next() % 9000).unwrap();
                let value = [0, 255, 1, u8::try_from(next() % 256).unwrap()];
                head[at] = value[usize::try_from(next() % 4).unwrap()];
            }
            head.truncate(usize::try_from(next() % (64 << 10)).unwrap());
            let size = next() % (1 << 40);
            let places = mounted_places(&head, size);
            assert!(places.len() <= 3 + 3 * PARTITIONS_MAX);
            assert!(places.iter().all(|place| *place < size));
        }
        let (zeroes, ones) = (vec![0; 65536], vec![255; 65536]);
        assert!(mounted_places(&zeroes, 0).is_empty());
        assert!(mounted_places(&ones, u64::MAX).len() < 100);
    }
}
