//! Messages of the QEMU monitor protocol: where one ends, and what it says.
//!
//! A monitor may be set to write its messages over several lines (`pretty=on`),
//! so a message ends where its outermost brace closes and not where its line
//! does. What the other side sends is doubted: a message is refused as soon as
//! it is too long, before there is room for it.

use serde_json::Value;

use super::error::QmpError;

/// No message is longer, bytes. All nodes of a VM with 30 disks take 150 KB.
pub(super) const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// What is kept of a text in an event, bytes.
const TEXT_BYTES_MAX: usize = 512;

/// Cuts a stream of bytes into messages.
#[derive(Debug, Default)]
pub(super) struct Splitter {
    message: Vec<u8>,
    depth: usize,
    in_string: bool,
    is_escaped: bool,
}

impl Splitter {
    /// Takes bytes as they came, and returns the messages that they complete.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, QmpError> {
        let mut whole = Vec::new();
        for byte in bytes {
            // In no text at all: an agent's answer follows, and what came before
            // was for somebody else.
            if *byte == 0xff {
                *self = Self::default();
                whole.clear();
                continue;
            }
            if self.depth == 0 {
                match byte {
                    b'{' => {}
                    // Between two messages.
                    b' ' | b'\t' | b'\r' | b'\n' => continue,
                    _ => return Err(QmpError::Malformed("it is no object".to_owned())),
                }
            }
            if self.message.len() >= MESSAGE_BYTES_MAX {
                return Err(QmpError::Malformed(format!(
                    "it is longer than {MESSAGE_BYTES_MAX} bytes"
                )));
            }
            self.message.push(*byte);
            self.follow(*byte);
            if self.depth == 0 {
                whole.push(std::mem::take(&mut self.message));
            }
        }
        Ok(whole)
    }

    fn follow(&mut self, byte: u8) {
        if self.in_string {
            match byte {
                _ if self.is_escaped => self.is_escaped = false,
                b'\\' => self.is_escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth = self.depth.saturating_add(1),
            b'}' | b']' => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
    }
}

/// What a message is.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Message {
    /// The first one of a connection.
    Greeting,
    /// The answer to the command with this number.
    Answer(u64, Result<Value, QmpError>),
    /// Something happened.
    Event(Event),
    /// Nothing that is of use.
    Other,
}

/// Something that happened at the VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    /// QEMU's name for it (`BLOCK_IO_ERROR`).
    pub(crate) name: String,
    /// The node, job, export or device that it is about, as far as it says:
    /// each is a name of its own kind.
    pub(crate) node: Option<String>,
    pub(crate) id: Option<String>,
    /// What went wrong, or why it happened.
    pub(crate) reason: Option<String>,
    /// `BLOCK_IO_ERROR`: what was tried, and what QEMU did about it.
    pub(crate) operation: Option<String>,
    pub(crate) action: Option<String>,
}

/// Understands one message.
pub(super) fn message(bytes: &[u8]) -> Result<Message, QmpError> {
    let value: Value =
        serde_json::from_slice(bytes).map_err(|error| QmpError::Malformed(error.to_string()))?;
    let Value::Object(mut fields) = value else {
        return Err(QmpError::Malformed("it is no object".to_owned()));
    };
    if fields.contains_key("QMP") {
        return Ok(Message::Greeting);
    }
    if let Some(Value::String(name)) = fields.get("event") {
        return Ok(Message::Event(event(name, fields.get("data"))));
    }
    // Each of our commands has a number; an answer without is not to one of them.
    let Some(id) = fields.get("id").and_then(Value::as_u64) else {
        return Ok(Message::Other);
    };
    if let Some(answer) = fields.remove("return") {
        return Ok(Message::Answer(id, Ok(answer)));
    }
    let Some(error) = fields.get("error") else {
        let why = "it is neither an answer nor an error".to_owned();
        return Ok(Message::Answer(id, Err(QmpError::Malformed(why))));
    };
    Ok(Message::Answer(id, Err(refusal(error))))
}

/// Understands what a command was refused with.
pub(super) fn refusal(error: &Value) -> QmpError {
    let text = |key: &str| short(error.get(key)).unwrap_or_default();
    QmpError::Refused {
        class: text("class"),
        desc: text("desc"),
    }
}

