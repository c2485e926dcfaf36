#!/bin/bash
# Makes signed apt and yum repositories, as folders that any web server or file share can serve. Needs no network.
#   packaging/repo.sh [PACKAGES] [OUTPUT]     (default target/packages, target/repo)
# Environment:
#   TOMBOLO_SIGNING_KEY   fingerprint or id of an RSA key in your gpg keyring. Without one a throw-away key is made beside
#                         the repository: good for a test, not for a release.
source "$(dirname "$0")/lib.sh"
IN=$(cd "${1:-$TARGET/packages}" && pwd) || die "no packages; run: make packages"
OUT=${2:-$TARGET/repo}
for tool in gpg reprepro createrepo_c rpmsign rpmkeys; do need "$tool"; done
compgen -G "$IN/*.deb" >/dev/null && compgen -G "$IN/*.rpm" >/dev/null || die "no packages in $IN; run: make packages"
mkdir -p "$OUT"; OUT=$(cd "$OUT" && pwd)

KEY=${TOMBOLO_SIGNING_KEY:-}
if [ -z "$KEY" ]; then
  # In /tmp: gpg-agent's socket path must be short.
  GNUPGHOME=$(mktemp -d); export GNUPGHOME
  trap 'gpgconf --kill all; rm -rf "$GNUPGHOME"' EXIT
  # RSA: rpm 4.16 and older know no other.
  gpg --quiet --batch --passphrase '' --quick-generate-key "Tombolo throw-away test key" rsa3072 sign 30d 2>/dev/null
  KEY=$(gpg --list-secret-keys --with-colons | awk -F: '/^fpr/{print $10; exit}')
  echo "packaging: signed with a throw-away key; for a release: make repo SIGNING_KEY=ID"
fi
gpg --batch --armor --export "$KEY" > "$OUT/tombolo.asc"
[ -s "$OUT/tombolo.asc" ] || die "no key $KEY in the gpg keyring"

# --- apt
rm -rf "$OUT/apt"; mkdir -p "$OUT/apt/conf"
architectures=$(for deb in "$IN"/*.deb; do dpkg-deb -f "$deb" Architecture; done | sort -u | tr '\n' ' ')
cat > "$OUT/apt/conf/distributions" <<C
Origin: Tombolo
Label: Tombolo
Suite: stable
Codename: stable
Architectures: $architectures
Components: main
Description: The Tombolo service mesh
SignWith: $KEY
C
for deb in "$IN"/*.deb; do
  reprepro --silent --basedir "$OUT/apt" --ignore=extension includedeb stable "$deb"
done
# reprepro's own state is not for the clients.
rm -rf "$OUT/apt/conf" "$OUT/apt/db"

# --- yum
rm -rf "$OUT/yum"; mkdir -p "$OUT/yum"
cp "$IN"/*.rpm "$OUT/yum/"
rpmsign --define "_gpg_name $KEY" --define "__gpg $(command -v gpg)" --addsign "$OUT"/yum/*.rpm >/dev/null 2>&1 || die "rpmsign failed"
createrepo_c --quiet --simple-md-filenames --revision "$SOURCE_DATE_EPOCH" --set-timestamp-to-revision "$OUT/yum"
gpg --batch --yes --armor --local-user "$KEY" --detach-sign --output "$OUT/yum/repodata/repomd.xml.asc" "$OUT/yum/repodata/repomd.xml"
cat > "$OUT/tombolo.repo" <<'C'
# For /etc/yum.repos.d: put the address of this folder in place of REPOSITORY.
[tombolo]
name=The Tombolo service mesh
baseurl=REPOSITORY/yum
gpgkey=REPOSITORY/tombolo.asc
gpgcheck=1
repo_gpgcheck=1
enabled=1
C
cat > "$OUT/tombolo.sources" <<'C'
# For /etc/apt/sources.list.d, with tombolo.asc in /etc/apt/keyrings: put the address of this folder in place of REPOSITORY.
Types: deb
URIs: REPOSITORY/apt
Suites: stable
Components: main
Signed-By: /etc/apt/keyrings/tombolo.asc
C
chmod -R u=rwX,go=rX "$OUT"
echo "$OUT"
