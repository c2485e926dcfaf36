//! tombolo.admin.v1: the one API of CLI, console and tests. On the admin socket, and on 15012 for operators.

mod apply;
mod clusters;
mod export_conditions;
mod gateway;
mod near;
mod rules;
mod show;
pub mod socket;
mod trust;
mod vms;

use crate::{
    audit::{Audit, Line},
    bearer::{self, Bearer},
    caller::{Authenticators, Caller, link_of},
    enroll::{Context, Place},
    federation::Federation,
    listener::Link,
    refusal::Refusal,
    roles::{Thing, Verb},
    xds::Subscribers,
};
use std::{sync::Arc, time::Duration};
use tombolo_config::Kind;
use tombolo_proto::tombolo::admin::v1::{self as pb, admin_server::Admin};
use tombolo_runtime::TaskGroup;
use tombolo_types::{Code, check_label};
use tonic::{Request, Response, Status};

/// What the admin API works with.
#[derive(Debug)]
pub struct AdminContext {
    /// Store, fleet, authority, mesh.
    pub mesh: Arc<Context>,
    /// Bearer tokens.
    pub bearer: Arc<Bearer>,
    /// Who is subscribed.
    pub subscribers: Subscribers,
    /// Hosts that nobody may publish: agents need them to reach discovery.
    pub protected_hosts: Vec<String>,
    /// Unix ms of the start of this process.
    pub started_unix_ms: i64,
    /// Other clusters.
    pub federation: Federation,
    /// Where what must not end with its caller runs.
    pub tasks: TaskGroup,
}

/// The service, with the authenticators of its listener.
#[derive(Debug, Clone)]
pub struct AdminService {
    context: Arc<AdminContext>,
    authenticators: Authenticators,
}

/// An authenticated call and where it came from.
#[derive(Debug)]
struct Call {
    caller: Caller,
    link: Link,
}

impl AdminService {
    /// Ready to be served.
    pub fn new(context: Arc<AdminContext>, authenticators: Authenticators) -> Self {
        Self {
            context,
            authenticators,
        }
    }

    async fn call<T: Sync>(&self, request: &Request<T>) -> Result<Call, Status> {
        match self.authenticators.caller(request).await {
            Ok((caller @ Caller::Operator { .. }, link)) => Ok(Call { caller, link }),
            // At once: who holds no role learns nothing, not even from the form of a refusal what there is.
            Ok((caller, link)) => {
                let refusal = Refusal::new(Code::Forbidden, format_args!("{caller} holds no role"));
                let call = Call { caller, link };
                self.record(&call, verb_of::<T>(), "Admin", (None, None), Err(&refusal));
                Err(refusal.into())
            }
            Err(refusal) => {
                let call = Call {
                    caller: Caller::Anonymous,
                    link: link_of(request),
                };
                self.record(&call, "connect", "Admin", (None, None), Err(&refusal));
                Err(refusal.into())
            }
        }
    }

    fn audit(&self) -> &Audit {
        &self.context.mesh.audit
    }

    /// Checks a right; a refusal is audited.
    fn authorize(
        &self,
        call: &Call,
        verb: Verb,
        thing: Thing,
        namespace: Option<&str>,
        object: &str,
    ) -> Result<(), Refusal> {
        let result = call.caller.authorize(verb, thing, namespace);
        if let Err(refusal) = &result {
            self.record(call, &verb.to_string(), object, (None, None), Err(refusal));
        }
        result
    }

    fn record(
        &self,
        call: &Call,
        verb: &str,
        object: &str,
        (before, after): (Option<String>, Option<String>),
        result: Result<(), &Refusal>,
    ) {
        let line = Line {
            who: call.caller.to_string(),
            from: call.link.from_where(),
            verb: verb.into(),
            object: object.into(),
            before,
            after,
            result: result.map_or_else(|refusal| format!("refused: {refusal}"), |()| "ok".into()),
            ..Line::default()
        };
        let holds_a_role = matches!(call.caller, Caller::Operator { .. });
        if !holds_a_role && result.is_err() {
            self.audit().write_bounded(line)
        } else {
            self.audit().write(line)
        }
    }
}

/// What a request asks for, by its type: `ListVmsRequest` is `ListVms`.
fn verb_of<T>() -> &'static str {
    let name = std::any::type_name::<T>();
    let name = name.rsplit_once("::").map_or(name, |(_, last)| last);
    name.strip_suffix("Request").unwrap_or(name)
}

fn find_kind(name: &str) -> Result<Kind, Refusal> {
    Kind::find(name).map_err(|unknown| Refusal::new(Code::NotFound, unknown))
}

fn thing_of(kind: Kind) -> Result<Thing, Refusal> {
    Thing::of_kind(kind.name())
        .ok_or_else(|| Refusal::internal(format_args!("{kind} has no row in the role table")))
}

