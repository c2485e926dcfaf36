//! The serial number of a certificate of our CA names the device, so that one device is revoked without a list of
//! certificates.
//!
//! | certificate | serial, unsigned big-endian | as an ASN.1 INTEGER |
//! |---|---|---|
//! | of a device | device id (8 bytes), 11 random bytes: a value below 2^152 | at most 20 bytes: one zero more when the id's top bit is set, fewer bytes when the id starts with zeros |
//! | of no device | 20 random bytes, top bits `01`: a value of 2^158 or more | 20 bytes |
//!
//! The two ranges do not meet, so every 64-bit id is carried, with its top bit set and the id 0 too, and 20 bytes is
//! the most that RFC 5280 4.1.2.2 allows. A serial number of another CA may read as some device id by chance: revoke
//! its certificates by hash, not by device.

use tombolo_types::DeviceId;

/// Bytes of a device's serial number before DER drops leading zeros.
const DEVICE_SERIAL_BYTES: usize = 19;

/// The serial number of a certificate of `device`.
pub fn for_device(device: DeviceId, random: [u8; 11]) -> [u8; 19] {
    let mut serial = [0; DEVICE_SERIAL_BYTES];
    serial[..8].copy_from_slice(&device.0.to_be_bytes());
    serial[8..].copy_from_slice(&random);
    serial
}

/// The serial number of a certificate that belongs to no device (discovery, gateways, bearer tokens).
pub fn without_device(mut random: [u8; 20]) -> [u8; 20] {
    random[0] = (random[0] & 0x3f) | 0x40;
    random
}

/// The device that a serial number names. Takes both forms: with or without the ASN.1 sign byte.
pub fn device_of(serial: &[u8]) -> Option<DeviceId> {
    let value = unsigned(serial);
    let missing = DEVICE_SERIAL_BYTES.checked_sub(value.len())?;
    let mut padded = [0; DEVICE_SERIAL_BYTES];
    padded[missing..].copy_from_slice(value);
    let (id, _random) = padded.split_first_chunk::<8>()?;
    Some(DeviceId(u64::from_be_bytes(*id)))
}

/// Drops leading zeros: the form in which serial numbers are compared and shown.
pub(crate) fn unsigned(serial: &[u8]) -> &[u8] {
    let zeros = serial.iter().take_while(|&&byte| byte == 0).count();
    &serial[zeros..]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a DER encoder makes of an unsigned value.
    fn integer(value: &[u8]) -> Vec<u8> {
        let value = unsigned(value);
        match value.first() {
            None => vec![0],
            Some(first) if first & 0x80 != 0 => [&[0], value].concat(),
            Some(_) => value.to_vec(),
        }
    }

    proptest! {
        #[test]
        fn every_device_id_is_carried(id: u64, shift in 0u32..64, random: [u8; 11]) {
            for id in [id, id >> shift, 0, u64::MAX, 1 << 63] {
                let serial = for_device(DeviceId(id), random);
                prop_assert_eq!(device_of(&serial), Some(DeviceId(id)));
                prop_assert_eq!(device_of(&integer(&serial)), Some(DeviceId(id)));
                prop_assert!(integer(&serial).len() <= 20);
            }
        }

        #[test]
        fn other_certificates_name_no_device(random: [u8; 20], any in proptest::collection::vec(any::<u8>(), 0..40)) {
            let serial = integer(&without_device(random));
            prop_assert_eq!(serial.len(), 20);
            prop_assert_eq!(device_of(&serial), None);
            let _ = device_of(&any);
        }
    }
}
