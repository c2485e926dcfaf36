//! What the VM signs to prove that it holds a key: always over the exporter of the TLS connection it speaks on, so a
//! signature seen once is worth nothing on another connection.
//!
//! Form: a domain string that differs per purpose and ends in a zero byte, then each field as its length (four bytes,
//! big-endian) and its bytes. Two different lists of fields never give the same message.

use crate::IdentityError;
use tombolo_types::DeviceId;

/// Label of the channel binding. Source: RFC 9266 section 2.
const EXPORTER_LABEL: &[u8] = b"EXPORTER-Channel-Binding";

/// What token key and device key sign at enrolment: this connection, this token, this device, this request.
pub fn enroll(exporter: &[u8; 32], token_id: &[u8; 16], device_public_key: &[u8], csr_pem: &str) -> Vec<u8> {
    message(
        b"tombolo enroll v1\0",
        &[exporter, token_id, device_public_key, csr_pem.as_bytes()],
    )
}

/// What the device key signs to get its next certificate, by mutual TLS or after any absence.
pub fn renew(exporter: &[u8; 32], device_id: DeviceId, generation: u64, csr_pem: &str) -> Vec<u8> {
    let fields: [&[u8]; 4] = [
        exporter,
        &device_id.0.to_be_bytes(),
        &generation.to_be_bytes(),
        csr_pem.as_bytes(),
    ];
    message(b"tombolo renew v1\0", &fields)
}

/// What the device key signs to leave the mesh.
pub fn leave(exporter: &[u8; 32], device_id: DeviceId) -> Vec<u8> {
    message(b"tombolo leave v1\0", &[exporter, &device_id.0.to_be_bytes()])
}

fn message(domain: &[u8], fields: &[&[u8]]) -> Vec<u8> {
    let mut out = domain.to_vec();
    for field in fields {
        // A field over 4 GiB cannot come out of a gRPC message of a few megabytes.
        out.extend_from_slice(&u32::try_from(field.len()).unwrap_or(u32::MAX).to_be_bytes());
        out.extend_from_slice(field);
    }
    out
}

/// The channel binding of a connection, client side; the same 32 bytes as [`server_exporter`] gives on the other.
///
/// # Errors
/// While the handshake is not finished. Source: RFC 9266 (tls-exporter).
pub fn client_exporter(connection: &rustls::ClientConnection) -> Result<[u8; 32], IdentityError> {
    connection
        .export_keying_material([0; 32], EXPORTER_LABEL, Some(b""))
        .map_err(tls)
}

/// The channel binding of a connection, server side.
///
/// # Errors
/// While the handshake is not finished.
pub fn server_exporter(connection: &rustls::ServerConnection) -> Result<[u8; 32], IdentityError> {
    connection
        .export_keying_material([0; 32], EXPORTER_LABEL, Some(b""))
        .map_err(tls)
}

fn tls(error: rustls::Error) -> IdentityError {
    IdentityError::Tls(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn different_fields_give_different_messages(
            a in proptest::collection::vec(any::<u8>(), 0..40), b in ".{0,40}",
            c in proptest::collection::vec(any::<u8>(), 0..40), d in ".{0,40}",
        ) {
            let (x, t) = ([1; 32], [2; 16]);
            prop_assert_eq!((&a, &b) == (&c, &d), enroll(&x, &t, &a, &b) == enroll(&x, &t, &c, &d));
        }

        #[test]
        fn purposes_do_not_mix(x: [u8; 32], id: u64, generation: u64, csr in ".{0,20}") {
            let id = DeviceId(id);
            prop_assert_ne!(renew(&x, id, generation, &csr), leave(&x, id));
            prop_assert_ne!(renew(&x, id, generation, &csr), renew(&x, id, generation.wrapping_add(1), &csr));
        }
    }

    #[test]
    fn the_form_is_fixed() {
        let got = leave(&[0xaa; 32], DeviceId(0x0102_0304_0506_0708));
        let want = [
            &b"tombolo leave v1\0"[..],
            &[0, 0, 0, 32],
            &[0xaa; 32],
            &[0, 0, 0, 8],
            &[1, 2, 3, 4, 5, 6, 7, 8],
        ];
        assert_eq!(got, want.concat());
    }
}
