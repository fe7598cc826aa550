//! Leaves out what must not be kept with a restore point: passwords and keys in
//! a command line, and in the address of a disk on another host.
//!
//! What stands in their place is always the same, so that a disk is the same disk
//! whether its password was changed or not.

use serde_json::Value;

const MASK: &str = "***";

/// What options are called whose value is a secret. The `-secret` ones name an
/// object, which is none.
const SECRETS: [&str; 7] = [
    "password", "passwd", "pass", "secret", "key", "token", "cookie",
];

/// Masks one argument of a command line, or one file name as QEMU spells it.
pub(super) fn masked(text: &str) -> String {
    if let Some(json) = masked_json(text) {
        return json;
    }
    let pieces = pieces(text);
    let is_secret_object = pieces.iter().any(|piece| {
        let kind = piece.strip_prefix("qom-type=").unwrap_or(piece);
        kind == "secret" || kind == "secret_keyring"
    });
    let pieces = pieces.iter().map(|piece| {
        if let Some((key, value)) = piece.split_once('=') {
            if let Some(json) = masked_json(&value.replace(",,", ",")) {
                return format!("{key}={}", json.replace(',', ",,"));
            }
            if is_secret_object && key == "data" {
                return format!("{key}={MASK}");
            }
        }
        if piece.contains("rbd:") {
            let parts = split_at(piece, ':', Some('\\'));
            let parts: Vec<String> = parts.into_iter().map(masked_pair).collect();
            return parts.join(":");
        }
        masked_login(&masked_pair(piece))
    });
    pieces.collect::<Vec<_>>().join(",")
}

/// Splits options at their commas; a doubled one belongs to a value.
fn pieces(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = text;
    let mut from = 0_usize;
    while let Some(at) = rest
        .get(from..)
        .and_then(|it| it.find(','))
        .map(|it| it.saturating_add(from))
    {
        let next = at.saturating_add(1);
        if rest.as_bytes().get(next) == Some(&b',') {
            from = next.saturating_add(1);
            continue;
        }
        found.push(rest.get(..at).unwrap_or_default());
        rest = rest.get(next..).unwrap_or_default();
        from = 0;
    }
    found.push(rest);
    found
}

fn split_at(text: &str, separator: char, escape: Option<char>) -> Vec<&str> {
    let mut is_escaped = false;
    text.split(move |letter: char| {
        let ends = letter == separator && !is_escaped;
        is_escaped = !is_escaped && Some(letter) == escape;
        ends
    })
    .collect()
}

/// Masks the value of `key=value` if that is secret.
fn masked_pair(piece: &str) -> String {
    match piece.split_once('=') {
        Some((key, value)) if is_secret(key) && !is_switch(value) => format!("{key}={MASK}"),
        _ => piece.to_owned(),
    }
}

fn is_secret(key: &str) -> bool {
    let last = key.rsplit('.').next().unwrap_or(key);
    SECRETS.contains(&last)
}

/// `-vnc :1,password=on` asks for one, and tells none.
fn is_switch(value: &str) -> bool {
    matches!(value, "on" | "off" | "yes" | "no" | "true" | "false" | "")
}

/// Masks the password in `scheme://user:password@host`.
fn masked_login(text: &str) -> String {
    let Some((before, after)) = text.split_once("://") else {
        return text.to_owned();
    };
    let end = after.find(['/', '?']).unwrap_or(after.len());
    let (authority, rest) = after.split_at_checked(end).unwrap_or((after, ""));
    let login = authority.rsplit_once('@');
    match login.and_then(|(login, host)| Some((login.split_once(':')?.0, host))) {
        Some((user, host)) => format!("{before}://{user}:{MASK}@{host}{rest}"),
        None => text.to_owned(),
    }
}

/// Masks `{...}` and `json:{...}`; `None` if it is neither.
fn masked_json(text: &str) -> Option<String> {
    let (prefix, json) = match text.strip_prefix("json:") {
        Some(json) => ("json:", json),
        None => ("", text),
    };
    if !json.starts_with('{') {
        return None;
    }
    let Ok(mut value) = serde_json::from_str::<Value>(json) else {
        // QEMU understands it, perhaps; nobody here knows what is in it.
        return Some(format!("{prefix}{{{MASK}}}"));
    };
    // As it was written, unless something has to go.
    Some(if mask(&mut value) {
        format!("{prefix}{value}")
    } else {
        text.to_owned()
    })
}

fn mask(value: &mut Value) -> bool {
    let mut is_masked = false;
    match value {
        Value::Array(values) => {
            for value in values {
                is_masked |= mask(value);
            }
        }
        Value::Object(fields) => {
            let kind = fields.get("qom-type").and_then(Value::as_str);
            let is_secret_object = kind.is_some_and(|kind| kind.starts_with("secret"));
            for (key, value) in fields {
                let is_it = is_secret(key) || (is_secret_object && key == "data");
                match value {
                    Value::String(text) => {
                        let new = if is_it && !is_switch(text) {
                            MASK.to_owned()
                        } else {
                            masked_login(text)
                        };
                        is_masked |= new != *text;
                        *text = new;
                    }
                    other => is_masked |= mask(other),
                }
            }
        }
        _ => {}
    }
    is_masked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_password_and_no_key_is_kept() {
        for (given, kept) in [
            ("secret,id=s,data=aGk=", "secret,id=s,data=***"),
            (
                "secret,id=s,data=a,,b,format=raw",
                "secret,id=s,data=***,format=raw",
            ),
            (
                "qom-type=secret,data=x,id=s",
                "qom-type=secret,data=***,id=s",
            ),
            ("port=5900,password=hunter2", "port=5900,password=***"),
            (
                "file=rbd:pool/i:id=admin:key=AQ==:mon_host=a\\:1,if=virtio",
                "file=rbd:pool/i:id=admin:key=***:mon_host=a\\:1,if=virtio",
            ),
            ("rbd:pool/i:key=AQ==", "rbd:pool/i:key=***"),
            (
                "file=ssh://me:pa:s@kvm/a.img",
                "file=ssh://me:***@kvm/a.img",
            ),
            ("https://me:p@s@kvm/a?b=c", "https://me:***@kvm/a?b=c"),
            ("driver=https,cookie=x", "driver=https,cookie=***"),
            (
                r#"{"qom-type":"secret","id":"s","data":"x"}"#,
                r#"{"data":"***","id":"s","qom-type":"secret"}"#,
            ),
            (
                r#"file=json:{"driver":"https",,"password":"x"},if=none"#,
                r#"file=json:{"driver":"https",,"password":"***"},if=none"#,
            ),
            (
                r#"json:{"file":{"url":"https://u:p@h/x","driver":"https"}}"#,
                r#"json:{"file":{"driver":"https","url":"https://u:***@h/x"}}"#,
            ),
            (r#"json:{"password":"x""#, "json:{***}"),
        ] {
            assert_eq!(masked(given), kept);
            assert_eq!(masked(kept), kept);
        }
    }

    #[test]
    fn what_is_no_secret_is_kept_as_it_was_written() {
        for given in [
            "",
            "-object",
            "node-name=a,key-secret=s,password-secret=t",
            ":1,password=on",
            "file=/vm/a,,b.img,if=virtio",
            "data-file=/x,data=file1:file2",
            "nbd://127.0.0.1:10809/x",
            "iscsi://me@host/iqn.2024:x/1",
            r#"{"node-name":"a","driver":"file","filename":"/x"}"#,
            "{",
        ] {
            let kept = if given == "{" { "{***}" } else { given };
            assert_eq!(masked(given), kept);
        }
    }
}
