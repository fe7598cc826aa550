//! `highwater verify`

mod document;
mod text;

use std::io::IsTerminal as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use highwater_engine::repository::{
    Progress, RepoErrorKind, Repository, VerifyDepth, VerifyError, VerifyPhase, VerifyReport,
    VmIdentity,
};
use highwater_engine::{self as engine, Subject, VerifyJob};
use highwater_model::PointId;
use highwater_store::Store;
use indicatif::{ProgressBar, ProgressStyle};

use crate::advice::{self, CliError};
use crate::args::{Global, Verify};
use crate::commands::{all_points, find_point};
use crate::{output, secrets, settings, signals};

/// What was verified, and how long it took.
struct Verified {
    report: VerifyReport,
    depth: VerifyDepth,
    with_key: bool,
    elapsed: Duration,
}

pub(crate) fn run(global: &Global, args: &Verify) -> Result<u8, CliError> {
    let started = Instant::now();
    let cancel = signals::cancel_on_signals();
    let store = settings::open_store(global)?;
    let repo = if args.no_key {
        // Without a key to open there is nothing that could be left out.
        let kinds = Repository::secret_kinds(store.as_ref());
        match kinds.as_deref() {
            Ok([]) => Some(Repository::open(Arc::clone(&store), None)?),
            _ => None,
        }
    } else {
        open(global, &store)?
    };
    let points = match &repo {
        Some(repo) if !args.points.is_empty() => Some(wanted(repo, &args.points)?),
        _ => None,
    };
    let subject = match (&repo, &points) {
        (Some(repo), Some(points)) => Subject::Points(repo, points),
        (Some(repo), None) => Subject::Whole(repo),
        (None, _) => Subject::WithoutKey(store.as_ref()),
    };
    let depth = if args.read_data {
        VerifyDepth::Data
    } else {
        VerifyDepth::Structure
    };
    let bar = Bar::new(global);
    let job = VerifyJob {
        depth,
        workers: std::thread::available_parallelism().map_or(2, std::num::NonZero::get),
        progress: &|progress| bar.show(progress),
        cancel: &cancel,
    };
    let report = engine::verify(subject, &job);
    bar.end();
    let report = report.map_err(|error| match error {
        VerifyError::Repo(error) => CliError::Repo(error),
        VerifyError::Interrupted => CliError::Interrupted,
    })?;
    tell(
        global,
        &Verified {
            report,
            depth,
            with_key: repo.is_some(),
            elapsed: started.elapsed(),
        },
    )
}

/// Opens the repository; `None` if its keys are so damaged that none opens it,
/// which is something to report and not a reason to look at nothing.
fn open(global: &Global, store: &Arc<dyn Store>) -> Result<Option<Repository>, CliError> {
    let kinds = match Repository::secret_kinds(store.as_ref()) {
        Ok(kinds) => kinds,
        Err(error) if error.kind() == RepoErrorKind::Damaged => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let secret = secrets::for_opening(global, &kinds).map_err(|error| match error {
        CliError::Usage { message, hint } => CliError::Usage {
            message,
            hint: format!("{hint}; or check what can be checked without it: --no-key"),
        },
        other => other,
    })?;
    Ok(Some(Repository::open(Arc::clone(store), secret.as_ref())?))
}

fn wanted(repo: &Repository, texts: &[String]) -> Result<Vec<(VmIdentity, PointId)>, CliError> {
    let list = all_points(repo)?;
    let find = |text: &String| {
        let point = find_point(&list.points, text)?;
        Ok((point.vm.clone(), point.point))
    };
    texts.iter().map(find).collect()
}

fn tell(global: &Global, verified: &Verified) -> Result<u8, CliError> {
    let report = &verified.report;
    let code = match (report.is_clean(), report.warnings.is_empty()) {
        (false, _) => advice::DAMAGE,
        (true, false) if global.strict => advice::WARNED,
        (true, _) => advice::DONE,
    };
    let (state, hint) = text::advice(verified);
    if global.json {
        output::document(&document::Document::new(
            verified,
            state.as_deref(),
            hint,
            code,
        ))?;
    }
    for warning in &report.warnings {
        output::warn(warning);
    }
    // Damage is told even when everything else is quiet.
    let is_told = !report.is_clean() || !global.quiet;
    if is_told && !global.json {
        output::data(&text::report(verified))?;
    }
    if !report.is_clean() {
        output::talk(&format!("error: {}", text::verdict(report)));
    }
    if let Some(state) = state.filter(|_| !report.is_clean()) {
        output::talk(&format!("state: {state}"));
    }
    if let Some(hint) = hint {
        output::talk(&format!("hint: {hint}"));
    }
    Ok(code)
}

/// A bar at a terminal; nothing elsewhere.
struct Bar {
    bar: Option<ProgressBar>,
    phase: Mutex<Option<VerifyPhase>>,
}

impl Bar {
    fn new(global: &Global) -> Self {
        let wanted = !(global.quiet || global.json || global.no_progress);
        let style = ProgressStyle::with_template("{prefix:>14} {bar:28} {percent:>3}%  {elapsed}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = (wanted && std::io::stderr().is_terminal())
            .then(|| ProgressBar::new(1).with_style(style));
        Self {
            bar,
            phase: Mutex::default(),
        }
    }

    fn show(&self, progress: Progress) {
        let Some(bar) = &self.bar else { return };
        let mut phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        if *phase != Some(progress.phase) {
            *phase = Some(progress.phase);
            bar.set_prefix(match progress.phase {
                VerifyPhase::Points => "restore points",
                VerifyPhase::Index => "index",
                VerifyPhase::Trees => "trees",
                VerifyPhase::Data => "data",
                VerifyPhase::Ranges => "what is hurt",
            });
        }
        bar.set_length(progress.total.max(1));
        bar.set_position(progress.done);
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
