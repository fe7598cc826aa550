//! What libvirt will call a disk's device once its domain runs.
//!
//! The definition of a domain that is off names no devices, and a disk without a
//! serial number is told by its device's name: it has to be the same whether the
//! domain is on or off.

use roxmltree::Node;

use super::xml::child;

/// Prefixes of targets; what follows is the disk's number, in letters.
const PREFIXES: [&str; 6] = ["fd", "hd", "sd", "ubd", "vd", "xvd"];

/// Returns the name, or `None` for a bus that libvirt names in other ways.
pub(super) fn alias(devices: Option<Node<'_, '_>>, disk: Node<'_, '_>) -> Option<String> {
    let target = child(disk, "target")?;
    let bus = target.attribute("bus")?;
    let prefix = match bus {
        "virtio" | "usb" => {
            let number = number(target.attribute("dev")?)?;
            return Some(format!("{bus}-disk{number}"));
        }
        "scsi" | "sata" | "ide" => bus,
        _ => return None,
    };
    let address = child(disk, "address").filter(|it| it.attribute("type") == Some("drive"))?;
    let field = |name: &str| address.attribute(name)?.parse::<u32>().ok();
    let (controller, bus, unit) = (field("controller")?, field("bus")?, field("unit")?);
    if prefix == "scsi" && !is_lsi_logic(devices, controller) {
        let target = field("target")?;
        return Some(format!("{prefix}{controller}-{bus}-{target}-{unit}"));
    }
    Some(format!("{prefix}{controller}-{bus}-{unit}"))
}

/// The one kind of controller whose disks are named without a target.
fn is_lsi_logic(devices: Option<Node<'_, '_>>, number: u32) -> bool {
    let controllers = devices.into_iter().flat_map(|all| all.children());
    let mut controllers = controllers.filter(|one| {
        one.has_tag_name("controller")
            && one.attribute("type") == Some("scsi")
            && one.attribute("index").and_then(|it| it.parse().ok()) == Some(number)
    });
    controllers.any(|one| one.attribute("model") == Some("lsilogic"))
}

/// `a` is 0, `z` 25, `aa` 26.
fn number(target: &str) -> Option<u32> {
    let letters = PREFIXES
        .iter()
        .find_map(|prefix| target.strip_prefix(prefix))?;
    // What libvirt takes for the number of a partition.
    let letters = letters.trim_end_matches(|letter: char| letter.is_ascii_digit());
    if letters.is_empty() {
        return None;
    }
    let mut number = 0_u32;
    for letter in letters.bytes() {
        let digit = u32::from(letter.checked_sub(b'a').filter(|digit| *digit < 26)?);
        number = number.checked_mul(26)?.checked_add(digit)?.checked_add(1)?;
    }
    number.checked_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_are_numbers_without_a_zero() {
        let cases = [
            ("vda", 0),
            ("vdz", 25),
            ("vdaa", 26),
            ("sdzz", 701),
            ("hdb1", 1),
        ];
        for (target, expected) in cases {
            assert_eq!(number(target), Some(expected), "{target}");
        }
        for target in ["vd", "vda-b", "disk0", "vd\u{e4}", "vdaaaaaaaaaaaaaa"] {
            assert_eq!(number(target), None, "{target}");
        }
    }
}
