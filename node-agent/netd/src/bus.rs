//! The system bus: systemd-resolved, systemd and NetworkManager are told what to do over it.

use futures_util::StreamExt as _;
use std::time::Duration;
use tokio::time::sleep;
use zbus::{
    Connection, MatchRule, Message, MessageStream, OwnedObjectPath, OwnedVariant, message,
    zvariant::DynamicType,
};

pub(crate) const RESOLVED: &str = "org.freedesktop.resolve1";
const SYSTEMD: &str = "org.freedesktop.systemd1";
const SYSTEMD_PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const NETWORK_MANAGER: &str = "org.freedesktop.NetworkManager";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
/// `NM_MANAGER_RELOAD_FLAG_DNS_FULL`: the DNS plugin is started anew, with all of its files.
const DNS_FULL: u32 = 4;
/// A bus that is being restarted.
const BUS_AGAIN: Duration = Duration::from_secs(5);
/// How often is looked whether a job of systemd is done.
const JOB_POLL: Duration = Duration::from_millis(20);

/// The bus, and what it says of systemd-resolved coming and going.
#[derive(Debug)]
pub(crate) struct Bus {
    connection: Connection,
    owners: MessageStream,
}

/// The bus while there is one; connected to when there is something to say.
#[derive(Debug, Default)]
pub(crate) struct Line(Option<Bus>);

impl Line {
    /// The bus, if there is one.
    pub(crate) async fn bus(&mut self) -> Option<&Bus> {
        if self.0.is_none() {
            match Bus::connect().await {
                Ok(bus) => self.0 = Some(bus),
                Err(error) => tracing::debug!(%error, "there is no system bus"),
            }
        }
        self.0.as_ref()
    }

    pub(crate) fn hang_up(&mut self) {
        self.0 = None;
    }

    /// True if somebody has this name. Asked of the bus, since a call to the program itself could start it.
    pub(crate) async fn has_owner(&mut self, name: &str) -> bool {
        let Some(bus) = self.bus().await else { return false };
        match bus.has_owner(name).await {
            Ok(there) => there,
            Err(error) => {
                tracing::debug!(%error, "the bus is gone");
                self.0 = None;
                false
            }
        }
    }

    /// How NetworkManager has names looked up: `default`, `dnsmasq`, `systemd-resolved`, `none`. `None` where it does
    /// not run. Source: org.freedesktop.NetworkManager.DnsManager.
    pub(crate) async fn network_manager_mode(&mut self) -> Option<String> {
        if !self.has_owner(NETWORK_MANAGER).await {
            return None;
        }
        let path = "/org/freedesktop/NetworkManager/DnsManager";
        let property = ("org.freedesktop.NetworkManager.DnsManager", "Mode");
        match self.bus().await?.property(NETWORK_MANAGER, path, &property).await {
            Ok(mode) => Some(mode),
            Err(error) => {
                tracing::debug!(%error, "NetworkManager does not say how names are looked up");
                None
            }
        }
    }

    /// Waits until systemd-resolved has (re)started, the bus is gone, or it is time to look for a new bus; for ever
    /// unless `wanted`. Cancel-safe.
    pub(crate) async fn resolved_returned(&mut self, wanted: bool) {
        let Some(bus) = self.0.as_mut() else {
            return if wanted {
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
        self.0 = None;
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

    async fn has_owner(&self, name: &str) -> zbus::Result<bool> {
        let bus = "org.freedesktop.DBus";
        let reply = self.call(bus, "/org/freedesktop/DBus", bus, "NameHasOwner", &name);
        reply.await?.body().deserialize()
    }

    pub(crate) async fn call<B>(
        &self,
        program: &str,
        path: &str,
        interface: &str,
        verb: &str,
        body: &B,
    ) -> zbus::Result<Message>
    where
        B: serde::Serialize + DynamicType + Sync,
    {
        self.connection
            .call_method(Some(program), path, Some(interface), verb, body)
            .await
    }

    async fn property(&self, program: &str, path: &str, which: &(&str, &str)) -> zbus::Result<String> {
        let reply = self.call(program, path, PROPERTIES, "Get", which).await?;
        let value: OwnedVariant = reply.body().deserialize()?;
        String::try_from(value)
    }

    /// `active`, `inactive`, `failed`, and so on; `inactive` for a unit that is not loaded.
    pub(crate) async fn unit_state(&self, unit: &str) -> String {
        let state = async {
            let reply = self
                .call(SYSTEMD, SYSTEMD_PATH, MANAGER, "GetUnit", &unit)
                .await?;
            let path: OwnedObjectPath = reply.body().deserialize()?;
            let property = ("org.freedesktop.systemd1.Unit", "ActiveState");
            self.property(SYSTEMD, path.as_str(), &property).await
        };
        state.await.unwrap_or_else(|_| "inactive".into())
    }

    /// Has systemd do a job with a unit, and waits until it is done; an error unless the unit is active then.
    pub(crate) async fn unit_job(&self, verb: &str, unit: &str) -> Result<(), String> {
        let failed = |error: zbus::Error| format!("systemd refuses {verb} of {unit}: {error}");
        let body = (unit, "replace");
        let reply = self.call(SYSTEMD, SYSTEMD_PATH, MANAGER, verb, &body);
        let job: OwnedObjectPath = reply
            .await
            .map_err(failed)?
            .body()
            .deserialize()
            .map_err(failed)?;
        let property = ("org.freedesktop.systemd1.Job", "JobType");
        // Its object goes with it.
        while self.property(SYSTEMD, job.as_str(), &property).await.is_ok() {
            sleep(JOB_POLL).await;
        }
        match self.unit_state(unit).await.as_str() {
            "active" | "reloading" => Ok(()),
            state => Err(format!("{unit} is {state} after {verb}: journalctl -u {unit}")),
        }
    }

    /// Has NetworkManager start its dnsmasq anew, with all of its files.
    pub(crate) async fn network_manager_reload(&self) -> Result<(), String> {
        let path = "/org/freedesktop/NetworkManager";
        self.call(NETWORK_MANAGER, path, NETWORK_MANAGER, "Reload", &DNS_FULL)
            .await
            .map(drop)
            .map_err(|error| format!("NetworkManager refuses to reload its DNS: {error}"))
    }
}
