//! Modules of a crate must not use each other in a circle.
//!
//! The graph is of top-level modules, drawn from `crate::module` and from names
//! that the crate's root re-exports; tests do not count.

use std::collections::{BTreeMap, BTreeSet};

use super::source::{code_only, is_test_file, without_tests};
use crate::repository::Text;

type Graph = BTreeMap<String, BTreeSet<String>>;

/// Returns one fault for each circle found in a crate.
pub(super) fn faults(texts: &[Text]) -> Vec<String> {
    let mut crates: BTreeMap<&str, Vec<(&str, String)>> = BTreeMap::new();
    for file in texts.iter().filter(|text| text.is_rust()) {
        let Some((name, inside)) = file.path.split_once("/src/") else {
            continue;
        };
        if !is_test_file(&file.path) {
            let code = without_tests(&code_only(&file.text));
            crates.entry(name).or_default().push((inside, code));
        }
    }
    let mut faults = Vec::new();
    for (name, files) in crates {
        if let Some(circle) = circle(&graph(&files)) {
            faults.push(format!(
                "{name}: modules in a circle: {}",
                circle.join(" -> ")
            ));
        }
    }
    faults
}

fn module_of(inside: &str) -> &str {
    let first = inside.split('/').next().unwrap_or(inside);
    first.strip_suffix(".rs").unwrap_or(first)
}

fn is_root(module: &str) -> bool {
    matches!(module, "lib" | "main" | "bin")
}

fn graph(files: &[(&str, String)]) -> Graph {
    let modules: BTreeSet<&str> = files
        .iter()
        .map(|(inside, _)| module_of(inside))
        .filter(|module| !is_root(module))
        .collect();
    let exports = exports(files, &modules);
    let mut graph = Graph::new();
    for (inside, code) in files {
        let from = module_of(inside);
        if is_root(from) {
            // The root holds all together; it uses everything by its nature.
            continue;
        }
        let used = graph.entry(from.to_owned()).or_default();
        for name in names_behind(code, "crate::") {
            let module = modules
                .get(name.as_str())
                .copied()
                .or_else(|| exports.get(&name).map(String::as_str));
            if let Some(module) = module.filter(|module| *module != from) {
                used.insert(module.to_owned());
            }
        }
    }
    graph
}

/// Returns which module each name that the root re-exports comes from.
fn exports(files: &[(&str, String)], modules: &BTreeSet<&str>) -> BTreeMap<String, String> {
    let mut exports = BTreeMap::new();
    for (inside, code) in files
        .iter()
        .filter(|(inside, _)| is_root(module_of(inside)))
    {
        debug_assert!(!inside.is_empty());
        for module in modules {
            for name in names_behind(code, &format!("use {module}::")) {
                exports.insert(name, (*module).to_owned());
            }
        }
    }
    exports
}

/// Returns the first name of each path behind a prefix: `a` and `b` for
/// `crate::{a::x, b}`.
fn names_behind(code: &str, prefix: &str) -> Vec<String> {
    let mut names = Vec::new();
    for (at, _) in code.match_indices(prefix) {
        let rest = &code[at + prefix.len()..];
        match rest.strip_prefix('{') {
            Some(group) => names.extend(first_names(group)),
            None => names.extend(first_word(rest)),
        }
    }
    names
}

fn first_names(group: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut depth = 0_usize;
    let mut expects_name = true;
    for (at, letter) in group.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => expects_name = true,
            letter if expects_name && !letter.is_whitespace() => {
                names.extend(first_word(&group[at..]));
                expects_name = false;
            }
            _ => {}
        }
    }
    names
}

fn first_word(text: &str) -> Option<String> {
    let end = text.find(|letter: char| !letter.is_alphanumeric() && letter != '_');
    let word = &text[..end.unwrap_or(text.len())];
    (!word.is_empty()).then(|| word.to_owned())
}

/// Returns the modules of one circle, the first once more at the end.
fn circle(graph: &Graph) -> Option<Vec<String>> {
    let mut done = BTreeSet::new();
    for start in graph.keys() {
        if let Some(found) = walk(graph, start, &mut Vec::new(), &mut done) {
            return Some(found);
        }
    }
    None
}

fn walk(
    graph: &Graph,
    module: &str,
    way: &mut Vec<String>,
    done: &mut BTreeSet<String>,
) -> Option<Vec<String>> {
    if let Some(seen) = way.iter().position(|earlier| earlier == module) {
        let mut circle = way[seen..].to_vec();
        circle.push(module.to_owned());
        return Some(circle);
    }
    if done.contains(module) {
        return None;
    }
    way.push(module.to_owned());
    for next in graph.get(module).into_iter().flatten() {
        if let Some(found) = walk(graph, next, way, done) {
            return Some(found);
        }
    }
    way.pop();
    done.insert(module.to_owned());
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(files: &[(&str, &str)], expected: &[&str]) {
        let texts: Vec<Text> = files
            .iter()
            .map(|(path, text)| Text {
                path: format!("crates/a/src/{path}"),
                text: (*text).to_owned(),
            })
            .collect();
        assert_eq!(faults(&texts), expected);
    }

    #[test]
    fn a_circle_is_found_through_modules_groups_and_re_exports() {
        let lib = "mod one; mod two; pub use two::{Deep, Wide};";
        check(
            &[
                ("lib.rs", lib),
                ("one.rs", "use crate::two::X;"),
                ("two.rs", ""),
            ],
            &[],
        );
        let circle = ["crates/a: modules in a circle: one -> two -> one"];
        let one = ("one.rs", "use crate::{Deep as D, three};");
        let deep = ("two/deep.rs", "fn f() { crate::one::g() }");
        check(&[("lib.rs", lib), one, deep], &circle);
    }

    #[test]
    fn tests_comments_and_parents_make_no_circle() {
        let one = (
            "one.rs",
            "// crate::two\n#[cfg(test)] mod tests { use crate::two::X; }",
        );
        let two = ("two.rs", "use crate::one::Y; use crate::two::Z;");
        check(&[one, two, ("two/tests.rs", "use crate::one::Y;")], &[]);
    }
}
