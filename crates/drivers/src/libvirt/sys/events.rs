//! Events of a domain, written down by libvirt's event thread.

use std::ffi::{c_char, c_int, c_ulonglong, c_void};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::handles::{ConnectionHandle, DomainHandle};
use super::{Api, CallError, EventCallback, LoadError, Opaque, copy_text};

/// Event numbers of `virDomainEventID`.
const LIFECYCLE: c_int = 0;
const IO_ERROR_REASON: c_int = 6;
const JOB_COMPLETED: c_int = 21;
const BLOCK_THRESHOLD: c_int = 24;

/// Lifecycle events of `virDomainEventType` and the detail that we care for.
const SUSPENDED: c_int = 3;
const STOPPED: c_int = 5;
const SUSPENDED_IO_ERROR: c_int = 2;

/// More than this many I/O errors tell nothing new.
const IO_ERRORS_MAX: usize = 64;

/// What happened to a domain since the log was opened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct EventLog {
    /// I/O errors: device alias and reason.
    pub(crate) io_errors: Vec<(String, String)>,
    /// QEMU paused the guest because a write failed.
    pub(crate) paused_on_error: bool,
    /// QEMU ended.
    pub(crate) stopped: bool,
    /// A job ended, for whatever reason.
    pub(crate) job_completed: bool,
    /// A watched file grew beyond its threshold.
    pub(crate) threshold_passed: bool,
}

type SharedLog = Mutex<EventLog>;

/// An open log; closing it (dropping) ends the registration.
pub(crate) struct EventListener {
    connection: Arc<ConnectionHandle>,
    callbacks: Vec<c_int>,
    log: Arc<SharedLog>,
}

impl EventListener {
    /// Begins to write down what happens to `domain`.
    pub(crate) fn open(domain: &DomainHandle) -> Result<Self, CallError> {
        let mut listener = Self {
            connection: Arc::clone(&domain.connection),
            callbacks: Vec::new(),
            log: Arc::new(SharedLog::default()),
        };
        // SAFETY: libvirt calls each function with the arguments that its event
        // number documents, whatever the type it is passed as; these have
        // exactly those types.
        let functions: [(c_int, EventCallback); 4] = unsafe {
            [
                (
                    LIFECYCLE,
                    std::mem::transmute::<LifecycleFn, EventCallback>(on_lifecycle),
                ),
                (
                    IO_ERROR_REASON,
                    std::mem::transmute::<IoErrorFn, EventCallback>(on_io_error),
                ),
                (
                    JOB_COMPLETED,
                    std::mem::transmute::<JobFn, EventCallback>(on_job_completed),
                ),
                (
                    BLOCK_THRESHOLD,
                    std::mem::transmute::<ThresholdFn, EventCallback>(on_threshold),
                ),
            ]
        };
        for (event, function) in functions {
            let api = domain.connection.api;
            let shared = Arc::into_raw(Arc::clone(&listener.log))
                .cast_mut()
                .cast::<c_void>();
            // SAFETY: live connection and domain; libvirt keeps `shared` until
            // it calls `release`, which gives the reference back.
            let id = unsafe {
                (api.domain_event_register_any)(
                    domain.connection.raw,
                    domain.raw,
                    event,
                    function,
                    shared,
                    Some(release),
                )
            };
            match api.checked(id) {
                Ok(id) => listener.callbacks.push(id),
                Err(error) => {
                    // SAFETY: the registration failed, so libvirt does not keep
                    // the reference; it is given back here, once.
                    unsafe { release(shared) };
                    return Err(error);
                }
            }
        }
        Ok(listener)
    }

