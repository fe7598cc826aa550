//! An XML text from outside, parsed within limits.
//!
//! Length, depth, attributes and namespaces are checked before the parser sees
//! the text, because its stack, memory and time grow with them; document types
//! (and so entities) are refused by the parser itself.

use roxmltree::{Document, Node};

/// A domain with a few hundred devices has about 300 KiB; libvirt's protocol
/// carries no longer text (`REMOTE_STRING_MAX`).
const XML_BYTES_MAX: usize = 4 << 20;

/// No real chain of backing files is longer.
pub(crate) const CHAIN_MAX: usize = 200;

/// Each backing file is one level deeper than the one above it, and the parser
/// calls itself for every level, so this is what the stack has to hold.
const DEPTH_MAX: usize = CHAIN_MAX + 56;

/// The parser compares each attribute of an element with all others of it, so a
/// million of them would take it a day. libvirt writes about a dozen.
const ATTRIBUTES_MAX: usize = 256;

/// The parser copies the namespaces of an element to the elements in it. A
/// definition has libvirt's own and those of a few tools that keep notes in it.
const NAMESPACES_MAX: usize = 64;

/// Far more than any machine has slots for; each is asked about on its own.
pub(crate) const DISKS_MAX: usize = 4096;

/// Why a text is not the XML it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum XmlError {
    #[error("it has {0} bytes, more than any sensible one")]
    TooLong(usize),
    #[error("its elements are nested deeper than {DEPTH_MAX} levels")]
    TooDeep,
    #[error("an element of it has more than {ATTRIBUTES_MAX} attributes")]
    TooManyAttributes,
    #[error("it has more than {NAMESPACES_MAX} namespaces")]
    TooManyNamespaces,
    #[error("it has more than {DISKS_MAX} disks")]
    TooManyDisks,
    #[error("it has a disk called {0:?}, which is no name of a disk")]
    BadTarget(String),
    #[error("it has two disks called `{0}`")]
    SameTarget(String),
    #[error("{0}")]
    Malformed(String),
    #[error("its outermost element is not <{0}>")]
    WrongRoot(&'static str),
}

/// Parses a text with limits and checks its outermost element.
pub(crate) fn document<'text>(
    text: &'text str,
    root: &'static str,
) -> Result<Document<'text>, XmlError> {
    if text.len() > XML_BYTES_MAX {
        return Err(XmlError::TooLong(text.len()));
    }
    check_shape(text)?;
    if text.matches("xmlns").nth(NAMESPACES_MAX).is_some() {
        return Err(XmlError::TooManyNamespaces);
    }
    let document = Document::parse(text).map_err(|error| XmlError::Malformed(error.to_string()))?;
    if document.root_element().has_tag_name(root) {
        Ok(document)
    } else {
        Err(XmlError::WrongRoot(root))
    }
}

/// Refuses what the parser would need too much stack or time for. Where the
/// text is malformed the parser stops too, so what follows is of no matter.
fn check_shape(text: &str) -> Result<(), XmlError> {
    let mut depth = 0_usize;
    let mut rest = text;
    while let Some((_, markup)) = rest.split_once('<') {
        let skipped = [("!--", "-->"), ("![CDATA[", "]]>"), ("?", "?>"), ("/", ">")]
            .into_iter()
            .find_map(|(begin, end)| Some((begin, markup.strip_prefix(begin)?.split_once(end)?.1)));
        if let Some((begin, after)) = skipped {
            if begin == "/" {
                depth = depth.saturating_sub(1);
            }
            rest = after;
            continue;
        }
        let Some((tag, after)) = split_tag(markup) else {
            // The parser reads on to the end of the text.
            return check_attributes(markup);
        };
        check_attributes(tag)?;
        if !tag.ends_with('/') {
            depth = depth.saturating_add(1);
        }
        if depth > DEPTH_MAX {
            return Err(XmlError::TooDeep);
        }
        rest = after;
    }
    Ok(())
}

/// Each attribute has an equals sign outside of its value.
fn check_attributes(tag: &str) -> Result<(), XmlError> {
    let mut quote = None;
    let mut attributes = 0_usize;
    for letter in tag.chars() {
        match quote {
            Some(open) if letter == open => quote = None,
            Some(_) => {}
            None if matches!(letter, '"' | '\'') => quote = Some(letter),
            None => attributes = attributes.saturating_add(usize::from(letter == '=')),
        }
        if attributes > ATTRIBUTES_MAX {
            return Err(XmlError::TooManyAttributes);
        }
    }
    Ok(())
}

