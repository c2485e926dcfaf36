//! Clusters over loopback and what operators do with them.

use crate::lab::*;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use tombolo_discovery::config::Config;
use tombolo_identity::JoinKey;
use tombolo_proto::{
    istio::workload::{Address, Workload, address::Type},
    tombolo::admin::v1 as admin,
    type_url, unpack,
};
use tombolo_types::InviteToken;
use zeroize::Zeroizing;

pub(crate) fn free_port() -> u16 {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap().port()
}

/// A discovery with a trust domain of its own, at a port that stays over a restart.
pub(crate) async fn cluster(name: &str) -> Lab {
    cluster_with(name, |_| ()).await
}

pub(crate) async fn cluster_with(name: &str, edit: impl FnOnce(&mut Config)) -> Lab {
    let mut lab = founded(name, edit);
    lab.boot().await;
    lab
}

/// The same as a process of its own.
pub(crate) async fn process(name: &str, edit: impl FnOnce(&mut Config)) -> Lab {
    let mut lab = founded(name, edit);
    lab.spawn().await;
    lab
}

pub(crate) fn founded(name: &str, edit: impl FnOnce(&mut Config)) -> Lab {
    let at = format!("127.0.0.1:{}", free_port());
    Lab::found_with(|config| {
        config.trust_domain = format!("{name}.example");
        config.listen = at.parse().unwrap();
        config.advertise = vec![at];
        edit(config);
    })
}

pub(crate) struct Invite {
    pub(crate) request: admin::CreateClusterInviteRequest,
    pub(crate) seed: Zeroizing<[u8; 32]>,
}

impl Invite {
    pub(crate) fn of(cluster: &str) -> Self {
        let seed = Zeroizing::new(rand::random());
        let request = admin::CreateClusterInviteRequest {
            invite_id: rand::random::<[u8; 16]>().to_vec(),
            public_key: JoinKey::from_seed(&seed).public_key().to_vec(),
            cluster: cluster.into(),
            trust_domain: format!("{cluster}.example"),
            namespaces: vec!["shop".into()],
            ..Default::default()
        };
        Self { request, seed }
    }

    pub(crate) async fn make(&self, lab: &Lab) -> Result<String, tonic::Status> {
        self.token(lab).await.map(|token| token.encode().to_string())
    }

    pub(crate) async fn token(&self, lab: &Lab) -> Result<InviteToken, tonic::Status> {
        let request = self.request.clone();
        let made = lab
            .admin()
            .await
            .create_cluster_invite(request)
            .await?
            .into_inner();
        let token = InviteToken {
            id: self.request.invite_id.as_slice().try_into().unwrap(),
            root_pin: made.root_pin.as_slice().try_into().unwrap(),
            seed: self.seed.clone(),
            trust_domain: made.trust_domain.parse().unwrap(),
            cluster: self.request.cluster.clone(),
            endpoints: made.endpoints,
        };
        Ok(token)
    }
}

pub(crate) async fn join(lab: &Lab, token: &str) -> Result<admin::JoinClusterResponse, tonic::Status> {
    let request = admin::JoinClusterRequest {
        token: token.into(),
        ..Default::default()
    };
    let answer = lab.admin().await.join_cluster(request).await?;
    Ok(answer.into_inner())
}

/// `inviter` invites `lab` of this name, which joins.
pub(crate) async fn admit(inviter: &Lab, lab: &Lab, name: &str) {
    let token = Invite::of(name).make(inviter).await.unwrap();
    let joined = join(lab, &token).await.unwrap();
    assert_eq!(joined.cluster, name);
}

pub(crate) async fn clusters(lab: &Lab) -> Vec<admin::Cluster> {
    let request = admin::ListClustersRequest::default();
    let listed = lab.admin().await.list_clusters(request).await.unwrap();
    listed.into_inner().clusters
}

pub(crate) async fn state(lab: &Lab, name: &str) -> Option<String> {
    let all = clusters(lab).await;
    all.into_iter().find(|c| c.name == name).map(|c| c.state)
}

