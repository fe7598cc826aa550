//! Domain XML of a test VM, and the little reading of XML that tests need.

use std::fmt::Write as _;
use std::path::PathBuf;

use crate::disk::{DiskSpec, ErrorPolicy, Source};

/// Returns the `<disk>` element.
pub(crate) fn disk(spec: &DiskSpec, image: Option<&(PathBuf, String)>) -> String {
    if let Source::Xml(xml) = &spec.source {
        return xml.clone();
    }
    let (path, format) = image.expect("every disk but one given as XML has an image");
    let bus = match spec.target.get(..2) {
        Some("sd") => "scsi",
        Some("hd") => "sata",
        _ => "virtio",
    };
    let policy = spec.error_policy.map_or(String::new(), |policy| {
        let word = match policy {
            ErrorPolicy::Stop => "stop",
            ErrorPolicy::Report => "report",
            ErrorPolicy::Ignore => "ignore",
            ErrorPolicy::Enospace => "enospace",
        };
        format!(" error_policy='{word}'")
    });
    let serial = spec
        .serial
        .as_ref()
        .map_or(String::new(), |serial| format!("<serial>{serial}</serial>"));
    format!(
        "<disk type='file' device='disk'>\
         <driver name='qemu' type='{format}' discard='{}'{policy}{}/>\
         <source file='{}'/><target dev='{}' bus='{bus}'/>{serial}{}</disk>\n",
        spec.discard,
        spec.driver,
        path.display(),
        spec.target,
        spec.elements
    )
}

/// What a domain consists of beside its disks.
#[derive(Debug, Default)]
pub(crate) struct Domain {
    pub(crate) name: String,
    /// libvirt draws one where there is none.
    pub(crate) uuid: Option<String>,
    pub(crate) machine: String,
    pub(crate) memory_mib: u64,
    /// Threads that disks may be served from.
    pub(crate) iothreads: u32,
    /// Elements of `<os>`: a kernel, or firmware.
    pub(crate) os: String,
    /// Elements of `<devices>`, disks included.
    pub(crate) devices: String,
}

impl Domain {
    pub(crate) fn to_xml(&self) -> String {
        let mut xml = format!("<domain type='qemu'>\n<name>{}</name>\n", self.name);
        if let Some(uuid) = &self.uuid {
            writeln!(xml, "<uuid>{uuid}</uuid>").expect("writing to a String cannot fail");
        }
        let Self {
            machine,
            memory_mib,
            iothreads,
            os,
            devices,
            ..
        } = self;
        write!(
            xml,
            "<memory unit='MiB'>{memory_mib}</memory>\n<vcpu>1</vcpu>\n\
             <iothreads>{iothreads}</iothreads>\n\
             <os><type arch='x86_64' machine='{machine}'>hvm</type>{os}</os>\n\
             <features><acpi/></features>\n<cpu mode='maximum'/>\n\
             <devices>\n{devices}\
             <controller type='usb' model='none'/>\n<memballoon model='none'/>\n\
             <video><model type='none'/></video>\n</devices>\n</domain>\n"
        )
        .expect("writing to a String cannot fail");
        xml
    }
}

/// Returns the alias of the disk with this target in a running domain's XML.
///
/// libvirt writes one element per line in a fixed order: the target stands
/// before the alias of the same disk.
pub(crate) fn disk_alias(domain_xml: &str, target: &str) -> Option<String> {
    let wanted = format!("<target dev='{target}'");
    domain_xml
        .lines()
        .skip_while(|line| !line.trim_start().starts_with(&wanted))
        .find_map(|line| {
            let rest = line.trim_start().strip_prefix("<alias name='")?;
            rest.split('\'').next().map(str::to_owned)
        })
}
