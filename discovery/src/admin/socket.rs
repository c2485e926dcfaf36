//! The admin socket: whoever the kernel says is root, discovery's own user or of group tombolo-admin is a mesh-admin.

use crate::{
    caller::{Authenticator, Caller},
    listener::{Connection, Link, LocalUser},
    refusal::Refusal,
    roles::{Grant, Role},
};
use std::{io, os::unix::fs::PermissionsExt as _, path::Path, time::Duration};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::mpsc,
};
use tombolo_runtime::TaskGroup;
use tombolo_types::Code;
use tonic::metadata::MetadataMap;

/// Members of this group are operators.
const GROUP: &str = "tombolo-admin";

/// Binds. Everybody may connect, so that who is refused reads why.
///
/// # Errors
/// When another discovery listens there, or the path cannot be made.
pub async fn bind(path: &Path) -> io::Result<UnixListener> {
    if UnixStream::connect(path).await.is_ok() {
        return Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "another discovery listens there",
        ));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
    Ok(listener)
}

/// Accepts until the group stops.
pub async fn run(
    listener: UnixListener,
    accepted_tx: mpsc::Sender<io::Result<Connection<UnixStream>>>,
    tasks: TaskGroup,
) {
    let stop = tasks.token();
    while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
        let Ok((socket, _)) = accepted else {
            tokio::time::sleep(Duration::from_millis(50)).await; // out of file descriptors
            continue;
        };
        let Ok(credentials) = socket.peer_cred() else {
            continue;
        };
        let local = LocalUser {
            uid: credentials.uid(),
            gid: credentials.gid(),
            pid: credentials.pid(),
        };
        let link = Link {
            local: Some(local),
            ..Link::default()
        };
        if accepted_tx.send(Ok(Connection::new(socket, link))).await.is_err() {
            return;
        }
    }
}

/// Peer credentials.
#[derive(Debug)]
pub struct PeerCredentials;

#[tonic::async_trait]
impl Authenticator for PeerCredentials {
    async fn authenticate(&self, link: &Link, _headers: &MetadataMap) -> Result<Option<Caller>, Refusal> {
        let Some(user) = &link.local else { return Ok(None) };
        let name = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(user.uid))
            .ok()
            .flatten()
            .map(|u| u.name);
        let group = nix::unistd::Group::from_name(GROUP).ok().flatten();
        let shown = name.clone().unwrap_or_else(|| user.uid.to_string());
        if is_operator(
            user,
            nix::unistd::Uid::effective().as_raw(),
            name.as_deref(),
            group.as_ref(),
        ) {
            let grants = vec![Grant {
                role: Role::MeshAdmin,
                namespaces: Vec::new(),
            }];
            return Ok(Some(Caller::Operator {
                name: format!("local user {shown}"),
                grants,
            }));
        }
        Err(Refusal::new(
            Code::Forbidden,
            format_args!(
                "local user {shown} is neither root nor in group {GROUP} (sudo, or: usermod -aG {GROUP} {shown})"
            ),
        ))
    }
}

fn is_operator(
    user: &LocalUser,
    own_uid: u32,
    name: Option<&str>,
    group: Option<&nix::unistd::Group>,
) -> bool {
    user.uid == 0
        || user.uid == own_uid
        || group.is_some_and(|group| {
            group.gid.as_raw() == user.gid
                || name.is_some_and(|name| group.mem.iter().any(|member| member == name))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_an_operator() {
        let user = |uid, gid| LocalUser { uid, gid, pid: None };
        let group = nix::unistd::Group {
            name: GROUP.into(),
            passwd: std::ffi::CString::default(),
            gid: nix::unistd::Gid::from_raw(777),
            mem: vec!["anna".into()],
        };
        let check = |user: &LocalUser, name| is_operator(user, 500, name, Some(&group));
        assert!(check(&user(0, 0), Some("root")));
        assert!(check(&user(500, 500), None), "discovery's own user");
        assert!(check(&user(1000, 777), Some("bert")), "by primary group");
        assert!(check(&user(1000, 1000), Some("anna")));
        assert!(!check(&user(1000, 1000), Some("bert")) && !check(&user(1000, 1000), None));
        assert!(
            !is_operator(&user(1000, 777), 500, Some("anna"), None),
            "no such group on this host"
        );
    }
}
