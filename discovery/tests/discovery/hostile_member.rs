//! A member that breaks the rules: the keys of a real one in the hands of somebody who speaks the protocol.

use crate::lab::*;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tombolo_federation::{Grant, MemberKey, Record};
use tombolo_identity::{
    JoinKey, LiveIdentity, WorkloadIdentity, client_exporter, control_client_config, control_server_name,
};
use tombolo_proto::tombolo::federation::v1::{
    self as pb, federation_client::FederationClient, peer_message::Message,
};
use tombolo_types::{InviteToken, SpiffeId, TrustDomain};
use tonic::transport::Channel;

/// Above the epoch of every honest start in a test.
static EPOCH: AtomicU64 = AtomicU64::new(1 << 20);

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Fields of what is signed, as the protocol writes them.
struct Signed(Vec<u8>);

impl Signed {
    fn new(what: &str) -> Self {
        Self(format!("tombolo {what}\0\x01").into_bytes())
    }

    fn bytes(mut self, value: &[u8]) -> Self {
        self.0
            .extend_from_slice(&u32::try_from(value.len()).unwrap().to_be_bytes());
        self.0.extend_from_slice(value);
        self
    }

    fn number(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_be_bytes());
        self
    }

    fn flag(mut self, value: bool) -> Self {
        self.0.push(u8::from(value));
        self
    }
}

/// A certificate of an identity by the CA of a lab.
pub(crate) fn certificate(lab: &Lab, id: &SpiffeId) -> Arc<WorkloadIdentity> {
    let authority =
        tombolo_ca::Authority::open(&lab.config.state_dir.join("ca"), &lab.trust_domain()).unwrap();
    // Its keys make identities of any name.
    let authority = authority.publishing(&tombolo_ca::Publication {
        trust_domain: Some(id.trust_domain.clone()),
        ..tombolo_ca::Publication::default()
    });
    let authority = authority.unwrap();
    let life = Duration::from_secs(600);
    let issued = authority.issue_server(id, &[], &[], life, std::time::SystemTime::now());
    Arc::new(issued.unwrap())
}

/// A stream to a discovery, with what belongs to its connection.
pub(crate) struct Stream<M> {
    pub(crate) messages: tokio::sync::mpsc::Sender<M>,
    pub(crate) answers: tonic::Streaming<pb::PeerMessage>,
    pub(crate) exporter: [u8; 32],
}

/// A connection as the discovery of another cluster makes it.
pub(crate) async fn peer_channel(
    to: &Lab,
    identity: Arc<WorkloadIdentity>,
) -> Result<(Channel, [u8; 32]), String> {
    let live = LiveIdentity::new(Some(identity), vec![to.bundle()]);
    let discovery = SpiffeId::discovery(to.trust_domain());
    let tls = control_client_config(&live, &discovery, true).unwrap();
    let socket = tokio::net::TcpStream::connect(to.address()).await.unwrap();
    let name = control_server_name(&to.trust_domain()).unwrap();
    let stream = tokio_rustls::TlsConnector::from(Arc::new(tls))
        .connect(name, socket)
        .await
        .map_err(|error| error.to_string())?;
    let exporter = client_exporter(stream.get_ref().1).unwrap();
    let mut once = Some(stream);
    let channel = tonic::transport::Endpoint::from_static("http://discovery")
        .connect_with_connector(tower::service_fn(move |_: http::Uri| {
            let stream = once
                .take()
                .ok_or_else(|| std::io::Error::other("one connection only"));
            async move { stream.map(hyper_util::rt::TokioIo::new) }
        }))
        .await
        .map_err(|error| error.to_string())?;
    Ok((channel, exporter))
}

