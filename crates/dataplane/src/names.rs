//! Name lookups: the mesh's own are answered, all others go to the host's own servers as they are.

use crate::{context::Context, upstreams::Upstreams};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UdpSocket},
    sync::Semaphore,
    time::{Instant, timeout},
};
use tombolo_dns::{Answer, Client, OnlyFamilies, answer, servfail};
use tombolo_telemetry::DnsLabels;

/// Longest wait for one server; resolvers ask again after 5 s.
const SERVER_TIMEOUT: Duration = Duration::from_millis(1500);
/// Longest wait for all servers together.
const FORWARD_TIMEOUT: Duration = Duration::from_millis(4500);
/// Times that the list of servers is gone through.
const ROUNDS: usize = 2;
/// Longest pause between two queries of a TCP connection. Source: RFC 7766, 6.2.3: a few seconds.
const TCP_IDLE: Duration = Duration::from_secs(10);
/// Most TCP connections at once.
const TCP_MAX: usize = 128;
/// Longest message by UDP.
const UDP_LENGTH_MAX: usize = 64 * 1024;

/// Answers name lookups.
pub(crate) struct Names {
    context: Arc<Context>,
    upstreams: Upstreams,
    forwards: Semaphore,
    connections: Semaphore,
}

impl Names {
    /// `port`: of the host's servers, 53 but in tests.
    pub(crate) fn new(context: Arc<Context>, port: u16) -> Self {
        let plan = &context.plan;
        let own: Vec<IpAddr> = vec![
            plan.dns_v4().into(),
            plan.dns_v6().into(),
            plan.host_v4().into(),
            plan.host_v6().into(),
        ];
        Self {
            upstreams: Upstreams::new(context.settings.resolv_conf.clone(), own, port),
            forwards: Semaphore::new(context.settings.dns_in_flight_max),
            connections: Semaphore::new(TCP_MAX),
            context,
        }
    }

    fn count(&self, result: &'static str) {
        self.context
            .metrics
            .dns
            .get_or_create(&DnsLabels { result })
            .inc();
    }

    /// What the mesh says of a query; `Err` if it is not the mesh's to answer.
    fn own(&self, query: &[u8], udp: bool) -> Result<Option<Vec<u8>>, NotOurs> {
        let world = self.context.world.load();
        let settings = &self.context.settings;
        let names = OnlyFamilies {
            names: &*world,
            v4: settings.ipv4,
            v6: settings.ipv6,
        };
        let search = self.upstreams.search(Instant::now());
        let client = Client {
            namespace: &self.context.own.namespace,
            search: &search,
            udp,
        };
        match answer(query, &names, &client, rand::random()) {
            Answer::Reply(reply) => {
                self.count("answered");
                Ok(Some(reply))
            }
            Answer::Drop => {
                self.count("dropped");
                Ok(None)
            }
            Answer::Forward => Err(NotOurs),
        }
    }

    /// Answers at once, if it is the mesh's to answer: no task is needed for it.
    pub(crate) fn answer(&self, query: &[u8]) -> Result<Option<Vec<u8>>, NotOurs> {
        self.own(query, true)
    }

    /// Asks the host's servers; SERVFAIL if none answers.
    pub(crate) async fn forward(&self, query: &[u8], udp: bool) -> Option<Vec<u8>> {
        let Ok(_permit) = self.forwards.try_acquire() else {
            self.count("overload");
            return servfail(query);
        };
        match timeout(FORWARD_TIMEOUT, self.ask(query, udp)).await {
            Ok(Some(reply)) => {
                self.count("forwarded");
                Some(reply)
            }
            Ok(None) | Err(_) => {
                self.count("failed");
                servfail(query)
            }
        }
    }

    /// The first good answer; else the first that was an answer at all.
    async fn ask(&self, query: &[u8], udp: bool) -> Option<Vec<u8>> {
        let servers = self.upstreams.servers(Instant::now());
        let mut bad = None;
        for _ in 0..ROUNDS {
            for &server in servers.iter() {
                let asked = async {
                    if udp {
                        by_udp(server, query).await
                    } else {
                        by_tcp(server, query).await
                    }
                };
                match timeout(SERVER_TIMEOUT, asked).await {
                    // SERVFAIL and REFUSED: another server may know.
                    Ok(Ok(reply)) if matches!(reply.get(3).map(|flags| flags & 0xf), Some(2 | 5)) => {
                        bad.get_or_insert(reply);
                    }
                    Ok(Ok(reply)) => return Some(reply),
                    Ok(Err(error)) => tracing::debug!(%server, %error, "name server failed"),
                    Err(_) => tracing::debug!(%server, "name server did not answer"),
                }
            }
            if bad.is_some() {
                break;
            }
        }
        bad
    }

    /// Serves one TCP connection: queries one after the other.
    pub(crate) async fn serve_tcp(&self, mut socket: TcpStream) {
        let Ok(_permit) = self.connections.try_acquire() else {
            self.count("overload");
            return;
        };
        // The end of a lookup's connection is no event.
        let _ = self.tcp_queries(&mut socket).await;
    }

    async fn tcp_queries(&self, socket: &mut TcpStream) -> io::Result<()> {
        loop {
            let query = timeout(TCP_IDLE, read_message(socket)).await??;
            let reply = match self.own(&query, false) {
                Ok(reply) => reply,
                Err(NotOurs) => self.forward(&query, false).await,
            };
            let Some(reply) = reply else { return Ok(()) };
            timeout(TCP_IDLE, write_message(socket, &reply)).await??;
        }
    }
}

/// The query is for the host's own servers.
pub(crate) struct NotOurs;

async fn by_udp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let any: IpAddr = if server.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    // A socket of its own: a source port that nobody can guess, and answers from this server only.
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(query).await?;
    let mut reply = vec![0; UDP_LENGTH_MAX];
    loop {
        let length = socket.recv(&mut reply).await?;
        if is_answer(query, &reply[..length]) {
            reply.truncate(length);
            reply.shrink_to_fit();
            return Ok(reply);
        }
    }
}

async fn by_tcp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let mut socket = TcpStream::connect(server).await?;
    write_message(&mut socket, query).await?;
    let reply = read_message(&mut socket).await?;
    if is_answer(query, &reply) {
        Ok(reply)
    } else {
        Err(io::ErrorKind::InvalidData.into())
    }
}

/// The same id, and a response.
fn is_answer(query: &[u8], reply: &[u8]) -> bool {
    reply.len() >= 12 && query.get(..2) == reply.get(..2) && reply[2] & 0x80 != 0
}

async fn read_message(socket: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = socket.read_u16().await?;
    let mut message = vec![0; usize::from(length)];
    socket.read_exact(&mut message).await?;
    Ok(message)
}

async fn write_message(socket: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut framed = Vec::with_capacity(2 + message.len());
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(message);
    socket.write_all(&framed).await
}
