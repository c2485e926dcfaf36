//! The host's resolver: which back-end points it at the mesh, chosen by the owner's word and by what is found.

use crate::{
    backends::{Applied, Backend, Folder, Plain, Resolved},
    bus::{Line, RESOLVED},
    lookup::Lookup,
    seen::Seen,
};
use async_trait::async_trait;
use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, interval, sleep_until, timeout},
};
use tombolo_capture::netd::{CONFIRM_WITHIN, DnsSettings, HostNames, HostResolver, NamesMode};
use tombolo_runtime::TaskGroup;

/// All of one request; the agent gives up after ten seconds.
const PATIENCE: Duration = Duration::from_secs(8);
/// A resolver that did not work with the mesh is not started anew again before this; the agent asks every 5 s.
const REFUSED_FOR: Duration = Duration::from_secs(600);
const TICK: Duration = Duration::from_secs(1);

type Reply<T> = oneshot::Sender<T>;

#[derive(Debug)]
enum Wish {
    Set(DnsSettings, Reply<Result<HostNames, String>>),
    Confirm(Option<String>, Reply<Result<HostNames, String>>),
    Alive(Reply<()>),
    Revert(Reply<()>),
}

/// Where things are.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    /// The link that lookups of the mesh leave by.
    pub(crate) link: String,
    /// `/`, but in tests.
    pub(crate) root: PathBuf,
    /// The agent's configuration, for the owner's word.
    pub(crate) config: PathBuf,
    /// netd's state directory.
    pub(crate) state: PathBuf,
}

/// The handle; a task of its own keeps the settings and follows restarts of resolvers.
#[derive(Debug)]
pub(crate) struct Resolver {
    wishes: mpsc::Sender<Wish>,
}

impl Resolver {
    /// The bus is connected to when there is something to say.
    pub(crate) fn new(places: Places, tasks: &TaskGroup) -> Self {
        let (wishes, asked) = mpsc::channel(4);
        let owner = Owner::new(places);
        let stopped = tasks.token().cancelled_owned();
        tasks.spawn("host resolver", owner.run(asked, stopped));
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

    async fn confirm(&self, problem: Option<String>) -> Result<HostNames, String> {
        let answer = self.ask(|reply| Wish::Confirm(problem, reply)).await;
        answer.unwrap_or_else(|| Err("tombolo-netd stops".into()))
    }

    async fn alive(&self) {
        let _ = self.ask(Wish::Alive).await;
    }

    async fn revert(&self) {
        let _ = self.ask(Wish::Revert).await;
    }
}

/// Takes back what a netd that is gone did: `tombolo-netd revert`.
pub(crate) async fn revert(places: Places) {
    let mut owner = Owner::new(places);
    let _ = timeout(PATIENCE, owner.revert()).await;
}

/// A back-end that did not work.
#[derive(Debug)]
struct Refused {
    mode: NamesMode,
    settings: DnsSettings,
    reason: String,
    until: Instant,
}

#[derive(Debug)]
struct Owner {
    root: PathBuf,
    config: PathBuf,
    line: Line,
    backends: Vec<Box<dyn Backend>>,
    /// The back-end in force, and what it was told.
    set: Option<(NamesMode, DnsSettings)>,
    /// It is taken back then, unless lookups are said to work.
    trial: Option<Instant>,
    refused: Option<Refused>,
}

impl Owner {
    fn new(places: Places) -> Self {
        let Places {
            link,
            root,
            config,
            state,
        } = places;
        let backends: Vec<Box<dyn Backend>> = vec![
            Box::new(Resolved::new(&link)),
            Box::new(Folder::network_manager(&root)),
            Box::new(Folder::dnsmasq(&root)),
            Box::new(Folder::unbound(&root)),
            Box::new(Plain::new(&root, &state, &link)),
        ];
        Self {
            root,
            config,
            line: Line::default(),
            backends,
            set: None,
            trial: None,
            refused: None,
        }
    }