/// A `Peer` stream of any messages; those of the protocol are [`pb::PeerMessage`].
pub(crate) async fn stream_on<M: prost::Message + Default + 'static>(
    channel: Channel,
    exporter: [u8; 32],
) -> Result<Stream<M>, String> {
    let (messages, receiver) = tokio::sync::mpsc::channel(16);
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.map_err(|error| error.to_string())?;
    let path = http::uri::PathAndQuery::from_static("/tombolo.federation.v1.Federation/Peer");
    let codec = tonic_prost::ProstCodec::<M, pb::PeerMessage>::default();
    let request = tonic::Request::new(tokio_stream::wrappers::ReceiverStream::new(receiver));
    let answers = client.streaming(request, path, codec).await;
    let answers = answers.map_err(|status| status.message().to_owned())?;
    Ok(Stream {
        messages,
        answers: answers.into_inner(),
        exporter,
    })
}

/// Both of the above.
pub(crate) async fn peer_stream<M: prost::Message + Default + 'static>(
    to: &Lab,
    identity: Arc<WorkloadIdentity>,
) -> Result<Stream<M>, String> {
    let (channel, exporter) = peer_channel(to, identity).await?;
    stream_on(channel, exporter).await
}

impl<M> Stream<M> {
    /// The next message; `None` when the stream has ended.
    pub(crate) async fn next(&mut self) -> Option<Message> {
        let next = tokio::time::timeout(Duration::from_secs(15), self.answers.message()).await;
        let message = next.expect("a message, or the end").ok().flatten()?;
        message.message
    }

    /// Reads to the end: the code of the refusal, if one was said.
    pub(crate) async fn refused(&mut self) -> Option<String> {
        let mut code = None;
        while let Some(message) = self.next().await {
            if let Message::Refused(refused) = message {
                code = Some(refused.code);
            }
        }
        code
    }
}

impl Stream<pb::PeerMessage> {
    /// Sends; false when nobody takes it any more.
    pub(crate) async fn say(&self, message: Message) -> bool {
        let message = Some(message);
        self.messages.send(pb::PeerMessage { message }).await.is_ok()
    }

    /// Reads until the other side has begun a session.
    pub(crate) async fn started(&mut self) -> Result<(), Message> {
        loop {
            let message = self.next().await.expect("an answer to the hello");
            if matches!(message, Message::Start(_)) {
                break;
            }
            if matches!(message, Message::Refused(_)) {
                return Err(message);
            }
        }
        self.say(Message::Start(pb::Start::default())).await;
        Ok(())
    }
}

/// The keys of a member.
pub(crate) struct HostileMember {
    pub(crate) cluster: String,
    pub(crate) trust_domain: TrustDomain,
    pub(crate) key: JoinKey,
    pub(crate) identity: Arc<WorkloadIdentity>,
    /// Names of its trust domain that it says it believes.
    pub(crate) believes: Vec<String>,
}

impl HostileMember {
    /// Takes them from the folder of a discovery, which does not run any more.
    pub(crate) fn steal(lab: &Lab, cluster: &str) -> Self {
        let text = std::fs::read_to_string(lab.config.state_dir.join("federation/member.key")).unwrap();
        let seed: [u8; 32] = STANDARD.decode(text.trim()).unwrap().try_into().unwrap();
        Self {
            cluster: cluster.into(),
            trust_domain: lab.trust_domain(),
            key: JoinKey::from_seed(&seed),
            identity: certificate(lab, &SpiffeId::discovery(lab.trust_domain())),
            believes: Vec::new(),
        }
    }

    pub(crate) async fn open(&self, to: &Lab) -> Stream<pb::PeerMessage> {
        peer_stream(to, Arc::clone(&self.identity)).await.unwrap()
    }

    /// A Hello of this member for this connection, under any name and version.
    pub(crate) fn hello(&self, exporter: &[u8; 32], cluster: &str, version: &str) -> Message {
        let (epoch, instance) = (EPOCH.fetch_add(1, Ordering::Relaxed), rand::random());
        let proof = Signed::new("hello")
            .bytes(exporter)
            .bytes(cluster.as_bytes())
            .number(epoch)
            .number(instance)
            .flag(true);
        Message::Hello(pb::Hello {
            version: version.into(),
            features: vec!["of-a-later-release".into()],
            cluster: cluster.into(),
            epoch,
            instance,
            proof: self.key.sign(&proof.0),
            chain: Vec::new(),
            trust_domains: self.believes.clone(),
        })
    }