pub(crate) async fn wait_state(lab: &Lab, name: &str, wanted: &str) {
    lab.wait_for(&format!("{name} is {wanted}"), async || {
        state(lab, name).await.as_deref() == Some(wanted)
    })
    .await;
}

pub(crate) async fn remove(lab: &Lab, cluster: &str) -> Result<(), tonic::Status> {
    let request = admin::RemoveClusterRequest {
        cluster: cluster.into(),
    };
    lab.admin().await.remove_cluster(request).await.map(drop)
}

/// Another name of a member's trust domain.
pub(crate) async fn add_name(lab: &Lab, cluster: &str, name: &str) -> Result<(), tonic::Status> {
    let request = admin::GrantClusterRequest {
        cluster: cluster.into(),
        add_trust_domain: name.into(),
        ..Default::default()
    };
    lab.admin().await.grant_cluster(request).await.map(drop)
}

/// A name of a member's trust domain goes.
pub(crate) async fn drop_name(
    lab: &Lab,
    cluster: &str,
    name: &str,
    force: bool,
) -> Result<(), tonic::Status> {
    let request = admin::GrantClusterRequest {
        cluster: cluster.into(),
        drop_trust_domain: name.into(),
        force,
        ..Default::default()
    };
    lab.admin().await.grant_cluster(request).await.map(drop)
}

pub(crate) fn exported(name: &str) -> Value {
    let mut service = service(name);
    service["metadata"]["labels"] = json!({ "istio.io/global": "true" });
    service
}

pub(crate) fn entry(name: &str, weight: u32) -> Value {
    object(
        "networking.istio.io/v1",
        "WorkloadEntry",
        &format!("{name}-1"),
        json!({ "address": "10.0.0.7", "serviceAccount": name, "weight": weight,
                "labels": { "app": name, "networking.istio.io/tunnel": "http" } }),
    )
}

/// Workloads of a service that are in other clusters, as this cluster's subscribers are told.
pub(crate) fn imported(lab: &Lab, name: &str) -> Vec<Workload> {
    let world = lab.running().fleet.world().load();
    let addresses = world.resources(type_url::ADDRESS).unwrap();
    let addresses = addresses.values().map(|compiled| {
        let address: Address = unpack(&compiled.any).unwrap();
        address
    });
    let workloads = addresses.filter_map(|address| match address.r#type {
        Some(Type::Workload(workload)) => Some(workload),
        _ => None,
    });
    let of_service = |workload: &Workload| {
        workload.uid.contains("/SplitHorizonWorkload/") && workload.canonical_name == name
    };
    workloads.filter(of_service).collect()
}

pub(crate) async fn wait_imported(lab: &Lab, name: &str, capacity: u32) {
    lab.wait_for(&format!("{name} with capacity {capacity}"), async || {
        imported(lab, name).iter().any(|w| w.capacity == Some(capacity))
    })
    .await;
}

pub(crate) fn bundles(lab: &Lab) -> BTreeSet<String> {
    let world = lab.running().fleet.world().load();
    let bundles = world.resources(type_url::TRUST_BUNDLE).unwrap();
    bundles.keys().map(|name| name.to_string()).collect()
}

/// What `tombolo cluster status` shows of a cluster.
pub(crate) async fn status(lab: &Lab, name: &str) -> Option<admin::Cluster> {
    clusters(lab)
        .await
        .into_iter()
        .find(|cluster| cluster.name == name)
}

/// Waits until the status of a cluster names a code that was refused of it, and the audit log with it.
pub(crate) async fn wait_refused(lab: &Lab, name: &str, code: &str) {
    lab.wait_for(&format!("{code} of {name}"), async || {
        let shown = status(lab, name).await;
        shown.is_some_and(|cluster| {
            cluster
                .refused
                .iter()
                .any(|refused| refused.message.starts_with(code))
        })
    })
    .await;
    let log = lab.audit_log();
    let who = format!("cluster {name}");
    assert!(
        log.lines().any(|line| line.contains(code) && line.contains(&who)),
        "{code} of {name} is not in the audit log"
    );
}
