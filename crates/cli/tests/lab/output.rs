//! A backup as people see it, with a real VM.

use anyhow::Result;
use highwater_testkit::{DiskSpec, tool};

use crate::golden::Golden;
use crate::support::Bed;

const MIB: u64 = 1 << 20;

fn say(golden: &mut Golden, bed: &Bed, words: &str) -> Result<()> {
    let args: Vec<&str> = words.split(' ').collect();
    golden.run(&format!("highwater {words}"), &mut bed.command(&args))?;
    Ok(())
}

fn golden(name: &'static str, bed: &Bed) -> Golden {
    Golden::new(name)
        .without_dates()
        .path(&bed.repo(), "/backup")
        .path(&bed.lab.run_dir(), "/run/libvirt")
        .path(&bed.lab.dir(), "/lab")
}

#[test]
fn a_backup_tells_in_a_line_per_disk_what_it_did_and_why() -> Result<()> {
    let bed = Bed::start()?;
    let mut golden = golden("backup", &bed);
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 64 * MIB))
        .disk(DiskSpec::raw("vdb", MIB))
        .start()?;
    vm.write("vda", "write -P 1 0 8M")?;
    vm.write("vdb", "write -P 2 0 64k")?;
    // One disk at a time: two are done in any order.
    say(&mut golden, &bed, "backup web01 -x vdb --estimate")?;
    say(
        &mut golden,
        &bed,
        "backup web01 -x vdb --tag first --group nightly",
    )?;
    vm.write("vda", "write -P 3 16M 192k")?;
    say(&mut golden, &bed, "backup web01 -x vdb --threshold 1MiB")?;
    say(
        &mut golden,
        &bed,
        "backup web01 -x vdb --threshold 1MiB --estimate",
    )?;
    say(&mut golden, &bed, "backup web01 -x vdb")?;
    say(&mut golden, &bed, "backup web01 -d vdb --verbose")?;
    say(&mut golden, &bed, "backup web01 -i vda -l full --quiet")?;
    say(&mut golden, &bed, "backup web01 -d vda -l copy --json")?;
    say(&mut golden, &bed, "backup web01 -d vda -l differential")?;
    let mark = vm.checkpoints()?.pop().unwrap_or_default();
    bed.lab.virsh(&["checkpoint-delete", "web01", &mark])?;
    say(&mut golden, &bed, "backup web01 -d vda")?;
    say(&mut golden, &bed, "list web01")?;
    say(&mut golden, &bed, "list --all --tag first")?;
    golden.check()
}

#[test]
fn the_first_mistakes_of_a_new_user_are_told_with_a_way_out() -> Result<()> {
    let bed = Bed::start()?;
    let mut golden = golden("mistakes", &bed);
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", MIB))
        .start()?;
    bed.lab
        .vm("db01")
        .disk(DiskSpec::qcow2("vda", MIB))
        .define()?;
    vm.write("vda", "write -P 1 0 64k")?;
    say(&mut golden, &bed, "backup wbe01")?;
    say(&mut golden, &bed, "backup mailserver")?;
    say(&mut golden, &bed, "backup db01")?;
    say(&mut golden, &bed, "backup web01 -d sda")?;
    say(&mut golden, &bed, "backup web01 -x vda")?;
    say(&mut golden, &bed, "backup web01 -l incremental")?;
    say(&mut golden, &bed, "backup web01 --quiesce require")?;
    say(&mut golden, &bed, "backup web01 db01 web01")?;
    say(&mut golden, &bed, "backup db01 nobody --json")?;
    tool("qemu-img")
        .args(["create", "-q", "-f", "raw"])
        .arg(bed.lab.path("taken.raw"))
        .arg("1M")
        .run()?;
    let taken = bed.lab.path("taken.raw").display().to_string();
    say(
        &mut golden,
        &bed,
        &format!("restore web01 -d vda --to {taken}"),
    )?;
    golden.check()
}
