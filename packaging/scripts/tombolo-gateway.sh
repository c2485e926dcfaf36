before_install() { mark_fresh gateway; }

after_install() {
  was_fresh gateway || :
  make_users tombolo-gateway
  make_folders tombolo-gateway
  enable_units tombolo-gateway.service
  # Idles until "tombolo-gateway join" has enrolled it.
  start_units tombolo-gateway.service
}

after_upgrade() {
  upgrading=yes
  make_users tombolo-gateway
  make_folders tombolo-gateway
  enable_units tombolo-gateway.service
  if was_fresh gateway; then
    start_units tombolo-gateway.service
  else
    # A restart is a drain: callers go to the other gateways of the network, and open calls may end.
    renew_units tombolo-gateway.service
  fi
}

before_remove() {
  stop_units tombolo-gateway.service
}

after_remove() {
  ! booted || systemctl daemon-reload || :
}

after_purge() {
  forget_units tombolo-gateway.service
  rm -rf /var/lib/tombolo/gateway /run/tombolo/gateway /etc/tombolo/gateway.yaml
  rm -f /var/log/tombolo/gateway.log*
  remove_users tombolo-gateway
  remove_empty /var/lib/tombolo /var/log/tombolo /run/tombolo /etc/tombolo
}
