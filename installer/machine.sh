# shellcheck shell=bash
# Whether this machine can be a worker, said in plain words; nothing is changed here.

LEAST_SYSTEMD=249
# Gigabytes at /opt that a release takes with and without what trains; as much again while it is unpacked from
# elsewhere is not needed, since cache and release share their files.
COMPUTE_GB=8
PLAIN_GB=1

check_machine() {
  check_distribution
  check_systemd
  if [ -z "$CPU" ] && [ -n "$COMPUTE" ] && ! grep -Eqs '^gpu = "none"' "$CONFIG"; then
    check_driver
  fi
}

check_source() {
  local file
  for file in pyproject.toml requirements.lock config.toml rvmcv_worker/__init__.py systemd/$UNIT; do
    [ -f "$SOURCE/$file" ] ||
      refuse "$SOURCE/$file is missing: run install.sh from a whole source tree of rvmcv-worker"
  done
}

# Nothing of anybody else's is taken for the worker's, and nobody but root can change what the service runs.
check_strangers() {
  local masked
  case $SOURCE/ in
    "$OPT"/*) refuse "this source tree lies in $OPT, where the installation goes: move it, say to /usr/local/src" ;;
  esac
  [ ! -e "$OPT" ] || [ -z "$(find -L "$OPT" -maxdepth 0 \( ! -uid 0 -o -perm /022 \))" ] ||
    refuse "$OPT is there, and others than root may write it: rename it, or: chown root:root $OPT; chmod 0755 $OPT"
  [ ! -e "$COMMAND" ] && [ ! -L "$COMMAND" ] || command_is_ours ||
    refuse "$COMMAND is there, and is not the installation's: rename or remove it"
  user_is_ours ||
    refuse "there is a user $SERVICE_USER with the home $(home_of_user): rename that user; the worker's is made anew"
  masked=$(systemctl list-unit-files --no-legend --plain --state=masked "$UNIT" 'rvmcv-worker-*' |
    cut -d ' ' -f 1 | xargs) || true
  [ -z "$masked" ] || refuse "masked: $masked. To install the worker: systemctl unmask $masked"
  [ ! -e "$ROOT/etc/systemd/system/$UNIT" ] ||
    note "/etc/systemd/system/$UNIT stands before the release's unit, which updates renew: better a drop-in," \
      "systemctl edit rvmcv-worker"
}

command_is_ours() { [ "$(readlink -- "$COMMAND")" = "$CURRENT/bin/rvmcv-worker" ]; }

home_of_user() { getent passwd "$SERVICE_USER" | cut -d : -f 6 || true; }

# Whether no such user is there, or one that this installation has made.
user_is_ours() {
  local home
  home=$(home_of_user)
  [ -z "$home" ] || [ "$ROOT$home" = "$STATE" ]
}

check_distribution() {
  local ID=unknown VERSION_ID=0 PRETTY_NAME='an unknown distribution'
  # shellcheck source=/dev/null
  [ ! -r "$ROOT/etc/os-release" ] || . "$ROOT/etc/os-release"
  case $ID:$VERSION_ID in
    ubuntu:22.04 | ubuntu:24.04 | debian:1[2-9]) ;;
    *) note "this is $PRETTY_NAME; rvmcv-worker is made for Ubuntu 22.04 and 24.04 and Debian 12 or newer. Going on." ;;
  esac
}

check_systemd() {
  [ -d /run/systemd/system ] ||
    refuse "systemd does not run this machine: the worker is a service of systemd's; in a container boot it"
  local version
  version=$(systemctl --version | sed -nE '1s/^systemd ([0-9]+).*/\1/p')
  [ "${version:-0}" -ge $LEAST_SYSTEMD ] ||
    refuse "systemd is ${version:-unknown}, and the units need $LEAST_SYSTEMD: use Ubuntu 22.04 or Debian 12, or newer"
}