/// Empty text is "not given".
fn given(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn mesh(&self, request: Request<pb::MeshRequest>) -> Result<Response<pb::MeshResponse>, Status> {
        let call = self.call(&request).await?;
        self.authorize(&call, Verb::Read, Thing::Mesh, None, "Mesh")?;
        let mesh = &self.context.mesh;
        let place = Place {
            network: &mesh.settings.network,
            outbound_only: false,
            gateway: false,
        };
        let authority = mesh.trust.authority();
        let gateway_endpoints = mesh.gateway_endpoints(place).await.map_err(Refusal::from)?;
        Ok(Response::new(pb::MeshResponse {
            gateway_endpoints,
            version: env!("CARGO_PKG_VERSION").into(),
            trust_domain: mesh.settings.trust_domain.to_string(),
            mesh_domain: mesh.settings.mesh_domain.clone(),
            cluster_id: mesh.settings.cluster_id.clone(),
            network: mesh.settings.network.clone(),
            endpoints: mesh.endpoints.clone(),
            root_pin: authority.root_pin().to_vec(),
            roots_pem: authority.roots_pem().to_owned(),
            vip_prefixes: mesh.settings.plan.prefixes().to_vec(),
        }))
    }

    async fn list(&self, request: Request<pb::ListRequest>) -> Result<Response<pb::ListResponse>, Status> {
        let call = self.call(&request).await?;
        Ok(Response::new(self.list_objects(&call, request.get_ref()).await?))
    }

    async fn get(&self, request: Request<pb::GetRequest>) -> Result<Response<pb::Object>, Status> {
        let call = self.call(&request).await?;
        Ok(Response::new(self.get_object(&call, request.get_ref()).await?))
    }

    async fn apply(&self, request: Request<pb::ApplyRequest>) -> Result<Response<pb::ApplyResponse>, Status> {
        let call = self.call(&request).await?;
        Ok(Response::new(self.apply_objects(&call, request.get_ref()).await?))
    }

    async fn delete(
        &self,
        request: Request<pb::DeleteRequest>,
    ) -> Result<Response<pb::DeleteResponse>, Status> {
        let call = self.call(&request).await?;
        self.delete_object(&call, request.get_ref()).await?;
        Ok(Response::new(pb::DeleteResponse {}))
    }

    async fn list_vms(
        &self,
        request: Request<pb::ListVmsRequest>,
    ) -> Result<Response<pb::ListVmsResponse>, Status> {
        let call = self.call(&request).await?;
        Ok(Response::new(self.vms(&call, request.get_ref())?))
    }

    async fn revoke_vm(
        &self,
        request: Request<pb::RevokeVmRequest>,
    ) -> Result<Response<pb::RevokeVmResponse>, Status> {
        let call = self.call(&request).await?;
        let vm = self.revoke(&call, request.get_ref()).await?;
        Ok(Response::new(pb::RevokeVmResponse { vm: Some(vm) }))
    }

    async fn delete_vm(
        &self,
        request: Request<pb::DeleteVmRequest>,
    ) -> Result<Response<pb::DeleteVmResponse>, Status> {
        let call = self.call(&request).await?;
        self.forget(&call, &request.get_ref().vm).await?;
        Ok(Response::new(pb::DeleteVmResponse {}))
    }

    async fn readmit_vm(
        &self,
        request: Request<pb::ReadmitVmRequest>,
    ) -> Result<Response<pb::ReadmitVmResponse>, Status> {
        let call = self.call(&request).await?;
        let vm = self.readmit(&call, &request.get_ref().vm).await?;
        Ok(Response::new(pb::ReadmitVmResponse { vm: Some(vm) }))
    }

    async fn create_bearer(
        &self,
        request: Request<pb::CreateBearerRequest>,
    ) -> Result<Response<pb::CreateBearerResponse>, Status> {
        let call = self.call(&request).await?;
        let asked = request.get_ref();
        let object = format!("Bearer {}/{}", asked.namespace, asked.service_account);
        self.authorize(
            &call,
            Verb::Create,
            Thing::Bearer,
            Some(&asked.namespace),
            &object,
        )?;
        // It changes whom a client believes, which is no matter of a namespace.
        if asked.all_roots {
            self.authorize(&call, Verb::Create, Thing::Cluster, None, &object)?;
        }
        check_label("namespace", &asked.namespace).map_err(Refusal::invalid)?;
        let ttl = match u64::try_from(asked.ttl_seconds) {
            Ok(0) => bearer::TTL_DEFAULT,
            Ok(seconds) if Duration::from_secs(seconds) <= bearer::TTL_MAX => Duration::from_secs(seconds),
            _ => return Err(Refusal::invalid("a bearer token lives at most 24 h (86400 seconds)").into()),
        };
        tombolo_types::SpiffeId::new(
            self.context.mesh.settings.trust_domain.clone(),
            &asked.namespace,
            &asked.service_account,
        )
        .map_err(Refusal::invalid)?;
        let now = jiff::Timestamp::now();
        let now_unix = u64::try_from(now.as_second()).unwrap_or_default();
        let wanted = bearer::Asked {
            namespace: &asked.namespace,
            service_account: &asked.service_account,
            all_roots: asked.all_roots,
        };
        let token = self
            .context
            .bearer
            .issue(&wanted, ttl, now_unix)
            .map_err(Refusal::internal)?;
        self.record(&call, "create", &object, (None, None), Ok(()));
        let expires_unix_ms = now.as_millisecond() + i64::try_from(ttl.as_millis()).unwrap_or_default();
        Ok(Response::new(pb::CreateBearerResponse {
            token,
            expires_unix_ms,
        }))
    }

    async fn create_gateway_token(
        &self,
        request: Request<pb::CreateGatewayTokenRequest>,
    ) -> Result<Response<pb::CreateGatewayTokenResponse>, Status> {
        let call = self.call(&request).await?;
        let answer = self.gateway_token(&call, request.get_ref()).await?;
        Ok(Response::new(answer))
    }

    async fn audit(&self, request: Request<pb::AuditRequest>) -> Result<Response<pb::AuditResponse>, Status> {
        let call = self.call(&request).await?;
        self.authorize(&call, Verb::Read, Thing::Audit, None, "Audit")?;
        let (since, limit) = (request.get_ref().since_unix_ms, request.get_ref().limit);
        let mesh = Arc::clone(&self.context.mesh);
        let lines = tokio::task::spawn_blocking(move || mesh.audit.read(since, limit as usize))
            .await
            .map_err(|error| Status::internal(error.to_string()))?
            .map_err(Refusal::internal)?;
        Ok(Response::new(pb::AuditResponse { lines }))
    }

    async fn health(
        &self,
        request: Request<pb::HealthRequest>,
    ) -> Result<Response<pb::HealthResponse>, Status> {
        let call = self.call(&request).await?;
        self.authorize(&call, Verb::Read, Thing::Mesh, None, "Health")?;
        Ok(Response::new(self.health_now()))
    }

    async fn create_cluster_invite(
        &self,
        request: Request<pb::CreateClusterInviteRequest>,
    ) -> Result<Response<pb::CreateClusterInviteResponse>, Status> {
        let call = self.call(&request).await?;
        Ok(Response::new(self.create_invite(&call, request.get_ref()).await?))
    }

    async fn list_cluster_invites(
        &self,
        request: Request<pb::ListClusterInvitesRequest>,
    ) -> Result<Response<pb::ListClusterInvitesResponse>, Status> {
        let call = self.call(&request).await?;
        Ok(Response::new(self.invites(&call).await?))
    }

    async fn revoke_cluster_invite(
        &self,
        request: Request<pb::RevokeClusterInviteRequest>,
    ) -> Result<Response<pb::RevokeClusterInviteResponse>, Status> {
        let call = self.call(&request).await?;
        self.revoke_invite(&call, &request.get_ref().id).await?;
        Ok(Response::new(pb::RevokeClusterInviteResponse {}))
    }

    async fn join_cluster(
        &self,
        request: Request<pb::JoinClusterRequest>,
    ) -> Result<Response<pb::JoinClusterResponse>, Status> {
        let call = self.call(&request).await?;
        Ok(Response::new(self.join(&call, request.into_inner()).await?))
    }

    async fn list_clusters(
        &self,
        request: Request<pb::ListClustersRequest>,
    ) -> Result<Response<pb::ListClustersResponse>, Status> {
        let call = self.call(&request).await?;
        Ok(Response::new(self.clusters(&call, request.get_ref()).await?))
    }

    async fn remove_cluster(
        &self,
        request: Request<pb::RemoveClusterRequest>,
    ) -> Result<Response<pb::RemoveClusterResponse>, Status> {
        let call = self.call(&request).await?;
        self.remove(&call, &request.get_ref().cluster).await?;
        Ok(Response::new(pb::RemoveClusterResponse {}))
    }

    async fn grant_cluster(
        &self,
        request: Request<pb::GrantClusterRequest>,
    ) -> Result<Response<pb::GrantClusterResponse>, Status> {
        let call = self.call(&request).await?;
        self.grant(&call, request.get_ref()).await?;
        Ok(Response::new(pb::GrantClusterResponse {}))
    }

    async fn list_trust(
        &self,
        request: Request<pb::ListTrustRequest>,
    ) -> Result<Response<pb::ListTrustResponse>, Status> {
        let call = self.call(&request).await?;
        Ok(Response::new(self.trust(&call).await?))
    }

    async fn rotate_trust(
        &self,
        request: Request<pb::RotateTrustRequest>,
    ) -> Result<Response<pb::RotateTrustResponse>, Status> {
        let call = self.call(&request).await?;
        Ok(Response::new(self.rotate(&call, request.get_ref()).await?))
    }
    async fn migrate_trust(
        &self,
        request: Request<pb::MigrateTrustRequest>,
    ) -> Result<Response<pb::MigrateTrustResponse>, Status> {
        let call = self.call(&request).await?;
        Ok(Response::new(self.migrate(&call, request.get_ref()).await?))
    }
}
