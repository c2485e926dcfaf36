//! PROXY headers: what is written, what is read, and the replay of the fuzzer's corpus.
#![allow(missing_docs, unreachable_pub, clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;
use std::net::{IpAddr, SocketAddr};
use tombolo_types::{PROXY_MAX, PROXY_PREFIX, PROXY_SIGNATURE, ProxyError, ProxyHeader};

#[path = "../../../fuzz/fuzz_targets/check/proxy_header.rs"]
mod check;

#[test]
fn the_corpus_of_proxy_headers() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/proxy_header");
    let (mut count, mut headers) = (0, 0);
    for entry in std::fs::read_dir(folder).unwrap() {
        headers += check::check(&std::fs::read(entry.unwrap().path()).unwrap());
        count += 1;
    }
    assert!(
        count >= 15 && (5..count - 5).contains(&headers),
        "{headers} of {count} are headers"
    );
}

fn proxied(source: &str, destination: &str) -> ProxyHeader {
    ProxyHeader::Proxied {
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
    }
}

#[test]
fn as_haproxy_writes_them() {
    // haproxy 2.8, `send-proxy-v2`: 192.0.2.7:56324 to 198.51.100.1:443.
    let bytes = [
        &PROXY_SIGNATURE[..],
        &[
            0x21, 0x11, 0, 12, 192, 0, 2, 7, 198, 51, 100, 1, 0xdc, 0x04, 0x01, 0xbb,
        ],
    ]
    .concat();
    let header = proxied("192.0.2.7:56324", "198.51.100.1:443");
    assert_eq!(ProxyHeader::decode(&bytes), Ok(header));
    assert_eq!(header.encode(), bytes);
    assert_eq!(ProxyHeader::length(bytes.first_chunk().unwrap()), Ok(28));
    // With an extension (PP2_TYPE_NOOP).
    let mut extended = [&bytes[..], &[4, 0, 1, 0]].concat();
    extended[15] = 16;
    assert_eq!(ProxyHeader::decode(&extended), Ok(header));
    let six = proxied("[2001:db8::7]:56324", "[2001:db8::1]:443");
    assert_eq!(six.encode().len(), 52);
    assert_eq!(ProxyHeader::decode(&six.encode()), Ok(six));
    assert_eq!(
        ProxyHeader::decode(&ProxyHeader::Local.encode()),
        Ok(ProxyHeader::Local)
    );
    // An IPv4 client of a socket of both families.
    assert_eq!(
        proxied("[::ffff:192.0.2.7]:56324", "[::ffff:198.51.100.1]:443").encode(),
        bytes
    );
}

#[test]
fn what_is_none() {
    let good = proxied("192.0.2.7:1", "192.0.2.1:2").encode();
    let spoiled = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        ProxyHeader::decode(&bytes).unwrap_err()
    };
    assert_eq!(spoiled(3, b'x'), ProxyError::NotProxy);
    assert_eq!(spoiled(12, 0x11), ProxyError::NotProxy, "another version");
    assert_eq!(spoiled(12, 0x22), ProxyError::Command);
    assert_eq!(spoiled(13, 0x12), ProxyError::Family, "UDP");
    assert_eq!(spoiled(13, 0x31), ProxyError::Family, "a unix socket");
    assert_eq!(spoiled(13, 0x00), ProxyError::Family, "it does not say");
    assert_eq!(spoiled(13, 0x21), ProxyError::Length(28), "too short for IPv6");
    assert_eq!(spoiled(15, 11), ProxyError::Length(28));
    assert_eq!(
        spoiled(14, 0xff),
        ProxyError::Length(PROXY_PREFIX + 0xff0c),
        "over {PROXY_MAX}"
    );
    // A TLS client, and version 1.
    for other in [
        &[22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3, 0, 0, 0, 0, 0][..],
        b"PROXY TCP4 192.0.2.7 192.0.2.1 1 2\r\n",
    ] {
        assert_eq!(
            ProxyHeader::length(other.first_chunk().unwrap()),
            Err(ProxyError::NotProxy)
        );
    }
}

fn address() -> impl Strategy<Value = SocketAddr> {
    let ip = prop_oneof![
        any::<[u8; 4]>().prop_map(IpAddr::from),
        any::<[u8; 16]>().prop_map(IpAddr::from)
    ];
    (ip, any::<u16>()).prop_map(SocketAddr::from)
}

proptest! {
    #[test]
    fn what_is_written_is_read(source in address(), destination in address()) {
        let written = ProxyHeader::Proxied { source, destination };
        let ProxyHeader::Proxied { source: read, destination: to } = ProxyHeader::decode(&written.encode()).unwrap() else {
            panic!("a proxied connection");
        };
        prop_assert_eq!((read.ip().to_canonical(), read.port()), (source.ip().to_canonical(), source.port()));
        prop_assert_eq!((to.ip().to_canonical(), to.port()), (destination.ip().to_canonical(), destination.port()));
    }

    #[test]
    fn any_bytes_are_something(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        check::check(&bytes);
    }

    #[test]
    fn damage_is_no_panic(source in address(), at in 0usize..52, value: u8, cut in 0usize..52) {
        let mut bytes = ProxyHeader::Proxied { source, destination: source }.encode();
        let length = bytes.len();
        bytes[at % length] = value;
        check::check(&bytes[..length - cut % length]);
    }
}
