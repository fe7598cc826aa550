//! Rules about texts of any kind: what must not stand in them, what must.

use crate::repository::Text;

/// Where somebody's machine shows through. In two pieces, so that this file
/// does not find itself.
const PLACES: [(&str, &str); 9] = [
    ("/wo", "rk/"),
    ("/ro", "ot/"),
    ("/home", "/"),
    ("deb.deb", "ian.org"),
    ("archive.ub", "untu.com"),
    ("index.crat", "es.io"),
    ("static.crat", "es.io"),
    ("pypi", ".org"),
    ("files.pythonh", "osted.org"),
];

/// The only source of dependencies, as Cargo writes it.
const REGISTRY: &str = "source = \"registry+https://github.com/rust-lang/crates.io-index\"";

/// Returns the faults of all texts.
pub(super) fn faults(texts: &[Text]) -> Vec<String> {
    let mut faults = Vec::new();
    for file in texts {
        faults.extend(places(file));
        faults.extend(not_ascii(file));
        faults.extend(foreign_sources(file));
    }
    faults.extend(unlisted_adrs(texts));
    faults
}

fn places(file: &Text) -> Vec<String> {
    let mut faults = Vec::new();
    for (number, line) in file.text.lines().enumerate() {
        for (start, end) in PLACES {
            let place = [start, end].concat();
            if line.contains(&place) {
                let at = number + 1;
                faults.push(format!(
                    "{}:{at}: a place of one machine: {place}",
                    file.path
                ));
            }
        }
    }
    faults
}

/// Rust has a rule of its own, which knows comments from code.
fn not_ascii(file: &Text) -> Option<String> {
    let is_code = ["toml", "sh", "c", "py"]
        .iter()
        .any(|extension| file.has_extension(extension));
    let line = file.text.lines().position(|line| !line.is_ascii())?;
    is_code.then(|| format!("{}:{}: code is plain ASCII", file.path, line + 1))
}

fn foreign_sources(file: &Text) -> Vec<String> {
    if !file.path.ends_with("Cargo.lock") {
        return Vec::new();
    }
    file.text
        .lines()
        .filter(|line| line.starts_with("source = ") && *line != REGISTRY)
        .map(|line| format!("{}: not from the public registry: {line}", file.path))
        .collect()
}

fn unlisted_adrs(texts: &[Text]) -> Vec<String> {
    let list = texts
        .iter()
        .find(|text| text.path == "docs/adr/README.md")
        .map_or("", |text| text.text.as_str());
    texts
        .iter()
        .filter_map(|text| text.path.strip_prefix("docs/adr/"))
        .filter(|name| *name != "README.md" && !list.contains(&format!("({name})")))
        .map(|name| format!("docs/adr/{name}: not linked from docs/adr/README.md"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(files: &[(&str, &str)], expected: &[&str]) {
        let texts: Vec<Text> = files
            .iter()
            .map(|(path, text)| Text {
                path: (*path).to_owned(),
                text: (*text).to_owned(),
            })
            .collect();
        assert_eq!(faults(&texts), expected);
    }

    #[test]
    fn a_place_of_one_machine_is_found() {
        let text = ["ok\nsee /ro", "ot/x\n"].concat();
        let fault = ["a.md:2: a place of one machine: /ro", "ot/"].concat();
        check(&[("a.md", &text)], &[&fault]);
    }

    #[test]
    fn scripts_are_ascii_and_prose_need_not_be() {
        check(&[("a.md", "\u{2192}")], &[]);
        check(&[("a.sh", "x\n\u{2192}")], &["a.sh:2: code is plain ASCII"]);
    }

    #[test]
    fn a_dependency_from_elsewhere_is_found() {
        let lock = format!("{REGISTRY}\nsource = \"git+https://example.org/x\"\n");
        let fault =
            "Cargo.lock: not from the public registry: source = \"git+https://example.org/x\"";
        check(&[("Cargo.lock", &lock)], &[fault]);
    }

    #[test]
    fn every_adr_is_listed() {
        let list = ("docs/adr/README.md", "[one](0001-one.md)");
        check(&[list, ("docs/adr/0001-one.md", "")], &[]);
        let fault = "docs/adr/0002-two.md: not linked from docs/adr/README.md";
        check(&[list, ("docs/adr/0002-two.md", "")], &[fault]);
    }
}
