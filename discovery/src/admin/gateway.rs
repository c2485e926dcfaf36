//! Tokens of gateways.

use super::{AdminService, Call, rules::check_new_token, show::shown};
use crate::{
    audit::sha256,
    enroll::group_of,
    objects,
    refusal::{Refusal, is_race},
    roles::{Thing, Verb},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use tombolo_config::{JoinTokenSpec, Kind, Metadata, Object, Resource};
use tombolo_proto::tombolo::admin::v1 as pb;
use tombolo_types::{Code, check_label};

/// Longest name of a network: it stands in names of objects.
const NETWORK_MAX: usize = 63;
/// Two operators may make the first token of a network at once.
const RACES_MAX: usize = 4;

impl AdminService {
    pub(super) async fn gateway_token(
        &self,
        call: &Call,
        request: &pb::CreateGatewayTokenRequest,
    ) -> Result<pb::CreateGatewayTokenResponse, Refusal> {
        let network: String = request.network.chars().take(NETWORK_MAX + 1).collect();
        let object = format!("Gateway {network:?}");
        self.authorize(call, Verb::Create, Thing::Gateway, None, &object)?;
        let made = self.make_gateway_token(call, request, &network).await;
        if let Err(refusal) = &made {
            self.record(call, "create", &object, (None, None), Err(refusal));
        }
        made
    }

    async fn make_gateway_token(
        &self,
        call: &Call,
        request: &pb::CreateGatewayTokenRequest,
        network: &str,
    ) -> Result<pb::CreateGatewayTokenResponse, Refusal> {
        let mesh = &self.context.mesh;
        if !network.is_empty() {
            check_label("network", network).map_err(Refusal::invalid)?;
        }
        // Discovery's own network has one name for gateways, whichever way it is written.
        let network = if network == mesh.settings.network {
            ""
        } else {
            network
        };
        let now = jiff::Timestamp::now().as_millisecond();
        let token = token(
            request,
            &group_of(&mesh.settings.trust_domain, network).metadata,
            now,
        )?;
        let mut raced = None;
        for _ in 0..RACES_MAX {
            let group = group_of(&mesh.settings.trust_domain, network);
            let (namespace, name) = (group.metadata.namespace.clone(), group.metadata.name.clone());
            let mut made = Vec::new();
            if mesh.objects.workload_group(&namespace, &name).await?.is_none() {
                made.push(Resource::WorkloadGroup(group));
            }
            if mesh
                .objects
                .get(Kind::JoinToken, &namespace, &token.metadata.name)
                .await?
                .is_some()
            {
                return Err(Refusal::new(
                    Code::AlreadyExists,
                    Resource::JoinToken(token).title(),
                ));
            }
            made.push(Resource::JoinToken(token.clone()));
            match mesh
                .objects
                .commit(made.iter().map(objects::create).collect())
                .await
            {
                Ok((stored, version)) => {
                    for resource in &made {
                        let after = Some(sha256(&objects::value_of(resource)));
                        self.record(call, "create", &resource.title(), (None, after), Ok(()));
                    }
                    mesh.fleet.wait_for(version).await;
                    let last = stored
                        .last()
                        .ok_or_else(|| Refusal::internal("nothing was stored"))?;
                    return Ok(pb::CreateGatewayTokenResponse {
                        token: Some(shown(objects::read(last)?, &mesh.fleet)),
                        namespace,
                        workload_group: name,
                    });
                }
                Err(error) if is_race(&error) => raced = Some(error.into()),
                Err(error) => return Err(error.into()),
            }
        }
        Err(raced.unwrap_or_else(|| Refusal::busy("try again")))
    }
}

/// The token, under the rules of every other one.
fn token(
    request: &pb::CreateGatewayTokenRequest,
    group: &Metadata,
    now_unix_ms: i64,
) -> Result<Object<JoinTokenSpec>, Refusal> {
    let (Ok(id), Ok(key)) = (
        <[u8; 16]>::try_from(request.token_id.as_slice()),
        <[u8; 32]>::try_from(request.public_key.as_slice()),
    ) else {
        return Err(Refusal::invalid("a token has an id of 16 bytes and a key of 32"));
    };
    let life = request.ttl_seconds.saturating_mul(1000);
    let spec = JoinTokenSpec {
        public_key: STANDARD.encode(key),
        workload_group: group.name.clone(),
        uses: request.uses,
        expires: tombolo_config::rfc3339(now_unix_ms.saturating_add(life)),
        cidr: request.cidr.clone(),
    };
    let name: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    let token = Object::<JoinTokenSpec>::new(Metadata::named(&group.namespace, name), spec);
    check_new_token(&token, now_unix_ms)?;
    // Its content is checked as that of every other one; where it lies is what this call is for.
    let mut elsewhere = token.clone();
    "default".clone_into(&mut elsewhere.metadata.namespace);
    let written = Resource::JoinToken(elsewhere).validate();
    let refused: Vec<String> = written
        .iter()
        .filter(|finding| !finding.warning)
        .map(ToString::to_string)
        .collect();
    if refused.is_empty() {
        Ok(token)
    } else {
        Err(Refusal::new(Code::InvalidResource, refused.join("; ")))
    }
}
