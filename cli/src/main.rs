//! `tombolo`: the command line of the mesh.
//!
//! Position: layer 6. One file per verb under `verbs`. Verbs about this host (`up down leave status why`) talk to the
//! agent's socket, verbs about the mesh to discovery's; both check who asks by the peer's credentials.
//!
//! Exit codes: 0 done (`why`: reachable), 1 an error (`why`: a broken hop, `diff`: there are differences), 2 the
//! command line is wrong, 3 refused, 4 the agent or discovery cannot be reached, 5 a deadline passed.
//!
//! **Invariant:** nothing is half done: `up` that is refused leaves no file, `apply` writes all objects or none.
//! **Invariant:** a secret is printed only where making it is the purpose of the verb.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "this is the program that talks to people"
)]

mod failure;
mod files;
mod host_names;
mod objects;
mod output;
mod routes;
mod services;
mod sockets;
mod text;
mod verbs;

use clap::Parser;
use failure::Failure;
use std::process::ExitCode;

/// Tombolo ties virtual machines and clusters into one service mesh.
#[derive(Debug, Parser)]
#[command(
    name = "tombolo",
    version,
    about,
    propagate_version = true,
    disable_help_subcommand = true,
    after_help = "Exit codes: 0 done, 1 error, 2 usage, 3 refused, 4 unreachable, 5 deadline passed.\n\
                  `why` exits with 0 if the destination can be reached and 1 if a hop is broken."
)]
struct Cli {
    #[command(flatten)]
    sockets: sockets::Sockets,
    #[command(subcommand)]
    verb: verbs::Verb,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // --help and --version are no errors, and a closed pipe is none either.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() {
                failure::USAGE
            } else {
                failure::OK
            });
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Failure::plain(format!("cannot start: {error}")).report(),
    };
    match runtime.block_on(verbs::run(cli.verb, &cli.sockets)) {
        Ok(code) => code,
        Err(failure) => failure.report(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_users_type_is_understood() {
        for line in [
            "up tmb1_x",
            "up -",
            "up --token-file /t --label a=b",
            "up",
            "down",
            "leave --force",
            "status -o json",
            "status --json",
            "why catalog.shop.svc.mesh.internal:80",
            "why catalog.shop.svc.mesh.internal 80",
            "get we -n shop -o wide",
            "get se,wg -A -o yaml",
            "get se/catalog -n shop -o name",
            "get -n shop ap deny-all -o json",
            "describe wg catalog -n shop",
            "apply -f x.yaml -f y -R --dry-run=server",
            "apply -f -",
            "delete ap x y -n shop",
            "delete -f x.yaml --ignore-not-found",
            "diff -f x.yaml",
            "wait we/a --for=condition=Healthy --timeout 30s -n shop",
            "wait we/a --for=delete",
            "wait we --all --for=condition=Healthy --timeout 500ms -n shop",
            "wait se/a --for=jsonpath={.status.x}=1",
            "workload-group create catalog -n shop --service-account catalog --port http=80:8080 --port x=1",
            "workload-group create --name catalog -n shop --serviceAccount c --ports http=8080,https=8443 --labels a=b,c=d",
            "workload-group create catalog --no-service -o yaml --dry-run=client",
            "token create -n shop --workload-group catalog --ttl 15m --uses 1 --cidr 10.0.0.0/8 --print-join-command",
            "token create --bearer -n shop --service-account x",
            "token create --bearer -n shop --service-account x --all-roots",
            "token list -A",
            "token revoke 00 -n shop",
            "token inspect tmb1_x",
            "vm list -n shop -o json",
            "vm describe 00000000000000ab",
            "vm revoke shop/x --reason stolen",
            "vm delete shop/x",
            "vm readmit shop/x",
            "cluster invite east --trust-domain east.example",
            "cluster invite east --trust-domain east.example --namespaces shop,bank --ttl 15m --may-admit -o json",
            "cluster invite east --trust-domain west.example --share-trust-domain",
            "cluster join tmi1_x --yes",
            "cluster join -",
            "cluster join --token-file /t",
            "cluster list -o wide",
            "cluster status east -o json",
            "cluster grant east --namespaces shop,bank",
            "cluster grant east --namespaces * --may-admit=false --yes",
            "get svcex,ns -A",
            "cluster remove east --yes",
            "trust show -o wide",
            "trust rotate start",
            "trust rotate switch --yes",
            "trust rotate finish --force --yes",
            "trust migrate start new.example --yes",
            "trust migrate finish --force",
            "audit --since 1h",
            "config show",
            "completion bash",
            "version -o json",
            "--socket /x get we",
            "get we --socket /x",
        ] {
            let args = std::iter::once("tombolo").chain(line.split(' '));
            if let Err(error) = Cli::try_parse_from(args) {
                panic!("{line}: {error}");
            }
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for line in [
            "up tmb1_x --token-file /t",
            "why",
            "get",
            "get we -n shop -A",
            "get we -o csv",
            "token create -n shop",
            "token create -n shop --workload-group a --bearer --service-account b",
            "token create -n shop --workload-group a --ttl soon",
            "token create -n shop --workload-group a --uses 0",
            "wait we/a",
            "apply",
            "workload-group create a --port 80",
            "cluster invite east",
            "cluster join tmi1_x --token-file /t",
            "cluster remove",
            "cluster grant east",
        ] {
            let args = std::iter::once("tombolo").chain(line.split(' '));
            assert!(Cli::try_parse_from(args).is_err(), "{line}");
        }
    }
}
