//! Names that are not the mesh's, asked of the host's first server before and after a change of it.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    time::Duration,
};
use tokio::{net::UdpSocket, time::timeout};

/// Longest wait for one answer; asked twice.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
const TRIES: usize = 2;
/// NS of RFC 1035, 3.2.2: what a resolver asks for by itself all day.
const NS: u8 = 2;
const NOERROR: u8 = 0;
const NXDOMAIN: u8 = 3;

/// What the host's first server says of ordinary names: one response code each, `None` for no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answers(Vec<(String, Option<u8>)>);

impl Answers {
    /// True if all that was answered before is answered so now.
    pub(crate) fn hold(&self, now: &Self) -> bool {
        let same = |name: &str, code: &Option<u8>| now.0.iter().any(|(n, c)| n == name && c == code);
        self.0
            .iter()
            .all(|(name, code)| code.is_none() || same(name, code))
    }
}

/// Asks for names that this host needs, its own search domains, and the root of all names.
pub(crate) async fn answers(resolv_conf: &Path, needed: &[String]) -> Answers {
    let text = fs::read_to_string(resolv_conf).unwrap_or_default();
    let mut names = vec![String::new()];
    names.extend(needed.iter().take(2).cloned());
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if matches!(words.next(), Some("search" | "domain")) {
            names.extend(
                words
                    .map(|name| name.trim_matches('.').to_owned())
                    .filter(|name| !name.is_empty())
                    .take(2),
            );
        }
    }
    let mut found = Vec::new();
    for name in names {
        let code = code_of(&text, &name).await;
        found.push((name, code));
    }
    Answers(found)
}

/// True if the host's first server has an answer of the one who knows: the name, or that there is none.
pub(crate) async fn is_answered(resolv_conf: &Path, name: &str) -> bool {
    let text = fs::read_to_string(resolv_conf).unwrap_or_default();
    matches!(code_of(&text, name).await, Some(NOERROR | NXDOMAIN))
}

async fn code_of(resolv_conf: &str, name: &str) -> Option<u8> {
    let server = first_server(resolv_conf);
    let query = query(name, rand::random())?;
    for _ in 0..TRIES {
        if let Ok(Some(code)) = timeout(ANSWER_TIMEOUT, ask(server, &query)).await {
            return Some(code);
        }
    }
    None
}

/// Source: resolv.conf(5): this host's own where there is none.
fn first_server(text: &str) -> IpAddr {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver"))
            .then(|| words.next()?.parse().ok())
            .flatten()
    };
    text.lines()
        .find_map(server)
        .unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
}

async fn ask(server: IpAddr, query: &[u8]) -> Option<u8> {
    let any: IpAddr = if server.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((any, 0)).await.ok()?;
    socket.connect((server, 53)).await.ok()?;
    socket.send(query).await.ok()?;
    let mut reply = [0; 2048];
    loop {
        let length = socket.recv(&mut reply).await.ok()?;
        if length >= 12 && reply[..2] == query[..2] && reply[2] & 0x80 != 0 {
            return Some(reply[3] & 0xf);
        }
    }
}

/// A question for the servers of a name; `None` for what is no name.
fn query(name: &str, id: u16) -> Option<Vec<u8>> {
    let mut query = id.to_be_bytes().to_vec();
    // Recursion desired, one question.
    query.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.').filter(|label| !label.is_empty()) {
        query.push(u8::try_from(label.len()).ok().filter(|length| *length < 64)?);
        query.extend(label.as_bytes());
    }
    query.extend([0, 0, NS, 0, 1]);
    Some(query)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked() {
        let query = query("mesh.internal", 0x0102).unwrap();
        assert_eq!(query[..6], [1, 2, 1, 0, 0, 1]);
        assert_eq!(&query[12..], b"\x04mesh\x08internal\0\0\x02\0\x01");
        assert_eq!(super::query("", 0).unwrap().len(), 17);
        assert!(super::query(&"a".repeat(64), 0).is_none());
        assert_eq!(
            first_server("search x\nnameserver 10.0.0.1\nnameserver 10.0.0.2\n"),
            IpAddr::from([10, 0, 0, 1])
        );
        assert_eq!(first_server(""), IpAddr::from([127, 0, 0, 1]));
    }

    #[test]
    fn what_was_answered_must_be_again() {
        let answers = |codes: &[Option<u8>]| {
            Answers(
                codes
                    .iter()
                    .enumerate()
                    .map(|(at, code)| (at.to_string(), *code))
                    .collect(),
            )
        };
        let before = answers(&[Some(0), None]);
        assert!(before.hold(&answers(&[Some(0), None])) && before.hold(&answers(&[Some(0), Some(2)])));
        assert!(!before.hold(&answers(&[Some(2), None])) && !before.hold(&answers(&[None, None])));
        assert!(!before.hold(&answers(&[])));
        assert!(
            answers(&[None, None]).hold(&answers(&[])),
            "a host without a network"
        );
    }
}
