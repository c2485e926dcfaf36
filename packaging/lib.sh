# Sourced by the scripts beside it: where things are, and the facts about one build of the packages.
set -euo pipefail
export LC_ALL=C TZ=UTC
umask 022
PACKAGING=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPO=$(dirname "$PACKAGING")
TARGET=${CARGO_TARGET_DIR:-$REPO/target}

die() { echo "packaging: $*" >&2; exit 1; }
need() { command -v "$1" >/dev/null || die "$1 is missing; run: packaging/setup.sh"; }

# The version in the workspace's Cargo.toml. The revision counts packages of one version.
VERSION=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' "$REPO/Cargo.toml")
REVISION=${TOMBOLO_PACKAGE_REVISION:-1}
MAINTAINER="Tombolo founders <founders@tombolo.example>"
HOMEPAGE=$(sed -n 's/^repository = "\(.*\)"/\1/p' "$REPO/Cargo.toml")
[ -n "$VERSION" ] && [ -n "$HOMEPAGE" ] || die "no version or repository in Cargo.toml"

# Every time in the packages is the commit's, so that a commit always gives the same bytes.
if [ -z "${SOURCE_DATE_EPOCH:-}" ]; then
  SOURCE_DATE_EPOCH=$(git -c safe.directory="$REPO" -C "$REPO" log -1 --format=%ct 2>/dev/null) \
    || die "not a git checkout: set SOURCE_DATE_EPOCH to the time of the sources"
fi
export SOURCE_DATE_EPOCH

# Newest glibc that a program of ours may ask for: Debian 12, Ubuntu 22.04, RHEL 9 have it.
GLIBC_FLOOR=2.34
# Largest package that is worth its name on a small VM, in bytes.
PACKAGE_BYTES_MAX=${TOMBOLO_PACKAGE_BYTES_MAX:-$((15 * 1024 * 1024))}
PACKAGES=(tombolo tombolo-agent tombolo-gateway tombolo-discovery)
