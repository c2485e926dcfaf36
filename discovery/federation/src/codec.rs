//! The canonical form of what is signed: one value, one sequence of bytes.

use crate::Refusal;
use tombolo_types::Code;

/// Appends fields. Numbers are big-endian; texts and byte strings carry their length in four bytes.
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    pub(crate) fn new(domain: &[u8]) -> Self {
        Self(domain.to_vec())
    }

    pub(crate) fn bytes(mut self, value: &[u8]) -> Self {
        // Every field is bounded far below 4 GiB before it comes here.
        self.0
            .extend_from_slice(&u32::try_from(value.len()).unwrap_or(u32::MAX).to_be_bytes());
        self.0.extend_from_slice(value);
        self
    }

    pub(crate) fn text(self, value: &str) -> Self {
        self.bytes(value.as_bytes())
    }

    pub(crate) fn number(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_be_bytes());
        self
    }

    pub(crate) fn flag(mut self, value: bool) -> Self {
        self.0.push(u8::from(value));
        self
    }

    pub(crate) fn texts<'a>(self, values: impl ExactSizeIterator<Item = &'a str>) -> Self {
        let count = self.number(values.len() as u64);
        values.fold(count, Self::text)
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.0
    }
}

/// Takes fields; anything that a [`Writer`] would not have written is refused.
pub(crate) struct Reader<'a>(&'a [u8]);

fn malformed() -> Refusal {
    Refusal::new(Code::MembershipForged, "the bytes are not a record")
}

impl<'a> Reader<'a> {
    /// `domain` ends in the byte of the form, any of 1 to `form_max`, which is returned too: later forms are told from
    /// garbage.
    pub(crate) fn new(bytes: &'a [u8], domain: &[u8], form_max: u8) -> Result<(Self, u8), Refusal> {
        let (name, _) = domain.split_at(domain.len() - 1);
        let rest = bytes.strip_prefix(name).ok_or_else(malformed)?;
        let (form, rest) = rest.split_first().ok_or_else(malformed)?;
        if !(1..=form_max).contains(form) {
            return Err(Refusal::new(
                Code::MembershipTooNew,
                format!("a record of form {form}"),
            ));
        }
        Ok((Self(rest), *form))
    }

    pub(crate) fn bytes(&mut self, max: usize) -> Result<&'a [u8], Refusal> {
        let (length, rest) = self.0.split_first_chunk::<4>().ok_or_else(malformed)?;
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        if length > max {
            return Err(malformed());
        }
        let (value, rest) = rest.split_at_checked(length).ok_or_else(malformed)?;
        self.0 = rest;
        Ok(value)
    }

    pub(crate) fn text(&mut self, max: usize) -> Result<&'a str, Refusal> {
        std::str::from_utf8(self.bytes(max)?).map_err(|_| malformed())
    }

    pub(crate) fn number(&mut self) -> Result<u64, Refusal> {
        let (value, rest) = self.0.split_first_chunk::<8>().ok_or_else(malformed)?;
        self.0 = rest;
        Ok(u64::from_be_bytes(*value))
    }

    pub(crate) fn flag(&mut self) -> Result<bool, Refusal> {
        let (value, rest) = self.0.split_first_chunk::<1>().ok_or_else(malformed)?;
        self.0 = rest;
        match value {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => Err(malformed()),
        }
    }

    pub(crate) fn texts(&mut self, count_max: usize, length_max: usize) -> Result<Vec<&'a str>, Refusal> {
        let count = usize::try_from(self.number()?).unwrap_or(usize::MAX);
        if count > count_max {
            return Err(malformed());
        }
        (0..count).map(|_| self.text(length_max)).collect()
    }

    pub(crate) fn finish(self) -> Result<(), Refusal> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(malformed())
        }
    }
}

/// FNV-1a, 64 bits: tells whether two members hold the same; nothing is believed because of it.
pub(crate) fn digest<'a>(parts: impl Iterator<Item = &'a [u8]>) -> u64 {
    parts.fold(0xcbf2_9ce4_8422_2325, |hash, part| {
        let length = (part.len() as u64).to_be_bytes();
        length.iter().chain(part).fold(hash, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
        })
    })
}
