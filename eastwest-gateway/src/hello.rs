//! Reads the first message of a TLS client, as far as a port that carries several protocols needs: the name that it
//! asks for, and what it wants to speak. Nothing is decrypted and nothing is consumed.
//!
//! Source: RFC 8446, 4.1.2 and 5.1; RFC 6066, 3 (server_name); RFC 7301, 3.1 (ALPN).

/// Longest first message that is waited for: a post-quantum one has about 1,500 bytes, in two segments.
pub(crate) const HELLO_MAX: usize = 16 * 1024;

const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const SERVER_NAME: u16 = 0;
const ALPN: u16 = 16;

/// What a client says first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct ClientHello {
    /// Host name that it asks for, lower case.
    pub(crate) server_name: Option<String>,
    /// Protocols that it offers, in its order.
    pub(crate) alpn: Vec<Vec<u8>>,
}

/// What the bytes so far are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Peeked {
    /// The whole message.
    Hello(ClientHello),
    /// The beginning of one: wait for more.
    Incomplete,
    /// Something else.
    NotTls,
}

/// Reads what has arrived so far.
pub(crate) fn peek(bytes: &[u8]) -> Peeked {
    match message(bytes) {
        Ok(Some(message)) => hello(&message).map_or(Peeked::NotTls, Peeked::Hello),
        Ok(None) if bytes.len() < HELLO_MAX => Peeked::Incomplete,
        Ok(None) | Err(NotTls) => Peeked::NotTls,
    }
}

struct NotTls;

/// The handshake message, joined from its records; `None` while some of it is missing.
fn message(mut bytes: &[u8]) -> Result<Option<Vec<u8>>, NotTls> {
    let mut message = Vec::new();
    loop {
        if let Some(&length) = message
            .get(1..4)
            .and_then(|length: &[u8]| length.first_chunk::<3>())
        {
            let [a, b, c] = length;
            let length = 4 + usize::from(a) * 65_536 + usize::from(b) * 256 + usize::from(c);
            if length > HELLO_MAX {
                return Err(NotTls);
            }
            if message.len() >= length {
                message.truncate(length);
                return Ok(Some(message));
            }
        }
        let (Some(&kind), version) = (bytes.first(), bytes.get(1)) else {
            return Ok(None);
        };
        if kind != HANDSHAKE || version.is_some_and(|&version| version != 3) {
            return Err(NotTls);
        }
        let Some(&[_, _, _, high, low]) = bytes.first_chunk::<5>() else {
            return Ok(None);
        };
        let length = usize::from(high) * 256 + usize::from(low);
        // Source: RFC 8446, 5.1: at most 2^14, and never empty for a handshake message.
        if length == 0 || length > 1 << 14 {
            return Err(NotTls);
        }
        let present = bytes.get(5..).unwrap_or_default();
        let fragment = present.get(..length.min(present.len())).unwrap_or_default();
        message.extend_from_slice(fragment);
        if message.first().is_some_and(|&kind| kind != CLIENT_HELLO) {
            return Err(NotTls);
        }
        bytes = present.get(length..).unwrap_or_default();
    }
}

