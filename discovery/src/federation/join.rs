//! Joining: this cluster redeems an invite at another one. What fails leaves both sides as they were.

use super::{Command, Federation, dial, of_transport};
use crate::refusal::Refusal;
use std::time::{Duration, Instant};
use tombolo_federation::limits::MESSAGE_BYTES_MAX;
use tombolo_identity::{ConnectRefusal, pinned_client_config};
use tombolo_proto::tombolo::federation::v1 as pb;
use tombolo_proto::tombolo::federation::v1::federation_client::FederationClient;
use tombolo_types::{Code, InviteToken, SpiffeId};

/// The answer of the inviting side.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// The first stream to the inviting side; without it the join is taken back.
const FIRST_CONTACT_TIMEOUT: Duration = Duration::from_secs(12);
/// Between two looks whether it is there.
const LOOK: Duration = Duration::from_millis(50);
/// Bytes of an answer: all records of a full set.
const ANSWER_BYTES_MAX: usize = 64 * MESSAGE_BYTES_MAX;
/// How the joining side says that the invite stood in an argument, where everybody on its host could read it.
const IN_ARGUMENT: &str = "invite-in-argument";
/// Most of its life that such an invite may have left.
const ARGUMENT_LIFE_MAX: Duration = Duration::from_secs(3600);
/// How a side says its mesh domain: releases that cannot translate the names of another one refuse it here.
const MESH_DOMAIN: &str = "mesh-domain=";

pub(super) fn mesh_domain_feature(mesh_domain: &str) -> String {
    format!("{MESH_DOMAIN}{mesh_domain}")
}

/// An invite that could be read by others and lives on for long is not taken.
pub(super) fn check_argument(
    features: &[String],
    expires_unix_ms: i64,
    now_unix_ms: i64,
) -> Result<(), Refusal> {
    let left = expires_unix_ms.saturating_sub(now_unix_ms);
    let long = i64::try_from(ARGUMENT_LIFE_MAX.as_millis()).is_ok_and(|max| left > max);
    if long && features.iter().any(|feature| feature == IN_ARGUMENT) {
        return Err(Refusal::new(
            Code::TokenInArgument,
            format_args!(
                "the invite lives for another {} min, and may have been read already",
                left / 60_000
            ),
        ));
    }
    Ok(())
}

/// How an invite is redeemed.
#[derive(Debug, Clone, Copy, Default)]
pub struct JoinOptions {
    /// The operator was told what sharing a trust domain gives away.
    pub share_trust_domain: bool,
    /// The invite stood in an argument.
    pub from_argument: bool,
}

#[allow(
    clippy::wildcard_enum_match_arm,
    reason = "what is not named is a failure of TLS: the text says which"
)]
fn refusal_of(endpoint: &str, refusal: &ConnectRefusal) -> Refusal {
    let code = match refusal {
        ConnectRefusal::PinMismatch => Code::PinMismatch,
        ConnectRefusal::NotDiscovery { .. } => Code::NotDiscovery,
        ConnectRefusal::Expired { .. } | ConnectRefusal::NotYetValid { .. } => Code::ClockSkew,
        _ => Code::Unreachable,
    };
    Refusal::new(code, format_args!("{endpoint}: {refusal}"))
}

impl Federation {
    /// Redeems an invite and waits for the first stream to the inviting cluster, whose name is returned. Cancelled or
    /// refused before the answer, nothing was changed here; without a first stream everything is put back.
    ///
    /// # Errors
    /// When the inviting side cannot be reached, is not the one that the token names, or refuses.
    pub async fn join(&self, token: &InviteToken, options: JoinOptions) -> Result<String, Refusal> {
        let mut worst: Option<Refusal> = None;
        for endpoint in &token.endpoints {
            match self.join_at(endpoint, token, options).await {
                Ok(response) => return self.accept(response).await,
                Err(Attempt::Refused(refusal)) => return Err(refusal),
                // Somebody else's discovery is worse news than none.
                Err(Attempt::NotThere(refusal)) if refusal.code == Some(Code::Unreachable) => {
                    worst.get_or_insert(refusal);
                }
                Err(Attempt::NotThere(refusal)) => worst = Some(refusal),
            }
        }
        Err(worst.unwrap_or_else(|| Refusal::new(Code::InviteMalformed, "it names no endpoint")))
    }

