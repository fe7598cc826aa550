//! Blocks of index files that were read lately; the oldest leave first.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use crate::index::format::BLOCK_LEN;

/// A proven block.
pub(crate) type Block = Arc<[u8; BLOCK_LEN]>;

const SHARDS: usize = 16;
/// 16 MiB in all.
const BLOCKS_PER_SHARD: usize = 256;

/// Keeps blocks by file number and block number.
pub(crate) struct BlockCache {
    shards: [Mutex<Shard>; SHARDS],
}

#[derive(Default)]
struct Shard {
    blocks: HashMap<(u64, u64), Block>,
    order: VecDeque<(u64, u64)>,
}

impl BlockCache {
    pub(crate) fn new() -> Self {
        Self {
            shards: std::array::from_fn(|_| Mutex::default()),
        }
    }

    pub(crate) fn get(&self, file: u64, block: u64) -> Option<Block> {
        self.shard(block, |shard| shard.blocks.get(&(file, block)).cloned())
    }

    pub(crate) fn insert(&self, file: u64, block: u64, bytes: Block) {
        self.shard(block, |shard| {
            if shard.blocks.insert((file, block), bytes).is_none() {
                shard.order.push_back((file, block));
            }
            if shard.order.len() > BLOCKS_PER_SHARD {
                let oldest = shard.order.pop_front();
                oldest.and_then(|oldest| shard.blocks.remove(&oldest));
            }
        });
    }

    fn shard<T>(&self, block: u64, visit: impl FnOnce(&mut Shard) -> T) -> T {
        let at = usize::try_from(block % 16).unwrap_or_default();
        let shard = self
            .shards
            .get(at)
            .expect("the remainder is below the number of shards");
        visit(&mut shard.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
