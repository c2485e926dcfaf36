//! systemd-resolved, told over D-Bus: it takes settings of a link from uid 0 and changes no file.

use super::{Applied, Backend};
use crate::{
    bus::{Bus, Line, RESOLVED},
    seen::Seen,
};
use async_trait::async_trait;
use nix::sys::socket::{AddressFamily, AddressFamily::Inet, AddressFamily::Inet6};
use std::{net::IpAddr, time::Duration};
use tokio::time::sleep;
use tombolo_capture::netd::{DnsSettings, NamesMode};
use zbus::zvariant::DynamicType;

/// resolved hears of a new link after we do, and after a restart of its own.
const LINK_TRIES: u32 = 40;
const LINK_AGAIN: Duration = Duration::from_millis(50);

/// The settings of one link.
#[derive(Debug)]
pub(crate) struct Resolved {
    link: String,
    told: bool,
}

impl Resolved {
    pub(crate) fn new(link: &str) -> Self {
        Self {
            link: link.to_owned(),
            told: false,
        }
    }

    /// As the bus wants it.
    fn index(&self) -> Option<i32> {
        let index = nix::net::if_::if_nametoindex(self.link.as_str()).ok()?;
        i32::try_from(index).ok()
    }
}

#[async_trait]
impl Backend for Resolved {
    fn mode(&self) -> NamesMode {
        NamesMode::Resolved
    }

    fn detect(&self, seen: &Seen, named: bool) -> Result<(), String> {
        if !seen.resolved {
            Err("systemd-resolved does not run here".into())
        } else if named || seen.leads_to_resolved() {
            Ok(())
        } else {
            Err("programs do not come to systemd-resolved".into())
        }
    }

    /// First what is never asked of this link, then whom it asks: the other way round ordinary names would come to the
    /// mesh for a moment.
    async fn apply(&mut self, settings: &DnsSettings, line: &mut Line) -> Result<Applied, String> {
        let bus = line.bus().await.ok_or("there is no system bus")?;
        let domains = [(settings.domain.as_str(), true)];
        let mut tries = 0;
        let link = loop {
            let link = self.index().ok_or("mesh0 is gone")?;
            match tell(bus, "SetLinkDomains", &(link, &domains[..])).await {
                Ok(()) => break link,
                Err(error) if tries == LINK_TRIES => return Err(refused(&error)),
                Err(_) => tries += 1,
            }
            sleep(LINK_AGAIN).await;
        };
        let servers: Vec<(i32, Vec<u8>)> = settings.servers.iter().map(|&server| octets(server)).collect();
        let told = async {
            tell(bus, "SetLinkDefaultRoute", &(link, false)).await?;
            for off in [
                "SetLinkLLMNR",
                "SetLinkMulticastDNS",
                "SetLinkDNSOverTLS",
                "SetLinkDNSSEC",
            ] {
                tell(bus, off, &(link, "no")).await?;
            }
            tell(bus, "SetLinkDNS", &(link, &servers)).await
        };
        let told = told.await;
        if told.is_err() {
            // All of it or nothing.
            let _ = tell(bus, "RevertLink", &(link,)).await;
        }
        self.told = told.is_ok();
        // Nothing but names of the mesh can have changed: there is nothing to try.
        told.map(|()| Applied::Known).map_err(|error| refused(&error))
    }

    async fn verify(&mut self, line: &mut Line) -> Result<(), String> {
        if line.has_owner(RESOLVED).await {
            Ok(())
        } else {
            Err("systemd-resolved is gone".into())
        }
    }

    async fn revert(&mut self, line: &mut Line) {
        if !std::mem::take(&mut self.told) {
            return;
        }
        if let (Some(bus), Some(link)) = (line.bus().await, self.index())
            && let Err(error) = tell(bus, "RevertLink", &(link,)).await
        {
            // The settings go with the link in any case.
            tracing::debug!(%error, "systemd-resolved did not take its settings back");
        }
        line.hang_up();
    }

    /// They go with the link, and the link with a boot.
    async fn repair(&mut self, _line: &mut Line) {}
}

async fn tell<B>(bus: &Bus, verb: &str, body: &B) -> zbus::Result<()>
where
    B: serde::Serialize + DynamicType + Sync,
{
    let (path, interface) = ("/org/freedesktop/resolve1", "org.freedesktop.resolve1.Manager");
    bus.call(RESOLVED, path, interface, verb, body).await.map(drop)
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
