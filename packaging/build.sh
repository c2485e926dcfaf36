#!/bin/bash
# Builds the deb and rpm packages from the programs of one release build.
#   packaging/build.sh [OUTPUT]      (default target/packages)
# Environment:
#   TOMBOLO_BIN_DIR            folder of the programs (default target/release); their ELF header decides the architecture
#   TOMBOLO_CLI                a `tombolo` that runs on this machine, where the packaged one is for another architecture
#   TOMBOLO_PACKAGE_REVISION   counts packages of one version (default 1)
#   TOMBOLO_PACKAGE_BYTES_MAX  largest package (default 15 MiB): for packages of a dev build, which nobody ships
#   SOURCE_DATE_EPOCH          default: time of the commit
# The same commit and the same programs give the same bytes.
source "$(dirname "$0")/lib.sh"
OUT=$(mkdir -p "${1:-$TARGET/packages}" && cd "${1:-$TARGET/packages}" && pwd)
BIN=${TOMBOLO_BIN_DIR:-$TARGET/release}
for tool in dpkg-deb rpmbuild readelf gzip awk; do need "$tool"; done
for program in tombolo tombolo-agent tombolo-netd tombolo-gateway tombolo-discovery; do
  [ -x "$BIN/$program" ] || die "no $program in $BIN; run: make build"
done

machine=$(readelf -h "$BIN/tombolo-agent" | sed -n 's/^ *Machine: *//p')
case $machine in
  *X86-64*) DEB_ARCH=amd64 RPM_ARCH=x86_64 STRIP=strip ;;
  *AArch64*) DEB_ARCH=arm64 RPM_ARCH=aarch64 STRIP=aarch64-linux-gnu-strip ;;
  *) die "programs for $machine: no such package" ;;
esac
[ "$(uname -m)" = "$RPM_ARCH" ] && STRIP=strip
CLI=${TOMBOLO_CLI:-$BIN/tombolo}
WORK=$(mktemp -d); trap 'rm -rf "$WORK"' EXIT
DATE=$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y-%m-%d)

# --- what a program asks of the system that it is installed on
glibc_of() { readelf --dyn-syms -W "$1" | grep -o '@GLIBC_[0-9.]*' | cut -d_ -f2 | sort -Vu | tail -1; }
needs_of() { readelf -d -W "$1" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p'; }
deb_depends() { # deb_depends PROGRAM…: the libraries, as dpkg-shlibdeps would say it, but by what the symbols need
  local program version highest=0 gcc=
  for program in "$@"; do
    version=$(glibc_of "$program")
    [ "$(printf '%s\n' "$version" "$GLIBC_FLOOR" | sort -V | tail -1)" = "$GLIBC_FLOOR" ] \
      || die "$program asks for glibc $version; the floor is $GLIBC_FLOOR: build it on an older system"
    highest=$(printf '%s\n' "$highest" "$version" | sort -V | tail -1)
    for library in $(needs_of "$program"); do
      case $library in
        libc.so.6 | libm.so.6 | libpthread.so.0 | libdl.so.2 | librt.so.1 | ld-linux*) ;;
        libgcc_s.so.1) gcc=", libgcc-s1 (>= 4.2)" ;;
        *) die "$program needs $library: say in packaging/build.sh which package has it" ;;
      esac
    done
  done
  echo "libc6 (>= $highest)$gcc"
}

