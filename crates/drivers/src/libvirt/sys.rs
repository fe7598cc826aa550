//! The only place that calls libvirt: the library loaded at run time, and every
//! function of it that we use.
//!
//! JUSTIFICATION for a binding of our own: the safe `virt` crate lacks backups,
//! checkpoints and events, and `virt-sys` links libvirt into the binary, which
//! then would not start on a host without it. The C interface used here is
//! stable since libvirt 6.0 (soname `libvirt.so.0`); signatures and constants
//! are those of libvirt's public headers.
//!
//! Nothing unsafe leaves this module: [`handles`] offers owned handles that
//! free themselves, [`events`] turns callbacks into a log that can be read.
#![expect(unsafe_code, reason = "calls into a C library found at run time")]

pub(crate) mod events;
pub(crate) mod handles;

use std::ffi::{CStr, c_char, c_int, c_longlong, c_uint, c_ulong, c_ulonglong, c_void};
use std::path::{Path, PathBuf};

/// An object of libvirt that we only know by its address.
pub(crate) type Opaque = *mut c_void;

type EventCallback = unsafe extern "C" fn();
type FreeCallback = unsafe extern "C" fn(*mut c_void);

/// `virError`: only the fields up to `message` are read.
#[repr(C)]
struct RawError {
    code: c_int,
    domain: c_int,
    message: *mut c_char,
}

/// `virDomainBlockInfo`.
#[repr(C)]
#[derive(Default)]
struct RawBlockInfo {
    capacity: c_ulonglong,
    allocation: c_ulonglong,
    physical: c_ulonglong,
}

/// `virDomainBlockStatsStruct`.
#[repr(C)]
#[derive(Default)]
struct RawBlockStats {
    read_requests: c_longlong,
    read_bytes: c_longlong,
    write_requests: c_longlong,
    write_bytes: c_longlong,
    errors: c_longlong,
}

/// `virTypedParameter`: a name, a type and eight bytes of value.
#[repr(C)]
struct RawParameter {
    field: [c_char; 80],
    kind: c_int,
    value: RawValue,
}

#[repr(C)]
#[derive(Clone, Copy)]
union RawValue {
    int: c_int,
    ulonglong: c_ulonglong,
}

/// `VIR_TYPED_PARAM_INT`.
const PARAMETER_IS_INT: c_int = 1;
/// `VIR_TYPED_PARAM_ULLONG`.
const PARAMETER_IS_ULLONG: c_int = 4;

