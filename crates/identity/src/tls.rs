//! The TLS settings of every connection of the mesh, made in one place.

use crate::{
    IdentityError, LiveIdentity,
    live::{Presents, PresentsWithRoots},
    pinned::{PinnedRoots, PinnedServer},
    verify::{self, Usage},
};
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, Error, ServerConfig, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
    server::{
        NoServerSessionStorage, ResolvesServerCert,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use rustls_pki_types::{CertificateDer, IpAddr, Ipv4Addr, ServerName, UnixTime};
use std::sync::{Arc, LazyLock};
use tombolo_types::{SpiffeId, TrustDomain};

/// ALPN of HBONE and of gRPC. Source: ztunnel offers and takes exactly this one.
const ALPN_H2: &[u8] = b"h2";
/// What stands before the trust domain in the server name of control connections.
pub(crate) const CONTROL_PREFIX: &str = "discovery.";

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    Arc::new(CryptoProvider {
        // 128 bits first: fewer rounds per block. ztunnel takes these two and no other.
        cipher_suites: vec![
            aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
            aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
        ],
        kx_groups: vec![
            aws_lc_rs::kx_group::X25519MLKEM768,
            aws_lc_rs::kx_group::X25519,
            aws_lc_rs::kx_group::SECP256R1,
            aws_lc_rs::kx_group::SECP384R1,
        ],
        ..aws_lc_rs::default_provider()
    })
});

/// The cryptography of the mesh: TLS 1.3 with AES-GCM, post-quantum key exchange (X25519MLKEM768) preferred.
///
/// It is passed to every configuration: with two providers in one program rustls has no default.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::clone(&PROVIDER)
}

/// HBONE, accepting side: a client certificate is demanded and must lead to a root of its own trust domain with EKU
/// clientAuth. ALPN `h2`; a client that offers no ALPN is let in, one that offers only others is refused.
///
/// # Errors
/// When the TLS library refuses the settings.
pub fn hbone_server_config(live: &Arc<LiveIdentity>) -> Result<ServerConfig, IdentityError> {
    server(
        Presents(Arc::clone(live)),
        PeerClient {
            live: Arc::clone(live),
            mandatory: true,
        },
    )
}

/// 15012, accepting side: a client certificate is optional, but one that is given must verify (an expired one fails
/// the handshake). The chain carries the roots, for clients that know one by its pin.
///
/// # Errors
/// When the TLS library refuses the settings.
pub fn discovery_server_config(live: &Arc<LiveIdentity>) -> Result<ServerConfig, IdentityError> {
    server(
        PresentsWithRoots(Arc::clone(live)),
        PeerClient {
            live: Arc::clone(live),
            mandatory: false,
        },
    )
}

/// As [`discovery_server_config`], with other roots for clients than for what it presents: discoveries of other
/// clusters come to the same port. Who of them may do what is for the caller to tell.
///
/// # Errors
/// When the TLS library refuses the settings.
pub fn federated_server_config(
    live: &Arc<LiveIdentity>,
    trusted: &Arc<LiveIdentity>,
) -> Result<ServerConfig, IdentityError> {
    server(
        PresentsWithRoots(Arc::clone(live)),
        PeerClient {
            live: Arc::clone(trusted),
            mandatory: false,
        },
    )
}

/// HBONE, dialling side: the server must be exactly one of `expected`; an empty list lets nobody in. No server name
/// is sent: pass [`hbone_server_name`].
///
/// # Errors
/// When the TLS library refuses the settings.
pub fn hbone_client_config(
    live: &Arc<LiveIdentity>,
    expected: Vec<SpiffeId>,
) -> Result<ClientConfig, IdentityError> {
    let verifier = PeerServer {
        live: Arc::clone(live),
        expected,
    };
    let mut config = client(verifier)?.with_client_cert_resolver(Arc::new(Presents(Arc::clone(live))));
    settle(&mut config);
    config.enable_sni = false;
    Ok(config)
}

