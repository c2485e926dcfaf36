//! The messages of ours only grow: agents, gateways and discoveries of neighbouring versions speak to each other.
//!
//! `wire.txt` is the record of every field and method that was ever published. What is in it must be there unchanged;
//! what is new is recorded by `RECORD_WIRE=1 cargo test -p tombolo-proto --test append_only`.

use prost::Message as _;
use prost_types::{DescriptorProto, FileDescriptorSet};
use std::{collections::BTreeSet, path::Path};

const RECORD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/wire.txt");

#[test]
fn what_was_published_stays() {
    let recorded: BTreeSet<String> = std::fs::read_to_string(RECORD)
        .unwrap_or_default()
        .lines()
        .map(str::to_owned)
        .collect();
    let present = present();
    let gone: Vec<_> = recorded.difference(&present).collect();
    assert!(gone.is_empty(), "published, and now gone or changed: {gone:#?}");
    if std::env::var_os("RECORD_WIRE").is_some() {
        let lines = present.into_iter().collect::<Vec<_>>().join("\n");
        std::fs::write(Path::new(RECORD), lines + "\n").unwrap();
        return;
    }
    let new: Vec<_> = present.difference(&recorded).collect();
    assert!(
        new.is_empty(),
        "not recorded yet; RECORD_WIRE=1 does it: {new:#?}"
    );
}

/// One line for each field and method of our packages: what a peer depends on.
fn present() -> BTreeSet<String> {
    let set = FileDescriptorSet::decode(tombolo_proto::DESCRIPTORS).expect("our own descriptors");
    let mut lines = BTreeSet::new();
    for file in set
        .file
        .iter()
        .filter(|file| file.package().starts_with("tombolo."))
    {
        for message in &file.message_type {
            message_lines(&mut lines, file.package(), message);
        }
        for kind in &file.enum_type {
            for value in &kind.value {
                lines.insert(format!(
                    "enum {}.{} {} {}",
                    file.package(),
                    kind.name(),
                    value.number(),
                    value.name()
                ));
            }
        }
        for service in &file.service {
            for method in &service.method {
                lines.insert(format!(
                    "rpc {}.{}/{} {}{} -> {}{}",
                    file.package(),
                    service.name(),
                    method.name(),
                    stream(method.client_streaming()),
                    method.input_type(),
                    stream(method.server_streaming()),
                    method.output_type()
                ));
            }
        }
    }
    assert!(lines.len() > 100, "the descriptors are not ours: {}", lines.len());
    lines
}

fn stream(is: bool) -> &'static str {
    if is { "stream " } else { "" }
}

fn message_lines(lines: &mut BTreeSet<String>, scope: &str, message: &DescriptorProto) {
    let name = format!("{scope}.{}", message.name());
    for field in &message.field {
        lines.insert(format!(
            "field {name} {} {} {:?} {:?} {}",
            field.number(),
            field.name(),
            field.r#type(),
            field.label(),
            field.type_name()
        ));
    }
    for nested in &message.nested_type {
        message_lines(lines, &name, nested);
    }
}