fn event(name: &str, data: Option<&Value>) -> Event {
    let text = |keys: &[&str]| {
        keys.iter()
            .find_map(|key| short(data?.get(key)))
            .filter(|text| !text.is_empty())
    };
    Event {
        name: cut(name),
        node: text(&["node-name"]),
        id: text(&["id", "device", "path"]),
        reason: text(&["reason", "error", "status"]),
        operation: text(&["operation"]),
        action: text(&["action"]),
    }
}

fn short(value: Option<&Value>) -> Option<String> {
    value?.as_str().map(cut)
}

fn cut(text: &str) -> String {
    let mut end = text.len().min(TEXT_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end = end.saturating_sub(1);
    }
    text.get(..end).unwrap_or_default().to_owned()
}

/// Writes a command.
pub(super) fn command(name: &str, arguments: &Value, id: u64) -> Vec<u8> {
    let mut command = serde_json::json!({"execute": name, "id": id});
    let has_arguments = arguments.as_object().is_some_and(|it| !it.is_empty());
    if let (true, Some(fields)) = (has_arguments, command.as_object_mut()) {
        fields.insert("arguments".to_owned(), arguments.clone());
    }
    let mut text = command.to_string().into_bytes();
    text.push(b'\n');
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn split(bytes: &[u8]) -> Vec<String> {
        let whole = Splitter::default().take(bytes).unwrap();
        whole
            .into_iter()
            .map(|it| String::from_utf8(it).unwrap())
            .collect()
    }

    #[test]
    fn a_message_ends_with_its_brace_wherever_its_lines_do() {
        assert_eq!(
            split(b"{\"a\":1}\r\n{\"b\":\r\n 2\n}\n"),
            ["{\"a\":1}", "{\"b\":\r\n 2\n}"]
        );
        assert_eq!(split(br#"{"a":"}\"}{"}{"b":[{}]}"#).len(), 2);
        assert_eq!(split(br#"{"a":"}"#), [""; 0]);
        assert_eq!(split(b"{\"old\": \"\xff{}"), ["{}"]);
    }

    #[test]
    fn a_message_without_end_is_refused_before_it_is_stored() {
        let mut splitter = Splitter::default();
        splitter.take(b"{\"a\":\"").unwrap();
        let piece = vec![b'x'; 1 << 20];
        let refused = (0..64).find_map(|_| splitter.take(&piece).err());
        assert!(
            matches!(refused, Some(QmpError::Malformed(_))),
            "{refused:?}"
        );
        assert!(splitter.message.capacity() <= 2 * MESSAGE_BYTES_MAX);
        assert!(Splitter::default().take(b"HTTP/1.1 400").is_err());
    }

    #[test]
    fn answers_refusals_and_events_are_told_apart() {
        let of = |text: &str| message(text.as_bytes()).unwrap();
        assert_eq!(of(r#"{"QMP":{"version":{}}}"#), Message::Greeting);
        let answer = of(r#"{"return":{"x":1},"id":7}"#);
        assert_eq!(answer, Message::Answer(7, Ok(serde_json::json!({"x": 1}))));
        let refused = of(r#"{"id":8,"error":{"class":"GenericError","desc":"no"}}"#);
        let why = QmpError::Refused {
            class: "GenericError".to_owned(),
            desc: "no".to_owned(),
        };
        assert_eq!(refused, Message::Answer(8, Err(why)));
        let Message::Event(event) = of(
            r#"{"event":"BLOCK_IO_ERROR","data":{"device":"","node-name":"n","reason":"full",
                "operation":"write","action":"stop"},"timestamp":{}}"#,
        ) else {
            panic!("it is an event");
        };
        assert_eq!(event.node.as_deref(), Some("n"));
        assert_eq!(event.id, None);
        assert_eq!(event.action.as_deref(), Some("stop"));
        assert_eq!(of(r#"{"return":{}}"#), Message::Other);
        assert!(message(b"[]").is_err());
        let deep = format!("{{\"a\":{}", "[".repeat(100_000));
        assert!(message(deep.as_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn it_does_not_matter_how_the_bytes_are_cut(text in "[{}\\[\\]\"\\\\a \n]{0,64}", at in 0_usize..64) {
            let mut one = Splitter::default();
            let whole = one.take(text.as_bytes());
            let mut two = Splitter::default();
            let (head, tail) = text.as_bytes().split_at(at.min(text.len()));
            let pieces = two.take(head).and_then(|mut first| {
                first.extend(two.take(tail)?);
                Ok(first)
            });
            prop_assert_eq!(whole, pieces);
        }
    }
}
