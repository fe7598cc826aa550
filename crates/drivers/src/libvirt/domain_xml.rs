//! A domain's definition, as far as a backup needs it.
//!
//! The text comes from outside: it is parsed within limits (see `xml`), and
//! everything that is not understood is left out, never guessed.

use std::collections::BTreeSet;
use std::path::PathBuf;

use highwater_hypervisor::{Agent, FirmwareFile, FirmwareRole, WriteErrorPolicy};
use roxmltree::Node;

use super::aliases;
use super::xml::{CHAIN_MAX, DISKS_MAX, XmlError, child, child_text, document};

/// Part of the names of files and exports.
const TARGET_BYTES_MAX: usize = 100;

/// libvirt's own description of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DomainXml {
    pub(crate) firmware: Vec<FirmwareFile>,
    pub(crate) tpm: Option<TpmXml>,
    pub(crate) agent: Agent,
    pub(crate) disks: Vec<DiskXml>,
}

/// An emulated TPM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TpmXml {
    /// Where its state is, if the definition says so.
    pub(crate) state: Option<PathBuf>,
    /// `1.2` or `2.0`.
    pub(crate) version: String,
}

/// One `<disk>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskXml {
    pub(crate) target: String,
    /// `disk`, `cdrom`, `floppy`, `lun`.
    pub(crate) device: String,
    pub(crate) serial: Option<String>,
    pub(crate) alias: Option<String>,
    pub(crate) write_errors: WriteErrorPolicy,
    pub(crate) readonly: bool,
    pub(crate) shareable: bool,
    pub(crate) transient: bool,
    /// The disk is being copied elsewhere (`<mirror>`).
    pub(crate) mirrored: bool,
    /// The image, or one below it, is encrypted at rest.
    pub(crate) encrypted: bool,
    /// Part of an image is the disk, or a backing file of it (`<slices>`).
    pub(crate) sliced: bool,
    /// The image and its backing files, topmost first; empty without a medium.
    pub(crate) chain: Vec<LinkXml>,
    /// The definition says that the last of them has no backing file.
    pub(crate) ends: bool,
}

/// One image of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LinkXml {
    pub(crate) source: SourceXml,
    pub(crate) format: String,
    /// Number that libvirt derives QEMU's node names from.
    pub(crate) index: Option<u32>,
    /// A qcow2's separate data file.
    pub(crate) data: Option<DataXml>,
}

/// A qcow2's separate data file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DataXml {
    /// `None` if the definition does not say it in words that are known.
    pub(crate) source: Option<SourceXml>,
    /// The same number as an image has.
    pub(crate) index: Option<u32>,
}

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SourceXml {
    File(PathBuf),
    Block(PathBuf),
    Volume {
        pool: String,
        volume: String,
    },
    Network(String),
    /// A device that does not go through QEMU's block layer.
    PassedThrough,
}

/// Reads a domain's definition.
pub(crate) fn parse(text: &str) -> Result<DomainXml, XmlError> {
    let document = document(text, "domain")?;
    let domain = document.root_element();
    let devices = child(domain, "devices");
    let device_list = |name: &'static str| {
        devices
            .into_iter()
            .flat_map(move |all| all.children().filter(move |one| one.has_tag_name(name)))
    };
    let disks: Vec<DiskXml> = device_list("disk")
        .take(DISKS_MAX.saturating_add(1))
        .filter_map(|node| disk(devices, node))
        .collect();
    check_targets(&disks)?;
    Ok(DomainXml {
        firmware: child(domain, "os").map(firmware).unwrap_or_default(),
        tpm: device_list("tpm").find_map(tpm),
        agent: device_list("channel")
            .filter_map(agent)
            .find(|agent| *agent == Agent::Connected)
            .or_else(|| device_list("channel").find_map(agent))
            .unwrap_or(Agent::Missing),
        disks,
    })
}

/// Targets name files, exports and disks of restore points: each must be one,
/// and each only once.
fn check_targets(disks: &[DiskXml]) -> Result<(), XmlError> {
    if disks.len() > DISKS_MAX {
        return Err(XmlError::TooManyDisks);
    }
    let mut seen = BTreeSet::new();
    for DiskXml { target, .. } in disks {
        let is_good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
        if !target.bytes().all(is_good)
            || !(1..=TARGET_BYTES_MAX).contains(&target.len())
            || target.starts_with('.')
        {
            return Err(XmlError::BadTarget(target.chars().take(80).collect()));
        }
        if !seen.insert(target) {
            return Err(XmlError::SameTarget(target.clone()));
        }
    }
    Ok(())
}

