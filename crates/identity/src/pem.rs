use crate::IdentityError;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use zeroize::Zeroizing;

/// Label of a root that lets nobody in any more. Whoever reads certificates passes it over.
const RETIRED: &str = "RETIRED CERTIFICATE";

/// Reads every certificate of a text; other blocks are passed over.
///
/// # Errors
/// When there is none, or one is damaged.
pub fn certificates_from_pem(text: &str) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    match found {
        Ok(list) if list.is_empty() => Err(IdentityError::Pem {
            what: "a certificate",
            cause: "there is none".into(),
        }),
        Ok(list) => Ok(list),
        Err(error) => Err(IdentityError::Pem {
            what: "a certificate",
            cause: error.to_string(),
        }),
    }
}

/// Reads the retired roots of a text; mostly there are none.
pub(crate) fn retired_from_pem(text: &str) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let (begin, end) = (
        format!("-----BEGIN {RETIRED}-----"),
        format!("-----END {RETIRED}-----"),
    );
    let damaged = |cause: &str| IdentityError::Pem {
        what: "a retired certificate",
        cause: cause.into(),
    };
    let mut found = Vec::new();
    let mut rest = text;
    while let Some((_, after)) = rest.split_once(&begin) {
        let (body, after) = after.split_once(&end).ok_or_else(|| damaged("it has no end"))?;
        let body: String = body.split_whitespace().collect();
        let der = STANDARD.decode(body).map_err(|_| damaged("it is not base64"))?;
        found.push(der.into());
        rest = after;
    }
    Ok(found)
}

/// Writes roots so that only [`retired_from_pem`] reads them.
pub(crate) fn retired_to_pem(list: &[CertificateDer<'_>]) -> String {
    list.iter()
        .map(|certificate| encode(RETIRED, certificate).as_str().to_owned())
        .collect()
}

/// Reads the first private key. The cause of an error never repeats the text.
pub(crate) fn private_key(text: &str) -> Result<PrivateKeyDer<'static>, IdentityError> {
    PrivateKeyDer::from_pem_slice(text.as_bytes()).map_err(|_| IdentityError::Key("not a PEM private key"))
}

/// Writes certificates as PEM, each with a trailing newline, concatenated.
pub fn certificates_to_pem<'a>(list: impl IntoIterator<Item = &'a CertificateDer<'a>>) -> String {
    list.into_iter()
        .map(|certificate| encode("CERTIFICATE", certificate).as_str().to_owned())
        .collect()
}

/// One PEM block with a trailing newline. The intermediate texts are wiped: the content may be a key.
pub(crate) fn encode(label: &str, der: &[u8]) -> Zeroizing<String> {
    let body = Zeroizing::new(STANDARD.encode(der));
    // Sized once, so that no outgrown copy of a key stays behind in freed memory.
    let mut text = Zeroizing::new(String::with_capacity(
        body.len() + body.len() / 64 + 2 * label.len() + 64,
    ));
    text.push_str(&format!("-----BEGIN {label}-----\n"));
    let mut rest = body.as_str();
    while !rest.is_empty() {
        let (line, tail) = rest.split_at(rest.len().min(64));
        text.push_str(line);
        text.push('\n');
        rest = tail;
    }
    text.push_str(&format!("-----END {label}-----\n"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_read_back() {
        for length in [1, 47, 48, 49, 200] {
            let der = vec![0x5a_u8; length];
            let text = encode("CERTIFICATE", &der);
            assert!(text.lines().all(|line| line.len() <= 64), "{}", *text);
            assert_eq!(certificates_from_pem(&text).unwrap()[0].as_ref(), der);
        }
    }

    #[test]
    fn retired_blocks_are_not_certificates() {
        let (root, retired) = (vec![1_u8; 90], CertificateDer::from(vec![2_u8; 90]));
        let text = format!(
            "{}{}",
            retired_to_pem(std::slice::from_ref(&retired)),
            *encode("CERTIFICATE", &root)
        );
        assert_eq!(
            certificates_from_pem(&text).unwrap(),
            [CertificateDer::from(root)]
        );
        assert_eq!(retired_from_pem(&text).unwrap(), [retired]);
        assert!(retired_from_pem("-----BEGIN RETIRED CERTIFICATE-----\n!!!").is_err());
    }

    #[test]
    fn refused() {
        assert!(certificates_from_pem("").is_err());
        assert!(
            certificates_from_pem("-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n").is_err()
        );
        let error =
            private_key("-----BEGIN PRIVATE KEY-----\nc2VjcmV0!\n-----END PRIVATE KEY-----\n").unwrap_err();
        assert!(!error.to_string().contains("c2Vj"), "{error}");
    }
}
