//! Peers that break the NBD protocol or cannot read, seen from the whole backup:
//! the disk behind them is left out, the others are in the point.
//!
//! Between QEMU and a backup that runs in the test's process stands a peer that
//! passes on what QEMU says, until it lies.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use highwater_drivers::libvirt::{LibvirtDriver, LibvirtOptions};
use highwater_engine::repository::{Compression, Repository};
use highwater_engine::{
    BackupContext, BackupOptions, Cancel, Event, Guard, Level, Observer, Report, Status, Tuning,
    backup, serve,
};
use highwater_hypervisor::{
    BeginOrder, Begun, Claimant, Driver, Ended, ErrorKind, ExportAddress, HypervisorError,
    LeftDirectory, MarkOrder, Quiesce, RunState, Surroundings, Swept, VmFacts, VmRef,
};
use highwater_model::{ClaimId, SessionId, SystemClock};
use highwater_testkit::{DiskSpec, Vm};

use crate::support::{Bed, assert_same, disk, mode, reference, write_noise};

const MIB: u64 = 1 << 20;
const VICTIM: &str = "vdb";

/// How the peer lies.
#[derive(Debug, Clone, Copy)]
enum Lie {
    /// Says nothing and hangs up.
    HangUp,
    /// Hangs up after so many bytes, in the midst of a reply.
    EndAfter(usize),
    /// Turns all bits over after so many bytes.
    GarbageAfter(usize),
    /// Says no more after so many bytes, and does not hang up.
    SilentAfter(usize),
    /// Tells another size than QEMU, in the handshake.
    Size(u64),
    /// No lie: passes everything on, each piece so much later.
    Late(Duration),
    /// The same, and hangs up on all clients after so many.
    LateAndFull(Duration, usize),
}

/// The driver, but the export of one disk is the liar's.
struct Lying {
    driver: LibvirtDriver,
    lie: Lie,
    socket: PathBuf,
}

impl Driver for Lying {
    fn list(&mut self) -> Result<Vec<(VmRef, RunState)>, HypervisorError> {
        self.driver.list()
    }

    fn find(&mut self, name_or_uuid: &str) -> Result<VmRef, HypervisorError> {
        self.driver.find(name_or_uuid)
    }

    fn observe(&mut self, vm: &VmRef) -> Result<VmFacts, HypervisorError> {
        self.driver.observe(vm)
    }

    fn begin(&mut self, order: &BeginOrder) -> Result<Begun, HypervisorError> {
        let mut begun = self.driver.begin(order)?;
        for export in &mut begun.exports {
            if export.target == VICTIM
                && let ExportAddress::Unix(real) = &export.address
            {
                listen(self.lie, &self.socket, real.clone());
                export.address = ExportAddress::Unix(self.socket.clone());
            }
        }
        Ok(begun)
    }

    fn check(&mut self, vm: &VmRef, session: SessionId) -> Result<(), HypervisorError> {
        self.driver.check(vm, session)
    }

    fn is_alarmed(&mut self, session: SessionId) -> bool {
        self.driver.is_alarmed(session)
    }

    fn end(&mut self, order: &BeginOrder) -> Result<Ended, HypervisorError> {
        self.driver.end(order)
    }

    fn end_leftover(&mut self, vm: &VmRef, session: SessionId) -> Result<Ended, HypervisorError> {
        self.driver.end_leftover(vm, session)
    }

    fn mark(&mut self, vm: &VmRef, order: &MarkOrder) -> Result<(), HypervisorError> {
        self.driver.mark(vm, order)
    }

    fn survey(&mut self, vm: &VmRef) -> Result<Surroundings, HypervisorError> {
        self.driver.survey(vm)
    }

    fn leftovers(
        &mut self,
        vm: &VmRef,
        places: &[PathBuf],
    ) -> Result<Vec<LeftDirectory>, HypervisorError> {
        self.driver.leftovers(vm, places)
    }

    fn sweep(&mut self, vm: &VmRef, places: &[PathBuf]) -> Result<Swept, HypervisorError> {
        self.driver.sweep(vm, places)
    }

    fn claimant(&mut self, vm: &VmRef) -> Result<Option<Box<dyn Claimant>>, HypervisorError> {
        self.driver.claimant(vm)
    }