/// Control connections of an enrolled agent: the server must be exactly `discovery`. Pass [`control_server_name`].
/// Without `present_certificate` no certificate is offered: a device whose certificate has expired proves its device
/// key instead.
///
/// # Errors
/// When the TLS library refuses the settings.
pub fn control_client_config(
    live: &Arc<LiveIdentity>,
    discovery: &SpiffeId,
    present_certificate: bool,
) -> Result<ClientConfig, IdentityError> {
    let builder = client(PeerServer {
        live: Arc::clone(live),
        expected: vec![discovery.clone()],
    })?;
    let mut config = if present_certificate {
        builder.with_client_cert_resolver(Arc::new(Presents(Arc::clone(live))))
    } else {
        builder.with_no_client_auth()
    };
    settle(&mut config);
    Ok(config)
}

/// The first connection, when all that is known of discovery is a join token: the presented chain must hold a
/// certificate whose key has the pin, discovery's certificate must lead to it and be exactly `discovery`'s. The second
/// value gives the root that the pin stood for once a handshake succeeded, and why the last one was refused.
///
/// # Errors
/// When the TLS library refuses the settings.
pub fn pinned_client_config(
    pin: [u8; 32],
    discovery: &SpiffeId,
) -> Result<(ClientConfig, PinnedRoots), IdentityError> {
    let roots = PinnedRoots::default();
    let mut config = client(PinnedServer::new(pin, discovery.clone(), roots.clone()))?.with_no_client_auth();
    settle(&mut config);
    Ok((config, roots))
}

/// The server name for HBONE connections. It is never sent and never checked; rustls wants one.
pub fn hbone_server_name() -> ServerName<'static> {
    ServerName::IpAddress(IpAddr::V4(Ipv4Addr::from([0, 0, 0, 0])))
}

/// The server name of control connections, `discovery.<trust domain>`, whatever address is dialled: gateways tell by
/// it whom a connection on a shared port is for.
///
/// # Errors
/// When the trust domain is too long to have a name below it (over 243 characters).
pub fn control_server_name(trust_domain: &TrustDomain) -> Result<ServerName<'static>, IdentityError> {
    ServerName::try_from(format!("{CONTROL_PREFIX}{trust_domain}"))
        .map_err(|_| IdentityError::Tls(format!("{CONTROL_PREFIX}{trust_domain} is no DNS name")))
}

/// The trust domain that a client asks for with the server name of a control connection.
pub fn asked_trust_domain(server_name: &str) -> Option<TrustDomain> {
    server_name.strip_prefix(CONTROL_PREFIX)?.parse().ok()
}

fn server(
    resolver: impl ResolvesServerCert + 'static,
    verifier: PeerClient,
) -> Result<ServerConfig, IdentityError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(tls)?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(resolver));
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    // ztunnel asks for 256 bits first; it takes 128 just as well.
    config.ignore_client_order = true;
    // A resumed session would carry an identity past its revocation and past a change of roots.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config)
}

type ClientBuilder = rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>;

fn client(verifier: impl ServerCertVerifier + 'static) -> Result<ClientBuilder, IdentityError> {
    Ok(ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(tls)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier)))
}

fn settle(config: &mut ClientConfig) {
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    // A resumed handshake does not ask the verifier.
    config.resumption = Resumption::disabled();
}

fn tls(error: Error) -> IdentityError {
    IdentityError::Tls(error.to_string())
}

/// Checks clients against the roots of this moment.
#[derive(Debug)]
struct PeerClient {
    live: Arc<LiveIdentity>,
    mandatory: bool,
}

impl ClientCertVerifier for PeerClient {
    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    /// No hints: they would change with the roots, and a client of ours has one certificate.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        verify::peer(&self.live.load(), leaf, intermediates, now, Usage::Client, None)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(
            message,
            certificate,
            signature,
            &PROVIDER.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &PROVIDER.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        PROVIDER.signature_verification_algorithms.supported_schemes()
    }
}

/// Checks servers against the roots of this moment and a fixed list of identities.
#[derive(Debug)]
struct PeerServer {
    live: Arc<LiveIdentity>,
    expected: Vec<SpiffeId>,
}

impl ServerCertVerifier for PeerServer {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        verify::peer(
            &self.live.load(),
            leaf,
            intermediates,
            now,
            Usage::Server,
            Some(&self.expected),
        )?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(
            message,
            certificate,
            signature,
            &PROVIDER.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &PROVIDER.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        PROVIDER.signature_verification_algorithms.supported_schemes()
    }
}