macro_rules! api {
    ($($library:ident { $($name:ident = $symbol:literal: fn($($argument:ty),*) $(-> $result:ty)?;)* })*) => {
        /// The functions of libvirt that we use, looked up once.
        pub(crate) struct Api {
            $($($name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*)*
        }

        impl Api {
            fn resolve($($library: &Loaded),*) -> Result<Self, LoadError> {
                Ok(Self {
                    $($($name: {
                        // SAFETY: the type is the one that libvirt's public
                        // header declares for this symbol, and the library is
                        // never unloaded (see `Loaded`), so the address stays
                        // valid for the life of the process.
                        unsafe { $library.symbol::<unsafe extern "C" fn($($argument),*) $(-> $result)?>($symbol)? }
                    },)*)*
                })
            }
        }
    };
}

api! {
    libvirt {
        initialize = "virInitialize": fn() -> c_int;
        get_last_error = "virGetLastError": fn() -> *mut RawError;
        set_error_func = "virSetErrorFunc": fn(*mut c_void, Option<unsafe extern "C" fn(*mut c_void, *mut RawError)>);
        connect_open = "virConnectOpen": fn(*const c_char) -> Opaque;
        connect_close = "virConnectClose": fn(Opaque) -> c_int;
        connect_is_alive = "virConnectIsAlive": fn(Opaque) -> c_int;
        connect_set_keep_alive = "virConnectSetKeepAlive": fn(Opaque, c_int, c_uint) -> c_int;
        connect_get_lib_version = "virConnectGetLibVersion": fn(Opaque, *mut c_ulong) -> c_int;
        connect_get_version = "virConnectGetVersion": fn(Opaque, *mut c_ulong) -> c_int;
        connect_list_all_domains = "virConnectListAllDomains": fn(Opaque, *mut *mut Opaque, c_uint) -> c_int;
        domain_lookup_by_name = "virDomainLookupByName": fn(Opaque, *const c_char) -> Opaque;
        domain_lookup_by_uuid = "virDomainLookupByUUIDString": fn(Opaque, *const c_char) -> Opaque;
        domain_free = "virDomainFree": fn(Opaque) -> c_int;
        domain_get_name = "virDomainGetName": fn(Opaque) -> *const c_char;
        domain_get_uuid = "virDomainGetUUIDString": fn(Opaque, *mut c_char) -> c_int;
        domain_get_xml = "virDomainGetXMLDesc": fn(Opaque, c_uint) -> *mut c_char;
        domain_get_state = "virDomainGetState": fn(Opaque, *mut c_int, *mut c_int, c_uint) -> c_int;
        domain_is_persistent = "virDomainIsPersistent": fn(Opaque) -> c_int;
        domain_set_metadata = "virDomainSetMetadata": fn(Opaque, c_int, *const c_char, *const c_char, *const c_char, c_uint) -> c_int;
        domain_has_managed_save = "virDomainHasManagedSaveImage": fn(Opaque, c_uint) -> c_int;
        domain_create = "virDomainCreateWithFlags": fn(Opaque, c_uint) -> c_int;
        domain_destroy = "virDomainDestroyFlags": fn(Opaque, c_uint) -> c_int;
        domain_resume = "virDomainResume": fn(Opaque) -> c_int;
        domain_get_block_info = "virDomainGetBlockInfo": fn(Opaque, *const c_char, *mut RawBlockInfo, c_uint) -> c_int;
        domain_block_stats = "virDomainBlockStats": fn(Opaque, *const c_char, *mut RawBlockStats, usize) -> c_int;
        domain_set_block_threshold = "virDomainSetBlockThreshold": fn(Opaque, *const c_char, c_ulonglong, c_uint) -> c_int;
        domain_get_job_stats = "virDomainGetJobStats": fn(Opaque, *mut c_int, *mut *mut RawParameter, *mut c_int, c_uint) -> c_int;
        typed_params_free = "virTypedParamsFree": fn(*mut RawParameter, c_int);
        domain_abort_job = "virDomainAbortJob": fn(Opaque) -> c_int;
        domain_backup_begin = "virDomainBackupBegin": fn(Opaque, *const c_char, *const c_char, c_uint) -> c_int;
        domain_backup_get_xml = "virDomainBackupGetXMLDesc": fn(Opaque, c_uint) -> *mut c_char;
        domain_list_all_checkpoints = "virDomainListAllCheckpoints": fn(Opaque, *mut *mut Opaque, c_uint) -> c_int;
        checkpoint_lookup_by_name = "virDomainCheckpointLookupByName": fn(Opaque, *const c_char, c_uint) -> Opaque;
        checkpoint_create_xml = "virDomainCheckpointCreateXML": fn(Opaque, *const c_char, c_uint) -> Opaque;
        checkpoint_get_xml = "virDomainCheckpointGetXMLDesc": fn(Opaque, c_uint) -> *mut c_char;
        checkpoint_delete = "virDomainCheckpointDelete": fn(Opaque, c_uint) -> c_int;
        checkpoint_free = "virDomainCheckpointFree": fn(Opaque) -> c_int;
        pool_lookup_by_name = "virStoragePoolLookupByName": fn(Opaque, *const c_char) -> Opaque;
        pool_free = "virStoragePoolFree": fn(Opaque) -> c_int;
        volume_lookup_by_name = "virStorageVolLookupByName": fn(Opaque, *const c_char) -> Opaque;
        volume_get_path = "virStorageVolGetPath": fn(Opaque) -> *mut c_char;
        volume_free = "virStorageVolFree": fn(Opaque) -> c_int;
        secret_lookup_by_uuid = "virSecretLookupByUUIDString": fn(Opaque, *const c_char) -> Opaque;
        secret_define_xml = "virSecretDefineXML": fn(Opaque, *const c_char, c_uint) -> Opaque;
        secret_set_value = "virSecretSetValue": fn(Opaque, *const u8, usize, c_uint) -> c_int;
        secret_undefine = "virSecretUndefine": fn(Opaque) -> c_int;
        secret_free = "virSecretFree": fn(Opaque) -> c_int;
        event_register_default_impl = "virEventRegisterDefaultImpl": fn() -> c_int;
        event_run_default_impl = "virEventRunDefaultImpl": fn() -> c_int;
        domain_event_register_any = "virConnectDomainEventRegisterAny": fn(Opaque, Opaque, c_int, EventCallback, *mut c_void, Option<FreeCallback>) -> c_int;
        domain_event_deregister_any = "virConnectDomainEventDeregisterAny": fn(Opaque, c_int) -> c_int;
    }
    qemu {
        monitor_command = "virDomainQemuMonitorCommand": fn(Opaque, *const c_char, *mut *mut c_char, c_uint) -> c_int;
        agent_command = "virDomainQemuAgentCommand": fn(Opaque, *const c_char, c_int, c_uint) -> *mut c_char;
    }
}

/// Why libvirt's library cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LoadError {
    /// The file cannot be loaded.
    #[error("cannot load `{library}`: {because}")]
    Missing { library: String, because: String },
    /// The library is older than what we need.
    #[error("`{library}` has no function `{symbol}`: it is too old")]
    TooOld { library: String, symbol: String },
    /// libvirt refused to start up.
    #[error("libvirt cannot be initialised: {0}")]
    Initialise(String),
}

