//! A member of a mesh for tests, with a real certificate and no manners: it asks a gateway for what it should not get,
//! holds more than it may, and offers sessions that nobody has asked for.
//!
//! `ask STATE GATEWAY [NAME=VALUE]... AUTHORITY...`: CONNECT of each authority on one connection, with these headers; prints
//! `AUTHORITY STATUS`, or how it ended. `method=GET` asks so; `filler=N` adds a header of N bytes. `hold STATE GATEWAY N AUTHORITY`:
//! N calls, over as many connections as that needs; prints how many were answered with which status, and keeps those until
//! stdin closes. `session STATE GATEWAY tcp|quic`: holds a reverse session; prints `held`, and `ended` when it is over.
//! `burst STATE GATEWAY N AUTHORITY [reset]`: N calls on one connection, asked for before the gateway could say how many it takes; prints
//! how many were answered with what. With `reset` each is given up 100 ms after it was asked for, 100 at a time.
//! `idle STATE GATEWAY`: a connection without calls; prints `ended` when it is closed.
//!
//! STATE is the state directory of an enrolled agent.
#![allow(clippy::print_stdout, reason = "a command-line program")]

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use h2::client::{Connection, SendRequest};
use http::{Method, Request};
use std::{collections::BTreeMap, fs, io::Read as _, net::SocketAddr, path::Path, sync::Arc, time::Duration};
use tokio::{
    net::TcpStream,
    task::JoinHandle,
    time::{Instant, timeout, timeout_at},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tombolo_identity::{
    LiveIdentity, Peer, TrustBundle, WorkloadIdentity, hbone_client_config, hbone_server_name,
};
use tombolo_runtime::TaskGroup;
use tombolo_tunnel::{Incoming, Limits, NoObserver, Server, Service, SessionEnd, Target};
use tombolo_types::SpiffeId;

/// For one step of anything.
const PATIENCE: Duration = Duration::from_secs(12);

#[tokio::main]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["ask", state, gateway, what @ ..] => ask(&member(state)?, gateway.parse()?, what).await,
        ["hold", state, gateway, count, authority] => {
            hold(&member(state)?, gateway.parse()?, count.parse()?, authority).await
        }
        ["burst", state, gateway, count, authority, rest @ ..] => {
            let live = member(state)?;
            burst(
                &live,
                gateway.parse()?,
                count.parse()?,
                authority,
                rest == ["reset"],
            )
            .await
        }
        ["idle", state, gateway] => {
            let (_send, ended) = connect(&member(state)?, gateway.parse()?).await?;
            println!("connected");
            let _ = ended.await;
            println!("ended");
            Ok(())
        }
        ["session", state, gateway, transport] => {
            let tasks = TaskGroup::new("session");
            let live = member(state)?;
            let (_end, ended) = session(&live, gateway.parse()?, transport, &tasks).await?;
            println!("held");
            let _ = ended.await;
            println!("ended");
            Ok(())
        }
        _ => bail!("usage: tombolo-member ask|hold|burst|idle|session ..."),
    }
}

/// The identity of an enrolled agent.
fn member(state: &str) -> Result<Arc<LiveIdentity>> {
    let read = |name: &str| {
        let path = Path::new(state).join(name);
        fs::read_to_string(&path).with_context(|| path.display().to_string())
    };
    let text = read("identity.pem")?;
    let key = text.rfind("-----BEGIN").context("no key in identity.pem")?;
    let (chain, key) = text.split_at(key);
    let identity = WorkloadIdentity::from_pem(chain, key)?;
    let bundle = TrustBundle::from_pem(identity.id().trust_domain.clone(), &read("roots.pem")?)?;
    Ok(LiveIdentity::new(
        Some(Arc::new(identity)),
        vec![Arc::new(bundle)],
    ))
}

fn stdin_ends() -> std::io::Result<()> {
    tokio::task::block_in_place(|| std::io::stdin().read_to_end(&mut Vec::new()).map(drop))
}

fn gateway_id(live: &LiveIdentity) -> Result<SpiffeId> {
    let current = live.current();
    let own = current.identity.as_ref().context("no certificate")?;
    Ok(SpiffeId::gateway(own.id().trust_domain.clone()))
}

type Connected = (SendRequest<Bytes>, JoinHandle<()>);

type Unpolled = Connection<TlsStream<TcpStream>, Bytes>;

/// A connection that nothing has come over yet: until it is polled, nothing is sent either.
async fn open(live: &Arc<LiveIdentity>, gateway: SocketAddr) -> Result<(SendRequest<Bytes>, Unpolled)> {
    let config = hbone_client_config(live, vec![gateway_id(live)?])?;
    let tcp = timeout(PATIENCE, TcpStream::connect(gateway)).await??;
    tcp.set_nodelay(true)?;
    let tls = TlsConnector::from(Arc::new(config)).connect(hbone_server_name(), tcp);
    let opened = h2::client::Builder::new()
        .max_header_list_size(1 << 20)
        .initial_max_send_streams(1 << 16)
        .handshake(timeout(PATIENCE, tls).await??);
    Ok(opened.await?)
}

async fn connect(live: &Arc<LiveIdentity>, gateway: SocketAddr) -> Result<Connected> {
    let (send, connection) = open(live, gateway).await?;
    #[allow(clippy::disallowed_methods, reason = "the program ends with it")]
    let ended = tokio::spawn(async move { drop(connection.await) });
    Ok((send, ended))
}

