//! What lets tests break the program is in debug builds only.

use super::source::{code_only, is_test_file};
use crate::repository::Text;

const VARIABLE: &str = "HIGHWATER_FAULT";
const HOME: &str = "crates/cli/src/faults";
/// Where the steps are named, and passing one is defined.
const STEPS: &str = "crates/model/src/step.rs";
const DEBUG_ONLY: &str = "#[cfg(debug_assertions)]";

/// Returns the places that would put the means into a release build.
pub(super) fn faults(texts: &[Text]) -> Vec<String> {
    let mut faults = Vec::new();
    let is_program = |text: &&Text| text.is_rust() && text.path.starts_with("crates/");
    for file in texts.iter().filter(is_program) {
        let path = &file.path;
        if is_test_file(path) || path.starts_with(HOME) {
            continue;
        }
        if file.text.contains(VARIABLE) {
            faults.push(format!("{path}: {VARIABLE} is read in {HOME}.rs alone"));
        }
        let code = code_only(&file.text);
        if path == STEPS {
            // Without it the compiler would keep the hook and every call.
            if code.matches("if cfg!(debug_assertions)").count() != 2 {
                faults.push(format!(
                    "{path}: passing a step costs a release build nothing"
                ));
            }
            continue;
        }
        for setter in ["on_step(", "limit_patience("] {
            if code.contains(setter) {
                faults.push(format!("{path}: `{setter})` outside {HOME}.rs"));
            }
        }
        let mut before = "";
        for line in code.lines().map(str::trim) {
            let uses = line.contains("faults::") || line == "mod faults;";
            if path.starts_with("crates/cli/src/") && uses && before != DEBUG_ONLY {
                faults.push(format!("{path}: `faults` without `{DEBUG_ONLY}` before it"));
            }
            before = line;
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(path: &str, text: &str, expected: &[&str]) {
        let text = Text {
            path: path.to_owned(),
            text: text.to_owned(),
        };
        assert_eq!(faults(&[text]), expected, "{path}");
    }

    #[test]
    fn nothing_that_breaks_the_program_is_in_a_release_build() {
        let main = "crates/cli/src/main.rs";
        check(main, "#[cfg(debug_assertions)]\nmod faults;\n", &[]);
        let missing =
            "crates/cli/src/main.rs: `faults` without `#[cfg(debug_assertions)]` before it";
        check(main, "mod faults;\n", &[missing]);
        check(
            main,
            "mod args;\n    crate::faults::install();\n",
            &[missing],
        );
        check(main, "// faults::install()\n", &[]);
        check(
            "crates/engine/src/lib.rs",
            "on_step(act); env(\"HIGHWATER_FAULT\");",
            &[
                "crates/engine/src/lib.rs: HIGHWATER_FAULT is read in crates/cli/src/faults.rs alone",
                "crates/engine/src/lib.rs: `on_step()` outside crates/cli/src/faults.rs",
            ],
        );
        check(
            STEPS,
            "pub fn pass(step: Step) {}",
            &["crates/model/src/step.rs: passing a step costs a release build nothing"],
        );
        check("crates/cli/tests/lab/x.rs", "env(\"HIGHWATER_FAULT\")", &[]);
    }
}
