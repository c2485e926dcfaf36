//! The rest of the mesh: discovery and a member, on this machine's kernel.

use anyhow::{Context as _, Result};
use tombolo_packages::{Machine, Yard, revision};

/// An application whose answer says which host it is on: systemd hands each connection to a shell.
pub(crate) const APPLICATION: &str = r#"
cat > /etc/systemd/system/application.socket <<'U'
[Socket]
ListenStream=8080
Accept=yes
MaxConnections=1000
[Install]
WantedBy=sockets.target
U
cat > /etc/systemd/system/application@.service <<'U'
[Service]
StandardInput=socket
StandardError=journal
ExecStart=/bin/sh -c 'while read -r line && [ "$${#line}" -gt 1 ]; do :; done; printf "HTTP/1.0 200 OK\\r\\n\\r\\n%%s" "$$(cat /etc/hostname)"'
U
systemctl daemon-reload && systemctl enable --quiet --now application.socket"#;

/// Discovery, and a member that the VM calls and is called by.
pub(crate) struct Mesh {
    pub(crate) discovery: Machine,
    pub(crate) peer: Machine,
}

impl Mesh {
    pub(crate) fn found(yard: &Yard) -> Result<Self> {
        let built = revision(1)?;
        let discovery = yard.machine("discovery")?;
        discovery.add_repository(built)?;
        discovery.apt("install tombolo-discovery")?;
        discovery.ok(&format!(
            "tombolo-discovery init --trust-domain mesh.example --advertise {}:15012 && systemctl enable --now tombolo-discovery",
            discovery.address()
        ))?;
        for group in ["webapp", "catalog"] {
            discovery.ok(&format!(
                "tombolo workload-group create {group} -n shop --service-account {group} --port http=80:8080"
            ))?;
        }
        let peer = yard.machine("peer")?;
        peer.add_repository(built)?;
        peer.apt("install tombolo-agent")?;
        peer.sh_with("sh", APPLICATION)?.checked()?;
        let token = discovery.ok("tombolo token create -n shop --workload-group catalog")?;
        peer.sh_with("tombolo up -", &token)?
            .checked()
            .with_context(|| peer.journal())?;
        Ok(Self { discovery, peer })
    }
}

/// A call by name, with time for an emulated processor.
pub(crate) fn call(service: &str) -> String {
    format!("curl -sS -m 20 http://{service}.shop.svc.mesh.internal/")
}
