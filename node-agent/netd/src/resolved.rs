//! The resolver of the host, told over D-Bus: systemd-resolved takes settings of a link from uid 0 and changes no file.

use crate::lookup::Lookup;
use async_trait::async_trait;
use futures_util::StreamExt as _;
use nix::sys::socket::{AddressFamily, AddressFamily::Inet, AddressFamily::Inet6};
use std::{net::IpAddr, path::PathBuf, time::Duration};
use tokio::{
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};
use tombolo_capture::netd::{DnsSettings, HostNames, HostResolver};
use tombolo_runtime::TaskGroup;
use zbus::{Connection, MatchRule, MessageStream, message, zvariant::DynamicType};

const RESOLVED: &str = "org.freedesktop.resolve1";
/// All of one request; the agent gives up after ten seconds.
const PATIENCE: Duration = Duration::from_secs(5);
/// A bus that is being restarted.
const BUS_AGAIN: Duration = Duration::from_secs(5);
/// resolved hears of a new link after we do, and after a restart of its own.
const LINK_TRIES: u32 = 40;
const LINK_AGAIN: Duration = Duration::from_millis(50);

type Reply<T> = oneshot::Sender<T>;

#[derive(Debug)]
enum Wish {
    Set(DnsSettings, Reply<Result<HostNames, String>>),
    Revert(Reply<()>),
}

/// The handle; a task of its own keeps the settings and follows restarts of systemd-resolved.
#[derive(Debug)]
pub(crate) struct Resolver {
    wishes: mpsc::Sender<Wish>,
}

impl Resolver {
    /// For the link `link`. The bus is connected to when there is something to say.
    pub(crate) fn new(link: &str, tasks: &TaskGroup) -> Self {
        let (wishes, asked) = mpsc::channel(4);
        let owner = Owner {
            link: link.to_owned(),
            root: "/".into(),
            bus: None,
            set: None,
        };
        tasks.spawn_until_stopped("host resolver", owner.run(asked));
        Self { wishes }
    }

    async fn ask<T>(&self, wish: impl FnOnce(Reply<T>) -> Wish) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.wishes.send(wish(reply)).await.ok()?;
        answer.await.ok()
    }
}

#[async_trait]
impl HostResolver for Resolver {
    async fn set(&self, settings: &DnsSettings) -> Result<HostNames, String> {
        let settings = settings.clone();
        let answer = self.ask(|reply| Wish::Set(settings, reply)).await;
        answer.unwrap_or_else(|| Err("tombolo-netd stops".into()))
    }

    async fn revert(&self) {
        let _ = self.ask(Wish::Revert).await;
    }
}

/// The bus, and what it says of systemd-resolved coming and going.
#[derive(Debug)]
struct Bus {
    connection: Connection,
    owners: MessageStream,
}

#[derive(Debug)]
struct Owner {
    link: String,
    root: PathBuf,
    bus: Option<Bus>,
    /// What resolved was told, for the next resolved.
    set: Option<DnsSettings>,
}

impl Owner {
    async fn run(mut self, mut asked: mpsc::Receiver<Wish>) {
        loop {
            tokio::select! {
                wish = asked.recv() => match wish {
                    None => return,
                    Some(Wish::Set(settings, reply)) => {
                        let done = timeout(PATIENCE, self.wished(&settings)).await;
                        let done = done.unwrap_or_else(|_| Err("systemd-resolved does not answer".to_owned()));
                        let _ = reply.send(done);
                    }
                    Some(Wish::Revert(reply)) => {
                        let _ = timeout(PATIENCE, self.revert()).await;
                        let _ = reply.send(());
                    }
                },
                () = returned(self.bus.as_mut(), self.set.is_some()) => self.again().await,
            }
        }
    }

    async fn wished(&mut self, settings: &DnsSettings) -> Result<HostNames, String> {
        let resolved = self.is_resolved_there().await;
        let lookup = Lookup::detect(&self.root, resolved);
        let asks = lookup == Lookup::Resolved;
        if asks {
            self.tell(settings).await?;
            if self.set.as_ref() != Some(settings) {
                tracing::info!(
                    link = self.link,
                    domain = settings.domain,
                    "systemd-resolved asks the mesh"
                );
            }
            self.set = Some(settings.clone());
        }
        Ok(HostNames {
            resolver: lookup.name(),
            asks,
            advice: lookup.advice(settings),
        })
    }

    /// A restart of systemd-resolved, or of the bus.
    async fn again(&mut self) {
        let Some(settings) = self.set.clone() else {
            self.bus = None;
            return;
        };
        if !matches!(timeout(PATIENCE, self.is_resolved_there()).await, Ok(true)) {
            return; // its next start is a message of the bus
        }
        match timeout(PATIENCE, self.tell(&settings)).await {
            Ok(Ok(())) => tracing::info!(link = self.link, "systemd-resolved was told again"),
            Ok(Err(error)) => tracing::warn!(error, "systemd-resolved was not told again"),
            Err(_) => tracing::warn!("systemd-resolved does not answer"),
        }
    }

