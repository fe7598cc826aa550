//! Rules about one Rust file at a time.

use crate::repository::Text;

const LINES_MAX: usize = 800;

/// Returns the faults of all Rust files.
pub(super) fn faults(texts: &[Text]) -> Vec<String> {
    let mut faults = Vec::new();
    for file in texts.iter().filter(|text| text.is_rust()) {
        let path = &file.path;
        let lines = file.text.lines().count();
        if lines > LINES_MAX {
            faults.push(format!("{path}: {lines} lines; {LINES_MAX} are refused"));
        }
        if !file.text.starts_with("//! ") {
            faults.push(format!("{path}: its first line must say `//! ` what it is"));
        }
        let code = code_only(&file.text);
        if !is_test_file(path) && has_word_sequence(&without_tests(&code), "use super::*") {
            faults.push(format!("{path}: `use super::*` outside tests"));
        }
        if !is_test_file(path) && !without_tests(&blank(&file.text, Blank::Comments)).is_ascii() {
            faults.push(format!("{path}: code is plain ASCII; comments need not be"));
        }
        if !is_sys(path) && has_word(&code, "unsafe") {
            faults.push(format!("{path}: unsafe outside a module named `sys`"));
        }
    }
    faults
}

/// Says whether a whole file is test code.
pub(super) fn is_test_file(path: &str) -> bool {
    path.contains("/tests/") || path.ends_with("/tests.rs")
}

fn is_sys(path: &str) -> bool {
    path.ends_with("/sys.rs") || path.contains("/sys/")
}

fn has_word(code: &str, word: &str) -> bool {
    code.split(|letter: char| !letter.is_alphanumeric() && letter != '_')
        .any(|found| found == word)
}

fn has_word_sequence(code: &str, sequence: &str) -> bool {
    code.lines().any(|line| {
        line.split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
            .contains(sequence)
    })
}