fn firmware(os: Node<'_, '_>) -> Vec<FirmwareFile> {
    const ROLES: [(&str, FirmwareRole); 4] = [
        ("loader", FirmwareRole::Loader),
        ("nvram", FirmwareRole::Nvram),
        ("kernel", FirmwareRole::Kernel),
        ("initrd", FirmwareRole::Initrd),
    ];
    ROLES
        .into_iter()
        .filter_map(|(element, role)| {
            let node = child(os, element)?;
            // Newer definitions may name the file in a <source>, older ones as text.
            let path = child(node, "source")
                .and_then(|source| source.attribute("file"))
                .or_else(|| child_text(os, element))?;
            Some(FirmwareFile {
                role,
                path: PathBuf::from(path),
            })
        })
        .collect()
}

fn tpm(node: Node<'_, '_>) -> Option<TpmXml> {
    let backend = child(node, "backend").filter(|one| one.attribute("type") == Some("emulator"))?;
    Some(TpmXml {
        state: child(backend, "source")
            .and_then(|source| source.attribute("path"))
            .map(PathBuf::from),
        version: backend.attribute("version").unwrap_or("2.0").to_owned(),
    })
}

fn agent(channel: Node<'_, '_>) -> Option<Agent> {
    let target = child(channel, "target")?;
    let is_agents = target.attribute("name") == Some("org.qemu.guest_agent.0");
    let connected = target.attribute("state") == Some("connected");
    is_agents.then_some(if connected {
        Agent::Connected
    } else {
        Agent::Silent
    })
}

/// A disk without a target name cannot be spoken of, so it is left out;
/// libvirt never writes one.
fn disk(devices: Option<Node<'_, '_>>, node: Node<'_, '_>) -> Option<DiskXml> {
    let driver = child(node, "driver");
    let (chain, ends) = chain(node);
    Some(DiskXml {
        target: child(node, "target")?.attribute("dev")?.to_owned(),
        device: node.attribute("device").unwrap_or("disk").to_owned(),
        serial: child_text(node, "serial").map(str::to_owned),
        alias: child(node, "alias")
            .and_then(|alias| alias.attribute("name"))
            .map(str::to_owned)
            .or_else(|| aliases::alias(devices, node)),
        write_errors: match driver.and_then(|driver| driver.attribute("error_policy")) {
            Some("report") => WriteErrorPolicy::Report,
            Some("ignore") => WriteErrorPolicy::Ignore,
            // `stop` and `enospace` both pause when the scratch file is full.
            _ => WriteErrorPolicy::Pause,
        },
        readonly: child(node, "readonly").is_some(),
        shareable: child(node, "shareable").is_some(),
        transient: child(node, "transient").is_some(),
        mirrored: child(node, "mirror").is_some(),
        // In the disk or in a source of it, by the age of the definition.
        encrypted: node
            .descendants()
            .any(|inner| inner.has_tag_name("encryption")),
        sliced: node.descendants().any(|inner| inner.has_tag_name("slices")),
        chain,
        ends,
    })
}

/// Returns the images, and whether the last one is said to have no backing file.
fn chain(disk: Node<'_, '_>) -> (Vec<LinkXml>, bool) {
    let mut links = Vec::new();
    let mut ends = false;
    let top_format = child(disk, "driver").and_then(|driver| driver.attribute("type"));
    links.extend(link(disk, top_format));
    let mut above = disk;
    while links.len() < CHAIN_MAX {
        let Some(backing) = child(above, "backingStore") else {
            break;
        };
        let format = child(backing, "format").and_then(|format| format.attribute("type"));
        // The last <backingStore/> is empty: it only says that the chain ends.
        let Some(found) = link(backing, format) else {
            ends = true;
            break;
        };
        links.push(found);
        above = backing;
    }
    (links, ends)
}

fn link(holder: Node<'_, '_>, format: Option<&str>) -> Option<LinkXml> {
    let node = child(holder, "source")?;
    let source = source(holder.attribute("type").unwrap_or("file"), node)?;
    Some(LinkXml {
        source,
        // libvirt's default when a definition names no format.
        format: format.unwrap_or("raw").to_owned(),
        // The number of a backing file is on <backingStore>, that of the top
        // image on <source>.
        index: number(node).or_else(|| number(holder)),
        data: child(node, "dataStore").map(data_file),
    })
}

fn data_file(data: Node<'_, '_>) -> DataXml {
    let inner = child(data, "source");
    let kind = data.attribute("type").unwrap_or("file");
    DataXml {
        source: inner.and_then(|inner| source(kind, inner)),
        index: inner.and_then(number).or_else(|| number(data)),
    }
}

fn number(node: Node<'_, '_>) -> Option<u32> {
    node.attribute("index").and_then(|text| text.parse().ok())
}

