//! The text of a `/etc/resolv.conf` with the mesh's lines in it, and without.

use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// Before our server.
const BEGIN: &str = "# tombolo-netd put this line here and takes it out again (tombolo down):";
/// Before our options, which must be the last ones.
const END: &str = "# tombolo-netd: the mesh's server is waited for one second";
/// The same where the original's last line has no end.
const END_AFTER_HALF: &str = "# tombolo-netd: the mesh's server is waited for one second.";
const OPTIONS: &str = "options timeout:1";

/// The first line of what is kept; the original follows.
#[derive(Debug, Serialize, Deserialize)]
struct Head {
    server: IpAddr,
    checksum: u64,
}

/// The original with the mesh's server before its own.
pub(crate) fn with(original: &str, server: IpAddr) -> String {
    let end = if original.is_empty() || original.ends_with('\n') {
        END.to_owned()
    } else {
        format!("\n{END_AFTER_HALF}")
    };
    format!("{BEGIN}\nnameserver {server}\n{original}{end}\n{OPTIONS}\n")
}

/// The text without our lines; `None` if it has none of them.
pub(crate) fn without(text: &str) -> Option<String> {
    let mut found = String::with_capacity(text.len());
    let mut any = false;
    let mut lines = text.split_inclusive('\n').peekable();
    while let Some(line) = lines.next() {
        let belongs = match line.trim_end() {
            BEGIN => "nameserver ",
            END => OPTIONS,
            END_AFTER_HALF => {
                found.truncate(found.strip_suffix('\n').map_or(found.len(), str::len));
                OPTIONS
            }
            _ => {
                found.push_str(line);
                continue;
            }
        };
        any = true;
        lines.next_if(|next| next.starts_with(belongs));
    }
    any.then_some(found)
}

/// True if the text is an original with our lines around it, and nothing else: nobody has written it since.
pub(crate) fn is_whole(text: &str) -> bool {
    let server = text
        .strip_prefix(BEGIN)
        .and_then(|rest| rest.strip_prefix("\nnameserver "))
        .and_then(|rest| rest.lines().next()?.parse().ok());
    match (server, without(text)) {
        (Some(server), Some(original)) => with(&original, server) == text,
        _ => false,
    }
}

/// Whether the mesh can be asked before this file's servers.
pub(crate) fn usable(original: &str) -> Result<(), String> {
    let mut words = original
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>());
    if words.clone().all(|line| line.first() != Some(&"nameserver")) {
        return Err("/etc/resolv.conf names no server that ordinary names could go to".into());
    }
    if words.any(|line| line.first() == Some(&"options") && line.contains(&"rotate")) {
        return Err(
            "/etc/resolv.conf says options rotate: names of the mesh would go to other servers in turn"
                .into(),
        );
    }
    Ok(())
}

/// What is kept of an original.
pub(crate) fn saved(original: &str, server: IpAddr) -> String {
    let checksum = checksum(original.as_bytes());
    let head = serde_json::to_string(&Head { server, checksum }).unwrap_or_default();
    format!("{head}\n{original}")
}

/// The original, if it is whole.
pub(crate) fn read_saved(text: &str) -> Option<(String, IpAddr)> {
    let (head, original) = text.split_once('\n')?;
    let head: Head = serde_json::from_str(head).ok()?;
    (head.checksum == checksum(original.as_bytes())).then(|| (original.to_owned(), head.server))
}

/// Against accidents: FNV-1a.
fn checksum(bytes: &[u8]) -> u64 {
    let step = |sum: u64, byte: &u8| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn server() -> IpAddr {
        "240.240.255.254".parse().unwrap()
    }

    #[test]
    fn the_mesh_first_and_the_old_servers_behind() {
        let text = with("search x\nnameserver 10.0.0.1\noptions timeout:5", server());
        let lines: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(
            lines,
            [
                "nameserver 240.240.255.254",
                "search x",
                "nameserver 10.0.0.1",
                "options timeout:5",
                "options timeout:1"
            ]
        );
        assert!(is_whole(&text) && !is_whole(&(text.clone() + "search y\n")));
        assert!(!is_whole("nameserver 10.0.0.1\n") && without("nameserver 10.0.0.1\n").is_none());
        // Somebody took one of our lines out: the others go without it.
        let broken = text.replace("nameserver 240.240.255.254\n", "");
        assert!(!is_whole(&broken));
        assert_eq!(
            without(&broken).unwrap(),
            "search x\nnameserver 10.0.0.1\noptions timeout:5"
        );
    }

    #[test]
    fn a_damaged_copy_is_not_believed() {
        let text = saved("nameserver 10.0.0.1\n", server());
        assert_eq!(
            read_saved(&text),
            Some(("nameserver 10.0.0.1\n".into(), server()))
        );
        assert!(read_saved(&text[..text.len() - 3]).is_none() && read_saved("").is_none());
        assert!(read_saved(&text.replace("10.0.0.1", "10.0.0.7")).is_none());
    }

    proptest! {
        #[test]
        fn every_original_comes_back(original in "([a-z#. 0-9]{0,12}\r?\n){0,6}[a-z 0-9]{0,9}") {
            let text = with(&original, server());
            prop_assert!(is_whole(&text));
            prop_assert_eq!(without(&text), Some(original.clone()));
            prop_assert_eq!(read_saved(&saved(&original, server())), Some((original, server())));
        }

        #[test]
        fn whatever_a_file_has_it_is_read(text in ".{0,200}") {
            let _ = (without(&text), is_whole(&text), read_saved(&text), usable(&text));
        }
    }
}