    async fn join_at(
        &self,
        endpoint: &str,
        token: &InviteToken,
        options: JoinOptions,
    ) -> Result<pb::JoinResponse, Attempt> {
        let discovery = SpiffeId::discovery(token.trust_domain.clone());
        let pinned = pinned_client_config(token.root_pin, &discovery);
        let (tls, roots) = pinned.map_err(|error| Attempt::NotThere(Refusal::internal(error)))?;
        let connected = dial::connect(endpoint, &token.trust_domain, tls).await;
        let connected = connected.map_err(|error| {
            Attempt::NotThere(match roots.refusal() {
                Some(refusal) => refusal_of(endpoint, &refusal),
                None => Refusal::new(Code::Unreachable, format_args!("{endpoint}: {error}")),
            })
        })?;
        let dial::Connected {
            channel, exporter, ..
        } = connected;
        let boxed = Box::new(token.clone());
        let mut request = self
            .ask(|reply| Command::PrepareJoin {
                token: boxed,
                exporter,
                share_trust_domain: options.share_trust_domain,
                reply,
            })
            .await
            .map_err(Attempt::Refused)?;
        request.features.push(mesh_domain_feature(&self.mesh_domain));
        if options.from_argument {
            request.features.push(IN_ARGUMENT.into());
        }
        let mut client = FederationClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, client.join(request)).await;
        let answer = answer.map_err(|_| {
            let cause =
                format!("{endpoint}: no answer to the invite; nothing has changed here, and it works again");
            Attempt::NotThere(Refusal::new(Code::Unreachable, cause))
        })?;
        let response = answer.map_err(|status| {
            // The inviting side's own coded message.
            let refused = Refusal {
                code: Code::find(status.message().split(' ').next().unwrap_or_default()),
                status: status.code(),
                message: status
                    .message()
                    .chars()
                    .filter(|c| !c.is_control())
                    .take(1000)
                    .collect(),
            };
            if status.code() == tonic::Code::Unavailable || of_transport(&status) {
                Attempt::NotThere(Refusal::new(
                    Code::Unreachable,
                    format_args!(
                        "{endpoint}: {refused}; nothing has changed here, and the invite works again"
                    ),
                ))
            } else {
                Attempt::Refused(refused)
            }
        })?;
        Ok(response.into_inner())
    }

    async fn accept(&self, response: pb::JoinResponse) -> Result<String, Refusal> {
        let inviter = response.inviter.clone();
        self.ask(|reply| Command::Accept(Box::new(response), reply))
            .await?;
        let deadline = Instant::now() + FIRST_CONTACT_TIMEOUT;
        let mut last = String::new();
        while Instant::now() < deadline {
            let shown = self.show().await?;
            let member = shown
                .members
                .iter()
                .find(|member| *member.status.member.record.cluster == *inviter);
            if let Some(member) = member {
                if member.status.connected {
                    self.tell(Command::Settled).await?;
                    return Ok(inviter);
                }
                last.clone_from(&member.dial_failure);
            }
            tokio::time::sleep(LOOK).await;
        }
        self.ask(Command::Rollback).await?;
        let cause = if last.is_empty() {
            "no stream came up".into()
        } else {
            last
        };
        Err(Refusal::new(
            Code::Unreachable,
            format_args!(
                "{inviter} admitted this cluster, and then: {cause}; everything was put back here, and the same invite \
                 works again"
            ),
        ))
    }
}

enum Attempt {
    /// The next endpoint may do.
    NotThere(Refusal),
    /// No other endpoint would say anything else.
    Refused(Refusal),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invite_in_an_argument_is_short() {
        let told = vec![IN_ARGUMENT.to_owned()];
        check_argument(&told, 3_600_000, 0).unwrap();
        check_argument(&[], i64::MAX, 0).unwrap();
        let refused = check_argument(&told, 2 * 3_600_000, 0).unwrap_err();
        assert_eq!(refused.code, Some(Code::TokenInArgument));
    }
}