    /// Returns what has happened so far.
    pub(crate) fn log(&self) -> EventLog {
        self.log
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Drop for EventListener {
    fn drop(&mut self) {
        for callback in &self.callbacks {
            // SAFETY: a live connection, and a number it gave out, ended once.
            // On a dead connection this fails and nothing is left to end.
            unsafe {
                (self.connection.api.domain_event_deregister_any)(self.connection.raw, *callback)
            };
        }
    }
}

/// Starts the thread that reads from all connections, once per process.
///
/// libvirt has one event loop per process, so this is the one piece of state
/// that cannot belong to a driver value.
pub(super) fn start_loop(api: &'static Api) -> Result<(), LoadError> {
    static STARTED: OnceLock<Result<(), LoadError>> = OnceLock::new();
    STARTED
        .get_or_init(|| {
            // SAFETY: called once, before any connection is opened.
            if unsafe { (api.event_register_default_impl)() } < 0 {
                return Err(LoadError::Initialise(api.last_error().message));
            }
            std::thread::Builder::new()
                .name("libvirt-events".to_owned())
                .spawn(move || {
                    loop {
                        // SAFETY: the loop was registered, and only this thread
                        // runs it.
                        if unsafe { (api.event_run_default_impl)() } < 0 {
                            // Nothing to report to; do not spin if it keeps failing.
                            std::thread::sleep(std::time::Duration::from_millis(100));
                        }
                    }
                })
                .map(drop)
                .map_err(|error| LoadError::Initialise(error.to_string()))
        })
        .clone()
}

type LifecycleFn = unsafe extern "C" fn(Opaque, Opaque, c_int, c_int, *mut c_void) -> c_int;
type IoErrorFn = unsafe extern "C" fn(
    Opaque,
    Opaque,
    *const c_char,
    *const c_char,
    c_int,
    *const c_char,
    *mut c_void,
);
type JobFn = unsafe extern "C" fn(Opaque, Opaque, *mut c_void, c_int, *mut c_void);
type ThresholdFn = unsafe extern "C" fn(
    Opaque,
    Opaque,
    *const c_char,
    *const c_char,
    c_ulonglong,
    c_ulonglong,
    *mut c_void,
);

/// Gives back one reference to a log.
///
/// # Safety
/// `shared` must come from `Arc::into_raw` and be given back once.
unsafe extern "C" fn release(shared: *mut c_void) {
    // SAFETY: by this function's contract.
    drop(unsafe { Arc::from_raw(shared.cast::<SharedLog>()) });
}

/// Writes into a log.
///
/// # Safety
/// `shared` must be a log that some registration still holds.
unsafe fn note(shared: *mut c_void, change: impl FnOnce(&mut EventLog)) {
    // SAFETY: alive while registered, by this function's contract.
    if let Some(log) = unsafe { shared.cast::<SharedLog>().as_ref() } {
        change(&mut log.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

unsafe extern "C" fn on_lifecycle(
    _connection: Opaque,
    _domain: Opaque,
    event: c_int,
    detail: c_int,
    shared: *mut c_void,
) -> c_int {
    // SAFETY: libvirt passes the log that was registered.
    unsafe {
        note(shared, |log| {
            log.stopped |= event == STOPPED;
            log.paused_on_error |= event == SUSPENDED && detail == SUSPENDED_IO_ERROR;
        });
    }
    0
}

unsafe extern "C" fn on_io_error(
    _connection: Opaque,
    _domain: Opaque,
    _path: *const c_char,
    alias: *const c_char,
    _action: c_int,
    reason: *const c_char,
    shared: *mut c_void,
) {
    // SAFETY: libvirt passes the log that was registered, and texts that are
    // valid during the call.
    unsafe {
        let alias = copy_text(alias).unwrap_or_default();
        let reason = copy_text(reason).unwrap_or_default();
        note(shared, |log| {
            if log.io_errors.len() < IO_ERRORS_MAX {
                log.io_errors.push((alias, reason));
            }
        });
    }
}

unsafe extern "C" fn on_job_completed(
    _connection: Opaque,
    _domain: Opaque,
    _parameters: *mut c_void,
    _count: c_int,
    shared: *mut c_void,
) {
    // SAFETY: libvirt passes the log that was registered.
    unsafe { note(shared, |log| log.job_completed = true) };
}

unsafe extern "C" fn on_threshold(
    _connection: Opaque,
    _domain: Opaque,
    _device: *const c_char,
    _path: *const c_char,
    _threshold_bytes: c_ulonglong,
    _excess_bytes: c_ulonglong,
    shared: *mut c_void,
) {
    // SAFETY: libvirt passes the log that was registered.
    unsafe { note(shared, |log| log.threshold_passed = true) };
}