# --- generated documents
changes() { # the items of the newest section of CHANGELOG.md, one a line
  awk '/^## /{n++} n==1 && /^- /{if (t) print t; t=substr($0,3); next} n==1 && t && /^  /{sub(/^ +/,""); t=t" "$0} END{if (t) print t}' \
    "$REPO/CHANGELOG.md" | tr -d '`*'
}
deb_changelog() {
  echo "$1 ($VERSION-$REVISION) unstable; urgency=medium"; echo
  changes | while IFS= read -r item; do echo "$item" | fold -s -w 74 | sed -e 's/ *$//' -e '1s/^/  * /' -e '2,$s/^/    /'; done
  echo; echo " -- $MAINTAINER  $(date -u -R -d "@$SOURCE_DATE_EPOCH")"
}
copyright() {
  cat <<C
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: tombolo
Upstream-Contact: $MAINTAINER
Source: $HOMEPAGE
Comment:
 The programs contain libraries of others, linked statically; third-party.gz
 beside this file lists each with its version and licence.

Files: *
Copyright: 2026 the Tombolo authors
License: Apache-2.0
 On Debian systems the full text of the Apache License, version 2.0, is in
 /usr/share/common-licenses/Apache-2.0; elsewhere it is at
 https://www.apache.org/licenses/LICENSE-2.0.
C
}
third_party() { # the crates in a package's programs
  local program
  for program in "$@"; do
    (cd "$REPO" && cargo tree --locked --offline --quiet -p "$program" -e normal --prefix none --format '{p}|{l}')
  done | sed -e '/(\//d' -e 's/ (\*)$//' -e 's/ (proc-macro)//' | sort -u | awk -F'|' '$1!=""{printf "%-45s %s\n", $1, $2}'
}
completion() { # completion SHELL
  [ -s "$WORK/completion-$1" ] || "$CLI" completion "$1" > "$WORK/completion-$1"
  cat "$WORK/completion-$1"
}
man_page() { sed -e "s/@VERSION@/$VERSION/g" -e "s/@DATE@/$DATE/g" "$PACKAGING/man/$1"; }

# --- one tree per package and format
put() { # put ROOT PACKAGE MODE SOURCE DESTINATION
  local root=$1 package=$2 mode=$3 source=$4 to=$1$5
  mkdir -p "$(dirname "$to")"
  case $source in
    dir) mkdir -p "$to" ;;
    # Release builds keep line tables for profiling; installed programs need none.
    bin:*) "$STRIP" --strip-all --remove-section=.comment -o "$to" "$BIN/${source#bin:}" ;;
    man:*) man_page "${source#man:}" | gzip -9n > "$to" ;;
    completion:*) completion "${source#completion:}" > "$to" ;;
    *) cp "$PACKAGING/$source" "$to" ;;
  esac
  chmod "$mode" "$to"
}
programs_of() { sed -n 's/.*bin:\([a-z-]*\) .*/\1/p' "$PACKAGING/files/$1"; }
tree_of() { # tree_of FORMAT PACKAGE: makes $WORK/FORMAT/PACKAGE/root and the list of conffiles
  local format=$1 package=$2 root=$WORK/$1/$2/root doc licences only mode source to conf
  mkdir -p "$root"; : > "$WORK/$format/$package/conffiles"; : > "$WORK/$format/$package/list"
  while read -r only mode source to conf; do
    case $only in '' | '#'*) continue ;; all | "$format") ;; *) continue ;; esac
    put "$root" "$package" "$mode" "$source" "$to"
    [ "$conf" != conf ] || echo "$to" >> "$WORK/$format/$package/conffiles"
    echo "$source $to $conf" >> "$WORK/$format/$package/list"
  done < "$PACKAGING/files/$package"
  doc=$root/usr/share/doc/$package; mkdir -p "$doc"
  copyright > "$doc/copyright"
  read -ra licences <<<"$(programs_of "$package" | tr '\n' ' ')"
  third_party "${licences[@]}" | gzip -9n > "$doc/third-party.gz"
  if [ "$format" = deb ]; then deb_changelog "$package" | gzip -9n > "$doc/changelog.Debian.gz"
  else cp "$REPO/CHANGELOG.md" "$doc/CHANGELOG.md"; cp "$REPO/LICENSE" "$doc/LICENSE"; fi
  [ "$format" != deb ] || [ ! -e "$PACKAGING/deb/$package.lintian-overrides" ] \
    || { mkdir -p "$root/usr/share/lintian/overrides"; cp "$PACKAGING/deb/$package.lintian-overrides" "$root/usr/share/lintian/overrides/$package"; }
  find "$root" -type d -exec chmod 0755 {} +
  find "$root" -type f -path '*/usr/share/doc/*' -exec chmod 0644 {} +
  find "$root" -type f -path '*/usr/share/lintian/*' -exec chmod 0644 {} +
  find "$root" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
}

# A field of packages.conf: field PACKAGE KEY [FORMAT]. A key may exist for one format alone: `deb.depends`.
field() { awk -v p="[$1]" -v k="$2" '$0==p{f=1;next} /^\[/{f=0} f && index($0,k" = ")==1{print substr($0,length(k)+4)}' "$PACKAGING/packages.conf"; }
description() { awk -v p="[$1]" '$0==p{f=1;next} /^\[/{f=0} f && /^\| ?/{sub(/^\| ?/,""); print}' "$PACKAGING/packages.conf"; }