/// The parts of a whole message; `None` for one that breaks its own lengths.
fn hello(message: &[u8]) -> Option<ClientHello> {
    let mut reader = Reader(message.get(4..)?);
    reader.take(2 + 32)?; // version, random
    reader.sized::<1>()?; // session id
    reader.sized::<2>()?; // cipher suites
    reader.sized::<1>()?; // compression
    let mut found = ClientHello::default();
    if reader.0.is_empty() {
        return Some(found);
    }
    let mut extensions = Reader(reader.sized::<2>()?);
    while !extensions.0.is_empty() {
        let kind = u16::from_be_bytes(*extensions.take(2)?.first_chunk()?);
        let mut body = Reader(extensions.sized::<2>()?);
        match kind {
            SERVER_NAME => {
                let mut names = Reader(body.sized::<2>()?);
                if names.take(1)? == [0] {
                    let name = std::str::from_utf8(names.sized::<2>()?).ok()?;
                    found.server_name = Some(name.trim_end_matches('.').to_ascii_lowercase());
                }
            }
            ALPN => {
                let mut protocols = Reader(body.sized::<2>()?);
                while !protocols.0.is_empty() {
                    found.alpn.push(protocols.sized::<1>()?.to_vec());
                }
            }
            _ => {}
        }
    }
    Some(found)
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    /// A vector with `N` bytes of length before it.
    fn sized<const N: usize>(&mut self) -> Option<&'a [u8]> {
        let length = self
            .take(N)?
            .iter()
            .fold(0, |sum, &byte| sum * 256 + usize::from(byte));
        self.take(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A message as a client writes it, in records of at most `record` bytes.
    fn written(name: Option<&str>, alpn: &[&[u8]], record: usize) -> Vec<u8> {
        let sized = |width: usize, bytes: &[u8]| {
            let mut out = bytes.len().to_be_bytes()[8 - width..].to_vec();
            out.extend_from_slice(bytes);
            out
        };
        let mut extensions = vec![0x2b, 0x2b];
        extensions.splice(.., [0, 43].into_iter().chain(sized(2, &[2, 3, 4])));
        if let Some(name) = name {
            let entry = [&[0][..], &sized(2, name.as_bytes())].concat();
            extensions.extend([&[0, 0][..], &sized(2, &sized(2, &entry))].concat());
        }
        if !alpn.is_empty() {
            let list: Vec<u8> = alpn.iter().flat_map(|protocol| sized(1, protocol)).collect();
            extensions.extend([&[0, 16][..], &sized(2, &sized(2, &list))].concat());
        }
        let body = [
            &[3, 3][..],
            &[7; 32],
            &sized(1, &[1; 32]),
            &sized(2, &[0x13, 1]),
            &sized(1, &[0]),
            &sized(2, &extensions),
        ]
        .concat();
        let message = [&[1][..], &sized(3, &body)].concat();
        message
            .chunks(record)
            .flat_map(|chunk| [&[22, 3, 1][..], &sized(2, chunk)].concat())
            .collect()
    }

    #[test]
    fn names_and_protocols_in_whatever_pieces() {
        let expected = ClientHello {
            server_name: Some("discovery.mesh.example".to_owned()),
            alpn: vec![b"h2".to_vec(), b"tombolo-reverse/1".to_vec()],
        };
        for record in [1, 7, 100, 16_384] {
            let bytes = written(
                Some("Discovery.mesh.example."),
                &[b"h2", b"tombolo-reverse/1"],
                record,
            );
            assert_eq!(peek(&bytes), Peeked::Hello(expected.clone()));
            for end in 0..bytes.len() {
                assert_eq!(
                    peek(&bytes[..end]),
                    Peeked::Incomplete,
                    "{end} of {}",
                    bytes.len()
                );
            }
        }
        let none = written(None, &[], 500);
        assert_eq!(peek(&none), Peeked::Hello(ClientHello::default()));
    }

    #[test]
    fn other_protocols_are_known_by_their_first_bytes() {
        for bytes in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"PRI * HTTP/2.0",
            b"SSH-2.0-x",
            &[0; 8],
            &[22, 2],
            &[22, 3, 1, 0, 0],
            &[22, 3, 1, 0xff, 0xff],
            &[22, 3, 3, 0, 4, 2, 0, 0, 1],
            &[22, 3, 3, 0, 4, 1, 1, 0, 0],
        ] {
            assert_eq!(peek(bytes), Peeked::NotTls, "{bytes:?}");
        }
        assert_eq!(peek(&vec![22; HELLO_MAX]), Peeked::NotTls);
    }

    proptest! {
        #[test]
        fn any_bytes_are_something(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = peek(&bytes);
        }

        #[test]
        fn damage_is_no_panic(at in 0usize..400, value: u8, cut in 0usize..400) {
            let mut bytes = written(Some("a.example"), &[b"h2"], 50);
            let length = bytes.len();
            bytes[at % length] = value;
            let _ = peek(&bytes[..length - cut % length]);
        }
    }
}