fn source(kind: &str, node: Node<'_, '_>) -> Option<SourceXml> {
    let attribute = |name: &str| node.attribute(name).filter(|text| !text.is_empty());
    match kind {
        "file" => attribute("file").map(|path| SourceXml::File(PathBuf::from(path))),
        "block" => attribute("dev").map(|path| SourceXml::Block(PathBuf::from(path))),
        "volume" => Some(SourceXml::Volume {
            pool: attribute("pool")?.to_owned(),
            volume: attribute("volume")?.to_owned(),
        }),
        "network" => network(node).map(SourceXml::Network),
        _ => Some(SourceXml::PassedThrough),
    }
}

/// Writes a network source as a URI that people recognise.
fn network(node: Node<'_, '_>) -> Option<String> {
    let protocol = node.attribute("protocol")?;
    let name = node.attribute("name").unwrap_or_default();
    let hosts: Vec<Node<'_, '_>> = node
        .children()
        .filter(|child| child.has_tag_name("host"))
        .collect();
    if let Some(socket) = hosts.iter().find_map(|host| host.attribute("socket")) {
        return Some(format!("{protocol}+unix:///{name}?socket={socket}"));
    }
    let hosts: Vec<String> = hosts
        .iter()
        .filter_map(|host| {
            let address = host.attribute("name")?;
            let address = if address.contains(':') {
                format!("[{address}]")
            } else {
                address.to_owned()
            };
            Some(match host.attribute("port") {
                Some(port) => format!("{address}:{port}"),
                None => address,
            })
        })
        .collect();
    Some(format!("{protocol}://{}/{name}", hosts.join(",")))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As libvirt 11.3 reported it for a running domain (shortened).
    const LIVE: &str = include_str!("testdata/domain.xml");

    fn disk(target: &str) -> DiskXml {
        parse(LIVE)
            .unwrap()
            .disks
            .into_iter()
            .find(|disk| disk.target == target)
            .unwrap()
    }

    #[test]
    fn a_chain_is_read_with_the_numbers_of_its_nodes() {
        let vda = disk("vda");
        let seen: Vec<_> = vda
            .chain
            .iter()
            .map(|link| (link.format.as_str(), link.index))
            .collect();
        assert_eq!(seen, [("qcow2", Some(12)), ("qcow2", Some(14))]);
        assert_eq!(vda.serial.as_deref(), Some("S1"));
        assert_eq!(vda.alias.as_deref(), Some("virtio-disk0"));
        assert_eq!(vda.write_errors, WriteErrorPolicy::Pause);
    }

    #[test]
    fn a_data_file_is_part_of_its_image() {
        let vdd = disk("vdd");
        assert_eq!(vdd.chain.len(), 1);
        let data = DataXml {
            source: Some(SourceXml::File("/images/df.raw".into())),
            index: Some(13),
        };
        assert_eq!(vdd.chain[0].data, Some(data));
    }

    #[test]
    fn every_kind_of_source_is_told_apart() {
        let source = |target: &str| disk(target).chain.remove(0).source;
        assert_eq!(source("vdc"), SourceXml::File("/images/odd.raw".into()));
        assert_eq!(
            source("vde"),
            SourceXml::Network("nbd+unix:///exp?socket=/run/nbd.sock".into())
        );
        assert_eq!(
            source("vdf"),
            SourceXml::Volume {
                pool: "p1".into(),
                volume: "vol1.qcow2".into()
            }
        );
        assert_eq!(
            source("vdj"),
            SourceXml::Network("rbd://[fe80::1]:6789,mon2/pool/image".into())
        );
        assert_eq!(source("vdk"), SourceXml::Block("/dev/vg/lv".into()));
        assert_eq!(source("vdl"), SourceXml::PassedThrough);
        assert!(disk("sdb").chain.is_empty());
    }

    #[test]
    fn flags_that_keep_a_disk_out_are_seen() {
        assert!(disk("vdg").shareable);
        assert!(disk("vdh").transient);
        assert!(disk("vdi").readonly);
        assert_eq!(disk("sda").device, "cdrom");
        assert_eq!(disk("vdc").write_errors, WriteErrorPolicy::Report);
        assert!(disk("vdm").encrypted && !disk("vda").encrypted);
    }

    #[test]
    fn what_a_definition_says_of_slices_and_of_the_end_of_a_chain_is_read() {
        let disk = |inner: &str| {
            let text = format!(
                "<domain><devices><disk type='file'><target dev='vda'/>{inner}</disk></devices></domain>"
            );
            let disk = parse(&text).unwrap().disks.remove(0);
            (disk.chain.len(), disk.ends, disk.sliced)
        };
        let below = "<backingStore type='file'><format type='raw'/><source file='/b'/>";
        assert_eq!(disk("<source file='/a'/>"), (1, false, false));
        assert_eq!(disk("<source file='/a'/><backingStore/>"), (1, true, false));
        let open = format!("<source file='/a'/>{below}</backingStore>");
        assert_eq!(disk(&open), (2, false, false));
        let ended = format!("<source file='/a'/>{below}<backingStore/></backingStore>");
        assert_eq!(disk(&ended), (2, true, false));
        let slice = "<source file='/a'><slices><slice type='storage' offset='512' size='512'/>\
                     </slices></source>";
        assert_eq!(disk(slice), (1, false, true));
    }

    #[test]
    fn firmware_tpm_and_agent_are_found() {
        let domain = parse(LIVE).unwrap();
        let roles: Vec<_> = domain.firmware.iter().map(|file| file.role).collect();
        assert_eq!(roles, [FirmwareRole::Loader, FirmwareRole::Nvram]);
        assert_eq!(domain.firmware[1].path, PathBuf::from("/nvram/w1_VARS.fd"));
        assert_eq!(
            domain.tpm,
            Some(TpmXml {
                state: None,
                version: "2.0".into()
            })
        );
        assert_eq!(domain.agent, Agent::Connected);
    }

    #[test]
    fn each_target_is_a_name_and_there_is_one_of_each() {
        let disks = |targets: &[&str]| {
            let disk = |dev: &&str| format!("<disk><target dev='{dev}'/></disk>");
            let disks: String = targets.iter().map(disk).collect();
            parse(&format!("<domain><devices>{disks}</devices></domain>"))
                .map(|domain| domain.disks.len())
        };
        assert_eq!(disks(&["vda", "vdaa", "hda", "ubd0", "x.1"]), Ok(5));
        assert_eq!(
            disks(&["vda", "vda"]),
            Err(XmlError::SameTarget("vda".to_owned()))
        );
        let long = "v".repeat(TARGET_BYTES_MAX + 1);
        for bad in [
            "",
            "..",
            "../../etc/x",
            "a/b",
            "a&#10;b",
            "&#9;",
            "a b",
            "\u{202e}",
            &long,
        ] {
            let refused = disks(&["vda", bad]);
            assert!(
                matches!(refused, Err(XmlError::BadTarget(_))),
                "{bad:?}: {refused:?}"
            );
        }
        // No XML can carry these, escaped or not.
        for bad in ["&#0;", "\0", "&#x1b;", "\u{1b}"] {
            let refused = disks(&["vda", bad]);
            assert!(
                matches!(refused, Err(XmlError::Malformed(_))),
                "{bad:?}: {refused:?}"
            );
        }
    }

    #[test]
    fn a_hundred_thousand_disks_are_refused_and_a_thousand_are_read() {
        let text = |count: usize| {
            let disk = |n: usize| format!("<disk><target dev='v{n}'/></disk>");
            let disks: String = (0..count).map(disk).collect();
            format!("<domain><devices>{disks}</devices></domain>")
        };
        assert_eq!(parse(&text(100_000)), Err(XmlError::TooManyDisks));
        assert_eq!(parse(&text(1000)).unwrap().disks.len(), 1000);
    }

    #[test]
    fn the_longest_chain_that_is_read_fits_the_depth() {
        let link = "<backingStore type='file'><format type='qcow2'/><source file='/b'/>";
        let text = |links: usize| {
            format!(
                "<domain><devices><disk type='file'><source file='/a'/><target dev='vda'/>{}{}\
                 </disk></devices></domain>",
                link.repeat(links),
                "</backingStore>".repeat(links)
            )
        };
        assert_eq!(parse(&text(199)).unwrap().disks[0].chain.len(), 200);
        assert_eq!(parse(&text(300)), Err(XmlError::TooDeep));
    }

    proptest! {
        #[test]
        fn no_mutation_of_a_definition_makes_the_parser_panic(
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0_usize..40), 1..20)
        ) {
            let mut bytes = LIVE.as_bytes().to_vec();
            for (place, byte, cut) in edits {
                let at = place.index(bytes.len());
                bytes[at] = byte;
                let end = bytes.len().min(at + cut);
                bytes.drain(at..end);
                if bytes.is_empty() { bytes.push(b'<'); }
            }
            let _outcome = parse(&String::from_utf8_lossy(&bytes));
        }

        #[test]
        fn no_shuffling_of_its_tags_makes_the_parser_panic(
            order in prop::collection::vec(any::<prop::sample::Index>(), 0..80)
        ) {
            let tags: Vec<&str> = LIVE.split_inclusive('>').collect();
            let text: String = order.iter().map(|place| tags[place.index(tags.len())]).collect();
            let _outcome = parse(&format!("<domain><devices>{text}</devices></domain>"));
        }
    }
}
