# Part of every maintainer script, deb and rpm. All of it may run twice, in a chroot, and where systemd does not run.

# systemd is PID 1 here. In a chroot or an image build it is not: then units are enabled and nothing is started.
booted() { [ -d /run/systemd/system ]; }

# make_users NAME: the users of /usr/lib/sysusers.d/NAME.conf.
make_users() {
  systemd-sysusers "/usr/lib/sysusers.d/$1.conf"
}

# make_folders NAME: the folders of /usr/lib/tmpfiles.d/NAME.conf. A file system that is not there yet (an image that is
# being built without /run) is no error: systemd makes them at boot.
make_folders() {
  systemd-tmpfiles --create "/usr/lib/tmpfiles.d/$1.conf" || :
}

# enable_units NAME…: so that they start at boot, once: a unit that the administrator disabled stays so.
enable_units() {
  for unit in "$@"; do
    if command -v deb-systemd-helper >/dev/null; then
      deb-systemd-helper unmask "$unit" >/dev/null || :
      if deb-systemd-helper --quiet was-enabled "$unit"; then
        deb-systemd-helper enable "$unit" >/dev/null || :
      else
        deb-systemd-helper update-state "$unit" >/dev/null || :
      fi
    elif [ -z "${upgrading:-}" ]; then
      # Elsewhere the distribution's presets decide; "tombolo up" enables what it needs in any case.
      systemctl --no-reload preset "$unit" >/dev/null 2>&1 || :
    fi
  done
}

# start_units NAME…: those that are enabled, where the administrator's policy-rc.d lets packages start things.
start_units() {
  booted || return 0
  systemctl daemon-reload || :
  for unit in "$@"; do
    systemctl --quiet is-enabled "$unit" 2>/dev/null || continue
    if command -v deb-systemd-invoke >/dev/null; then
      deb-systemd-invoke start "$unit" >/dev/null || :
    else
      systemctl --no-block start "$unit" || :
    fi
  done
}

# renew_units NAME…: those that run take the new program: by reload where the unit can, so that no connection is lost.
# One that cannot (it is of a version that does not know how) is restarted, unless the new program would not start.
renew_units() {
  booted || return 0
  systemctl daemon-reload || :
  for unit in "$@"; do
    systemctl try-reload-or-restart "$unit" && continue
    [ "$(systemctl show --value -p CanReload "$unit")" = yes ] && systemctl --quiet is-active "$unit" || continue
    program=/usr/bin/${unit%.service}
    if "$program" config >/dev/null; then
      echo "$unit: the running one does not hand over, so it is restarted: open connections get the time of a drain"
      systemctl try-restart "$unit" || :
    else
      echo "$unit: the running one goes on with the old program; mend the configuration, then: systemctl reload ${unit%.service}"
    fi
  done
}

# stop_units NAME…
stop_units() {
  booted || return 0
  systemctl stop "$@" || :
}

# forget_units NAME…: what this package's enabling left behind.
forget_units() {
  command -v deb-systemd-helper >/dev/null || return 0
  for unit in "$@"; do
    deb-systemd-helper purge "$unit" >/dev/null || :
    deb-systemd-helper unmask "$unit" >/dev/null || :
  done
}

# remove_users NAME…: every file of theirs is gone by now.
remove_users() {
  for user in "$@"; do
    ! getent passwd "$user" >/dev/null || userdel "$user" || :
    ! getent group "$user" >/dev/null || groupdel "$user" || :
  done
}

# The group of operators belongs to agent and discovery alike; the last one to go takes it along.
remove_admin_group() {
  [ ! -e /usr/lib/sysusers.d/tombolo-agent.conf ] && [ ! -e /usr/lib/sysusers.d/tombolo-discovery.conf ] || return 0
  ! getent group tombolo-admin >/dev/null || groupdel tombolo-admin || :
}

# remove_empty FOLDER…: shared with the other packages; the last one to go takes them along.
remove_empty() {
  for folder in "$@"; do
    [ ! -d "$folder" ] || rmdir --ignore-fail-on-non-empty "$folder" || :
  done
}

# Between the two halves of an installation: it is a new one, or one after a removal, and no upgrade.
mark_fresh() { : > "/run/tombolo-fresh-$1" || :; }
was_fresh() { [ -e "/run/tombolo-fresh-$1" ] && rm -f "/run/tombolo-fresh-$1"; }
