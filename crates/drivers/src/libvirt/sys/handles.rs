//! Owned handles of libvirt objects: safe to use, freed when dropped.

use std::ffi::{CString, c_char, c_int, c_uint, c_ulong};
use std::path::PathBuf;
use std::ptr;
use std::sync::Arc;

use super::{
    Api, CallError, Opaque, PARAMETER_IS_INT, PARAMETER_IS_ULLONG, RawBlockInfo, RawBlockStats,
    RawParameter, copy_text, free,
};

/// libvirt's code for "invalid argument", used where a text holds a zero byte.
const INVALID_ARGUMENT: i32 = 8;

fn c_text(text: &str) -> Result<CString, CallError> {
    CString::new(text).map_err(|_| CallError {
        code: INVALID_ARGUMENT,
        message: "a text for libvirt holds a zero byte".to_owned(),
    })
}

/// An open connection to a libvirt daemon.
pub(crate) struct ConnectionHandle {
    pub(super) api: &'static Api,
    pub(super) raw: Opaque,
}

// SAFETY: libvirt's connections are reference counted and locked inside; its
// documentation allows their use from several threads at once.
unsafe impl Send for ConnectionHandle {}
// SAFETY: as above.
unsafe impl Sync for ConnectionHandle {}

impl ConnectionHandle {
    /// Opens `uri`.
    pub(crate) fn open(api: &'static Api, uri: &str) -> Result<Arc<Self>, CallError> {
        let uri = c_text(uri)?;
        // SAFETY: a valid string that outlives the call.
        let raw = api.found(unsafe { (api.connect_open)(uri.as_ptr()) })?;
        Ok(Arc::new(Self { api, raw }))
    }

    /// Has the daemon asked for a sign of life every `interval_s` seconds; the
    /// connection counts as dead after `count` of them went unanswered.
    pub(crate) fn keep_alive(&self, interval_s: i32, count: u32) -> Result<(), CallError> {
        // SAFETY: `self.raw` is an open connection.
        self.api
            .checked(unsafe { (self.api.connect_set_keep_alive)(self.raw, interval_s, count) })
            .map(drop)
    }

    /// Returns whether the connection can still be used.
    pub(crate) fn is_alive(&self) -> bool {
        // SAFETY: `self.raw` is an open connection.
        unsafe { (self.api.connect_is_alive)(self.raw) == 1 }
    }

    /// Returns the version of the daemon, as `major * 1000000 + minor * 1000 + release`.
    pub(crate) fn libvirt_version(&self) -> Result<u64, CallError> {
        let mut version: c_ulong = 0;
        // SAFETY: an open connection, and a place for the number.
        let outcome = unsafe { (self.api.connect_get_lib_version)(self.raw, &raw mut version) };
        self.api.checked(outcome)?;
        Ok(version)
    }

    /// Returns the version of the host's QEMU, in the same form.
    pub(crate) fn hypervisor_version(&self) -> Result<u64, CallError> {
        let mut version: c_ulong = 0;
        // SAFETY: an open connection, and a place for the number.
        let outcome = unsafe { (self.api.connect_get_version)(self.raw, &raw mut version) };
        self.api.checked(outcome)?;
        Ok(version)
    }

    /// Returns all domains.
    pub(crate) fn domains(self: &Arc<Self>) -> Result<Vec<DomainHandle>, CallError> {
        let mut list: *mut Opaque = ptr::null_mut();
        // SAFETY: an open connection, and a place for the list's address.
        let count = unsafe { (self.api.connect_list_all_domains)(self.raw, &raw mut list, 0) };
        let count = self.api.checked(count)?;
        // SAFETY: libvirt returned this list of `count` objects to be owned by
        // us; each is owned by exactly one handle.
        Ok(unsafe { own_list(list, count) }
            .into_iter()
            .map(|raw| DomainHandle {
                connection: Arc::clone(self),
                raw,
            })
            .collect())
    }

    /// Finds a domain by name.
    pub(crate) fn domain_by_name(self: &Arc<Self>, name: &str) -> Result<DomainHandle, CallError> {
        let name = c_text(name)?;
        // SAFETY: an open connection and a valid string.
        let raw = unsafe { (self.api.domain_lookup_by_name)(self.raw, name.as_ptr()) };
        Ok(DomainHandle {
            connection: Arc::clone(self),
            raw: self.api.found(raw)?,
        })
    }

