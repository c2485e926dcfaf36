use std::fmt;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// Worth knowing.
    Info,
    /// Works, but will not for long or not for all.
    Warning,
    /// Does not work.
    Error,
}

macro_rules! codes {
    ($($variant:ident = $number:literal, $severity:ident, $title:literal, $next:literal;)*) => {
        /// A diagnostic code. The one table behind messages, `status`, `why` and docs/DIAGNOSTICS.md.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Code { $(#[doc = $title] $variant,)* }

        impl Code {
            /// All codes in order.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Its row of the table.
            pub const fn entry(self) -> CodeEntry {
                match self { $(Self::$variant => CodeEntry {
                    id: concat!("TMB", $number), severity: Severity::$severity, title: $title, next: $next,
                },)* }
            }
        }
    };
}

/// A row of the code table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CodeEntry {
    /// `TMB0101`.
    pub id: &'static str,
    /// How bad.
    pub severity: Severity,
    /// One sentence.
    pub title: &'static str,
    /// What to do next, usually a command.
    pub next: &'static str,
}

codes! {
    TokenMalformed = "0101", Error, "The join token is damaged.", "Copy the whole token, from `tmb1_` to its end, or make a new one: tombolo token create";
    TokenExpired = "0102", Error, "The join token has expired.", "Make a new one: tombolo token create -n NAMESPACE --workload-group GROUP";
    TokenSpent = "0103", Error, "The join token has no uses left.", "Make a new one: tombolo token create -n NAMESPACE --workload-group GROUP";
    TokenUnknown = "0104", Error, "Discovery does not know this join token.", "It was revoked or belongs to another mesh; make a new one: tombolo token create";
    TokenSource = "0105", Error, "The join token may not be used from this address.", "Use it from inside its --cidr, or make one without";
    TokenProof = "0106", Error, "The proof of possession does not fit.", "The token or the device key is damaged; run `tombolo up` with a new token";
    TokenInArgument = "0107", Error, "This join token may not be given as an argument: arguments are seen by everybody on the host.", "Give it by --token-file FILE, by `-` (standard input), by TOMBOLO_TOKEN or as a systemd credential; only a token of one use and at most an hour of life may be an argument";
    PinMismatch = "0110", Error, "The server is not the discovery of this token: its root certificate does not match the pin.", "Check the address in between (proxy, load balancer, DNS); do not go on. A new root needs a new token";
    NotDiscovery = "0111", Error, "The server has a certificate of this mesh but is not discovery.", "Somebody poses as discovery: tell your security team. Check the address with `tombolo token inspect`";
    Unreachable = "0112", Error, "Discovery cannot be reached.", "Check that the address resolves and port 15012 is open from here: nc -vz HOST 15012";
    ClockSkew = "0113", Error, "The clock of this host differs from discovery's.", "Set the clock (timedatectl set-ntp true), then run the command again";
    PrefixTaken = "0114", Error, "This host already routes the mesh's virtual addresses elsewhere.", "Choose other VIP prefixes at `tombolo-discovery init --vip-prefix`, or remove the route";
    AlreadyEnrolled = "0115", Error, "This host is enrolled already.", "tombolo status; to join another mesh: tombolo leave, then tombolo up";
    UserMissing = "0116", Error, "The user that the agent runs as does not exist.", "useradd --system --no-create-home --shell /usr/sbin/nologin tombolo-agent (the package does it), then run the command again";
    NeedsRoot = "0117", Error, "This command changes the host and needs root.", "Run it again with sudo";
    NotReady = "0118", Error, "The agent did not become ready in time.", "tombolo status; its log is in journalctl -u tombolo-agent, or in /var/log/tombolo/agent.log where there is no systemd";
    DeviceRevoked = "0120", Error, "This device was revoked.", "An operator can delete it (tombolo vm delete) and enrol the host again with a new token";
    DeviceClone = "0121", Error, "Another copy of this device has renewed already.", "If this is the right copy: tombolo vm readmit DEVICE. Otherwise: tombolo leave, and up with a new token";
    DeviceUnknown = "0122", Error, "Discovery does not know this device.", "tombolo leave --force, then tombolo up with a new token";
    AddressConflict = "0130", Warning, "Another live member holds this address.", "tombolo vm list shows both; the address moves when discovery can dial this device at it";
    AddressRefused = "0131", Warning, "The claimed address is not one that this node may claim.", "Loopback, link-local, multicast and virtual addresses are refused; others need the group's CIDRs or the connection's source";
    LabelRefused = "0132", Warning, "A label of the node is not listed by its WorkloadGroup.", "Add the key to the annotation tombolo.io/node-labels of the group";
    InvalidResource = "0201", Error, "The resource is not valid.", "Correct the field that is named; tombolo apply --dry-run=server checks without writing";
    Conflict = "0202", Error, "The object was changed by somebody else.", "Get it again and repeat the change";
    NotFound = "0203", Error, "There is no such object.", "tombolo get KIND -A lists what there is";
    AlreadyExists = "0204", Error, "The object exists already.", "Use `tombolo apply` to change it";
    Forbidden = "0205", Error, "You may not do this.", "Ask a mesh-admin; `tombolo audit` shows the refusal";
    Reserved = "0206", Error, "This namespace or name is reserved.", "Choose another namespace";
    AdminUnreachable = "0207", Error, "Discovery's admin socket does not answer.", "Run the command on the discovery host as root or in the group tombolo-admin; systemctl status tombolo-discovery; another path: --socket";
    Usage = "0208", Error, "The command line does not say what to do.", "Add --help to see what the command takes";
    IstioFiles = "0209", Error, "The files of an Istio VM cannot be taken over.", "Name the folder that `istioctl x workload entry configure` wrote, or copy cluster.env, mesh.yaml and hosts of the VM into one; docs/MIGRATING-FROM-ISTIO-VM.md";
    InvalidRequest = "0210", Error, "The command asks for something that cannot be.", "Correct what is named; the command with --help says what it takes";
    NotEnrolled = "0301", Warning, "This host is not enrolled.", "tombolo up TOKEN";
    NoControlPlane = "0302", Warning, "Discovery cannot be reached; what was received last is served.", "Nothing is lost; check the network to discovery: tombolo status";
    CertificateExpired = "0303", Error, "The certificate of this host has expired.", "It renews by itself as soon as discovery is reachable: tombolo status";
    CertificateExpiring = "0304", Warning, "The certificate is past its half life and not renewed yet.", "Check the network to discovery: tombolo status";
    NoPolicyYet = "0305", Error, "No policy set has been received yet; nothing is admitted.", "Wait for the first contact with discovery: tombolo status";
    ProbeFailing = "0306", Warning, "The health probe of the application fails; this host gets no calls.", "Start or mend the application";
    NetdUnreachable = "0307", Error, "tombolo-netd does not answer; there is no mesh0.", "systemctl status tombolo-netd";
    ProbeRefused = "0308", Warning, "The health probe of the WorkloadGroup is not of a kind that agents run.", "Use httpGet or tcpSocket, without a host or with one of this host's own addresses";
    ResourceRefused = "0309", Warning, "Discovery sent something that this agent does not understand.", "Upgrade the agent; what it had before stays in force: tombolo status";
    AgentUnreachable = "0310", Error, "The agent of this host does not answer.", "tombolo up starts it; its log is in journalctl -u tombolo-agent, or in /var/log/tombolo/agent.log where there is no systemd";
    CaptureFailed = "0311", Error, "mesh0, the way into the mesh, cannot be set up.", "journalctl -u tombolo-netd shows what the kernel said; is the module tun there, and no other mesh0?";
    NotAvailable = "0312", Error, "This version cannot do that.", "See the changelog for when it can";
    NamesNotAsked = "0313", Warning, "This host's resolver does not ask the mesh for names of the mesh.", "Add the line that is named; nothing on the host was changed. More: docs/OPERATIONS.md, names";
    GuardRefused = "0314", Error, "Ports that a policy closes to plaintext are not guarded on this host.", "Install the package nftables; journalctl -u tombolo-netd shows what the kernel said; tombolo status lists the ports. It is tried again by itself";
    NoReverseSession = "0315", Error, "This host only dials out, and no gateway of its network can be reached: nobody can call it.", "Check that this host may dial the gateways that are named, 443/tcp or 443/udp as a rule; it is tried again by itself";
    AgentStopping = "0316", Warning, "The agent of this host is being stopped; this host gets no new calls.", "tombolo up on that host starts it again";
    NameUnknown = "0401", Error, "No such name in the mesh.", "tombolo get se -A lists the services; names are <service>.<namespace>.svc.<mesh domain>";
    NameNotResolved = "0402", Error, "The mesh knows the name, but this host does not ask the mesh for it.", "Point the host's resolver at the DNS VIP: docs/OPERATIONS.md, names";
    PortUnknown = "0403", Error, "The service has no such port.", "tombolo describe se NAME lists its ports";
    PolicyDenies = "0404", Error, "A policy denies this connection.", "tombolo get ap -n NAMESPACE POLICY -o yaml; change or delete it";
    NoEndpoint = "0405", Error, "The service has no healthy endpoint.", "tombolo vm list shows which VMs are away or unhealthy, and why";
    EndpointUnreachable = "0406", Error, "No endpoint could be reached.", "Check that port 15008/tcp is open from here to the endpoint's address";
    PeerIdentity = "0407", Error, "The endpoint is not who it must be.", "The address was reused or somebody poses as the service: tombolo vm list";
    ApplicationRefuses = "0408", Error, "The endpoint was reached, but its application refused.", "Check that the application listens on its target port at the host's own address";
    PortNotDeclared = "0409", Error, "The endpoint does not deliver this port.", "Declare it: WorkloadGroup.spec.template.ports";
    EndpointNames = "0410", Error, "The endpoints of this service are names (resolution DNS), which this version does not resolve.", "Give the ServiceEntry resolution STATIC and endpoints with addresses, or call the name outside the mesh";
    GatewayUnreachable = "0411", Error, "The endpoint is in another network, and no gateway into it could be reached.", "Check that the port of the gateways is open from here, 443/tcp as a rule; tombolo vm list -n tombolo-system shows whether they are alive";
    GatewayRefuses = "0412", Error, "The gateway was reached, but it does not pass the call on.", "Its log names the reason: journalctl -u tombolo-gateway. An endpoint behind it may be away: tombolo vm list";
    PlaintextRefused = "0413", Error, "The port takes no plaintext: a policy closes it to callers outside of the mesh.", "Call it by its name, <service>.<namespace>.svc.<mesh domain>, from a host of the mesh; tombolo status on the endpoint lists its guarded ports";
    StateCorrupt = "0501", Warning, "A state file was unreadable and was set aside.", "Nothing to do if the host is back; the file is kept beside it with .bad";
    StateUnusable = "0502", Error, "The agent's state directory cannot be used.", "Check that /var/lib/tombolo/agent belongs to the agent's user, and that the disk is not full";
    StateLocked = "0503", Error, "Another process uses the agent's state directory.", "tombolo down stops the agent; then run the command again";
    ConfigInvalid = "0504", Error, "A configuration file is not valid.", "Correct the key that is named; tombolo config show prints what is in force and where it comes from";
    EndpointTaken = "0505", Warning, "Metrics or readiness are not served: their port is taken on this host.", "Set metrics_listen, readiness_listen or debug_listen in the configuration file; an agent and discovery on one host need two readiness ports";
    InboundTaken = "0506", Error, "The port on which other hosts of the mesh call this one is taken.", "ss -ltnp shows which program has it (another agent, Envoy or ztunnel?): stop that program; this one tries again by itself";
    StateLost = "0507", Error, "A file that this host cannot do without is damaged.", "Put it back from a copy, or: tombolo leave --force, then tombolo up with a new token";
    StateExposed = "0508", Warning, "A private key of this host could be read by others; the file is closed now.", "If others use this host, take the key out of use: tombolo leave, then tombolo up with a new token";
    StateNewer = "0509", Error, "A file on this host was written by a newer version; it was left as it is.", "Install the newer version again (apt install tombolo-agent=VERSION), or: tombolo leave --force, then tombolo up with a new token";
    VersionSkew = "0510", Warning, "Programs of this mesh are more than one minor version apart.", "Upgrade the older one; discovery first, then the agents: docs/OPERATIONS.md, upgrade";
    ReloadFailed = "0511", Error, "The agent was not reloaded; the one that runs goes on, and nothing was lost.", "Mend what is named and run systemctl reload tombolo-agent again; systemctl restart tombolo-agent starts anew, with open connections given the time of a drain";
    BrakeEngaged = "0601", Warning, "Many members turned suspect at once; nobody is taken out by suspicion.", "Check the network of discovery; members that are really dead are still taken out by callers";
    StartGrace = "0602", Info, "Discovery has just started; nobody is taken out by suspicion yet.", "Nothing to do: it ends after 20 s";
    MetricsRefused = "0603", Warning, "The metrics that a member pushed are refused.", "They must be Prometheus text of at most 256 KiB; set metrics_push_seconds: 0 in its /etc/tombolo/agent.yaml if something else scrapes it";
    MemberLimit = "0604", Warning, "One member holds too many connections or streams at discovery; more are refused.", "A restart of its agent closes them; a copy of the VM counts as the same member: tombolo vm list. If it goes on: tombolo vm revoke";
    AuditFailing = "0605", Error, "The audit log cannot be written.", "Free space in the folder of discovery, or mend the disk: what is done meanwhile is in discovery's own log only";
    HealthFlaps = "0606", Warning, "The health of this member's application flaps: it comes back into the choice of clients later each time.", "Look at the application's own log, or make the probe of the WorkloadGroup less strict";
    ProxyRefused = "0607", Warning, "A connection to discovery names another source than its own, and is not from a gateway.", "A gateway of this mesh must be listed at that address: tombolo vm list -n tombolo-system. A load balancer in between must not send PROXY headers";
    InviteMalformed = "0701", Error, "The invite is damaged.", "Copy the whole invite, from `tmi1_` to its end, or make a new one: tombolo cluster invite";
    InviteExpired = "0702", Error, "The invite has expired.", "Make a new one: tombolo cluster invite CLUSTER --trust-domain DOMAIN --namespaces LIST";
    InviteSpent = "0703", Error, "Another key has used the invite.", "If that was not you, remove the member: tombolo cluster remove CLUSTER. Then make a new invite: tombolo cluster invite";
    InviteUnknown = "0704", Error, "The inviting cluster does not know this invite.", "It was revoked or belongs to another mesh; make a new one: tombolo cluster invite";
    InviteProof = "0705", Error, "The proof of possession does not fit.", "The invite or the key of this discovery is damaged; join with a new invite";
    InviteMismatch = "0706", Error, "The invite is for another cluster or trust domain.", "Make one that names this cluster and its trust domain: tombolo cluster invite";
    MayNotAdmit = "0707", Error, "This cluster has no right to admit, change or remove that member.", "Run the command on the cluster that admitted it, or on the founder: tombolo cluster list";
    MemberExists = "0708", Error, "A member of this name exists already.", "Choose another name, or remove that member first: tombolo cluster remove CLUSTER";
    MemberUnknown = "0709", Error, "There is no such member.", "tombolo cluster list; right after a join the other members may need some seconds";
    MemberRemoved = "0710", Error, "This member was removed.", "It comes back by a new invite of the cluster that removed it: tombolo cluster invite";
    MembershipForged = "0711", Error, "A membership record is not signed by a member that may admit.", "Refused, nothing changed; the member that sent it is named: tombolo cluster status";
    MembershipOld = "0712", Warning, "A membership record is older than the one that is held.", "Refused, nothing changed; if it goes on, a member was restored from a backup: tombolo cluster status";
    MembershipTooNew = "0713", Error, "A membership record is of a version that is not understood.", "Upgrade this discovery to the version of its peers";
    TrustDomainTaken = "0714", Error, "Another member has this trust domain.", "Give each cluster its own trust domain, or read what --share-trust-domain gives away and use it on both sides";
    FederatedAlready = "0715", Error, "This cluster is federated already.", "tombolo cluster list; a cluster with members of its own cannot join another set";
    ExportOutsideGrant = "0716", Error, "A member exports a service of a namespace that it was not granted.", "Refused; grant the namespace, or stop the export on that cluster: tombolo cluster status";
    ExportForeignIdentity = "0717", Error, "A member exports a service with identities that are not of its own trust domain.", "Refused; tell the owner of that cluster: tombolo cluster status";
    ExportInvalid = "0718", Error, "A member exports something that is not valid.", "Refused; upgrade the older of the two discoveries, or tell the owner of that cluster";
    ExportTooLarge = "0719", Error, "A cluster exports more than a member may.", "Export fewer services, ports, identities or localities; the limits are in docs/OPERATIONS.md";
    MemberVersion = "0720", Error, "The two discoveries are more than one minor release apart.", "Upgrade the older one";
    PeerProof = "0721", Error, "The peer could not prove that it is the member it claims to be.", "Somebody poses as that cluster, or its key was lost: tombolo cluster status";
    PeerProtocol = "0722", Error, "The peer does not keep to the protocol.", "The connection was closed and is tried again; upgrade the older of the two discoveries";
    PeerRestored = "0723", Warning, "A discovery came back with an older memory: it was restored from a backup, or runs twice.", "If it runs twice, stop one of them; otherwise nothing is to be done";
    ClusterStale = "0724", Warning, "A member cannot be reached; what it exported last is still served.", "Check the network to its discovery: tombolo cluster status";
    MemberContested = "0725", Warning, "Two members with the right to admit claim the same name or trust domain.", "One of the two does not count: tombolo cluster list shows which; remove the wrong one";
    MemberLimitReached = "0726", Error, "The set of clusters is full.", "At most 256 clusters; remove those that are gone: tombolo cluster remove";
    JoinPending = "0727", Warning, "A cluster was admitted and has not come yet.", "If its join failed there, run it again with the same invite; or take it back: tombolo cluster remove CLUSTER";
    TrustDomainInUse = "0728", Error, "The member still uses this trust domain.", "Let it finish its migration first: tombolo trust show on that cluster. To cut off what it has of that name: --force";
    TrustDomainUnlisted = "0729", Error, "The other clusters do not know this name of the trust domain.", "Run the command that is named on the cluster that admitted this one; then repeat this";
    TrustStep = "0801", Error, "It is not the turn of this step of the change of trust.", "tombolo trust show says how far it is and what comes next";
    TrustBehind = "0802", Error, "Not everybody is ready for this step of the change of trust.", "Wait for those that are named, or leave them behind: --force. tombolo trust show lists them";
    TrustUnderWay = "0803", Info, "The root or the name of the trust domain of this mesh is being changed.", "tombolo trust show says how far it is and what comes next";
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.entry().id)
    }
}

impl Code {
    /// Finds a code by its id, for example in a gRPC error text.
    pub fn find(id: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|code| code.entry().id == id)
    }

    /// The message in its one form: `TMB0101 title cause. Next: …`. An empty cause is left out.
    pub fn message(self, cause: impl fmt::Display) -> String {
        let entry = self.entry();
        let cause = cause.to_string();
        let cause = cause.trim().trim_end_matches('.');
        let cause = if cause.is_empty() {
            String::new()
        } else {
            format!(" Cause: {cause}.")
        };
        format!("{} {}{cause} Next: {}", entry.id, entry.title, entry.next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_unique_and_ordered() {
        let ids: Vec<_> = Code::ALL.iter().map(|code| code.entry().id).collect();
        assert!(ids.windows(2).all(|w| w[0] < w[1]), "{ids:?}");
        assert_eq!(Code::find("TMB0103"), Some(Code::TokenSpent));
    }

    #[test]
    fn messages_name_cause_and_next_step() {
        let text = Code::TokenExpired.message("it ended 3 minutes ago.");
        assert!(
            text.starts_with("TMB0102 The join token has expired. Cause: it ended 3 minutes ago. Next: "),
            "{text}"
        );
    }
}