async fn ask(live: &Arc<LiveIdentity>, gateway: SocketAddr, what: &[&str]) -> Result<()> {
    let (headers, authorities): (Vec<&str>, Vec<&str>) = what.iter().partition(|word| word.contains('='));
    let (mut send, _ended) = match connect(live, gateway).await {
        Ok(connected) => connected,
        Err(error) => {
            println!("not connected: {error}");
            return Ok(());
        }
    };
    for authority in authorities {
        let mut request = Request::builder().method(Method::CONNECT).uri(authority);
        for header in &headers {
            request = match header.split_once('=').context("NAME=VALUE")? {
                ("method", method) => request
                    .method(Method::from_bytes(method.as_bytes())?)
                    .uri(format!("https://{authority}/")),
                ("filler", count) => request.header("x-filler", "x".repeat(count.parse()?)),
                (name, value) => request.header(name, value),
            };
        }
        let answer = async {
            send = send.clone().ready().await?;
            let (answer, _stream) = send.send_request(request.body(())?, false)?;
            Ok::<_, anyhow::Error>(answer.await?.status())
        };
        match timeout(PATIENCE, answer).await {
            Ok(Ok(status)) => println!("{authority} {}", status.as_u16()),
            Ok(Err(error)) => println!("{authority} {error}"),
            Err(_) => println!("{authority} no answer"),
        }
    }
    Ok(())
}

async fn hold(live: &Arc<LiveIdentity>, gateway: SocketAddr, count: usize, authority: &str) -> Result<()> {
    let mut answers: BTreeMap<String, usize> = BTreeMap::new();
    let mut kept = Vec::new();
    let mut at = connect(live, gateway).await?;
    let mut on_this = 0;
    for _ in 0..count {
        // As many as a server of ours or a ztunnel takes on one.
        if on_this == 200 {
            kept.push(Kept::Connection(std::mem::replace(
                &mut at,
                connect(live, gateway).await?,
            )));
            on_this = 0;
        }
        on_this += 1;
        let request = Request::builder()
            .method(Method::CONNECT)
            .uri(authority)
            .body(())?;
        let asked = async {
            let mut send = at.0.clone().ready().await?;
            let (answer, stream) = send.send_request(request, false)?;
            Ok::<_, anyhow::Error>((answer.await?, stream))
        };
        let text = match timeout(PATIENCE, asked).await {
            Ok(Ok((answer, stream))) => {
                let status = answer.status().as_u16().to_string();
                kept.push(Kept::Call(answer.into_body(), stream));
                status
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer".to_owned(),
        };
        *answers.entry(text).or_default() += 1;
    }
    for (answer, count) in answers {
        println!("{answer}: {count}");
    }
    println!("holds");
    stdin_ends()?;
    drop(kept);
    Ok(())
}

async fn burst(
    live: &Arc<LiveIdentity>,
    gateway: SocketAddr,
    count: usize,
    authority: &str,
    reset: bool,
) -> Result<()> {
    let (mut send, connection) = open(live, gateway).await?;
    let mut connection = Some(connection);
    let (mut asked, mut answers) = (Vec::new(), BTreeMap::<String, usize>::new());
    for n in 1..=count {
        send = send.ready().await?;
        let request = Request::builder().method(Method::CONNECT).uri(authority);
        asked.push(send.send_request(request.body(())?, false)?);
        if (!reset || n % 100 != 0) && n != count {
            continue;
        }
        #[allow(clippy::disallowed_methods, reason = "the program ends with it")]
        if let Some(connection) = connection.take() {
            tokio::spawn(async move { drop(connection.await) });
        }
        let patience = if reset {
            Duration::from_millis(100)
        } else {
            PATIENCE / 3
        };
        let by = Instant::now() + patience;
        let mut kept = Vec::new();
        for (answer, mut stream) in asked.drain(..) {
            let text = match timeout_at(by, answer).await {
                Ok(Ok(answer)) => {
                    let status = answer.status().as_u16().to_string();
                    kept.push((answer.into_body(), stream));
                    status
                }
                Ok(Err(error)) => error
                    .reason()
                    .map_or_else(|| error.to_string(), |reason| format!("{reason:?}")),
                Err(_) => {
                    stream.send_reset(h2::Reason::CANCEL);
                    "no answer".to_owned()
                }
            };
            *answers.entry(text).or_default() += 1;
        }
    }
    for (answer, count) in answers {
        println!("{answer}: {count}");
    }
    Ok(())
}

/// What ends when it is dropped.
enum Kept {
    #[allow(dead_code, reason = "kept, not read")]
    Connection(Connected),
    #[allow(dead_code, reason = "kept, not read")]
    Call(h2::RecvStream, h2::SendStream<Bytes>),
}

/// Takes no calls.
struct Nobody;

impl Service for Nobody {
    fn admit(&self, _: &Peer) -> bool {
        true
    }

    async fn connect(self: Arc<Self>, _: Incoming) {}
}

/// Holds a session; the task ends with it.
async fn session(
    live: &Arc<LiveIdentity>,
    gateway: SocketAddr,
    transport: &str,
    tasks: &TaskGroup,
) -> Result<(SessionEnd, JoinHandle<()>)> {
    let nowhere: SocketAddr = ([0, 0, 0, 0], 0).into();
    let server = Server::new(nowhere, live, Limits::default(), Arc::new(NoObserver), tasks)?;
    let expected = vec![gateway_id(live)?];
    #[allow(clippy::disallowed_methods, reason = "the program ends with it")]
    if transport == "quic" {
        let target = Target {
            hbone: gateway,
            expected: expected.into(),
        };
        let held = server.hold_reverse_quic(&target, Arc::new(Nobody), tasks).await?;
        Ok((held.end, tokio::spawn(held.run)))
    } else {
        let held = server
            .hold_reverse(gateway, expected, Arc::new(Nobody), tasks)
            .await?;
        Ok((held.end, tokio::spawn(held.run)))
    }
}
