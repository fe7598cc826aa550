//! Reads what libvirt says about a running backup job and about its checkpoints.

use std::path::PathBuf;

use highwater_hypervisor::CheckpointFacts;
use highwater_model::SessionId;
use roxmltree::Node;

use super::xml::{XmlError, child, child_text, document};
use crate::names::session_of_export;

/// A running backup job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BackupJob {
    /// The session that began it, if *every* export says the same one.
    pub(crate) session: Option<SessionId>,
    /// Its NBD socket.
    pub(crate) socket: Option<PathBuf>,
    /// Where its data go: a socket, an address, or the first file it writes.
    pub(crate) place: Option<String>,
    /// Its disks.
    pub(crate) disks: Vec<BackupJobDisk>,
}

/// One disk of a running backup job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BackupJobDisk {
    pub(crate) target: String,
    pub(crate) export: String,
    pub(crate) scratch: Option<PathBuf>,
    /// Number that names the scratch file in `vda[N]`.
    pub(crate) index: Option<u32>,
}

/// Reads `<domainbackup>` as libvirt reports it.
pub(crate) fn backup_job(text: &str) -> Result<BackupJob, XmlError> {
    let document = document(text, "domainbackup")?;
    let root = document.root_element();
    let disks: Vec<BackupJobDisk> = child(root, "disks")
        .into_iter()
        .flat_map(|disks| disks.children().filter(|one| one.has_tag_name("disk")))
        .filter(|disk| disk.attribute("backup") != Some("no"))
        .filter_map(|disk| {
            Some(BackupJobDisk {
                target: disk.attribute("name")?.to_owned(),
                export: disk.attribute("exportname").unwrap_or_default().to_owned(),
                scratch: child(disk, "scratch")
                    .and_then(|scratch| scratch.attribute("file"))
                    .map(PathBuf::from),
                index: disk.attribute("index").and_then(|text| text.parse().ok()),
            })
        })
        .collect();
    let mut sessions = disks.iter().map(|disk| session_of_export(&disk.export));
    let first = sessions.next().flatten();
    Ok(BackupJob {
        session: first.filter(|first| sessions.all(|other| other == Some(*first))),
        socket: child(root, "server")
            .and_then(|server| server.attribute("socket"))
            .map(PathBuf::from),
        place: place(root),
        disks,
    })
}

fn place(job: Node<'_, '_>) -> Option<String> {
    if let Some(server) = child(job, "server") {
        if let Some(socket) = server.attribute("socket") {
            return Some(socket.to_owned());
        }
        let host = server.attribute("name").unwrap_or("localhost");
        return Some(format!("{host}:{}", server.attribute("port")?));
    }
    let mut disks = child(job, "disks")?.children();
    let target = disks.find_map(|disk| child(disk, "target"))?;
    let written = target.attribute("file").or(target.attribute("dev"))?;
    Some(written.to_owned())
}

/// Reads `<domaincheckpoint>` as libvirt reports it.
pub(crate) fn checkpoint(text: &str) -> Result<CheckpointFacts, XmlError> {
    let document = document(text, "domaincheckpoint")?;
    let root = document.root_element();
    let name = child_text(root, "name").unwrap_or_default().to_owned();
    Ok(CheckpointFacts {
        mark: name.parse().ok(),
        nonce: child_text(root, "description").and_then(|text| text.parse().ok()),
        created_s: child_text(root, "creationTime").and_then(|text| text.parse().ok()),
        disks: child(root, "disks")
            .into_iter()
            .flat_map(|disks| disks.children().filter(|one| one.has_tag_name("disk")))
            .filter(|disk| disk.attribute("checkpoint") == Some("bitmap"))
            .filter_map(|disk| disk.attribute("name").map(str::to_owned))
            .collect(),
        name,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOB: &str =
        "<domainbackup mode='pull'><server transport='unix' socket='/s/n.sock'/><disks>
        <disk name='vda' backup='yes' exportname='hw-0101010101010101-vda' index='16'>
          <driver type='qcow2'/><scratch file='/s/vda'/></disk>
        <disk name='vdb' backup='yes' exportname='NAME' index='17'><scratch file='/s/vdb'/></disk>
        <disk name='vdc' backup='no'/></disks></domainbackup>";

    #[test]
    fn a_job_is_ours_only_if_every_export_carries_the_same_session() {
        let session = |other: &str| backup_job(&JOB.replace("NAME", other)).unwrap().session;
        assert_eq!(
            session("hw-0101010101010101-vdb"),
            Some(SessionId::from_bytes([1; 8]))
        );
        assert_eq!(session("hw-0202020202020202-vdb"), None);
        assert_eq!(session("vdb"), None);
    }

    #[test]
    fn a_job_tells_its_socket_its_scratch_files_and_their_numbers() {
        let job = backup_job(&JOB.replace("NAME", "vdb")).unwrap();
        assert_eq!(job.socket, Some("/s/n.sock".into()));
        assert_eq!(job.disks.len(), 2);
        assert_eq!(job.disks[0].scratch, Some("/s/vda".into()));
        assert_eq!(job.disks[1].index, Some(17));
    }

    #[test]
    fn a_job_tells_where_its_data_go() {
        let place = |text: &str| {
            let text = format!("<domainbackup>{text}</domainbackup>");
            backup_job(&text).unwrap().place
        };
        assert_eq!(backup_job(JOB).unwrap().place, Some("/s/n.sock".into()));
        assert_eq!(
            place("<server transport='tcp' name='::1' port='10809'/>"),
            Some("::1:10809".into())
        );
        assert_eq!(
            place("<disks><disk name='vda'/><disk name='vdb'><target file='/b'/></disk></disks>"),
            Some("/b".into())
        );
        assert_eq!(place(""), None);
    }

    #[test]
    fn a_checkpoint_lists_only_disks_with_a_bitmap() {
        let facts = checkpoint(
            "<domaincheckpoint><name>c1</name><description>mine</description>
             <creationTime>1795259190</creationTime><disks>
             <disk name='vda' checkpoint='bitmap' bitmap='c1'/><disk name='vdb' checkpoint='no'/>
             </disks></domaincheckpoint>",
        )
        .unwrap();
        assert_eq!(facts.disks, ["vda"]);
        assert_eq!(
            (facts.mark, facts.nonce, facts.created_s),
            (None, None, Some(1_795_259_190))
        );
    }
}