/// An error as libvirt reports it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct CallError {
    /// `virErrorNumber`.
    pub(crate) code: i32,
    /// libvirt's text.
    pub(crate) message: String,
}

/// A loaded library. It is never unloaded: libvirt keeps threads, thread-local
/// state and our callbacks for the life of the process.
struct Loaded {
    name: String,
    library: &'static libloading::Library,
}

impl Loaded {
    fn open(file: &Path) -> Result<Self, LoadError> {
        let name = file.display().to_string();
        // SAFETY: loading runs the library's initialisers. libvirt's are those
        // that every program linked with it runs at start; they need nothing
        // from us.
        let library =
            unsafe { libloading::Library::new(file) }.map_err(|error| LoadError::Missing {
                library: name.clone(),
                because: error.to_string(),
            })?;
        Ok(Self {
            name,
            library: Box::leak(Box::new(library)),
        })
    }

    /// # Safety
    /// `T` must be the type of a function pointer that fits `symbol`.
    unsafe fn symbol<T: Copy>(&self, symbol: &str) -> Result<T, LoadError> {
        // SAFETY: the caller vouches for the type.
        unsafe { self.library.get::<T>(symbol.as_bytes()) }
            .map(|found| *found)
            .map_err(|_| LoadError::TooOld {
                library: self.name.clone(),
                symbol: symbol.to_owned(),
            })
    }
}

impl Api {
    /// Loads libvirt and makes it ready: errors are reported to the caller only
    /// and never printed, and its event loop runs on a thread of its own.
    ///
    /// `library` overrides where `libvirt.so.0` is; its sibling
    /// `libvirt-qemu.so.0` is then looked for beside it.
    pub(crate) fn load(library: Option<&Path>) -> Result<&'static Self, LoadError> {
        let main = library.map_or_else(|| PathBuf::from("libvirt.so.0"), Path::to_path_buf);
        let sibling = library
            .and_then(Path::parent)
            .map_or_else(PathBuf::new, Path::to_path_buf)
            .join("libvirt-qemu.so.0");
        let api: &'static Self = Box::leak(Box::new(Self::resolve(
            &Loaded::open(&main)?,
            &Loaded::open(&sibling)?,
        )?));
        // SAFETY: `virInitialize` may be called any number of times from any
        // thread.
        if unsafe { (api.initialize)() } < 0 {
            return Err(LoadError::Initialise(api.last_error().message));
        }
        // SAFETY: the function given is valid for ever and ignores its data.
        unsafe { (api.set_error_func)(std::ptr::null_mut(), Some(say_nothing)) };
        events::start_loop(api)?;
        Ok(api)
    }

    /// Returns the calling thread's last error.
    fn last_error(&self) -> CallError {
        // SAFETY: libvirt returns null or a pointer to this thread's error,
        // valid until the next call on this thread; everything is copied here.
        unsafe {
            let raw = (self.get_last_error)();
            let Some(raw) = raw.as_ref() else {
                return CallError {
                    code: 0,
                    message: "libvirt gave no reason".to_owned(),
                };
            };
            let message =
                copy_text(raw.message).unwrap_or_else(|| "libvirt gave no reason".to_owned());
            CallError {
                code: raw.code,
                message,
            }
        }
    }

    /// Turns libvirt's "negative means failed" into a result.
    fn checked(&self, outcome: c_int) -> Result<c_int, CallError> {
        if outcome < 0 {
            Err(self.last_error())
        } else {
            Ok(outcome)
        }
    }

    /// Turns libvirt's "null means failed" into a result.
    fn found(&self, object: Opaque) -> Result<Opaque, CallError> {
        if object.is_null() {
            Err(self.last_error())
        } else {
            Ok(object)
        }
    }

    /// Takes over a text that libvirt allocated for us.
    ///
    /// # Safety
    /// `text` must be null or a string that libvirt hands over to its caller.
    unsafe fn own_text(&self, text: *mut c_char) -> Result<String, CallError> {
        // SAFETY: null or a valid string, by this function's contract; it is
        // freed exactly once, after it was copied.
        unsafe {
            let copy = copy_text(text);
            if !text.is_null() {
                free(text.cast());
            }
            copy.ok_or_else(|| self.last_error())
        }
    }
}

/// Copies a C string; bytes that are not UTF-8 are replaced.
///
/// # Safety
/// `text` must be null or point to a string that ends with a zero byte.
unsafe fn copy_text(text: *const c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: not null, and a string by this function's contract.
    Some(
        unsafe { CStr::from_ptr(text) }
            .to_string_lossy()
            .into_owned(),
    )
}

unsafe extern "C" {
    /// libvirt documents that its strings and arrays are released with `free`.
    fn free(memory: *mut c_void);
}

/// Keeps libvirt from printing errors on stderr; every error is fetched by
/// [`Api::last_error`] instead.
unsafe extern "C" fn say_nothing(_data: *mut c_void, _error: *mut RawError) {}