build_deb() {
  local package=$1 dir=$WORK/deb/$1 root=$WORK/deb/$1/root control libraries script verbs programs=() program key value
  tree_of deb "$package"
  control=$root/DEBIAN; mkdir "$control"
  for program in $(programs_of "$package"); do programs+=("$root/usr/bin/$program"); done
  libraries=$(deb_depends "${programs[@]}")
  {
    echo "Package: $package"; echo "Version: $VERSION-$REVISION"; echo "Architecture: $DEB_ARCH"
    echo "Maintainer: $MAINTAINER"; echo "Section: net"; echo "Priority: optional"; echo "Homepage: $HOMEPAGE"
    echo "Installed-Size: $(find "$root" -type f -not -path '*/DEBIAN/*' -printf '%s\n' | awk '{n+=int(($1+1023)/1024)} END{print n+16}')"
    echo "Depends: $libraries$(field "$package" deb.depends | sed -e 's/^/, /' -e "s/@VERSION@/$VERSION-$REVISION/g")"
    for key in recommends suggests; do value=$(field "$package" "deb.$key"); [ -z "$value" ] || echo "${key^}: $value"; done
    echo "Description: $(field "$package" summary)"
    description "$package" | sed -e 's/^$/./' -e 's/^/ /'
  } > "$control/control"
  [ ! -s "$dir/conffiles" ] || cp "$dir/conffiles" "$control/conffiles"
  if [ -e "$PACKAGING/scripts/$package.sh" ]; then
    for script in preinst postinst prerm postrm; do
      verbs=$(deb_verbs "$package" "$script")
      [ -n "$verbs" ] || continue
      { echo "#!/bin/sh"; echo "set -e"; with_functions "$package" "$verbs"; echo "exit 0"; } > "$control/$script"
      chmod 0755 "$control/$script"
    done
  fi
  (cd "$root" && find . -type f -not -path './DEBIAN/*' -printf '%P\n' | sort | xargs -d '\n' md5sum) > "$control/md5sums"
  find "$control" -type f -name '[cm]*' -exec chmod 0644 {} +
  find "$control" -exec touch -d "@$SOURCE_DATE_EPOCH" {} +; touch -d "@$SOURCE_DATE_EPOCH" "$root"
  # One thread: the blocks that several make depend on how many there are.
  dpkg-deb --root-owner-group --threads-max=1 -Zxz -z6 --build "$root" "$OUT/${package}_${VERSION}-${REVISION}_$DEB_ARCH.deb" >/dev/null
}
# --- maintainer scripts: the verbs of scripts/PACKAGE.sh in the words of dpkg and rpm
has() { grep -q "^$2()" "$PACKAGING/scripts/$1.sh"; }
deb_verbs() { # deb_verbs PACKAGE SCRIPT
  case $2 in
    preinst) ! has "$1" before_install || echo 'case "$1" in install) before_install ;; esac' ;;
    postinst) echo 'case "$1" in configure) if [ -z "${2:-}" ]; then after_install; else after_upgrade; fi ;; abort-upgrade) after_upgrade ;; abort-*) after_install ;; esac' ;;
    prerm) ! has "$1" before_remove || echo 'case "$1" in remove) before_remove ;; esac' ;;
    postrm) echo 'case "$1" in remove) after_remove ;; purge) after_remove; after_purge ;; esac' ;;
  esac
}
rpm_verbs() { # rpm_verbs PACKAGE SCRIPT; $1 of a scriptlet is how many versions are left afterwards
  case $2 in
    post) echo 'if [ "$1" = 1 ]; then after_install; else after_upgrade; fi' ;;
    preun) ! has "$1" before_remove || echo 'if [ "$1" = 0 ]; then before_remove; fi' ;;
    postun) echo 'if [ "$1" = 0 ]; then after_remove; fi' ;;
  esac
}
with_functions() { # with_functions PACKAGE TEXT: TEXT after the functions that it calls, directly or not, and no others
  (
    source "$PACKAGING/scripts/common.sh"; source "$PACKAGING/scripts/$1.sh"
    mapfile -t known < <(sed -n 's/^\([a-z_]*\)() .*/\1/p' "$PACKAGING/scripts/common.sh" "$PACKAGING/scripts/$1.sh")
    text=$2 found=""
    while :; do
      more=
      for name in "${known[@]}"; do
        [[ " $found " != *" $name "* ]] && grep -qw -- "$name" <<<"$text" || continue
        text=$(declare -f "$name")$'\n'$text; found+=" $name"; more=yes
      done
      [ -n "$more" ] || break
    done
    echo "$text"
  )
}