    /// Finds a domain by UUID.
    pub(crate) fn domain_by_uuid(self: &Arc<Self>, uuid: &str) -> Result<DomainHandle, CallError> {
        let uuid = c_text(uuid)?;
        // SAFETY: an open connection and a valid string.
        let raw = unsafe { (self.api.domain_lookup_by_uuid)(self.raw, uuid.as_ptr()) };
        Ok(DomainHandle {
            connection: Arc::clone(self),
            raw: self.api.found(raw)?,
        })
    }

    /// Returns the path of a storage volume.
    pub(crate) fn volume_path(&self, pool: &str, volume: &str) -> Result<PathBuf, CallError> {
        let (pool, volume) = (c_text(pool)?, c_text(volume)?);
        // SAFETY: an open connection and valid strings; each object found is
        // freed once, after its last use, and the path is a string handed over.
        unsafe {
            let pool = self
                .api
                .found((self.api.pool_lookup_by_name)(self.raw, pool.as_ptr()))?;
            let found = self
                .api
                .found((self.api.volume_lookup_by_name)(pool, volume.as_ptr()));
            let path = found.and_then(|volume| {
                let path = self.api.own_text((self.api.volume_get_path)(volume));
                (self.api.volume_free)(volume);
                path
            });
            (self.api.pool_free)(pool);
            path.map(PathBuf::from)
        }
    }
}

impl ConnectionHandle {
    /// Gives libvirt a secret.
    pub(crate) fn define_secret(&self, xml: &str, value: &[u8]) -> Result<(), CallError> {
        let xml = c_text(xml)?;
        // SAFETY: an open connection, a valid string and bytes of the length
        // passed along; the object found is freed once, after its last use.
        unsafe {
            let secret = self
                .api
                .found((self.api.secret_define_xml)(self.raw, xml.as_ptr(), 0))?;
            let outcome = self.api.checked((self.api.secret_set_value)(
                secret,
                value.as_ptr(),
                value.len(),
                0,
            ));
            (self.api.secret_free)(secret);
            outcome.map(drop)
        }
    }

    /// Has libvirt forget a secret.
    pub(crate) fn forget_secret(&self, uuid: &str) -> Result<(), CallError> {
        let uuid = c_text(uuid)?;
        // SAFETY: an open connection and a valid string; the object found is
        // freed once, after its last use.
        unsafe {
            let secret = self
                .api
                .found((self.api.secret_lookup_by_uuid)(self.raw, uuid.as_ptr()))?;
            let outcome = self.api.checked((self.api.secret_undefine)(secret));
            (self.api.secret_free)(secret);
            outcome.map(drop)
        }
    }
}

impl Drop for ConnectionHandle {
    fn drop(&mut self) {
        // SAFETY: opened once, closed once; domains hold the handle alive.
        unsafe { (self.api.connect_close)(self.raw) };
    }
}

/// Takes over a list that libvirt allocated, and frees the list itself.
///
/// # Safety
/// `list` must be null or hold `count` object pointers handed over by libvirt.
unsafe fn own_list(list: *mut Opaque, count: c_int) -> Vec<Opaque> {
    let count = usize::try_from(count).unwrap_or_default();
    if list.is_null() {
        return Vec::new();
    }
    // SAFETY: valid for `count` elements by this function's contract; only the
    // array is freed, the objects in it live on.
    unsafe {
        let objects = std::slice::from_raw_parts(list, count).to_vec();
        free(list.cast());
        objects
    }
}

/// Which of a domain's two definitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    /// The one that runs.
    Running,
    /// The one that is kept.
    Definition,
}

/// A domain (VM).
pub(crate) struct DomainHandle {
    pub(super) connection: Arc<ConnectionHandle>,
    pub(super) raw: Opaque,
}

// SAFETY: libvirt's domain objects are reference counted and immutable but for
// the connection they go through, which is thread safe.
unsafe impl Send for DomainHandle {}
// SAFETY: as above.
unsafe impl Sync for DomainHandle {}

/// Counters of one disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BlockStats {
    pub(crate) write_requests: i64,
    pub(crate) write_bytes: i64,
}

/// Kind and operation of a running job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct JobStats {
    /// `virDomainJobType`; 0 is "no job".
    pub(crate) kind: i32,
    /// `virDomainJobOperation`.
    pub(crate) operation: i32,
    /// How long it has run, milliseconds, if libvirt tells.
    pub(crate) elapsed_ms: Option<u64>,
}