/// Splits behind the `>` that ends a tag; one in a quoted value does not.
fn split_tag(markup: &str) -> Option<(&str, &str)> {
    let mut quote = None;
    let end = markup.find(|letter: char| {
        if let Some(open) = quote {
            if letter == open {
                quote = None;
            }
            return false;
        }
        if matches!(letter, '"' | '\'') {
            quote = Some(letter);
        }
        letter == '>'
    })?;
    let (tag, after) = markup.split_at_checked(end)?;
    Some((tag, after.strip_prefix('>')?))
}

/// Returns the first child element of that name.
pub(crate) fn child<'a, 'input>(node: Node<'a, 'input>, name: &str) -> Option<Node<'a, 'input>> {
    node.children().find(|child| child.has_tag_name(name))
}

/// Returns the text of the first child element of that name.
pub(crate) fn child_text<'a>(node: Node<'a, '_>, name: &str) -> Option<&'a str> {
    child(node, name)
        .and_then(|found| found.text())
        .map(str::trim)
        .filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    /// Refuses or reads a text; neither may take long.
    fn quick(text: &str) -> Result<(), XmlError> {
        let begin = Instant::now();
        let outcome = document(text, "domain").map(drop);
        let took = begin.elapsed();
        assert!(took < Duration::from_secs(10), "it took {took:?}");
        outcome
    }

    #[test]
    fn what_is_no_domain_is_refused() {
        assert_eq!(quick("<network/>"), Err(XmlError::WrongRoot("domain")));
        assert!(matches!(quick("<domain>"), Err(XmlError::Malformed(_))));
        let long = format!("<domain>{}</domain>", " ".repeat(XML_BYTES_MAX));
        assert!(matches!(quick(&long), Err(XmlError::TooLong(_))));
    }

    #[test]
    fn entities_are_refused_whatever_they_expand_to() {
        let lol = |level: usize| {
            format!(
                "<!ENTITY l{} '{}'>",
                level + 1,
                format!("&l{level};").repeat(10)
            )
        };
        let levels: String = (0..9).map(lol).collect();
        let text = format!("<!DOCTYPE d [<!ENTITY l0 'lol'>{levels}]><domain>&l9;</domain>");
        assert!(matches!(quick(&text), Err(XmlError::Malformed(_))));
        let file = "<!DOCTYPE d [<!ENTITY f SYSTEM 'file:///etc/shadow'>]><domain>&f;</domain>";
        assert!(matches!(quick(file), Err(XmlError::Malformed(_))));
        assert!(matches!(
            quick("<domain>&undefined;</domain>"),
            Err(XmlError::Malformed(_))
        ));
    }

    #[test]
    fn a_text_nested_without_end_does_not_end_the_process() {
        for (open, close) in [
            ("<a>", "</a>"),
            ("<a><!-- </a> -->", "</a>"),
            ("<a b='/>'>", "</a>"),
            ("<a b=\"'/>\">", "</a>"),
            ("<a><![CDATA[</a>]]>", "</a>"),
            ("<a><?x </a> ?>", "</a>"),
            ("<a>", ""),
        ] {
            let deep = format!(
                "<domain>{}{}</domain>",
                open.repeat(100_000),
                close.repeat(100_000)
            );
            assert_eq!(quick(&deep), Err(XmlError::TooDeep), "{open}");
        }
    }

    #[test]
    fn a_million_attributes_do_not_keep_the_parser_busy() {
        let attributes = |count: usize| {
            (0..count)
                .map(|n| format!(" a{n}=''"))
                .collect::<Vec<_>>()
                .concat()
        };
        for (begin, end) in [
            ("<domain", "/>"),
            ("<domain><a", "/></domain>"),
            ("<domain", ""),
        ] {
            let text = |count| format!("{begin}{}{end}", attributes(count));
            assert_eq!(
                quick(&text(100_000)),
                Err(XmlError::TooManyAttributes),
                "{begin}"
            );
            let few = quick(&text(ATTRIBUTES_MAX));
            assert_eq!(few.is_ok(), !end.is_empty(), "{begin}");
        }
    }

    #[test]
    fn namespaces_are_not_copied_into_a_million_elements() {
        let names = |count: usize| {
            let all = (0..count).map(|n| format!(" xmlns:a{n}='u{n}'"));
            all.collect::<Vec<_>>().concat()
        };
        let inner = "<a xmlns:b=''/>".repeat(200_000);
        let text = format!("<domain{}>{inner}</domain>", names(200));
        assert_eq!(quick(&text), Err(XmlError::TooManyNamespaces));
        assert_eq!(quick(&format!("<domain{}/>", names(20))), Ok(()));
    }

    #[test]
    fn as_many_small_elements_as_fit_are_read_quickly() {
        let text = format!(
            "<domain>{}</domain>",
            "<a/>".repeat(XML_BYTES_MAX / 4 - 100)
        );
        assert_eq!(quick(&text), Ok(()));
    }
}