    async fn is_resolved_there(&mut self) -> bool {
        if self.bus.is_none() {
            match Bus::connect().await {
                Ok(bus) => self.bus = Some(bus),
                Err(error) => {
                    tracing::debug!(%error, "there is no system bus");
                    return false;
                }
            }
        }
        let Some(bus) = &self.bus else { return false };
        match bus.has_owner().await {
            Ok(there) => there,
            Err(error) => {
                tracing::debug!(%error, "the bus is gone");
                self.bus = None;
                false
            }
        }
    }

    /// First what is never asked of this link, then whom it asks: the other way round ordinary names would come to the
    /// mesh for a moment.
    async fn tell(&self, settings: &DnsSettings) -> Result<(), String> {
        let Some(bus) = &self.bus else {
            return Err("there is no system bus".into());
        };
        let domains = [(settings.domain.as_str(), true)];
        let mut tries = 0;
        let link = loop {
            let link = self.index().ok_or("mesh0 is gone")?;
            match bus.call("SetLinkDomains", &(link, &domains[..])).await {
                Ok(()) => break link,
                Err(error) if tries == LINK_TRIES => return Err(refused(&error)),
                Err(_) => tries += 1,
            }
            sleep(LINK_AGAIN).await;
        };
        let servers: Vec<(i32, Vec<u8>)> = settings.servers.iter().map(|&server| octets(server)).collect();
        let told = async {
            bus.call("SetLinkDefaultRoute", &(link, false)).await?;
            for off in [
                "SetLinkLLMNR",
                "SetLinkMulticastDNS",
                "SetLinkDNSOverTLS",
                "SetLinkDNSSEC",
            ] {
                bus.call(off, &(link, "no")).await?;
            }
            bus.call("SetLinkDNS", &(link, &servers)).await
        };
        let told = told.await;
        if told.is_err() {
            // All of it or nothing.
            let _ = bus.call("RevertLink", &(link,)).await;
        }
        told.map_err(|error| refused(&error))
    }

    async fn revert(&mut self) {
        if self.set.take().is_none() {
            return;
        }
        if let (Some(bus), Some(link)) = (self.bus.take(), self.index())
            && let Err(error) = bus.call("RevertLink", &(link,)).await
        {
            // The settings go with the link in any case.
            tracing::debug!(%error, "systemd-resolved did not take its settings back");
        }
    }

    /// As the bus wants it.
    fn index(&self) -> Option<i32> {
        let index = nix::net::if_::if_nametoindex(self.link.as_str()).ok()?;
        i32::try_from(index).ok()
    }
}

impl Bus {
    async fn connect() -> zbus::Result<Self> {
        let connection = Connection::system().await?;
        let rule = MatchRule::builder()
            .msg_type(message::Type::Signal)
            .sender("org.freedesktop.DBus")
            .interface("org.freedesktop.DBus")
            .member("NameOwnerChanged")
            .arg(0, RESOLVED)
            .build()?;
        let owners = MessageStream::for_match_rule(rule, &connection, None).await?;
        Ok(Self { connection, owners })
    }

    /// Asked of the bus, since a call to systemd-resolved itself could start it.
    async fn has_owner(&self) -> zbus::Result<bool> {
        let bus = "org.freedesktop.DBus";
        let path = "/org/freedesktop/DBus";
        let reply = self
            .connection
            .call_method(Some(bus), path, Some(bus), "NameHasOwner", &RESOLVED);
        reply.await?.body().deserialize()
    }

    async fn call<B>(&self, verb: &str, body: &B) -> zbus::Result<()>
    where
        B: serde::Serialize + DynamicType + Sync,
    {
        let (path, interface) = ("/org/freedesktop/resolve1", "org.freedesktop.resolve1.Manager");
        let call = self
            .connection
            .call_method(Some(RESOLVED), path, Some(interface), verb, body);
        call.await.map(drop)
    }
}

/// Waits until systemd-resolved has (re)started, the bus is gone, or it is time to look for a new bus. Cancel-safe.
async fn returned(bus: Option<&mut Bus>, set: bool) {
    let Some(bus) = bus else {
        return if set {
            sleep(BUS_AGAIN).await
        } else {
            std::future::pending().await
        };
    };
    while let Some(Ok(message)) = bus.owners.next().await {
        // Name, old owner, new owner; none when it has gone.
        let body = message.body();
        if let Ok((_, _, new)) = body.deserialize::<(&str, &str, &str)>()
            && !new.is_empty()
        {
            return;
        }
    }
}

fn octets(address: IpAddr) -> (i32, Vec<u8>) {
    let family = |family: AddressFamily| family as i32;
    match address {
        IpAddr::V4(v4) => (family(Inet), v4.octets().to_vec()),
        IpAddr::V6(v6) => (family(Inet6), v6.octets().to_vec()),
    }
}

fn refused(error: &zbus::Error) -> String {
    format!("systemd-resolved refuses settings of mesh0: {error}")
}