impl DomainHandle {
    fn api(&self) -> &'static Api {
        self.connection.api
    }

    /// Returns the connection it was found on.
    pub(crate) fn connection(&self) -> &ConnectionHandle {
        &self.connection
    }

    /// Returns the domain's name.
    pub(crate) fn name(&self) -> Result<String, CallError> {
        // SAFETY: a live domain; the string belongs to it and is copied.
        unsafe { copy_text((self.api().domain_get_name)(self.raw)) }
            .ok_or_else(|| self.api().last_error())
    }

    /// Returns the domain's UUID, lower case with dashes.
    pub(crate) fn uuid(&self) -> Result<String, CallError> {
        // `VIR_UUID_STRING_BUFLEN` is 37: 36 characters and the final zero.
        let mut buffer = [0 as c_char; 37];
        // SAFETY: a live domain and a buffer of the documented length, which
        // libvirt ends with a zero byte when it succeeds.
        unsafe {
            self.api()
                .checked((self.api().domain_get_uuid)(self.raw, buffer.as_mut_ptr()))?;
            copy_text(buffer.as_ptr())
        }
        .ok_or_else(|| self.api().last_error())
    }

    /// Returns the definition.
    pub(crate) fn xml(&self, flags: c_uint) -> Result<String, CallError> {
        // SAFETY: a live domain; the string is handed over.
        unsafe {
            self.api()
                .own_text((self.api().domain_get_xml)(self.raw, flags))
        }
    }

    /// Returns state and reason.
    pub(crate) fn state(&self) -> Result<(i32, i32), CallError> {
        let (mut state, mut reason) = (0, 0);
        // SAFETY: a live domain and places for two numbers.
        let outcome =
            unsafe { (self.api().domain_get_state)(self.raw, &raw mut state, &raw mut reason, 0) };
        self.api().checked(outcome)?;
        Ok((state, reason))
    }

    /// Returns whether the definition outlives a shutdown.
    pub(crate) fn is_persistent(&self) -> Result<bool, CallError> {
        // SAFETY: a live domain.
        Ok(self
            .api()
            .checked(unsafe { (self.api().domain_is_persistent)(self.raw) })?
            == 1)
    }

    /// Sets or, without a text, removes the element of a namespace in the
    /// metadata of the domain.
    pub(crate) fn set_metadata(
        &self,
        element: Option<&str>,
        prefix: &str,
        namespace: &str,
        which: Which,
    ) -> Result<(), CallError> {
        /// `VIR_DOMAIN_METADATA_ELEMENT`.
        const ELEMENT: c_int = 2;
        // `VIR_DOMAIN_AFFECT_LIVE`, `VIR_DOMAIN_AFFECT_CONFIG`.
        let flags = match which {
            Which::Running => 1,
            Which::Definition => 2,
        };
        let element = element.map(c_text).transpose()?;
        let element = element.as_ref().map_or(ptr::null(), |text| text.as_ptr());
        let (prefix, namespace) = (c_text(prefix)?, c_text(namespace)?);
        // SAFETY: a live domain; all texts are valid (the first may be null) and
        // outlive the call.
        let outcome = unsafe {
            (self.api().domain_set_metadata)(
                self.raw,
                ELEMENT,
                element,
                prefix.as_ptr(),
                namespace.as_ptr(),
                flags,
            )
        };
        self.api().checked(outcome).map(drop)
    }

    /// Returns whether it would be started from a saved state.
    pub(crate) fn has_saved_state(&self) -> Result<bool, CallError> {
        // SAFETY: a live domain.
        let outcome = unsafe { (self.api().domain_has_managed_save)(self.raw, 0) };
        Ok(self.api().checked(outcome)? == 1)
    }

    /// Starts it; its guest does not run.
    pub(crate) fn start_paused(&self) -> Result<(), CallError> {
        /// `VIR_DOMAIN_START_PAUSED`.
        const PAUSED: c_uint = 1;
        // SAFETY: a live domain.
        self.api()
            .checked(unsafe { (self.api().domain_create)(self.raw, PAUSED) })
            .map(drop)
    }

    /// Has QEMU end in order, so that it writes its bitmaps; the guest is not
    /// asked. QEMU is not killed if it does not.
    pub(crate) fn shut_off(&self) -> Result<(), CallError> {
        /// `VIR_DOMAIN_DESTROY_GRACEFUL`.
        const GRACEFUL: c_uint = 1;
        // SAFETY: a live domain.
        self.api()
            .checked(unsafe { (self.api().domain_destroy)(self.raw, GRACEFUL) })
            .map(drop)
    }

    /// Lets a paused guest run.
    pub(crate) fn resume(&self) -> Result<(), CallError> {
        // SAFETY: a live domain.
        self.api()
            .checked(unsafe { (self.api().domain_resume)(self.raw) })
            .map(drop)
    }

    /// Returns the size the guest sees, in bytes.
    pub(crate) fn capacity(&self, disk: &str) -> Result<u64, CallError> {
        let disk = c_text(disk)?;
        let mut info = RawBlockInfo::default();
        // SAFETY: a live domain, a valid string and a place for the answer.
        let outcome = unsafe {
            (self.api().domain_get_block_info)(self.raw, disk.as_ptr(), &raw mut info, 0)
        };
        self.api().checked(outcome)?;
        Ok(info.capacity)
    }

    /// Returns what the guest has done to a disk since its process began.
    pub(crate) fn block_stats(&self, disk: &str) -> Result<BlockStats, CallError> {
        let disk = c_text(disk)?;
        let mut stats = RawBlockStats::default();
        // SAFETY: a live domain, a valid string, and a place of the size that is
        // passed along.
        let outcome = unsafe {
            (self.api().domain_block_stats)(
                self.raw,
                disk.as_ptr(),
                &raw mut stats,
                size_of::<RawBlockStats>(),
            )
        };
        self.api().checked(outcome)?;
        Ok(BlockStats {
            write_requests: stats.write_requests,
            write_bytes: stats.write_bytes,
        })
    }

    /// Asks for an event once `device` is written to beyond `threshold_bytes`.
    pub(crate) fn set_block_threshold(
        &self,
        device: &str,
        threshold_bytes: u64,
    ) -> Result<(), CallError> {
        let device = c_text(device)?;
        // SAFETY: a live domain and a valid string.
        let outcome = unsafe {
            (self.api().domain_set_block_threshold)(self.raw, device.as_ptr(), threshold_bytes, 0)
        };
        self.api().checked(outcome).map(drop)
    }

    /// Returns what job runs. Does not wait for it.
    pub(crate) fn job_stats(&self) -> Result<JobStats, CallError> {
        let mut kind = 0;
        let mut list: *mut RawParameter = ptr::null_mut();
        let mut count = 0;
        // SAFETY: a live domain and places for the three answers.
        let outcome = unsafe {
            (self.api().domain_get_job_stats)(
                self.raw,
                &raw mut kind,
                &raw mut list,
                &raw mut count,
                0,
            )
        };
        self.api().checked(outcome)?;
        let mut operation = 0;
        let mut elapsed_ms = None;
        if !list.is_null() {
            // SAFETY: libvirt returned `count` parameters for us to free; the
            // field is a string that ends within its 80 bytes, and the union is
            // read as the type that the parameter names.
            unsafe {
                let length = usize::try_from(count).unwrap_or_default();
                for parameter in std::slice::from_raw_parts(list, length) {
                    let name = copy_text(parameter.field.as_ptr());
                    if parameter.kind == PARAMETER_IS_INT && name.as_deref() == Some("operation") {
                        operation = parameter.value.int;
                    }
                    if parameter.kind == PARAMETER_IS_ULLONG
                        && name.as_deref() == Some("time_elapsed")
                    {
                        elapsed_ms = Some(parameter.value.ulonglong);
                    }
                }
                (self.api().typed_params_free)(list, count);
            }
        }
        Ok(JobStats {
            kind,
            operation,
            elapsed_ms,
        })
    }

    /// Aborts the domain's job, whoever began it.
    pub(crate) fn abort_job(&self) -> Result<(), CallError> {
        // SAFETY: a live domain.
        self.api()
            .checked(unsafe { (self.api().domain_abort_job)(self.raw) })
            .map(drop)
    }

    /// Starts a backup job, and creates a checkpoint in the same transaction.
    pub(crate) fn backup_begin(
        &self,
        backup_xml: &str,
        checkpoint_xml: Option<&str>,
        flags: c_uint,
    ) -> Result<(), CallError> {
        let backup = c_text(backup_xml)?;
        let checkpoint = checkpoint_xml.map(c_text).transpose()?;
        let checkpoint = checkpoint
            .as_ref()
            .map_or(ptr::null(), |text| text.as_ptr());
        // SAFETY: a live domain; both texts are valid (the second may be null)
        // and outlive the call.
        let outcome = unsafe {
            (self.api().domain_backup_begin)(self.raw, backup.as_ptr(), checkpoint, flags)
        };
        self.api().checked(outcome).map(drop)
    }

    /// Returns the running backup job's effective definition.
    pub(crate) fn backup_xml(&self) -> Result<String, CallError> {
        // SAFETY: a live domain; the string is handed over.
        unsafe {
            self.api()
                .own_text((self.api().domain_backup_get_xml)(self.raw, 0))
        }
    }

    /// Returns all checkpoints, parents before children.
    pub(crate) fn checkpoints(&self) -> Result<Vec<CheckpointHandle>, CallError> {
        /// `VIR_DOMAIN_CHECKPOINT_LIST_TOPOLOGICAL`.
        const TOPOLOGICAL: c_uint = 1 << 1;
        let mut list: *mut Opaque = ptr::null_mut();
        // SAFETY: a live domain, and a place for the list's address.
        let count = unsafe {
            (self.api().domain_list_all_checkpoints)(self.raw, &raw mut list, TOPOLOGICAL)
        };
        let count = self.api().checked(count)?;
        // SAFETY: libvirt returned this list of `count` objects to be owned by us.
        Ok(unsafe { own_list(list, count) }
            .into_iter()
            .map(|raw| CheckpointHandle {
                connection: Arc::clone(&self.connection),
                raw,
            })
            .collect())
    }

    /// Finds a checkpoint by name.
    pub(crate) fn checkpoint(&self, name: &str) -> Result<CheckpointHandle, CallError> {
        let name = c_text(name)?;
        // SAFETY: a live domain and a valid string.
        let raw = unsafe { (self.api().checkpoint_lookup_by_name)(self.raw, name.as_ptr(), 0) };
        Ok(CheckpointHandle {
            connection: Arc::clone(&self.connection),
            raw: self.api().found(raw)?,
        })
    }

    /// Creates or redefines a checkpoint.
    pub(crate) fn create_checkpoint(
        &self,
        xml: &str,
        flags: c_uint,
    ) -> Result<CheckpointHandle, CallError> {
        let xml = c_text(xml)?;
        // SAFETY: a live domain and a valid string.
        let raw = unsafe { (self.api().checkpoint_create_xml)(self.raw, xml.as_ptr(), flags) };
        Ok(CheckpointHandle {
            connection: Arc::clone(&self.connection),
            raw: self.api().found(raw)?,
        })
    }

    /// Sends a QMP command to QEMU and returns its whole reply as text.
    pub(crate) fn monitor_command(&self, command: &str) -> Result<String, CallError> {
        let command = c_text(command)?;
        let mut reply: *mut c_char = ptr::null_mut();
        // SAFETY: a live domain, a valid string, and a place for the reply's
        // address, which is handed over.
        unsafe {
            let outcome =
                (self.api().monitor_command)(self.raw, command.as_ptr(), &raw mut reply, 0);
            self.api().checked(outcome)?;
            self.api().own_text(reply)
        }
    }

    /// Returns whether the connection that it was found over can still be used.
    pub(crate) fn is_connected(&self) -> bool {
        self.connection.is_alive()
    }

    /// Sends a command to the guest agent and returns its whole reply as text;
    /// gives up after `timeout_s` seconds.
    pub(crate) fn agent_command(&self, command: &str, timeout_s: i32) -> Result<String, CallError> {
        let command = c_text(command)?;
        // SAFETY: a live domain and a valid string; the reply is handed over.
        unsafe {
            let reply = (self.api().agent_command)(self.raw, command.as_ptr(), timeout_s, 0);
            self.api().own_text(reply)
        }
    }
}

