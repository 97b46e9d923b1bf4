#!/bin/sh
# test_services.sh DIR: fetch the programs that tests/services.py looks for.
#
# On Debian and Ubuntu, it downloads missing programs and libraries from the distribution's archive and
# unpacks them: DIR/bin/NAME runs NAME. It installs and starts nothing, and does not need root. If this
# is not possible, it prints the reason, and the tests of these programs are skipped; with
# SERVICES=required it fails.
set -eu

dir=${1:?usage: test_services.sh DIR}

is_here() { [ -x "$dir/bin/$1" ] || PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin" command -v "$1" >/dev/null; }

missing=""
packages=""
for program in prometheus/prometheus promtool/prometheus nginx/nginx haproxy/haproxy \
    systemd-analyze/systemd chromium-headless-shell/chromium-headless-shell; do
    is_here "${program%/*}" && continue
    missing="$missing ${program%/*}"
    packages="$packages ${program#*/}"
done
[ -n "$missing" ] || exit 0

skip() {
    echo "$1: the tests that need$missing cannot run" >&2
    [ "${SERVICES:-}" = required ] && exit 1
    exit 0
}
command -v apt-get >/dev/null || skip "this is neither Debian nor Ubuntu"

echo "downloading for the tests:$missing" >&2
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
work=$(mktemp -d "$dir/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/archives/partial" "$dir/root" "$dir/bin"

# Use separate lists, cache and locks; read only the installed packages from the system.
apt() {
    apt-get -qq -o Dir::State::Lists="$work/lists" -o Dir::Cache="$work" \
        -o Dir::Cache::Archives="$work/archives" -o Debug::NoLocking=1 -o APT::Sandbox::User=root \
        -o Acquire::Languages=none -o Acquire::Retries=1 -o Acquire::http::Timeout=20 \
        -o Acquire::https::Timeout=20 "$@" >"$work/log" 2>&1
}
apt update || true # a list that cannot be read may belong to another repository
# Ubuntu has no package of a browser.
case $packages in *chromium-headless-shell*)
    apt install --simulate chromium-headless-shell || {
        echo "there is no chromium-headless-shell: the tests that need it cannot run" >&2
        [ "${SERVICES:-}" != required ] || exit 1
        missing=$(echo "$missing" | sed 's/ chromium-headless-shell//')
        packages=$(echo "$packages" | sed 's/ chromium-headless-shell//')
        [ -n "$missing" ] || exit 0
    } ;;
esac
# shellcheck disable=SC2086  # a list
apt install --download-only --no-install-recommends --yes $packages ||
    skip "the packages cannot be downloaded ($(grep -m1 '^E:' "$work/log" || echo apt-get))"

for archive in "$work"/archives/*.deb; do
    dpkg -x "$archive" "$dir/root"
done

# All folders in which they look for their libraries: systemd keeps some in a separate one.
libraries=$(find "$dir/root" -type d -path '*/lib/*-linux-gnu*' \
    \( -name '*-linux-gnu*' -o -name systemd -o -name pulseaudio \) | paste -sd: -)
units=$(find "$dir/root" -type d -path '*/lib/systemd/system' | paste -sd: -)

for name in $missing; do
    # What chromium has in bin is a script with an absolute path.
    program=$(find "$dir/root/usr/lib/chromium" "$dir/root/usr/bin" "$dir/root/usr/sbin" \
        -name "$name" 2>/dev/null | head -n 1)
    [ -n "$program" ] || continue
    cat >"$work/wrapper" <<END
#!/bin/sh
LD_LIBRARY_PATH='$libraries' SYSTEMD_UNIT_PATH='$units:' exec '$program' "\$@"
END
    chmod +x "$work/wrapper"
    mv "$work/wrapper" "$dir/bin/$name"
done
