#!/usr/bin/env bash
# Runs docker/Dockerfile's commands, then those given, in a fresh Debian in a folder, without Docker:
#   bash tests/stress/fresh_machine.sh FOLDER [COMMAND...]      as root; needs debootstrap
#   bash tests/stress/fresh_machine.sh /var/tmp/trixie 'make test' 'make demo QUICK=1'
# The checkout's last commit is what is installed. It ends with how long each command took.
set -euo pipefail
cd "$(dirname "$0")/../.."

[[ $# -ge 1 ]] || { sed -n '2,5s/^# //p' "$0"; exit 1; }
root=$1
shift
suite=$(sed -n 's/^ARG BASE=debian://p' docker/Dockerfile)
folder=$(sed -n 's/^WORKDIR //p' docker/Dockerfile)
times=()

# The folder is a machine of its own but for the kernel, the network's settings and the time.
enter() {
    unshare --mount --fork bash -c '
        mount -t proc proc "$0/proc"
        mount --rbind /dev "$0/dev"
        exec chroot "$0" /usr/bin/env -i PATH=/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin HOME=/root LANG=C.UTF-8 \
            DEBIAN_FRONTEND=noninteractive '"${proxies[*]@Q}"' bash -c "cd $1 2>/dev/null; $2"' "$root" "$folder" "$1"
}

timed() {
    local start=$SECONDS
    printf '\n=== %s\n' "$1"
    enter "$1" || { printf 'failed: %s\n' "$1"; exit 1; }
    times+=("$(printf '%4d:%02d  %s' $(((SECONDS - start) / 60)) $(((SECONDS - start) % 60)) "$1")")
}

# What says how to reach a network's package index goes along.
mapfile -t proxies < <(env | grep -i -E '^(https?_proxy|no_proxy|pip_(index_url|cert|timeout|default_timeout))=' || true)
if [[ ! -x $root/usr/bin/apt-get ]]; then
    debootstrap --variant=minbase "$suite" "$root"
fi
cp -L /etc/resolv.conf "$root/etc/resolv.conf"
certificates=/etc/ssl/certs/ca-certificates.crt

while read -r command; do
    timed "$command"
    [[ ! -e $certificates ]] || cp "$certificates" "$root$certificates"
    [[ -e $root$folder ]] || git clone --quiet . "$root$folder"
done < <(sed -n 's/^RUN //p' docker/Dockerfile)
for command in "$@"; do
    timed "$command"
done
printf '\n%s, %s:\n' "$(enter 'python3 --version')" "$(enter '. /etc/os-release; echo "$PRETTY_NAME"')"
printf '%s\n' "${times[@]}"
