before_install() { mark_fresh discovery; }

after_install() {
  was_fresh discovery || :
  make_users tombolo-discovery
  make_folders tombolo-discovery
  enable_units tombolo-discovery.service
  # Does nothing before "tombolo-discovery init" has made a mesh.
  start_units tombolo-discovery.service
}

after_upgrade() {
  upgrading=yes
  make_users tombolo-discovery
  make_folders tombolo-discovery
  enable_units tombolo-discovery.service
  if was_fresh discovery; then
    start_units tombolo-discovery.service
  else
    # Agents go on with what they have for the second that this takes.
    renew_units tombolo-discovery.service
  fi
}

before_remove() {
  stop_units tombolo-discovery.service
}

after_remove() {
  ! booted || systemctl daemon-reload || :
}

# The mesh's CA key and store go too: that is what purge means.
after_purge() {
  forget_units tombolo-discovery.service
  rm -rf /var/lib/tombolo/discovery /run/tombolo/discovery /etc/tombolo/discovery.yaml
  rm -f /var/log/tombolo/discovery.log*
  remove_users tombolo-discovery
  remove_admin_group
  remove_empty /var/lib/tombolo /var/log/tombolo /run/tombolo /etc/tombolo
}
