//! What holds for any bytes that claim to be a PROXY header. Run by the fuzzer and by the replay of its corpus.

use tombolo_types::{PROXY_MAX, PROXY_PREFIX, PROXY_SIGNATURE, ProxyHeader};

/// The bytes themselves, and with the signature before them, which would keep nearly all others from the reader. Returns
/// how many of the two are headers.
pub fn check(bytes: &[u8]) -> usize {
    usize::from(header(bytes)) + usize::from(header(&[&PROXY_SIGNATURE, bytes].concat()))
}

/// As discovery reads: the first bytes say how many there are.
fn header(bytes: &[u8]) -> bool {
    let Some(prefix) = bytes.first_chunk::<PROXY_PREFIX>() else {
        assert!(ProxyHeader::decode(bytes).is_err(), "too short for a header");
        return false;
    };
    let Ok(length) = ProxyHeader::length(prefix) else {
        assert!(
            ProxyHeader::decode(bytes).is_err(),
            "what has no length is no header"
        );
        return false;
    };
    assert!((PROXY_PREFIX..=PROXY_MAX).contains(&length));
    let Some(whole) = bytes.get(..length) else {
        assert!(ProxyHeader::decode(bytes).is_err(), "a part is no header");
        return false;
    };
    let Ok(read) = ProxyHeader::decode(whole) else {
        return false;
    };
    let again = read.encode();
    assert!(again.len() <= length, "nothing is added");
    let told = ProxyHeader::decode(&again).expect("what is written can be read");
    match (read, told) {
        (ProxyHeader::Local, ProxyHeader::Local) => {}
        (
            ProxyHeader::Proxied { source, destination },
            ProxyHeader::Proxied {
                source: told_source,
                destination: told_destination,
            },
        ) => {
            for (read, told) in [(source, told_source), (destination, told_destination)] {
                assert_eq!(read.port(), told.port());
                assert_eq!(read.ip().to_canonical(), told.ip().to_canonical());
            }
        }
        other => panic!("{other:?}"),
    }
    true
}