/// Blanks comments, strings and character literals; lines stay where they are.
pub(super) fn code_only(source: &str) -> String {
    blank(source, Blank::CommentsAndLiterals)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blank {
    Comments,
    CommentsAndLiterals,
}

fn blank(source: &str, what: Blank) -> String {
    let bytes = source.as_bytes();
    let mut code = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = end_of_non_code(bytes, at);
        if end == at {
            at += 1;
            continue;
        }
        if what == Blank::Comments && bytes[at] != b'/' {
            at = end;
            continue;
        }
        for byte in &mut code[at..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end;
    }
    String::from_utf8_lossy(&code).into_owned()
}

/// Returns where the comment or literal that begins at `at` ends, or `at`.
fn end_of_non_code(bytes: &[u8], at: usize) -> usize {
    let rest = &bytes[at..];
    if rest.starts_with(b"//") {
        return at
            + rest
                .iter()
                .position(|byte| *byte == b'\n')
                .unwrap_or(rest.len());
    }
    if rest.starts_with(b"/*") {
        return at + end_of_block_comment(rest);
    }
    if rest.starts_with(b"\"") {
        return at + end_of_string(rest);
    }
    let after_word = at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_');
    if rest.starts_with(b"r") && !after_word {
        let hashes = rest[1..].iter().take_while(|byte| **byte == b'#').count();
        if rest.get(1 + hashes) == Some(&b'"') {
            return at + end_of_raw_string(rest, hashes);
        }
    }
    if rest.starts_with(b"'") {
        return at + end_of_char(rest);
    }
    at
}

fn end_of_block_comment(rest: &[u8]) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while at < rest.len() {
        if rest[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if rest[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    rest.len()
}

fn end_of_string(rest: &[u8]) -> usize {
    let mut at = 1;
    while at < rest.len() {
        match rest[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

fn end_of_raw_string(rest: &[u8], hashes: usize) -> usize {
    let close: Vec<u8> = std::iter::once(b'"')
        .chain(std::iter::repeat_n(b'#', hashes))
        .collect();
    let from = 2 + hashes;
    rest[from..]
        .windows(close.len())
        .position(|window| window == close)
        .map_or(rest.len(), |found| from + found + close.len())
}

/// A lifetime is not a character literal and ends at once.
fn end_of_char(rest: &[u8]) -> usize {
    if rest.get(1) == Some(&b'\\') {
        let close = rest.iter().skip(3).position(|byte| *byte == b'\'');
        return close.map_or(rest.len(), |found| found + 4);
    }
    let close = rest.iter().take(6).skip(2).position(|byte| *byte == b'\'');
    match close {
        // Up to four bytes make one character; `'a, 'b` is two lifetimes.
        Some(found) if found == 0 || !rest[1].is_ascii() => found + 3,
        _ => 0,
    }
}

/// Blanks the items under `#[cfg(test)]` in what [`code_only`] returns.
pub(super) fn without_tests(code: &str) -> String {
    let mut kept = String::new();
    let mut rest = code;
    while let Some(found) = rest.find("#[cfg(test)]") {
        kept.push_str(&rest[..found]);
        rest = &rest[found..];
        rest = &rest[end_of_item(rest)..];
    }
    kept.push_str(rest);
    kept
}

/// Returns where an item ends: behind its block, or at its semicolon.
fn end_of_item(code: &str) -> usize {
    let mut depth = 0_usize;
    for (at, letter) in code.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' if depth <= 1 => return at + 1,
            '}' => depth -= 1,
            ';' if depth == 0 => return at + 1,
            _ => {}
        }
    }
    code.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(path: &str, source: &str, expected: &[&str]) {
        let text = Text {
            path: path.to_owned(),
            text: source.to_owned(),
        };
        assert_eq!(faults(&[text]), expected);
    }

    #[test]
    fn a_file_says_first_what_it_is_and_ends_before_line_800() {
        check("a.rs", "//! What it is.\n", &[]);
        check(
            "a.rs",
            "use std::fs;\n",
            &["a.rs: its first line must say `//! ` what it is"],
        );
        let long = format!("//! Long.\n{}", "\n".repeat(800));
        check("a.rs", &long, &["a.rs: 801 lines; 800 are refused"]);
    }

    #[test]
    fn use_super_star_is_for_tests() {
        let test = "//! A.\n#[cfg(test)]\nmod tests {\n    use super::*;\n}\n";
        check("a.rs", test, &[]);
        check(
            "crates/a/tests/b.rs",
            "//! A.\nmod b { use super::*; }\n",
            &[],
        );
        let after = format!("{test}mod c {{\n    pub(crate) use super::*;\n}}\n");
        check("a.rs", &after, &["a.rs: `use super::*` outside tests"]);
        check(
            "a.rs",
            "//! A.\n// use super::*\nconst A: &str = \"use super::*\";\n",
            &[],
        );
    }

    #[test]
    fn unsafe_is_for_sys() {
        let source = "//! A.\nfn a() { unsafe { b() } }\n";
        check("src/sys.rs", source, &[]);
        check(
            "src/a.rs",
            source,
            &["src/a.rs: unsafe outside a module named `sys`"],
        );
        check(
            "src/a.rs",
            "//! A.\n#![forbid(unsafe_code)]\n// unsafe\n",
            &[],
        );
    }

    #[test]
    fn code_and_literals_are_ascii_where_people_run_them() {
        let fault = ["a.rs: code is plain ASCII; comments need not be"];
        check("a.rs", "//! A.\nconst A: &str = \"\u{e9}\";\n", &fault);
        check("a.rs", "//! A.\n// \u{2192}\n/* \u{2192} */\n", &[]);
        check(
            "a.rs",
            "//! A.\n#[cfg(test)]\nmod t { const A: &str = \"\u{e9}\"; }\n",
            &[],
        );
    }

    #[test]
    fn literals_and_comments_are_no_code() {
        let source = r##"a("x\"{", '{', '\'', r#"{"#, b'{', '\u{7b}'); /* { /* } */ { */ fn f<'a>(x: &'a str) {}"##;
        let code = code_only(source);
        assert_eq!(code.len(), source.len());
        assert_eq!(code.matches('{').count(), 1, "{code}");
        assert!(code.contains("fn f<'a>(x: &'a str) {}"), "{code}");
    }
}
