before_install() { mark_fresh agent; }

# Restarts that get slower each time, where systemd knows how; an older one would complain about the words.
use_backoff() {
  version=$(systemctl --version 2>/dev/null | sed -n '1s/^systemd \([0-9]*\).*/\1/p')
  if [ "${version:-0}" -ge 254 ]; then
    mkdir -p /usr/lib/systemd/system/tombolo-agent.service.d
    cp /usr/share/tombolo-agent/backoff.conf /usr/lib/systemd/system/tombolo-agent.service.d/
  fi
}

after_install() {
  was_fresh agent || :
  make_users tombolo-agent
  make_folders tombolo-agent
  use_backoff
  enable_units tombolo-netd.service tombolo-agent.service tombolo-join.service
  # Without a registration both idle and say so; nothing of the network is touched before "tombolo up".
  start_units tombolo-netd.service tombolo-agent.service tombolo-join.service
}

after_upgrade() {
  upgrading=yes
  make_users tombolo-agent
  make_folders tombolo-agent
  use_backoff
  enable_units tombolo-netd.service tombolo-agent.service tombolo-join.service
  if was_fresh agent; then
    start_units tombolo-netd.service tombolo-agent.service tombolo-join.service
  else
    # netd first: mesh0 outlives it, and a new agent may ask for a verb that the old one does not have.
    renew_units tombolo-netd.service tombolo-agent.service
  fi
}

before_remove() {
  if [ -s /var/lib/tombolo/agent/registration.json ]; then
    echo "tombolo-agent: this host is still a member of its mesh and its key is kept; 'tombolo leave' gives both up"
  fi
  if booted; then
    stop_units tombolo-join.service tombolo-agent.service
    # While netd can still be asked, and by itself where it cannot.
    tombolo-netd revert || :
    # A process from before a reload is drained by the main one; of a host that is in no mesh it may be there a moment longer.
    systemctl kill -s KILL tombolo-agent.service 2>/dev/null || :
    stop_units tombolo-netd.service
  else
    tombolo down >/dev/null 2>&1 || tombolo-netd revert >/dev/null 2>&1 || :
  fi
}

after_remove() {
  rm -rf /usr/lib/systemd/system/tombolo-agent.service.d
  # Of "tombolo up --names resolv-conf".
  rm -f /etc/systemd/system/tombolo-netd.service.d/tombolo-names.conf
  remove_empty /etc/systemd/system/tombolo-netd.service.d
  ! booted || systemctl daemon-reload || :
}

after_purge() {
  forget_units tombolo-netd.service tombolo-agent.service tombolo-join.service
  rm -rf /var/lib/tombolo/agent /var/lib/tombolo/netd /run/tombolo/agent /run/tombolo/netd
  rm -f /var/log/tombolo/agent.log* /var/log/tombolo/netd.log*
  remove_users tombolo-agent
  remove_admin_group
  remove_empty /var/lib/tombolo /var/log/tombolo /run/tombolo /etc/tombolo
}
