//! `tombolo.federation.v1` on 15012.

use super::{Command, Federation, LINGER, Outgoing, QUEUE_MAX, of_transport, owner::next_conn};
use crate::{
    caller::{exporter_of, link_of},
    refusal::Refusal,
};
use std::{pin::Pin, sync::Arc};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::{Stream, StreamExt as _, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tombolo_federation::ConnId;
use tombolo_proto::tombolo::federation::v1::{self as pb, federation_server};
use tombolo_runtime::TaskGroup;
use tombolo_types::{Code, SpiffeId};
use tonic::{Request, Response, Status, Streaming};

/// Joins at once: whoever has an invite, or only tries, delays no member.
const JOINING_MAX: usize = 4;

/// The service.
#[derive(Debug, Clone)]
pub struct FederationService {
    federation: Federation,
    tasks: TaskGroup,
    joining: Arc<Semaphore>,
}

impl FederationService {
    /// Ready to be served.
    pub fn new(federation: Federation, tasks: TaskGroup) -> Self {
        Self {
            federation,
            tasks,
            joining: Arc::new(Semaphore::new(JOINING_MAX)),
        }
    }
}

type Messages = Pin<Box<dyn Stream<Item = Result<pb::PeerMessage, Status>> + Send>>;

/// Reads a stream to its end, or until the owner wants no more and the peer has had time to read what was sent.
pub(super) async fn read(
    federation: &Federation,
    conn: ConnId,
    mut messages: Streaming<pb::PeerMessage>,
    closing: CancellationToken,
) {
    let reading = async {
        loop {
            let message = match messages.message().await {
                Ok(Some(message)) => message,
                Ok(None) => return None,
                Err(status) => return garbage(&status),
            };
            if closing.is_cancelled() {
                continue;
            }
            let received = Command::Received(conn, Box::new(message));
            if federation.tell(received).await.is_err() {
                return None;
            }
        }
    };
    let cut = async {
        closing.cancelled().await;
        tokio::time::sleep(LINGER).await;
    };
    let broken = tokio::select! {
        broken = reading => broken,
        () = cut => None,
    };
    if !closing.is_cancelled() {
        let ended = match broken {
            Some(cause) => Command::Broken(conn, cause),
            None => Command::Closed(conn),
        };
        let _ = federation.tell(ended).await; // discovery stops
    }
}

/// What was no message, or too large a one; `None` for a connection that only ended.
fn garbage(status: &Status) -> Option<String> {
    let undecodable = matches!(
        status.code(),
        tonic::Code::Internal | tonic::Code::OutOfRange | tonic::Code::Unimplemented
    );
    (undecodable && !of_transport(status)).then(|| format!("what came is no message: {}", status.message()))
}

#[tonic::async_trait]
impl federation_server::Federation for FederationService {
    type PeerStream = Messages;

    async fn join(&self, request: Request<pb::JoinRequest>) -> Result<Response<pb::JoinResponse>, Status> {
        let link = link_of(&request);
        let exporter = exporter_of(&link)?;
        let busy = || Refusal::busy("too many clusters join at once; try again");
        let _place = self.joining.try_acquire().map_err(|_| busy())?;
        let request = Box::new(request.into_inner());
        let ours = super::join::mesh_domain_feature(&self.federation.mesh_domain);
        let mut response = self
            .federation
            .ask(|reply| Command::Redeem {
                request,
                exporter,
                from: link.from_where(),
                reply,
            })
            .await?;
        response.features.push(ours);
        Ok(Response::new(response))
    }

    async fn peer(
        &self,
        request: Request<Streaming<pb::PeerMessage>>,
    ) -> Result<Response<Self::PeerStream>, Status> {
        let link = link_of(&request);
        if let Some(cause) = &link.over {
            return Err(Refusal::new(Code::MemberLimit, cause).into());
        }
        let exporter = exporter_of(&link)?;
        let peer = link.member.as_ref().or(link.peer.as_ref());
        let id = peer.map(|peer| peer.id.clone());
        let discovery = id.filter(|id| *id == SpiffeId::discovery(id.trust_domain.clone()));
        let Some(id) = discovery else {
            return Err(Refusal::new(Code::PeerProof, "no certificate of a discovery").into());
        };
        let (messages_tx, messages_rx) = mpsc::channel(QUEUE_MAX);
        let (conn, closing) = (next_conn(), CancellationToken::new());
        let opened = Command::Opened {
            conn,
            dialled: None,
            trust_domain: id.trust_domain,
            exporter,
            outgoing: Outgoing {
                messages_tx,
                closing: closing.clone(),
            },
        };
        self.federation.tell(opened).await?;
        let (federation, messages) = (self.federation.clone(), request.into_inner());
        self.tasks.spawn_until_stopped("federation peer", async move {
            read(&federation, conn, messages, closing).await;
        });
        let answers: Messages = Box::pin(ReceiverStream::new(messages_rx).map(Ok));
        Ok(Response::new(answers))
    }
}