    async fn run(mut self, mut asked: mpsc::Receiver<Wish>, stopped: impl Future<Output = ()>) {
        for backend in &mut self.backends {
            let _ = timeout(PATIENCE, backend.repair(&mut self.line)).await;
        }
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        tokio::pin!(stopped);
        loop {
            let by_bus = matches!(self.set, Some((NamesMode::Resolved, _)));
            tokio::select! {
                () = &mut stopped => break,
                wish = asked.recv() => match wish {
                    None => break,
                    Some(wish) => self.act(wish).await,
                },
                _ = ticks.tick() => for backend in &mut self.backends {
                    backend.tick().await;
                },
                () = self.line.resolved_returned(by_bus) => self.again().await,
                () = at(self.trial) => self.judged(Some("nobody said that lookups work".into())).await,
            }
        }
        for backend in &mut self.backends {
            backend.stop();
        }
    }

    async fn act(&mut self, wish: Wish) {
        match wish {
            Wish::Set(settings, reply) => {
                let done = timeout(PATIENCE, self.wished(&settings)).await;
                let done = match done {
                    Ok(done) => done,
                    Err(_) => {
                        // In the middle of something: nothing is left half done.
                        let _ = timeout(PATIENCE, self.revert()).await;
                        Err("the host's resolver does not answer".to_owned())
                    }
                };
                let _ = reply.send(done);
            }
            Wish::Confirm(problem, reply) => {
                self.judged(problem).await;
                let settings = self.set.as_ref().map(|(_, settings)| settings.clone());
                let settings = settings.or_else(|| Some(self.refused.as_ref()?.settings.clone()));
                let found = timeout(PATIENCE, self.said(&settings.unwrap_or_default())).await;
                let _ = reply.send(found.map_err(|_| "the host's resolver does not answer".to_owned()));
            }
            Wish::Alive(reply) => {
                self.backends.iter_mut().for_each(|backend| backend.alive());
                let _ = reply.send(());
            }
            Wish::Revert(reply) => {
                let _ = timeout(PATIENCE, self.revert()).await;
                // Who starts again after this may try again.
                self.refused = None;
                let _ = reply.send(());
            }
        }
    }

