//! Joins that fail in the middle: at every byte of the way, and with either process killed.

use crate::{clusters::*, lab::*};
use futures_util::future::join_all;
use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tombolo_runtime::TaskGroup;

/// What happens at the end of what the way carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Connections are closed, and so is every new one.
    Closed,
    /// They stay open, and nothing comes any more.
    Silent,
}

#[derive(Debug, Clone, Copy)]
struct Limit {
    /// Bytes from the inviting side, over all connections.
    bytes: u64,
    /// Connections that are carried at all.
    connections: usize,
    end: End,
}

const OPEN: Limit = Limit {
    bytes: u64::MAX,
    connections: usize::MAX,
    end: End::Closed,
};

/// The only way to a discovery.
struct Way {
    address: SocketAddr,
    limit: watch::Sender<Limit>,
    carried: Arc<AtomicU64>,
    /// Bytes of each connection.
    each: Arc<Mutex<Vec<u64>>>,
    tasks: TaskGroup,
}

impl Way {
    async fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (limit, seen) = watch::channel(OPEN);
        let (carried, each) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(Vec::new())));
        let tasks = TaskGroup::new("way");
        let (group, total, counts) = (tasks.clone(), Arc::clone(&carried), Arc::clone(&each));
        tasks.spawn_until_stopped("way", async move {
            while let Ok((near, _)) = listener.accept().await {
                let index = {
                    let mut counts = counts.lock().unwrap();
                    counts.push(0);
                    counts.len() - 1
                };
                let strand = strand(
                    near,
                    port,
                    index,
                    seen.clone(),
                    Arc::clone(&total),
                    Arc::clone(&counts),
                );
                group.spawn_until_stopped("strand", strand);
            }
        });
        Self {
            address,
            limit,
            carried,
            each,
            tasks,
        }
    }

    fn carry(&self, bytes: u64, end: End) {
        let bytes = self.carried.load(Ordering::Relaxed).saturating_add(bytes);
        self.limit.send_replace(Limit { bytes, end, ..OPEN });
    }

    fn carry_connections(&self, more: usize) {
        let connections = self.each.lock().unwrap().len() + more;
        self.limit.send_replace(Limit {
            connections,
            end: End::Silent,
            ..OPEN
        });
    }

    fn open(&self) {
        self.limit.send_replace(OPEN);
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        self.tasks.stop();
    }
}

async fn strand(
    mut near: TcpStream,
    port: u16,
    index: usize,
    limit: watch::Receiver<Limit>,
    total: Arc<AtomicU64>,
    counts: Arc<Mutex<Vec<u64>>>,
) {
    let over = |limit: &Limit| index >= limit.connections || total.load(Ordering::Relaxed) >= limit.bytes;
    let now = *limit.borrow();
    if !over(&now) {
        let Ok(mut far) = TcpStream::connect(("127.0.0.1", port)).await else {
            return;
        };
        let (mut up, mut down) = (vec![0; 16 << 10], vec![0; 16 << 10]);
        loop {
            tokio::select! {
                read = near.read(&mut up) => match read {
                    Ok(0) | Err(_) => return,
                    Ok(n) => if far.write_all(&up[..n]).await.is_err() { return },
                },
                read = far.read(&mut down) => match read {
                    Ok(0) | Err(_) => return,
                    Ok(n) => {
                        let limit = *limit.borrow();
                        let left = limit.bytes.saturating_sub(total.load(Ordering::Relaxed));
                        let part = n.min(usize::try_from(left).unwrap_or(usize::MAX));
                        let _ = near.write_all(&down[..part]).await;
                        total.fetch_add(part as u64, Ordering::Relaxed);
                        counts.lock().unwrap()[index] += part as u64;
                        if part < n {
                            break;
                        }
                    }
                },
            }
        }
    }
    let end = limit.borrow().end;
    if end == End::Silent {
        std::future::pending::<()>().await; // the sockets stay open, and silent
    }
}

/// West, not running yet, and the only way to it.
async fn west_behind() -> (Lab, Way) {
    let port = free_port();
    let way = Way::to(port).await;
    let west = founded("west", |config| {
        config.listen = ([127, 0, 0, 1], port).into();
        config.advertise = vec![way.address.to_string()];
    });
    (west, way)
}

async fn joined(west: &Lab, east: &Lab) {
    wait_state(west, "east", "Connected").await;
    wait_state(east, "west", "Connected").await;
    for lab in [west, east] {
        let names: Vec<String> = clusters(lab).await.into_iter().map(|c| c.name).collect();
        assert_eq!(names, ["east", "west"]);
    }
}