    /// A session as the member that it is.
    pub(crate) async fn session(&self, to: &Lab) -> Stream<pb::PeerMessage> {
        let mut stream = self.open(to).await;
        let hello = self.hello(&stream.exporter, &self.cluster, VERSION);
        stream.say(hello).await;
        stream.started().await.expect("a session");
        stream
    }

    /// What it says in the place of another version or under another name; the code of the refusal, if any.
    pub(crate) async fn greets(&self, to: &Lab, cluster: &str, version: &str) -> Option<String> {
        let mut stream = self.open(to).await;
        let hello = self.hello(&stream.exporter, cluster, version);
        stream.say(hello).await;
        match stream.started().await {
            Ok(()) => None,
            Err(Message::Refused(refused)) => Some(refused.code),
            Err(other) => panic!("{other:?}"),
        }
    }

    /// A record with its signature, whatever it says.
    pub(crate) fn signs(&self, record: &Record) -> pb::Signed {
        let body = record.encode();
        let signature = self.key.sign(&body);
        pb::Signed { body, signature }
    }

    /// A record of a cluster that nobody admitted.
    pub(crate) fn ghost(&self, admitted_by: &str) -> Record {
        Record {
            cluster: "ghost".into(),
            trust_domain: "ghost.example".parse().unwrap(),
            aliases: std::collections::BTreeSet::new(),
            key: MemberKey(self.key.public_key()),
            roots_pem: "root".into(),
            endpoints: vec!["ghost.example:443".into()],
            namespaces: Grant::All,
            may_admit: true,
            share_trust_domain: false,
            incarnation: 1,
            version: 1,
            removed: false,
            admitted_by: admitted_by.into(),
            rank: 2,
            admitter_incarnation: 1,
        }
    }
}

/// What the holder of an invite asks for.
pub(crate) struct Redemption<'a> {
    pub(crate) token: &'a InviteToken,
    pub(crate) key: &'a JoinKey,
    pub(crate) cluster: &'a str,
    pub(crate) trust_domain: &'a str,
    pub(crate) version: &'a str,
    pub(crate) roots_pem: String,
}

impl<'a> Redemption<'a> {
    /// As the invite says.
    pub(crate) fn of(token: &'a InviteToken, key: &'a JoinKey) -> Self {
        Self {
            token,
            key,
            cluster: &token.cluster,
            trust_domain: "thief.example",
            version: VERSION,
            roots_pem: "root".into(),
        }
    }

    /// Asks on a connection of its own, which the proof is for unless it was made for another one.
    pub(crate) async fn ask(
        &self,
        to: &Lab,
        proof_of: Option<[u8; 32]>,
    ) -> Result<pb::JoinResponse, tonic::Status> {
        let (channel, exporter) = to.dial(None).await;
        let invite = JoinKey::from_seed(&self.token.seed);
        let public = self.key.public_key();
        let proof = Signed::new("join")
            .bytes(&proof_of.unwrap_or(exporter))
            .bytes(&self.token.id)
            .bytes(self.cluster.as_bytes())
            .bytes(self.trust_domain.as_bytes())
            .bytes(&public)
            .bytes(self.roots_pem.as_bytes())
            .number(0)
            .flag(false);
        let request = pb::JoinRequest {
            version: self.version.into(),
            invite_id: self.token.id.to_vec(),
            cluster: self.cluster.into(),
            trust_domain: self.trust_domain.into(),
            member_key: public.to_vec(),
            roots_pem: self.roots_pem.clone(),
            invite_signature: invite.sign(&proof.0),
            member_signature: self.key.sign(&proof.0),
            ..pb::JoinRequest::default()
        };
        let answer = FederationClient::new(channel).join(request).await?;
        Ok(answer.into_inner())
    }

    /// The code with which it is refused.
    pub(crate) async fn refusal(&self, to: &Lab) -> String {
        let refused = self.ask(to, None).await.unwrap_err();
        refused.message().chars().take(7).collect()
    }
}
