use super::{
    DnsSettings, Families, GuardRules, HostNames, NetdError,
    message::{Answer, Request, Socket, VERSION},
};
use std::{io, os::fd::OwnedFd, path::Path, time::Duration};
use tokio::sync::Mutex;
use tombolo_types::AddressPlan;

/// netd answers within milliseconds; one that does not is stuck.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// The agent's side of the protocol. Requests of one client follow one another.
#[derive(Debug)]
pub struct NetdClient {
    socket: Mutex<Socket>,
}

impl NetdClient {
    /// Connects to netd's socket, [`super::SOCKET`] by default.
    ///
    /// # Errors
    /// When netd is not there, does not know this user, or is of another version.
    pub async fn connect(path: &Path) -> Result<Self, NetdError> {
        let socket = Socket::connect(path)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
        let client = Self {
            socket: Mutex::new(socket),
        };
        let answer = client.ask(&Request::Hello { version: VERSION }).await?.0;
        if matches!(answer, Answer::Hello { .. }) {
            Ok(client)
        } else {
            Err(unexpected(&answer))
        }
    }

    /// The TUN descriptor of mesh0, attached and with offloads; mesh0 is made if there is none.
    ///
    /// # Errors
    /// When netd refuses (another agent is attached) or is gone.
    pub async fn open_tun(&self) -> Result<OwnedFd, NetdError> {
        match self.ask(&Request::OpenTun).await? {
            (Answer::Tun, Some(tun)) => Ok(tun),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Gives mesh0 its own addresses, in those of the wished families that another link of the host has a global
    /// address of, and takes the others away. Returns these families.
    ///
    /// # Errors
    /// When netd refuses or is gone.
    pub async fn set_address(
        &self,
        plan: AddressPlan,
        ipv4: bool,
        ipv6: bool,
    ) -> Result<Families, NetdError> {
        let request = Request::SetAddress {
            plan: plan.into(),
            families: Families { ipv4, ipv6 },
        };
        let answer = self.ask(&request).await?.0;
        if let Answer::Families { families } = answer {
            Ok(families)
        } else {
            Err(unexpected(&answer))
        }
    }

    /// Routes the VIP prefixes of these families to mesh0; while nobody is attached, they are unreachable. Routes of
    /// other families or an earlier plan are taken away.
    ///
    /// # Errors
    /// With `TMB0114` when a prefix is routed by another link already; when netd refuses or is gone.
    pub async fn set_route(&self, plan: AddressPlan, ipv4: bool, ipv6: bool) -> Result<(), NetdError> {
        self.done(&Request::SetRoute {
            plan: plan.into(),
            families: Families { ipv4, ipv6 },
        })
        .await
    }

    /// Closes declared ports to callers outside of the mesh, these and no others. What is in force stays when the agent
    /// or netd ends; rules without a port and [`Self::revert`] remove it.
    ///
    /// # Errors
    /// With `TMB0314` when nft is missing or the kernel refuses (the rules from before stay), or when the rules are not
    /// ones that netd takes; when netd is gone.
    pub async fn set_guard(&self, rules: GuardRules) -> Result<(), NetdError> {
        self.done(&Request::SetGuard { rules }).await
    }

    /// Has the host's resolver ask the mesh for names of the mesh, as far as the host's owner lets netd; otherwise says
    /// what looks up names here and what an administrator can do.
    ///
    /// # Errors
    /// With `TMB0313` when the resolver refuses or the settings are not ones that netd passes on, with `TMB0312` from a
    /// netd that cannot; when netd is gone.
    pub async fn set_dns(&self, settings: DnsSettings) -> Result<HostNames, NetdError> {
        let answer = self.ask(&Request::SetDns { settings }).await?.0;
        if let Answer::Names { names } = answer {
            Ok(names)
        } else {
            Err(unexpected(&answer))
        }
    }

    /// Says how lookups went after a change that `confirm` of the answer to [`Self::set_dns`] asks about; with a problem
    /// it is taken back.
    ///
    /// # Errors
    /// With `TMB0313` when the resolver refuses; when netd is gone.
    pub async fn confirm_dns(&self, problem: Option<String>) -> Result<HostNames, NetdError> {
        let answer = self.ask(&Request::ConfirmDns { problem }).await?.0;
        if let Answer::Names { names } = answer {
            Ok(names)
        } else {
            Err(unexpected(&answer))
        }
    }

    /// Says that the agent answers lookups.
    ///
    /// # Errors
    /// When netd is gone.
    pub async fn alive(&self) -> Result<(), NetdError> {
        self.done(&Request::Alive).await
    }

    /// Waits until netd has closed the connection: it was stopped or started again. Nothing can be asked meanwhile.
    /// Cancel-safe.
    pub async fn closed(&self) {
        let socket = self.socket.lock().await;
        while matches!(socket.receive().await, Ok(Some(_))) {}
    }

    /// Removes mesh0 and all that netd did on this host.
    ///
    /// # Errors
    /// When netd refuses or is gone.
    pub async fn revert(&self) -> Result<(), NetdError> {
        self.done(&Request::Revert).await
    }

    async fn done(&self, request: &Request) -> Result<(), NetdError> {
        let answer = self.ask(request).await?.0;
        if answer == Answer::Done {
            Ok(())
        } else {
            Err(unexpected(&answer))
        }
    }

    async fn ask(&self, request: &Request) -> Result<(Answer, Option<OwnedFd>), NetdError> {
        let bytes = serde_json::to_vec(request).map_err(io::Error::other)?;
        let exchange = async {
            let socket = self.socket.lock().await;
            socket.send(&bytes, &[]).await?;
            let closed = || io::Error::new(io::ErrorKind::UnexpectedEof, "netd closed the connection");
            socket.receive().await?.ok_or_else(closed)
        };
        let (bytes, mut descriptors) = tokio::time::timeout(ANSWER_TIMEOUT, exchange)
            .await
            .map_err(io::Error::from)??;
        let answer = serde_json::from_slice(&bytes).map_err(io::Error::other)?;
        if let Answer::Refused { code, message } = answer {
            return Err(NetdError::Refused { code, message });
        }
        Ok((answer, descriptors.pop()))
    }
}

fn unexpected(answer: &Answer) -> NetdError {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("netd gave another answer than asked for: {answer:?}"),
    )
    .into()
}
