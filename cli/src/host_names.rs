//! `tombolo up --names`: the owner's word on how programs of this host come to names of the mesh.

use crate::{
    failure::Failure,
    output,
    services::{self, Layout},
};
use std::{
    fs, io,
    io::{BufRead as _, IsTerminal as _, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
};
use tombolo_capture::netd::NamesMode;

/// Lets netd write /etc, on hosts whose owner chose that its resolv.conf is changed, and on no others.
const DROP_IN: &str = "/etc/systemd/system/tombolo-netd.service.d/tombolo-names.conf";
const DROP_IN_TEXT: &str = "# Written by tombolo up --names resolv-conf; another --names and tombolo leave remove it.\n\
     # A file is replaced in one step only where its folder can be written.\n[Service]\nReadWritePaths=/etc\n";
/// What `resolv-conf` costs.
const COST: &str = "With --names resolv-conf the agent's address becomes the first server of /etc/resolv.conf, the old ones stay behind it \
and `options timeout:1` is set. All lookups of this host pass through the agent then, and:\n\
\x20 - while the agent is killed, none waits: the next server is asked at once;\n\
\x20 - while the agent is frozen, each query waits 1 s before the next server is asked, for about 4 s; then tombolo-netd takes\n\
\x20   the line out, and puts it back when the agent answers again. With tombolo-netd frozen or killed as well, each query waits\n\
\x20   its 1 s until netd is back;\n\
\x20 - the C library asks three servers at most: of three old ones the last is not asked any more;\n\
\x20 - tombolo-netd may write all of /etc (a drop-in of its unit); on other hosts it may not.\n\
tombolo down, tombolo leave and the removal of the package put the file back as it is now.";

/// Records a mode and makes the host fit for it. Gives whether anything has changed.
pub(crate) fn choose(mode: NamesMode, yes: bool, layout: &Layout) -> Result<bool, Failure> {
    let before = in_file(&layout.config)?;
    if mode == NamesMode::ResolvConf && before != mode {
        consent(yes)?;
    }
    let changed = before != mode;
    if changed {
        record(mode, &layout.config)?;
        output::line(format!("names: {mode} is set in {}", layout.config.display()));
    }
    Ok(changed)
}

/// The drop-in is there if and only if the recorded mode needs it. Gives whether it has changed.
pub(crate) fn fit(layout: &Layout) -> Result<bool, Failure> {
    if !layout.systemd() {
        return Ok(false);
    }
    let wanted = in_file(&layout.config)? == NamesMode::ResolvConf;
    set_drop_in(wanted)
}

/// Takes the drop-in away: this host leaves.
pub(crate) fn forget(layout: &Layout) {
    if layout.systemd()
        && let Err(failure) = set_drop_in(false)
    {
        eprintln!("warning: {failure}");
    }
}

fn set_drop_in(wanted: bool) -> Result<bool, Failure> {
    let path = Path::new(DROP_IN);
    let there = fs::read_to_string(path).is_ok_and(|text| text == DROP_IN_TEXT);
    if wanted == there {
        return Ok(false);
    }
    let failed = |error: io::Error| Failure::plain(format!("{DROP_IN}: {error}"));
    let folder = path.parent().unwrap_or(path);
    if wanted {
        fs::create_dir_all(folder).map_err(failed)?;
        fs::write(path, DROP_IN_TEXT).map_err(failed)?;
    } else {
        fs::remove_file(path).map_err(failed)?;
        // Other drop-ins stay, and the folder with them.
        let _ = fs::remove_dir(folder);
    }
    services::systemctl(&["daemon-reload"])?;
    Ok(true)
}

fn in_file(config: &Path) -> Result<NamesMode, Failure> {
    let shown = config.display();
    match fs::read_to_string(config) {
        Ok(text) => NamesMode::in_file(&text)
            .map_err(|value| Failure::plain(format!("{shown}: names: {value:?} is no such mode"))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(NamesMode::Auto),
        Err(error) => Err(Failure::plain(format!("{shown}: {error}"))),
    }
}

/// Asks a person; what is no terminal says it by --yes.
fn consent(yes: bool) -> Result<(), Failure> {
    output::line(COST);
    if yes {
        return Ok(());
    }
    if !io::stdin().is_terminal() {
        return Err(Failure::plain(
            "nothing was changed: --names resolv-conf asks for confirmation, and there is no terminal; add --yes",
        ));
    }
    eprint!("Change /etc/resolv.conf on these terms? [y/N] ");
    let _ = io::stderr().flush();
    let mut answer = String::new();
    let read = io::stdin().lock().read_line(&mut answer);
    if read.is_ok() && matches!(answer.trim(), "y" | "Y" | "yes") {
        Ok(())
    } else {
        Err(Failure::plain("nothing was changed"))
    }
}

fn record(mode: NamesMode, config: &Path) -> Result<(), Failure> {
    let failed = |error: io::Error| Failure::plain(format!("{}: {error}", config.display()));
    let text = match fs::read_to_string(config) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        text => text.unwrap_or_default(),
    };
    let permissions =
        fs::metadata(config).map_or_else(|_| fs::Permissions::from_mode(0o644), |found| found.permissions());
    if let Some(folder) = config.parent() {
        fs::create_dir_all(folder).map_err(failed)?;
    }
    let beside = config.with_extension("yaml.new");
    let write = || {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&beside)?;
        file.write_all(with_mode(&text, mode).as_bytes())?;
        file.set_permissions(permissions)?;
        file.sync_all()?;
        fs::rename(&beside, config)
    };
    write().map_err(failed)
}

/// The text with the mode in the place of an earlier one, else of the example, else at the end.
fn with_mode(text: &str, mode: NamesMode) -> String {
    let new = format!("names: {mode}");
    let mut lines: Vec<&str> = text.lines().collect();
    let at = |start: &str| lines.iter().position(|line| line.starts_with(start));
    match at("names:").or_else(|| at("#names:")) {
        Some(at) => lines[at] = &new,
        None => lines.push(&new),
    }
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mode_is_recorded_in_its_place() {
        let mode = NamesMode::ResolvConf;
        let new = "names: resolv-conf\n";
        for (text, expected) in [
            ("", new.to_owned()),
            ("workers: 2\n", format!("workers: 2\n{new}")),
            ("#names: auto\nworkers: 2\n", format!("{new}workers: 2\n")),
            ("#names: auto\nnames: none # x\n", format!("#names: auto\n{new}")),
        ] {
            let text = with_mode(text, mode);
            assert_eq!(text, expected);
            assert_eq!(NamesMode::in_file(&text), Ok(mode));
        }
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("agent.yaml");
        record(mode, &config).unwrap();
        fs::set_permissions(&config, fs::Permissions::from_mode(0o640)).unwrap();
        record(NamesMode::None, &config).unwrap();
        assert_eq!(in_file(&config).unwrap(), NamesMode::None);
        assert_eq!(fs::metadata(&config).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