    /// The owner's word. A file that is not there is silent.
    fn word(&self) -> Result<NamesMode, String> {
        let shown = self.config.display();
        match fs::read_to_string(&self.config) {
            Ok(text) => NamesMode::in_file(&text).map_err(|value| {
                let known: Vec<_> = NamesMode::ALL.iter().map(|mode| mode.as_str()).collect();
                format!("{shown}: names: {value:?} is none of {}", known.join(", "))
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(NamesMode::Auto),
            Err(error) => Err(format!("{shown}: {error}")),
        }
    }

    async fn look(&mut self) -> Seen {
        let resolved = self.line.has_owner(RESOLVED).await;
        let manager = self.line.network_manager_mode().await;
        Seen::read(&self.root, resolved, manager)
    }

    async fn wished(&mut self, settings: &DnsSettings) -> Result<HostNames, String> {
        let word = self.word()?;
        let seen = self.look().await;
        let lookup = Lookup::of(&seen);
        let named = word != NamesMode::Auto;
        let chosen = match word {
            NamesMode::Auto => lookup.backend(),
            NamesMode::None => None,
            NamesMode::Resolved
            | NamesMode::NetworkManager
            | NamesMode::Dnsmasq
            | NamesMode::Unbound
            | NamesMode::ResolvConf => Some(word),
        };
        if chosen.is_some() || word == NamesMode::None {
            self.revert_all_but(chosen).await;
        }
        let mut names = HostNames {
            resolver: lookup.name(),
            advice: lookup.advice(settings),
            ..HostNames::default()
        };
        let Some(chosen) = chosen else {
            if word == NamesMode::None {
                names.advice = format!("names: none is set; {}", names.advice);
            }
            return Ok(names);
        };
        if let Some(reason) = self.still_refused(chosen, settings) {
            names.advice = format!("{chosen} was tried and taken back ({reason}); {}", names.advice);
            return Ok(names);
        }
        let Some(backend) = self.backends.iter_mut().find(|backend| backend.mode() == chosen) else {
            return Ok(names);
        };
        let applied = match backend.detect(&seen, named) {
            Ok(()) => backend.apply(settings, &mut self.line).await,
            Err(reason) => Err(reason),
        };
        match applied {
            Ok(applied) => {
                let new = self.set.as_ref() != Some(&(chosen, settings.clone()));
                if new {
                    tracing::info!(backend = %chosen, domain = settings.domain, "the host's resolver asks the mesh");
                }
                self.set = Some((chosen, settings.clone()));
                match applied {
                    Applied::OnTrial => self.trial = Some(Instant::now() + CONFIRM_WITHIN),
                    Applied::Known => {}
                }
                self.in_force(&mut names);
                Ok(names)
            }
            // systemd-resolved is asked again and again: it may have been starting.
            Err(reason) if chosen == NamesMode::Resolved && !named => Err(reason),
            Err(reason) => {
                names.advice = format!("{chosen} is not pointed at the mesh: {reason}; {}", names.advice);
                Ok(names)
            }
        }
    }

    fn in_force(&self, names: &mut HostNames) {
        let Some((mode, _)) = &self.set else { return };
        names.asks = true;
        names.backend = mode.to_string();
        names.confirm = self.trial.is_some();
        names.alive = *mode == NamesMode::ResolvConf;
        names.advice = String::new();
    }

    /// What there is, without changing anything.
    async fn said(&mut self, settings: &DnsSettings) -> HostNames {
        let lookup = Lookup::of(&self.look().await);
        let mut names = HostNames {
            resolver: lookup.name(),
            advice: lookup.advice(settings),
            ..HostNames::default()
        };
        if let Some(refused) = &self.refused {
            names.advice = format!(
                "{} was tried and taken back ({}); {}",
                refused.mode, refused.reason, names.advice
            );
        }
        self.in_force(&mut names);
        names
    }

    fn still_refused(&self, mode: NamesMode, settings: &DnsSettings) -> Option<String> {
        let refused = self.refused.as_ref()?;
        let same = refused.mode == mode && refused.settings == *settings && Instant::now() < refused.until;
        same.then(|| refused.reason.clone())
    }

    /// The trial is over.
    async fn judged(&mut self, problem: Option<String>) {
        let Some((mode, settings)) = self.set.clone().filter(|_| self.trial.take().is_some()) else {
            return;
        };
        let Some(backend) = self.backends.iter_mut().find(|backend| backend.mode() == mode) else {
            return;
        };
        let verdict = match problem {
            None => match timeout(PATIENCE, backend.verify(&mut self.line)).await {
                Ok(verdict) => verdict.and_then(|()| backend.keep()),
                Err(_) => Err("it does not answer".into()),
            },
            Some(problem) => Err(problem),
        };
        let Err(reason) = verdict else {
            tracing::info!(backend = %mode, "lookups work: it stays");
            return;
        };
        tracing::warn!(backend = %mode, reason, "taken back");
        let _ = timeout(PATIENCE, self.revert()).await;
        self.refused = Some(Refused {
            mode,
            settings,
            reason,
            until: Instant::now() + REFUSED_FOR,
        });
    }

    /// A restart of systemd-resolved, or of the bus.
    async fn again(&mut self) {
        let Some((NamesMode::Resolved, settings)) = self.set.clone() else {
            self.line.hang_up();
            return;
        };
        if !matches!(timeout(PATIENCE, self.line.has_owner(RESOLVED)).await, Ok(true)) {
            return; // its next start is a message of the bus
        }
        let resolved = NamesMode::Resolved;
        let Some(backend) = self
            .backends
            .iter_mut()
            .find(|backend| backend.mode() == resolved)
        else {
            return;
        };
        match timeout(PATIENCE, backend.apply(&settings, &mut self.line)).await {
            Ok(Ok(_)) => tracing::info!("systemd-resolved was told again"),
            Ok(Err(error)) => tracing::warn!(error, "systemd-resolved was not told again"),
            Err(_) => tracing::warn!("systemd-resolved does not answer"),
        }
    }

    async fn revert(&mut self) {
        self.revert_all_but(None).await;
    }

    /// What earlier netds did, too.
    async fn revert_all_but(&mut self, kept: Option<NamesMode>) {
        if self.set.as_ref().map(|(mode, _)| *mode) != kept {
            self.set = None;
            self.trial = None;
        }
        for backend in &mut self.backends {
            if Some(backend.mode()) != kept {
                backend.revert(&mut self.line).await;
            }
        }
    }
}

async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

impl Places {
    /// Of a host as packages lay it out.
    pub(crate) fn new(link: &str, config: &Path, state: &Path) -> Self {
        Self {
            link: link.to_owned(),
            root: "/".into(),
            config: config.to_owned(),
            state: state.to_owned(),
        }
    }
}