/// Bytes from west until the join has ended: of the first connection, and of all.
async fn measured() -> (u64, u64) {
    let (mut west, way) = west_behind().await;
    west.boot().await;
    let east = cluster("east").await;
    let token = Invite::of("east").make(&west).await.unwrap();
    join(&east, &token).await.unwrap();
    let first = way.each.lock().unwrap()[0];
    (first, way.carried.load(Ordering::Relaxed))
}

async fn cut_after(bytes: u64, end: End) -> String {
    let (mut west, way) = west_behind().await;
    west.boot().await;
    let east = cluster("east").await;
    let token = Invite::of("east").make(&west).await.unwrap();
    way.carry(bytes, end);
    let told = match join(&east, &token).await {
        Ok(_) => "joined".to_owned(),
        Err(refused) => {
            assert!(refused.message().starts_with("TMB"), "{bytes} {end:?}: {refused}");
            let here = clusters(&east).await;
            assert_eq!(
                (here.len(), here[0].state.as_str()),
                (1, "Own"),
                "{bytes} {end:?}"
            );
            let there = match status(&west, "east").await {
                None => "nothing".to_owned(),
                Some(shown) => {
                    assert!(!shown.reason.is_empty(), "{bytes} {end:?}: {shown:?}");
                    let says = if shown.state == "Joining" {
                        "TMB0727"
                    } else {
                        "TMB0724"
                    };
                    assert!(shown.reason.starts_with(says), "{bytes} {end:?}: {shown:?}");
                    shown.state
                }
            };
            way.open();
            let again = join(&east, &token).await;
            again.unwrap_or_else(|refused| panic!("{bytes} {end:?}, the same invite again: {refused}"));
            format!("refused, west shows {there}")
        }
    };
    way.open();
    joined(&west, &east).await;
    format!("{bytes} bytes, then {end:?}: {told}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_join_that_is_cut_anywhere_changes_nothing_and_is_repeated() {
    let (first, all) = measured().await;
    assert!(first > 2000 && all > first, "{first} {all}");
    let mut cuts: Vec<_> = [0, 700, first / 2, first - 600, first - 40, first + 40, all - 900]
        .map(|bytes| (bytes, End::Closed))
        .into();
    // In the handshake, in the answer, before the first word of the session.
    cuts.extend([300, first - 300, first + 1500].map(|bytes| (bytes, End::Silent)));
    let told = join_all(cuts.into_iter().map(|(bytes, end)| cut_after(bytes, end))).await;
    println!("{first} bytes of the answer, {all} in all\n{}", told.join("\n"));
    let count = |what: &str| told.iter().filter(|line| line.contains(what)).count();
    assert!(count("west shows nothing") >= 3, "before the invite was read");
    assert!(count("west shows Joining") >= 2, "after it was admitted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_dies_in_a_join_comes_back_into_it() {
    let (first, _) = measured().await;
    // The inviting side, when it has admitted and its answer is not out.
    let (mut west, way) = west_behind().await;
    west.spawn().await;
    let mut east = process("east", |_| ()).await;
    let token = Invite::of("east").make(&west).await.unwrap();
    way.carry(first - 200, End::Silent);
    let dies = async {
        wait_state(&west, "east", "Joining").await;
        west.sigkill();
    };
    let (refused, ()) = tokio::join!(join(&east, &token), dies);
    let refused = refused.unwrap_err();
    assert!(refused.message().starts_with("TMB0112"), "{refused}");
    assert_eq!(clusters(&east).await.len(), 1);
    west.kill();
    west.spawn().await;
    wait_state(&west, "east", "Joining").await;
    way.open();
    join(&east, &token).await.unwrap();
    joined(&west, &east).await;
    remove(&west, "east").await.unwrap();
    wait_state(&east, "east", "Removed").await;

    // The joining side, when it has written the answer down and not yet said a word.
    let token = Invite::of("east").make(&west).await.unwrap();
    way.carry_connections(1);
    let dies = async {
        wait_state(&east, "west", "Stale").await;
        east.sigkill();
    };
    let (died, ()) = tokio::join!(join(&east, &token), dies);
    died.unwrap_err();
    east.kill();
    east.spawn().await;
    assert_eq!(state(&east, "west").await.as_deref(), Some("Stale"));
    let shown = status(&west, "east").await.unwrap();
    assert_eq!(shown.state, "Joining");
    assert!(shown.reason.starts_with("TMB0727"), "{}", shown.reason);
    // It goes on by itself as soon as it can; the same command again is no harm.
    way.open();
    joined(&west, &east).await;
}
