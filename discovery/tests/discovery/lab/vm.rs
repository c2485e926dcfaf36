//! VMs and their join tokens.

use super::{Ads, Lab};
use std::sync::Arc;
use tombolo_identity::{DeviceKey, JoinKey, WorkloadIdentity, generate_csr, proof};
use tombolo_proto::tombolo::v1::{self as pb, enrollment_client::EnrollmentClient};

pub(crate) struct Token {
    pub(crate) id: [u8; 16],
    pub(crate) key: JoinKey,
}

impl Token {
    pub(crate) fn name(&self) -> String {
        self.id.iter().map(|b| format!("{b:02x}")).collect()
    }
}

/// A VM: its device key, and what it has been told.
pub(crate) struct Host {
    pub(crate) key: DeviceKey,
    pub(crate) csr: tombolo_identity::KeyAndCsr,
    pub(crate) registration: pb::Registration,
    pub(crate) identity: Option<Arc<WorkloadIdentity>>,
    pub(crate) warnings: Vec<String>,
    /// What it says of itself.
    pub(crate) addresses: Vec<String>,
}

impl Host {
    pub(crate) fn new() -> Self {
        Self {
            key: DeviceKey::generate().unwrap(),
            csr: generate_csr(None).unwrap(),
            registration: pb::Registration::default(),
            identity: None,
            warnings: Vec::new(),
            addresses: vec!["10.1.2.3".into()],
        }
    }

    pub(crate) fn request(&self, token: &Token, exporter: &[u8; 32]) -> pb::EnrollRequest {
        let public = self.key.public_key();
        let message = proof::enroll(exporter, &token.id, &public, &self.csr.csr_pem);
        pb::EnrollRequest {
            hello: Some(pb::Hello {
                version: "0.1.0".into(),
                features: Vec::new(),
            }),
            token_id: token.id.to_vec(),
            device_public_key: public,
            token_signature: token.key.sign(&message),
            device_signature: self.key.sign(&message),
            csr: self.csr.csr_pem.clone(),
            hostname: "vm-a".into(),
            addresses: self.addresses.clone(),
            ..Default::default()
        }
    }

    pub(crate) async fn enrol(&mut self, lab: &Lab, token: &Token) -> Result<(), tonic::Status> {
        let (channel, exporter) = lab.dial(None).await;
        let request = self.request(token, &exporter);
        let response = EnrollmentClient::new(channel).enroll(request).await?.into_inner();
        self.take(response.registration, &response.cert_chain);
        self.warnings = response.warnings;
        Ok(())
    }

    pub(crate) fn take(&mut self, registration: Option<pb::Registration>, chain: &[String]) {
        self.registration = registration.unwrap();
        self.identity = Some(Arc::new(
            WorkloadIdentity::from_issued(chain, &self.csr.key_pem).unwrap().0,
        ));
    }

    pub(crate) fn serial(&self) -> Vec<u8> {
        self.identity.as_ref().unwrap().serial().to_vec()
    }

    /// Renews with the key that it holds, at a generation.
    pub(crate) async fn renew(&mut self, lab: &Lab, generation: u64) -> Result<(), tonic::Status> {
        let (channel, exporter) = lab.dial(None).await;
        let device = self.registration.device_id.parse().unwrap();
        let message = proof::renew(&exporter, device, generation, &self.csr.csr_pem);
        let request = pb::RenewRequest {
            device_id: self.registration.device_id.clone(),
            generation,
            csr: self.csr.csr_pem.clone(),
            device_signature: self.key.sign(&message),
            ..Default::default()
        };
        let response = EnrollmentClient::new(channel).renew(request).await?.into_inner();
        self.take(response.registration, &response.cert_chain);
        Ok(())
    }

    pub(crate) fn new_csr(&mut self) {
        self.csr = generate_csr(None).unwrap();
    }

    pub(crate) fn node(&self) -> tombolo_proto::envoy::config::core::v3::Node {
        let registration = &self.registration;
        node(&[
            ("NAME", &registration.workload_name),
            ("NAMESPACE", &registration.namespace),
            ("SERVICE_ACCOUNT", &registration.service_account),
            ("INSTANCE_IPS", &self.addresses.join(",")),
        ])
    }

    pub(crate) async fn ads(&self, lab: &Lab) -> Ads {
        let (channel, _) = lab.dial(self.identity.clone()).await;
        Ads::open(channel, self.node(), None).await
    }
}

pub(crate) fn node(pairs: &[(&str, &str)]) -> tombolo_proto::envoy::config::core::v3::Node {
    let value = |text: &str| prost_types::Value {
        kind: Some(prost_types::value::Kind::StringValue(text.to_owned())),
    };
    let fields = pairs.iter().map(|(k, v)| ((*k).to_owned(), value(v))).collect();
    tombolo_proto::envoy::config::core::v3::Node {
        id: "sidecar~1.1.1.1~x.shop~shop.svc.cluster.local".into(),
        metadata: Some(prost_types::Struct { fields }),
        ..Default::default()
    }
}
