use std::{fmt, str::FromStr};

/// The 64-bit id of a device (a VM), drawn at enrolment; the key of everything about it. Written as 16 hex digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceId(pub u64);

/// Not 16 lower-case hex digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a device id (16 hex digits)")]
pub struct ParseDeviceIdError(String);

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for DeviceId {
    type Err = ParseDeviceIdError;
    fn from_str(value: &str) -> Result<Self, ParseDeviceIdError> {
        let refused = || ParseDeviceIdError(value.to_owned());
        if value.len() != 16 || value.bytes().any(|b| !b.is_ascii_hexdigit()) {
            return Err(refused());
        }
        u64::from_str_radix(value, 16).map(Self).map_err(|_| refused())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form() {
        let id = DeviceId(0x00ab_cdef_0123_4567);
        assert_eq!(id.to_string(), "00abcdef01234567");
        assert_eq!("00abcdef01234567".parse(), Ok(id));
        for bad in [
            "",
            "0",
            "+0abcdef01234567",
            "00abcdef0123456z",
            "000abcdef01234567",
        ] {
            assert!(bad.parse::<DeviceId>().is_err(), "{bad}");
        }
    }
}