    fn act_for(&mut self, claim: Option<ClaimId>) {
        self.driver.act_for(claim);
    }

    fn still_claimed(&mut self, vm: &VmRef) -> Result<(), HypervisorError> {
        self.driver.still_claimed(vm)
    }
}

fn listen(lie: Lie, socket: &Path, real: PathBuf) {
    drop(fs::remove_file(socket));
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        for (number, client) in listener.incoming().enumerate() {
            if matches!(lie, Lie::LateAndFull(_, clients) if number >= clients) {
                drop(client);
                continue;
            }
            let (client, real) = (client.unwrap(), UnixStream::connect(&real).unwrap());
            std::thread::spawn(move || talk(lie, client, &real));
        }
    });
}

/// Passes on what both say; both are done when one hangs up.
fn talk(lie: Lie, mut client: UnixStream, real: &UnixStream) {
    let (mut asking, mut to_real) = (client.try_clone().unwrap(), real.try_clone().unwrap());
    std::thread::spawn(move || {
        drop(std::io::copy(&mut asking, &mut to_real));
        drop(to_real.shutdown(Shutdown::Both));
    });
    let (mut said, mut buffer, mut from) = (0, vec![0; 64 << 10], real);
    let mut teller = SizeTeller::default();
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        let mut bytes = buffer[..len].to_vec();
        let kept = |after: usize| after.saturating_sub(said).min(len);
        match lie {
            Lie::HangUp => bytes.clear(),
            Lie::EndAfter(after) | Lie::SilentAfter(after) => bytes.truncate(kept(after)),
            Lie::GarbageAfter(after) => bytes[kept(after)..]
                .iter_mut()
                .for_each(|byte| *byte = !*byte),
            Lie::Size(size) => teller.tell(&mut bytes, size),
            Lie::Late(by) | Lie::LateAndFull(by, _) => std::thread::sleep(by),
        }
        let is_over = bytes.len() < len;
        said += len;
        if client.write_all(&bytes).is_err() || (is_over && !matches!(lie, Lie::SilentAfter(_))) {
            break;
        }
    }
    drop(client.shutdown(Shutdown::Both));
}

/// Rewrites the size in NBD_INFO_EXPORT, the reply to NBD_OPT_GO, however the
/// stream is cut into pieces.
#[derive(Default)]
struct SizeTeller {
    seen: Vec<u8>,
    told: usize,
}

impl SizeTeller {
    fn tell(&mut self, bytes: &mut [u8], size: u64) {
        let reply = [
            &0x0003_e889_0455_65a9_u64.to_be_bytes()[..],
            &7_u32.to_be_bytes(),
            &3_u32.to_be_bytes(),
            &12_u32.to_be_bytes(),
            &0_u16.to_be_bytes(),
        ]
        .concat();
        let size = size.to_be_bytes();
        for byte in bytes {
            if !self.seen.ends_with(&reply) {
                self.seen.push(*byte);
            } else if let Some(wrong) = size.get(self.told) {
                *byte = *wrong;
                self.told += 1;
            }
        }
    }
}

struct Deaf;