build_rpm() {
  local package=$1 root=$WORK/rpm/$1/root spec=$WORK/rpm/$1/$1.spec source to conf script verbs summary
  tree_of rpm "$package"
  summary=$(field "$package" summary)
  {
    sed -e "s|@PACKAGE@|$package|g" -e "s|@VERSION@|$VERSION|g" -e "s|@REVISION@|$REVISION|g" -e "s|@HOMEPAGE@|$HOMEPAGE|g" \
      -e "s|@MAINTAINER@|$MAINTAINER|g" -e "s|@SUMMARY@|${summary^}|g" -e "s|@ROOT@|$root|g" "$PACKAGING/rpm/head.spec"
    field "$package" rpm.requires | tr ',' '\n' | sed -e 's/^ *//' -e '/^$/d' -e 's/^/Requires: /' -e "s/@VERSION@/$VERSION-$REVISION/g"
    field "$package" rpm.recommends | tr ',' '\n' | sed -e 's/^ *//' -e '/^$/d' -e 's/^/Recommends: /'
    echo; echo "%description"; description "$package"; echo
    if [ -e "$PACKAGING/scripts/$package.sh" ]; then
      for script in post preun postun; do
        verbs=$(rpm_verbs "$package" "$script")
        [ -n "$verbs" ] || continue
        # A scriptlet that fails would leave the transaction half done; what can fail here says so itself.
        echo "%$script"; with_functions "$package" "$verbs" | sed 's/%/%%/g'; echo ":"; echo
      done
    fi
    echo "%files"
    while read -r source to conf; do
      case $source in
        dir) echo "%dir $to" ;;
        man:*) echo "%doc $to" ;;
        *) [ "$conf" = conf ] && echo "%config(noreplace) $to" || echo "$to" ;;
      esac
    done < "$WORK/rpm/$package/list"
    echo "%dir /usr/share/doc/$package"
    echo "%doc /usr/share/doc/$package/CHANGELOG.md"; echo "%doc /usr/share/doc/$package/copyright"
    echo "%doc /usr/share/doc/$package/third-party.gz"; echo "%license /usr/share/doc/$package/LICENSE"
    echo; echo "%changelog"; echo "* $(date -u -d "@$SOURCE_DATE_EPOCH" '+%a %b %d %Y') $MAINTAINER - $VERSION-$REVISION"
    changes | sed -e 's/^/- /' -e 's/%/%%/g'
  } > "$spec"
  # Everything that could change the bytes from machine to machine is set here.
  rpmbuild --quiet -bb --target "$RPM_ARCH-linux" --buildroot "$root" \
    --define "_topdir $WORK/rpm/top" --define "_rpmdir $OUT" --define "_rpmfilename %{NAME}-%{VERSION}-%{RELEASE}.%{ARCH}.rpm" \
    --define "_buildhost tombolo.example" --define "use_source_date_epoch_as_buildtime 1" --define "clamp_mtime_to_source_date_epoch 1" \
    --define "_binary_payload w12.zstdio" --define "__os_install_post %{nil}" --define "_build_id_links none" --define "debug_package %{nil}" \
    --define "_docdir_fmt %{NAME}" --define "__spec_install_pre %{nil}" --define "__spec_clean_body %{nil}" "$spec" > "$WORK/rpm.log" 2>&1 \
    || { cat "$WORK/rpm.log" >&2; die "rpmbuild failed for $package"; }
}

# Both formats at once: each compresses with one thread. What they share is made before.
for shell in bash zsh fish; do completion "$shell" >/dev/null; done
(for package in "${PACKAGES[@]}"; do build_deb "$package"; done) & debs=$!
for package in "${PACKAGES[@]}"; do build_rpm "$package"; done
wait "$debs"
for file in "$OUT"/*"$VERSION-$REVISION"*; do
  bytes=$(stat -c %s "$file")
  [ "$bytes" -le "$PACKAGE_BYTES_MAX" ] || die "$file has $bytes bytes; at most $PACKAGE_BYTES_MAX are allowed"
  printf '%8d KiB  %s\n' "$((bytes / 1024))" "$file"
done