impl Drop for DomainHandle {
    fn drop(&mut self) {
        // SAFETY: one reference, given back once, while the connection is open.
        unsafe { (self.api().domain_free)(self.raw) };
    }
}

/// A checkpoint record of a domain.
pub(crate) struct CheckpointHandle {
    connection: Arc<ConnectionHandle>,
    raw: Opaque,
}

impl CheckpointHandle {
    fn api(&self) -> &'static Api {
        self.connection.api
    }

    /// Returns the record without the domain's definition in it.
    pub(crate) fn xml(&self) -> Result<String, CallError> {
        /// `VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN`.
        const NO_DOMAIN: c_uint = 1 << 1;
        // SAFETY: a live checkpoint; the string is handed over.
        unsafe {
            self.api()
                .own_text((self.api().checkpoint_get_xml)(self.raw, NO_DOMAIN))
        }
    }

    /// Deletes the record, and its bitmaps unless `flags` say otherwise.
    pub(crate) fn delete(&self, flags: c_uint) -> Result<(), CallError> {
        // SAFETY: a live checkpoint.
        self.api()
            .checked(unsafe { (self.api().checkpoint_delete)(self.raw, flags) })
            .map(drop)
    }
}

impl Drop for CheckpointHandle {
    fn drop(&mut self) {
        // SAFETY: one reference, given back once, while the connection is open.
        unsafe { (self.api().checkpoint_free)(self.raw) };
    }
}
