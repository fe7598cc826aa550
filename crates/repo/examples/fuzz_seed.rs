//! Writes seeds for the fuzz targets: `fuzz_seed CORPUS`.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result};

fn main() -> Result<()> {
    let corpus = std::env::args().nth(1).context("usage: fuzz_seed CORPUS")?;
    for (number, (target, bytes)) in highwater_repo::fuzzing::seeds().iter().enumerate() {
        let folder = Path::new(&corpus).join(target);
        fs::create_dir_all(&folder)?;
        File::create(folder.join(format!("seed-{number}")))?.write_all(bytes)?;
    }
    Ok(())
}
