use crate::{lab::*, xds::bearer};
use std::sync::Arc;
use tombolo_identity::{WorkloadIdentity, generate_csr};
use tombolo_proto::istio::v1::auth::{
    IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
};

struct Asked<'a> {
    bearer: Option<&'a str>,
    identity: Option<Arc<WorkloadIdentity>>,
    ttl: i64,
    impersonate: Option<&'a str>,
}

async fn ask(lab: &Lab, asked: Asked<'_>) -> Result<(WorkloadIdentity, Vec<String>), tonic::Status> {
    let (channel, _) = lab.dial(asked.identity).await;
    // The CSR asks to be somebody else: nobody cares.
    let wanted = "spiffe://mesh.example/ns/shop/sa/payments".parse().unwrap();
    let csr = generate_csr(Some(&wanted)).unwrap();
    let metadata = asked.impersonate.map(|id| prost_types::Struct {
        fields: [(
            "ImpersonatedIdentity".to_owned(),
            prost_types::Value {
                kind: Some(prost_types::value::Kind::StringValue(id.into())),
            },
        )]
        .into(),
    });
    let mut request = tonic::Request::new(IstioCertificateRequest {
        csr: csr.csr_pem.clone(),
        validity_duration: asked.ttl,
        metadata,
    });
    if let Some(token) = asked.bearer {
        request
            .metadata_mut()
            .insert("authorization", format!("Bearer {token}").parse().unwrap());
    }
    let chain = IstioCertificateServiceClient::new(channel)
        .create_certificate(request)
        .await?
        .into_inner()
        .cert_chain;
    let (identity, _) = WorkloadIdentity::from_issued(&chain, &csr.key_pem).unwrap();
    Ok((identity, chain))
}

fn plain() -> Asked<'static> {
    Asked {
        bearer: None,
        identity: None,
        ttl: 0,
        impersonate: None,
    }
}

#[tokio::test]
async fn the_identity_is_the_callers() {
    let lab = Lab::start().await;
    lab.group("catalog").await;
    let host = lab.enrol("catalog").await;
    let token = bearer(&lab, "shop", "legacy").await;
    let (identity, chain) = ask(
        &lab,
        Asked {
            bearer: Some(&token),
            ..plain()
        },
    )
    .await
    .unwrap();
    assert_eq!(
        identity.id().to_string(),
        "spiffe://mesh.example/ns/shop/sa/legacy"
    );
    assert_eq!((identity.device(), chain.len()), (None, 2), "leaf and root");
    assert_eq!(identity.not_after() - identity.not_before(), 24 * 3600 + 120);
    // A certificate goes before a token, and an expired or foreign token beside it does no harm.
    let both = |identity| Asked {
        bearer: Some("nonsense"),
        identity,
        ..plain()
    };
    let (legacy, _) = ask(&lab, both(Some(Arc::new(identity)))).await.unwrap();
    assert_eq!(legacy.id().to_string(), "spiffe://mesh.example/ns/shop/sa/legacy");
    // A device renews by its device key: its certificate alone would let a clone live on unnoticed.
    let status = ask(&lab, both(host.identity.clone()))
        .await
        .map(drop)
        .unwrap_err();
    assert_eq!(status.code(), tonic::Code::PermissionDenied, "{status:?}");
}

#[tokio::test]
async fn refusals_in_istiods_words() {
    let lab = Lab::start().await;
    let token = bearer(&lab, "shop", "x").await;
    let refused = async |asked: Asked<'_>| {
        let status = ask(&lab, asked).await.map(drop).unwrap_err();
        (status.code(), status.message().to_owned())
    };
    let unauthenticated = (
        tonic::Code::Unauthenticated,
        "request authenticate failure".to_owned(),
    );
    assert_eq!(refused(plain()).await, unauthenticated);
    assert_eq!(
        refused(Asked {
            bearer: Some("nonsense"),
            ..plain()
        })
        .await,
        unauthenticated
    );
    let other = Some("spiffe://mesh.example/ns/shop/sa/payments");
    let (code, text) = refused(Asked {
        bearer: Some(&token),
        impersonate: other,
        ..plain()
    })
    .await;
    assert_eq!(
        (code, text.as_str()),
        (
            tonic::Code::Unauthenticated,
            "request impersonation authentication failure"
        )
    );
    let (code, _) = refused(Asked {
        bearer: Some(&token),
        ttl: 91 * 24 * 3600,
        ..plain()
    })
    .await;
    assert_eq!(
        code,
        tonic::Code::InvalidArgument,
        "too long a life is refused, not cut"
    );
    assert!(
        ask(
            &lab,
            Asked {
                bearer: Some(&token),
                impersonate: Some(""),
                ttl: 3600,
                ..plain()
            }
        )
        .await
        .is_ok()
    );
}

#[tokio::test]
async fn no_identities_of_the_system() {
    let lab = Lab::start().await;
    let request =
        |namespace: &str, account: &str, ttl| tombolo_proto::tombolo::admin::v1::CreateBearerRequest {
            namespace: namespace.into(),
            service_account: account.into(),
            ttl_seconds: ttl,
            all_roots: false,
        };
    let mut admin = lab.admin().await;
    let status = admin
        .create_bearer(request("tombolo-system", "discovery", 0))
        .await
        .unwrap_err();
    assert!(status.message().starts_with("TMB0206"), "{status:?}");
    for (namespace, account, ttl) in [
        ("shop", "x", 86_401),
        ("shop", "x", -1),
        ("shop", "", 0),
        ("Shop", "x", 0),
    ] {
        assert!(
            admin
                .create_bearer(request(namespace, account, ttl))
                .await
                .is_err(),
            "{namespace} {account} {ttl}"
        );
    }
}
