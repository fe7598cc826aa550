//! Names that carry a session, so that what is found is known as its own.

use highwater_model::SessionId;

/// Returns the name under which a disk, and its bitmap, is exported. It carries
/// the session, so that a job can be told from everybody else's.
pub(crate) fn export_name(session: SessionId, target: &str) -> String {
    format!("hw-{session}-{target}")
}

/// Returns the session that an export name carries, if it is one of ours.
pub(crate) fn session_of_export(name: &str) -> Option<SessionId> {
    let (session, _target) = name.strip_prefix("hw-")?.split_once('-')?;
    let parsed: SessionId = session.parse().ok()?;
    // Only the exact spelling is ours.
    (parsed.to_string() == session).then_some(parsed)
}

/// Returns the session whose scratch file this is. QEMU writes a file with
/// options (encryption) as JSON that ends with its path.
pub(crate) fn session_of_scratch(file: &str) -> Option<SessionId> {
    let name = file.rsplit('/').next()?;
    session_of_export(name).filter(|_| name.contains(".scratch"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCRATCH: &str = "/s/0101010101010101/hw-0101010101010101-vda.scratch";

    fn session() -> SessionId {
        SessionId::from_bytes([1; 8])
    }

    #[test]
    fn an_export_name_gives_its_session_back_and_foreign_names_give_none() {
        assert_eq!(
            session_of_export(&export_name(session(), "vda")),
            Some(session())
        );
        assert_eq!(
            session_of_export(&export_name(session(), "sd-a-b")),
            Some(session())
        );
        for foreign in [
            "vda",
            "hw-",
            "hw-vda",
            "hw-abab-vda",
            "hw-ABABABABABABABAB-vda",
            "",
        ] {
            assert_eq!(session_of_export(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn a_scratch_file_tells_its_session_however_qemu_writes_its_name() {
        let session = Some(SessionId::from_bytes([1; 8]));
        assert_eq!(session_of_scratch(SCRATCH), session);
        let with_options =
            format!(r#"json:{{"driver":"qcow2","file":{{"filename":"{SCRATCH}"}}}}"#);
        assert_eq!(session_of_scratch(&with_options), session);
        for other in [
            "/s/vda.scratch",
            "/s/hw-vda.scratch",
            "/s/hw-01-vda.scratch",
            "/s/hw-0101010101010101-vda.qcow2",
            "/s/hw-0101010101010101-vda.scratch/vda.qcow2",
            "",
        ] {
            assert_eq!(session_of_scratch(other), None, "{other}");
        }
    }
}
