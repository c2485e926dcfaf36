#!/bin/sh
# A web server on port 8080 that answers with the name of its host: systemd hands each connection to a shell.
set -eu
cat > /etc/systemd/system/application.socket <<'U'
[Socket]
ListenStream=8080
Accept=yes
[Install]
WantedBy=sockets.target
U
cat > /etc/systemd/system/application@.service <<'U'
[Service]
StandardInput=socket
StandardError=journal
ExecStart=/bin/sh -c 'while read -r line && [ "$${#line}" -gt 1 ]; do :; done; printf "HTTP/1.0 200 OK\\r\\n\\r\\n%%s" "$$(cat /etc/hostname)"'
U
systemctl daemon-reload
systemctl enable --quiet --now application.socket
curl -sS -m 20 http://127.0.0.1:8080/ >/dev/null