check_disk() {
  local need_gb=$PLAIN_GB free_gb place=$ROOT/opt
  [ -z "$COMPUTE" ] || need_gb=$COMPUTE_GB
  ! release_is_whole "$RELEASE" || return 0
  mkdir -p "$place"
  free_gb=$(($(df --output=avail -B1000000 -- "$place" | tail -n 1) / 1000))
  [ "$free_gb" -ge "$need_gb" ] ||
    refuse "$place has $free_gb GB free, and a release takes $need_gb GB: make room there, or mount a larger disk at /opt"
}

# The CUDA that the locked torch is built for, as a major version; Python decides between its stanzas.
locked_cuda() {
  sed -nE 's/^cuda-toolkit==([0-9]+)\..*/\1/p' "$SOURCE/requirements.lock" | sort -n | tail -n 1
}

# The least NVIDIA driver by that major version; `rvmcv-worker doctor` has the same table.
least_driver() { # CUDA
  case $1 in
    12) echo 525 ;;
    13) echo 580 ;;
    *) echo 0 ;;
  esac
}

installed_driver() {
  sed -nE '1s/.*Kernel Module( for [a-z0-9_]+)? +([0-9]+\.[0-9.]+).*/\2/p' \
    "$ROOT/proc/driver/nvidia/version" 2>/dev/null ||
    modinfo -F version nvidia 2>/dev/null || true
}

check_driver() {
  local cuda need driver
  cuda=$(locked_cuda)
  need=$(least_driver "${cuda:-0}")
  driver=$(installed_driver)
  [ -n "$driver" ] ||
    refuse "no NVIDIA driver is loaded: install $need or newer (on Ubuntu: ubuntu-drivers install, then reboot)," \
      "or give --cpu for a machine without a GPU"
  [ "${driver%%.*}" -ge "$need" ] ||
    refuse "the NVIDIA driver is $driver, and torch is built for CUDA $cuda, which needs $need: install that" \
      "(on Ubuntu: ubuntu-drivers install nvidia:$need, then reboot), or give --cpu"
}

# Whether bubblewrap can build the wall around jobs, tried as a user who may do nothing.
check_wall() {
  [ -z "$APPARMOR_PROFILE" ] || put_apparmor_profile
  local said
  said=$(setpriv --reuid=65534 --regid=65534 --clear-groups --no-new-privs \
    bwrap --unshare-all --ro-bind / / --proc /proc true 2>&1) && return
  note "bubblewrap cannot build the wall around jobs (${said:-it said nothing}): the worker will claim nothing."
  note "$(wall_advice)"
}

kernel_setting() { cat "$ROOT/proc/sys/$1" 2>/dev/null || true; }

wall_advice() {
  if [ "$(kernel_setting kernel/unprivileged_userns_clone)" = 0 ]; then
    say "user namespaces are for root only here; allow them: echo kernel.unprivileged_userns_clone=1" \
      ">/etc/sysctl.d/60-rvmcv-worker.conf && sysctl --system"
  elif [ "$(kernel_setting user/max_user_namespaces)" = 0 ]; then
    say "no user namespaces may be made here; allow them: echo user.max_user_namespaces=15000" \
      ">/etc/sysctl.d/60-rvmcv-worker.conf && sysctl --system"
  elif [ "$(kernel_setting kernel/apparmor_restrict_unprivileged_userns)" = 1 ]; then
    say "AppArmor keeps programs from making user namespaces (Ubuntu 24.04): run install.sh again with" \
      "--apparmor-profile, which allows it for bubblewrap by $APPARMOR, or write such a profile yourself"
  else
    say "kernel, container or security module forbid it: in a container allow nested user namespaces"
  fi
}

put_apparmor_profile() {
  command -v apparmor_parser >/dev/null ||
    refuse "--apparmor-profile: AppArmor is not installed here, so nothing restricts bubblewrap: leave the option out"
  put_file "$SOURCE/installer/apparmor-bwrap" "$APPARMOR" 0644
  apparmor_parser --replace -- "$APPARMOR" ||
    refuse "AppArmor does not take $APPARMOR (see above): it knows user namespaces from version 4 on"
}
