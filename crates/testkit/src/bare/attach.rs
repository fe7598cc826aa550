//! How an image becomes a disk of a VM: the ways people write it on QEMU's
//! command line.

use std::path::Path;

use serde_json::{Value, json};

use crate::disk::{DiskSpec, ErrorPolicy};

/// One way to put an image into a VM.
#[derive(Debug, Clone)]
pub struct Attach {
    way: Way,
    device: String,
    device_id: DeviceId,
    id: Option<String>,
    node: Option<String>,
    throttle: Throttle,
    iothread: bool,
    options: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// `-drive if=virtio`: QEMU makes the device.
    Drive,
    /// `-drive if=none` and a `-device`.
    DriveAndDevice,
    /// The same, with a `json:` file name.
    Json,
    /// `-blockdev` and a `-device`.
    Blockdev,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DeviceId {
    /// The name of the disk in the test.
    Target,
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Throttle {
    None,
    /// A filter node above the image.
    Filter,
    /// Of the drive itself (`throttling.iops-total`).
    Drive,
}

/// So many that no test waits for it: what it is about is the graph.
const IOPS: u32 = 1_000_000;

impl Attach {
    /// `-drive file=...,if=virtio`, nothing named.
    pub fn drive() -> Self {
        Self::of(Way::Drive, "virtio-blk-pci")
    }

    /// `-drive if=none` and `-device <device>`, such as `virtio-blk-pci`,
    /// `scsi-hd`, `ide-hd`, `nvme`, `usb-storage`.
    pub fn drive_and_device(device: &str) -> Self {
        Self::of(Way::DriveAndDevice, device)
    }

    /// The same with a `json:` file name.
    pub fn json(device: &str) -> Self {
        Self::of(Way::Json, device)
    }

    /// `-blockdev` and `-device <device>`; the node has the disk's name and `-node`.
    pub fn blockdev(device: &str) -> Self {
        Self::of(Way::Blockdev, device)
    }

    fn of(way: Way, device: &str) -> Self {
        Self {
            way,
            device: device.to_owned(),
            device_id: DeviceId::Target,
            id: None,
            node: None,
            throttle: Throttle::None,
            iothread: false,
            options: String::new(),
        }
    }

    /// Gives a `-drive` an `id=`.
    #[must_use]
    pub fn id(mut self, id: &str) -> Self {
        self.id = Some(id.to_owned());
        self
    }

    /// Names the node.
    #[must_use]
    pub fn node(mut self, name: &str) -> Self {
        self.node = Some(name.to_owned());
        self
    }

    /// Gives the `-device` no `id=`.
    #[must_use]
    pub const fn anonymous(mut self) -> Self {
        self.device_id = DeviceId::None;
        self
    }

    /// Limits it: a filter node above the image of a `-blockdev`, the drive's own
    /// limit otherwise.
    #[must_use]
    pub fn throttled(mut self) -> Self {
        self.throttle = if self.way == Way::Blockdev {
            Throttle::Filter
        } else {
            Throttle::Drive
        };
        self
    }

    /// Serves it from a thread of its own.
    #[must_use]
    pub const fn iothread(mut self) -> Self {
        self.iothread = true;
        self
    }

    /// Adds options to the `-device` (or to a `-drive` that makes its own), such
    /// as `,share-rw=on`.
    #[must_use]
    pub fn options(mut self, options: &str) -> Self {
        self.options.push_str(options);
        self
    }

    /// Returns QEMU's arguments for one disk.
    pub(super) fn arguments(&self, spec: &DiskSpec, image: &Path, format: &str) -> Vec<String> {
        let mut arguments = Vec::new();
        match self.way {
            Way::Drive => {
                let drive = format!("{},if=virtio", self.drive_text(spec, image, format));
                arguments.extend(["-drive".to_owned(), drive + &self.options]);
                return arguments;
            }
            Way::DriveAndDevice | Way::Json => {
                let drive = self.drive_text(spec, image, format);
                arguments.extend(["-drive".to_owned(), format!("{drive},if=none")]);
            }
            Way::Blockdev => arguments.extend(self.blockdev_arguments(spec, image, format)),
        }
        arguments.extend(self.device_arguments(spec));
        arguments
    }

    /// Returns the name by which a device refers to what it stands on.
    fn below(&self, spec: &DiskSpec) -> String {
        match (self.way, self.throttle) {
            (Way::Blockdev, Throttle::Filter) => format!("{}-throttle", spec.target),
            (Way::Blockdev, _) => self.node_name(spec),
            _ => self.drive_id(spec),
        }
    }

    fn node_name(&self, spec: &DiskSpec) -> String {
        let default = || format!("{}-node", spec.target);
        self.node.clone().unwrap_or_else(default)
    }

    fn drive_id(&self, spec: &DiskSpec) -> String {
        let default = || format!("drive-{}", spec.target);
        self.id.clone().unwrap_or_else(default)
    }

    fn drive_text(&self, spec: &DiskSpec, image: &Path, format: &str) -> String {
        let image = image.display();
        let mut parts = if self.way == Way::Json {
            let file = json!({"driver": "file", "filename": image.to_string()});
            let file = json!({"driver": format, "file": file}).to_string();
            // A comma ends an option unless it is doubled.
            vec![format!("file=json:{}", file.replace(',', ",,"))]
        } else {
            vec![format!("file={image},format={format}")]
        };
        parts.push(format!("discard={}", spec.discard));
        if self.id.is_some() || self.way != Way::Drive {
            parts.push(format!("id={}", self.drive_id(spec)));
        }
        if let Some(node) = &self.node {
            parts.push(format!("node-name={node}"));
        }
        if self.throttle == Throttle::Drive {
            parts.push(format!("throttling.iops-total={IOPS}"));
        }
        if self.way == Way::Drive {
            parts.extend(write_errors(spec));
        }
        parts.join(",")
    }

    fn blockdev_arguments(&self, spec: &DiskSpec, image: &Path, format: &str) -> Vec<String> {
        let discard = spec.discard;
        let node = json!({"driver": format, "node-name": self.node_name(spec), "discard": discard,
            "file": {"driver": "file", "filename": image.display().to_string(), "discard": discard}});
        let mut arguments = vec!["-blockdev".to_owned(), node.to_string()];
        if self.throttle == Throttle::Filter {
            let group = format!("{}-limits", spec.target);
            let filter: Value = json!({"driver": "throttle", "node-name": self.below(spec),
                "throttle-group": group, "file": self.node_name(spec)});
            arguments.extend([
                "-object".to_owned(),
                format!("throttle-group,id={group},x-iops-total={IOPS}"),
                "-blockdev".to_owned(),
                filter.to_string(),
            ]);
        }
        arguments
    }

    fn device_arguments(&self, spec: &DiskSpec) -> Vec<String> {
        let target = &spec.target;
        let mut arguments = Vec::new();
        let mut add = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
        let mut thread = String::new();
        if self.iothread {
            add("-object", format!("iothread,id=io-{target}"));
            thread = format!(",iothread=io-{target}");
        }
        let mut device = vec![format!("{},drive={}", self.device, self.below(spec))];
        match self.device.as_str() {
            "scsi-hd" => {
                add(
                    "-device",
                    format!("virtio-scsi-pci,id=scsi-{target}{thread}"),
                );
                device.push(format!("bus=scsi-{target}.0"));
            }
            "usb-storage" => {
                add("-device", format!("qemu-xhci,id=xhci-{target}"));
                device.push(format!("bus=xhci-{target}.0"));
            }
            "nvme" if spec.serial.is_none() => device.push(format!("serial={target}")),
            "virtio-blk-pci" if self.iothread => device.push(format!("iothread=io-{target}")),
            _ => {}
        }
        if self.device_id == DeviceId::Target {
            device.push(format!("id={target}"));
        }
        device.extend(spec.serial.iter().map(|serial| format!("serial={serial}")));
        device.extend(write_errors(spec));
        add("-device", device.join(",") + &self.options);
        arguments
    }
}

fn write_errors(spec: &DiskSpec) -> Option<String> {
    let policy = match spec.error_policy? {
        ErrorPolicy::Stop => "stop",
        ErrorPolicy::Report => "report",
        ErrorPolicy::Ignore => "ignore",
        ErrorPolicy::Enospace => "enospc",
    };
    Some(format!("werror={policy}"))
}
