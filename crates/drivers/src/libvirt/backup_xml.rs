//! Writes the XML that libvirt is given. Pure; everything that comes from
//! outside is escaped here and nowhere else.

use std::fmt::Write as _;
use std::path::Path;

use highwater_hypervisor::{DiskOrder, NewMark, ReadMode, Redefinition};
use highwater_model::SessionId;

use crate::names::export_name;

/// One disk of a backup job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BackupDisk<'a> {
    pub(crate) order: &'a DiskOrder,
    pub(crate) scratch: &'a Path,
    /// UUID of libvirt's secret that opens the scratch file, if it is encrypted.
    pub(crate) secret: Option<&'a str>,
}

/// Writes `<domainbackup>`: pull mode over a unix socket.
///
/// Disks that are not listed take no part: libvirt backs up all of them only
/// when there is no list at all, and an order always has one.
pub(crate) fn domain_backup(session: SessionId, socket: &Path, disks: &[BackupDisk<'_>]) -> String {
    let mut xml = String::from("<domainbackup mode='pull'>\n");
    line(
        &mut xml,
        1,
        &format!("<server transport='unix' socket='{}'/>", path(socket)),
    );
    line(&mut xml, 1, "<disks>");
    for disk in disks {
        let name = escape(&export_name(session, &disk.order.target));
        let read = match &disk.order.mode {
            ReadMode::All => "backupmode='full'".to_owned(),
            ReadMode::Since(mark) => format!(
                "backupmode='incremental' incremental='{}' exportbitmap='{name}'",
                escape(&mark.to_string())
            ),
        };
        line(
            &mut xml,
            2,
            &format!(
                "<disk name='{}' backup='yes' type='file' {read} exportname='{name}'>",
                escape(&disk.order.target)
            ),
        );
        line(&mut xml, 3, "<driver type='qcow2'/>");
        let scratch = path(disk.scratch);
        match disk.secret {
            None => line(&mut xml, 3, &format!("<scratch file='{scratch}'/>")),
            Some(secret) => {
                line(&mut xml, 3, &format!("<scratch file='{scratch}'>"));
                line(&mut xml, 4, "<encryption format='luks'>");
                let secret = escape(secret);
                line(
                    &mut xml,
                    5,
                    &format!("<secret type='passphrase' uuid='{secret}'/>"),
                );
                line(&mut xml, 4, "</encryption>");
                line(&mut xml, 3, "</scratch>");
            }
        }
        line(&mut xml, 2, "</disk>");
    }
    line(&mut xml, 1, "</disks>");
    xml.push_str("</domainbackup>\n");
    xml
}

/// Writes `<secret>`: kept in the daemon's memory only, and told to no client.
pub(crate) fn scratch_secret(session: SessionId, uuid: &str) -> String {
    format!(
        "<secret ephemeral='yes' private='yes'>\n  <uuid>{}</uuid>\n  \
         <description>scratch files of highwater session {session}</description>\n</secret>\n",
        escape(uuid)
    )
}

/// Writes `<domaincheckpoint>` for a mark to be created with the backup.
pub(crate) fn new_checkpoint(mark: &NewMark) -> String {
    checkpoint(
        &mark.name.to_string(),
        Some(&mark.nonce.to_string()),
        None,
        &mark.disks,
    )
}

/// Writes `<domaincheckpoint>` for a mark that libvirt forgot.
pub(crate) fn redefined_checkpoint(mark: &Redefinition) -> String {
    checkpoint(
        &mark.name.to_string(),
        Some(&mark.nonce.to_string()),
        Some(mark.created_s),
        &mark.disks,
    )
}

/// Writes `<domaincheckpoint>`. The disks are always listed: a record without
/// them would later be deleted without its bitmaps.
pub(crate) fn checkpoint(
    name: &str,
    nonce: Option<&str>,
    created_s: Option<i64>,
    disks: &[String],
) -> String {
    let name = escape(name);
    let mut xml = String::from("<domaincheckpoint>\n");
    line(&mut xml, 1, &format!("<name>{name}</name>"));
    if let Some(nonce) = nonce {
        line(
            &mut xml,
            1,
            &format!("<description>{}</description>", escape(nonce)),
        );
    }
    if let Some(created_s) = created_s {
        line(
            &mut xml,
            1,
            &format!("<creationTime>{created_s}</creationTime>"),
        );
    }
    line(&mut xml, 1, "<disks>");
    for target in disks {
        let target = escape(target);
        line(
            &mut xml,
            2,
            &format!("<disk name='{target}' checkpoint='bitmap' bitmap='{name}'/>"),
        );
    }
    line(&mut xml, 1, "</disks>");
    xml.push_str("</domaincheckpoint>\n");
    xml
}

fn line(xml: &mut String, depth: usize, text: &str) {
    writeln!(xml, "{:width$}{text}", "", width = depth.saturating_mul(2))
        .expect("writing to a String cannot fail");
}

/// A path that is not UTF-8 cannot be written into XML; orders with such paths
/// are refused before (see `directories`).
fn path(path: &Path) -> String {
    escape(&path.to_string_lossy())
}

/// Writes a text so that it can stand in an element or an attribute.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\'' => escaped.push_str("&apos;"),
            '"' => escaped.push_str("&quot;"),
            // As an attribute these would be read back as a space.
            '\t' | '\n' | '\r' => {
                write!(escaped, "&#{};", u32::from(letter))
                    .expect("writing to a String cannot fail");
            }
            _ => escaped.push(letter),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use highwater_model::{MarkName, Nonce, PointId, RepoId};

    use super::*;

    fn session() -> SessionId {
        SessionId::from_bytes([0xab; 8])
    }

    fn mark() -> MarkName {
        let point: PointId = "01ARZ3NDEKTSV4RRFFQ69G5FAV".parse().unwrap();
        MarkName::new(RepoId::from_bytes([0x11; 16]), point)
    }

    #[test]
    fn a_backup_of_mixed_modes_is_written_exactly_so() {
        let full = DiskOrder {
            target: "vda".into(),
            mode: ReadMode::All,
        };
        let since = DiskOrder {
            target: "vdb".into(),
            mode: ReadMode::Since(mark()),
        };
        let xml = domain_backup(
            session(),
            Path::new("/run/s/n.sock"),
            &[
                BackupDisk {
                    order: &full,
                    scratch: Path::new("/s/a&b"),
                    secret: None,
                },
                BackupDisk {
                    order: &since,
                    scratch: Path::new("/s/vdb"),
                    secret: Some("it's <mine>"),
                },
            ],
        );
        assert_eq!(
            xml,
            "\
<domainbackup mode='pull'>
  <server transport='unix' socket='/run/s/n.sock'/>
  <disks>
    <disk name='vda' backup='yes' type='file' backupmode='full' exportname='hw-abababababababab-vda'>
      <driver type='qcow2'/>
      <scratch file='/s/a&amp;b'/>
    </disk>
    <disk name='vdb' backup='yes' type='file' backupmode='incremental' incremental='hw-111111111111-01arz3ndektsv4rrffq69g5fav' exportbitmap='hw-abababababababab-vdb' exportname='hw-abababababababab-vdb'>
      <driver type='qcow2'/>
      <scratch file='/s/vdb'>
        <encryption format='luks'>
          <secret type='passphrase' uuid='it&apos;s &lt;mine&gt;'/>
        </encryption>
      </scratch>
    </disk>
  </disks>
</domainbackup>
"
        );
    }

    #[test]
    fn a_redefinition_names_its_disks_and_its_first_creation_time() {
        let xml = redefined_checkpoint(&Redefinition {
            name: mark(),
            nonce: Nonce::from_bytes([7; 16]),
            created_s: 1_795_259_190,
            disks: vec!["vda".into()],
        });
        assert_eq!(
            xml,
            "\
<domaincheckpoint>
  <name>hw-111111111111-01arz3ndektsv4rrffq69g5fav</name>
  <description>07070707070707070707070707070707</description>
  <creationTime>1795259190</creationTime>
  <disks>
    <disk name='vda' checkpoint='bitmap' bitmap='hw-111111111111-01arz3ndektsv4rrffq69g5fav'/>
  </disks>
</domaincheckpoint>
"
        );
    }

    #[test]
    fn a_new_mark_has_no_creation_time_yet() {
        let xml = new_checkpoint(&NewMark {
            name: mark(),
            nonce: Nonce::from_bytes([7; 16]),
            disks: vec!["vda".into(), "vdb".into()],
        });
        assert!(!xml.contains("creationTime"));
        assert_eq!(xml.matches("checkpoint='bitmap'").count(), 2);
    }
}