impl Observer for Deaf {
    fn event(&self, _: &Event<'_>) {}
}

/// Backs up in this process, over the liar.
fn back_up(bed: &Bed, lie: Lie) -> Result<Report> {
    let (ours, theirs) = UnixStream::pair()?;
    let (lifeline, cutter) = UnixStream::pair()?;
    let socket = bed.lab.path("liar.sock");
    std::thread::spawn(move || {
        serve(theirs, cutter, &move |uri: &str| {
            Ok(Box::new(Lying {
                driver: LibvirtDriver::connect(uri, &LibvirtOptions::default())?,
                lie,
                socket: socket.clone(),
            }) as Box<dyn Driver>)
        });
    });
    let store = highwater_store::open(bed.repo().to_str().context("a path is text")?)?;
    let context = BackupContext {
        repo: &Repository::open(store, None)?,
        guard: &Guard::connect(ours, lifeline, &bed.lab.uri(), &bed.runtime())?,
        restart_guard: &|| {
            Err(HypervisorError::new(
                ErrorKind::Other,
                "cannot start another",
            ))
        },
        clock: &SystemClock,
        observer: &Deaf,
        cancel: &Cancel::default(),
    };
    let options = BackupOptions {
        level: Level::Auto,
        only_disks: Vec::new(),
        without_disks: Vec::new(),
        quiesce: Quiesce::Off,
        freeze_mountpoints: Vec::new(),
        offline: highwater_engine::Offline::Yield,
        start_paused: false,
        scratch_dir: bed.runtime().join("scratch"),
        socket_dir: bed.runtime(),
        compression: Compression::Zstd(1),
        tuning: Tuning::default(),
        threshold: None,
        audit: None,
        tags: Vec::new(),
        group: None,
        host: "test".to_owned(),
        utc_offset_minutes: 0,
    };
    Ok(backup(&context, "web01", &options)?)
}

/// Two disks with a point of both, and writes since then.
fn two_disks() -> Result<(Bed, Vm)> {
    let bed = Bed::start()?;
    let disks = ["vda", VICTIM].map(|target| DiskSpec::qcow2(target, 64 * MIB));
    let [one, two] = disks;
    let vm = bed.lab.vm("web01").disk(one).disk(two).start()?;
    bed.backup(&vm, &[])?;
    write_noise(&bed, &vm, "vda", 0, 4)?;
    write_noise(&bed, &vm, VICTIM, 20, 12)?;
    Ok((bed, vm))
}

/// The victim is left out with a reason; the other disk is right; the next plain
/// backup goes on from the old marks and is right for both.
fn check(bed: &Bed, vm: &Vm, lie: Lie) -> Result<()> {
    let report = back_up(bed, lie).with_context(|| format!("{lie:?}"))?;
    ensure!(report.status == Status::Partial, "{lie:?}: {report:?}");
    let failed = report.disks.iter().find(|disk| disk.disk == VICTIM);
    let failed = failed.context("the victim is in the report")?;
    ensure!(
        failed.mode == "failed" && failed.root.is_none() && !failed.failure.is_empty(),
        "{lie:?}: {failed:?}"
    );
    // One mark of each disk: that of the point before, and that of this one.
    bed.assert_tidy(vm, 2).with_context(|| format!("{lie:?}"))?;
    let raw = reference(bed, vm, "vda", "vda.ref")?;
    let point = format!("id:{}", report.point.context("there is a point")?);
    let dir = bed.restore(&point, "partial", &["--format", "raw"])?;
    assert_same(&raw, &dir.join("vda.raw"))?;
    ensure!(!dir.join("vdb.raw").exists());
    fs::remove_dir_all(dir)?;
    Ok(())
}

/// Both disks of the latest point are what the guest wrote.
fn latest_is_right(bed: &Bed, vm: &Vm) -> Result<()> {
    let dir = bed.restore("web01", "whole", &["--format", "raw"])?;
    for target in ["vda", VICTIM] {
        let raw = reference(bed, vm, target, &format!("{target}.ref"))?;
        assert_same(&raw, &dir.join(format!("{target}.raw")))?;
    }
    Ok(())
}

fn the_next_is_right(bed: &Bed, vm: &Vm) -> Result<()> {
    let report = bed.backup(vm, &[])?;
    for target in ["vda", VICTIM] {
        ensure!(mode(&report, target) == "incremental", "{report}");
    }
    ensure!(disk(&report, VICTIM)["dirty_bytes"] == 12 * MIB, "{report}");
    latest_is_right(bed, vm)?;
    bed.assert_tidy(vm, 1)
}

#[test]
fn a_peer_that_breaks_the_protocol_costs_its_own_disk_only() -> Result<()> {
    let (bed, vm) = two_disks()?;
    for lie in [
        Lie::HangUp,
        Lie::EndAfter(100),
        Lie::EndAfter(3 << 20),
        Lie::GarbageAfter(10),
        Lie::GarbageAfter(1 << 20),
    ] {
        check(&bed, &vm, lie)?;
    }
    the_next_is_right(&bed, &vm)
}

#[test]
fn a_peer_that_lies_about_the_size_costs_its_own_disk_only() -> Result<()> {
    let (bed, vm) = two_disks()?;
    for size in [
        0,
        64 * MIB - 512,
        64 * MIB + 512,
        128 * MIB,
        1 << 62,
        u64::MAX,
    ] {
        check(&bed, &vm, Lie::Size(size))?;
    }
    the_next_is_right(&bed, &vm)
}

/// The disk behind this peer is in the point, and right.
fn check_right(bed: &Bed, vm: &Vm, lie: Lie) -> Result<()> {
    let report = back_up(bed, lie)?;
    ensure!(report.status == Status::Ok, "{report:?}");
    bed.assert_tidy(vm, 1)?;
    latest_is_right(bed, vm)
}

/// A server that is far is read over more connections, which begin in mid-run.
#[test]
fn a_peer_that_is_far_away_is_read_right() -> Result<()> {
    let (bed, vm) = two_disks()?;
    check_right(&bed, &vm, Lie::Late(Duration::from_millis(15)))
}

/// Two connections for maps and two to read are what a near server gets; where
/// no more are let in, these do the work.
#[test]
fn a_peer_far_away_that_lets_few_clients_in_is_read_right() -> Result<()> {
    let (bed, vm) = two_disks()?;
    check_right(&bed, &vm, Lie::LateAndFull(Duration::from_millis(15), 4))
}

#[test]
fn a_peer_that_says_no_more_is_not_waited_for_for_ever() -> Result<()> {
    let (bed, vm) = two_disks()?;
    check(&bed, &vm, Lie::SilentAfter(2 << 20))?;
    the_next_is_right(&bed, &vm)
}

/// A network disk whose server cannot read 64 KiB of it.
fn with_a_bad_spot(bed: &Bed, target: &str) -> Result<DiskSpec> {
    let socket = bed.lab.path("spot.sock");
    let bad = bed.lab.path("bad");
    let read = format!(
        "if [ -e {} ] && [ $4 -lt 5308416 ] && [ $(($4 + $3)) -gt 5242880 ]; then \
         echo EIO the head scratches >&2; exit 1; fi; head -c $3 /dev/zero | tr '\\000' x",
        bad.display()
    );
    let server = bed.lab.inside("nbdkit").arg("-U").arg(&socket);
    let server = server.args(["eval", "get_size=echo 16M", "pwrite=cat > /dev/null"]);
    server.arg(format!("pread={read}")).run()?;
    let xml = format!(
        "<disk type='network' device='disk'><driver name='qemu' type='raw'/>\
         <source protocol='nbd' name=''><host transport='unix' socket='{}'/></source>\
         <target dev='{target}' bus='virtio'/></disk>",
        socket.display()
    );
    Ok(DiskSpec::raw_xml(target, &xml))
}

#[test]
fn a_disk_with_one_bad_spot_fails_alone_and_comes_back_when_it_is_healed() -> Result<()> {
    let bed = Bed::start()?;
    let spot = with_a_bad_spot(&bed, VICTIM)?;
    let vm = bed
        .lab
        .vm("web01")
        .disk(DiskSpec::qcow2("vda", 64 * MIB))
        .disk(spot)
        .start()?;
    write_noise(&bed, &vm, "vda", 3, 2)?;
    fs::write(bed.lab.path("bad"), "")?;
    let output = bed.output(&["backup", "web01", "--json"])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(3), "{}: {said}", output.status);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    ensure!(disk(&report, VICTIM)["root"].is_null(), "{report}");
    let why = disk(&report, VICTIM)["because"].to_string();
    ensure!(why.contains("cannot read bytes"), "{report}");
    let raw = reference(&bed, &vm, "vda", "vda.ref")?;
    let dir = bed.restore("web01", "partial", &["--format", "raw"])?;
    assert_same(&raw, &dir.join("vda.raw"))?;
    ensure!(!dir.join("vdb.raw").exists());
    // Alone, a disk that cannot be read leaves no point at all.
    let (code, said) = bed.fail(&["backup", "web01", "-d", VICTIM])?;
    ensure!(
        code == 1 && said.contains("state: no restore point was added"),
        "{code}: {said}"
    );
    fs::remove_file(bed.lab.path("bad"))?;
    let report = bed.backup(&vm, &[])?;
    ensure!(mode(&report, "vda") == "incremental", "{report}");
    let dir = bed.restore("web01", "whole", &["--format", "raw"])?;
    ensure!(fs::read(dir.join("vdb.raw"))? == vec![b'x'; 16 << 20]);
    ensure!(vm.state()? == "running");
    Ok(())
}
