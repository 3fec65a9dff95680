#!/bin/bash
# Makes this machine a worker of RVM-Server's: checks it, installs, starts, updates, removes.
# What it does in which order stands in main() at the end; the steps are in installer/, a noun a file.
set -euo pipefail
umask 022
# Root's programs run here: what a shell of the caller's has set must not bend them, and messages are read by us.
unset CDPATH "${!PYTHON@}" PIP_TARGET PIP_PREFIX PIP_USER
export LC_ALL=C.UTF-8
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
SOURCE=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd)

# shellcheck source=installer/say.sh
. "$SOURCE/installer/say.sh"
# shellcheck source=installer/paths.sh
. "$SOURCE/installer/paths.sh"
# shellcheck source=installer/machine.sh
. "$SOURCE/installer/machine.sh"
# shellcheck source=installer/packages.sh
. "$SOURCE/installer/packages.sh"
# shellcheck source=installer/secrets.sh
. "$SOURCE/installer/secrets.sh"
# shellcheck source=installer/tools.sh
. "$SOURCE/installer/tools.sh"
# shellcheck source=installer/release.sh
. "$SOURCE/installer/release.sh"
# shellcheck source=installer/config.sh
. "$SOURCE/installer/config.sh"
# shellcheck source=installer/service.sh
. "$SOURCE/installer/service.sh"
# shellcheck source=installer/upgrade.sh
. "$SOURCE/installer/upgrade.sh"
# shellcheck source=installer/removal.sh
. "$SOURCE/installer/removal.sh"

usage() {
  cat <<'HELP'
install.sh: install, update or remove rvmcv-worker as a service of this machine. Run as root from a source tree.

  sudo ./install.sh                   install, start, and look with `rvmcv-worker doctor` whether all is well
  sudo ./install.sh --upgrade         go to this source's version; back by itself when it is not ready in 2 minutes
  sudo ./install.sh --uninstall       remove the service and its programs; settings, token and state stay
  sudo ./install.sh --purge           --uninstall, and then settings, token, state and user too

Options
  --token-file FILE          RVM-Server's worker token; without it you are asked at the terminal. A token that is
                             already there is kept, unless this names another
  --s3-access-key-file FILE  MinIO's keys, where storage is not reached by presigned URLs; both or none
  --s3-secret-key-file FILE
  --server URL               RVM-Server's origin, such as https://vm100; written into a fresh config.toml only
  --cpu                      a machine without a GPU: no look at the NVIDIA driver; trainings run on the CPU
  --without-compute          leave torch and all that trains out: to try the installation itself
  --wheelhouse DIR           install from the files that `make wheelhouse` has put there, without internet
  --apparmor-profile         allow bubblewrap user namespaces where AppArmor restricts them (Ubuntu 24.04)
  --drain-timeout S          with --upgrade: how long running jobs may take to be handed back (180)
  --yes                      do not ask (--purge)
  --help                     this text

Secrets are never arguments: other users could read them in the list of processes.
Run again it changes only what is not yet so, and one that was broken off may be run again.

Exit status: 0 done, or nothing to do; 1 refused or failed (an upgrade that failed has gone back); 2 the options
make no sense; 3 installed, but `doctor` has found what is in the way of jobs, or the service does not run.
HELP
}

main() {
  parse_options "$@"
  # Python and uv take modules and settings from the directory that they are started in.
  cd /
  # A terminal that is gone must not end an upgrade between two steps.
  trap '' PIPE
  become_the_only_installer
  case $MODE in
    uninstall | purge) remove_worker ;;
    *) install_or_upgrade ;;
  esac
}

parse_options() {
  MODE=install TOKEN_FILE='' S3_ACCESS_KEY_FILE='' S3_SECRET_KEY_FILE='' SERVER_URL='' WHEELHOUSE=''
  CPU='' COMPUTE=yes APPARMOR_PROFILE='' DRAIN_TIMEOUT_S=180 YES=''
  while [ $# -gt 0 ]; do
    case $1 in
      --token-file | --s3-access-key-file | --s3-secret-key-file | --server | --wheelhouse | --drain-timeout)
        [ -n "${2:-}" ] || misused "$1 wants a value after it"
        ;;&
      --token-file) TOKEN_FILE=$2 && shift ;;
      --s3-access-key-file) S3_ACCESS_KEY_FILE=$2 && shift ;;
      --s3-secret-key-file) S3_SECRET_KEY_FILE=$2 && shift ;;
      --server) SERVER_URL=$2 && shift ;;
      --wheelhouse) WHEELHOUSE=$2 && shift ;;
      --drain-timeout) DRAIN_TIMEOUT_S=$2 && shift ;;
      --cpu) CPU=yes ;;
      --without-compute) COMPUTE='' ;;
      --apparmor-profile) APPARMOR_PROFILE=yes ;;
      --yes) YES=yes ;;
      --upgrade | --uninstall | --purge)
        [ "$MODE" = install ] || [ "--$MODE" = "$1" ] || misused "--$MODE and $1 together"
        MODE=${1#--}
        ;;
      --help | -h) usage && exit 0 ;;
      *) misused "no option $1" ;;
    esac
    shift
  done
  [ -z "$S3_ACCESS_KEY_FILE" ] && [ -z "$S3_SECRET_KEY_FILE" ] ||
    { [ -n "$S3_ACCESS_KEY_FILE" ] && [ -n "$S3_SECRET_KEY_FILE" ]; } ||
    misused "--s3-access-key-file and --s3-secret-key-file go together"
  TOKEN_FILE=$(absolute "$TOKEN_FILE")
  S3_ACCESS_KEY_FILE=$(absolute "$S3_ACCESS_KEY_FILE")
  S3_SECRET_KEY_FILE=$(absolute "$S3_SECRET_KEY_FILE")
  [[ $DRAIN_TIMEOUT_S =~ ^[0-9]{1,6}$ ]] || misused "--drain-timeout $DRAIN_TIMEOUT_S: a whole number of seconds"
  [ -z "$SERVER_URL" ] || [[ $SERVER_URL =~ ^https?://[][A-Za-z0-9.:_-]+/?$ ]] ||
    misused "--server $SERVER_URL: an origin is wanted, such as https://vm100 or https://vm100:8443"
  if [ -n "$WHEELHOUSE" ]; then
    [ -d "$WHEELHOUSE" ] || misused "--wheelhouse $WHEELHOUSE: no such directory; make one by: make wheelhouse"
    WHEELHOUSE=$(cd -- "$WHEELHOUSE" && pwd)
  fi
}

absolute() { # PATH
  case $1 in
    '' | /*) printf '%s\n' "$1" ;;
    *) printf '%s\n' "$PWD/$1" ;;
  esac
}

become_the_only_installer() {
  [ "$(id -u)" = 0 ] || refuse "this needs root, to make a user and a service: run it by sudo"
  exec 9>"$LOCK" || refuse "$LOCK cannot be opened: is /run there?"
  # What the installer starts inherits the lock: one that was killed is not over while its uv still writes.
  flock --nonblock 9 || refuse "another install.sh is at work (it holds $LOCK): wait until it has ended"
}

install_or_upgrade() {
  check_source
  check_machine
  check_strangers
  install_packages
  check_wheelhouse
  mend_broken_off_upgrade
  local current
  current=$(current_release)
  find_release
  if [ -n "$current" ] && [ "$current" != "$RELEASE" ] && [ "$MODE" = install ]; then
    refuse "$current is installed, and this source is $RELEASE: to go there run install.sh --upgrade"
  elif [ -z "$current" ] && [ "$MODE" = upgrade ]; then
    refuse "nothing is installed that could be upgraded: run install.sh without --upgrade"
  fi
  check_disk
  check_wall
  gather_secrets
  build_release
  if [ -n "$current" ] && [ "$current" != "$RELEASE" ]; then
    upgrade "$current"
  else
    install_service
  fi
  remove_old_releases
  conclude
}

install_service() {
  put_service_files "$RELEASE"
  put_secrets
  put_config
  switch_to "$RELEASE"
  start_service
}

# The last words, by what `doctor` sees with the service's own eyes.
conclude() {
  local verdict=0
  if ! systemctl is-active --quiet "$UNIT"; then
    say "rvmcv-worker $RELEASE is installed, but the service does not run. Its last words:"
    last_words "$STARTED_AT"
    say "correct what they name (settings: $CONFIG), then: systemctl restart rvmcv-worker"
    exit 3
  fi
  say "what rvmcv-worker doctor says:"
  run_doctor || verdict=$?
  if [ "$CHANGES" -gt 0 ]; then
    say "rvmcv-worker $RELEASE is installed and runs"
  else
    say "rvmcv-worker $RELEASE is installed and runs: nothing had to be changed"
  fi
  [ "$verdict" -eq 0 ] || {
    say "doctor has found what is in the way of jobs (FAILED, above). When that is mended the worker goes on by"
    say "itself, after a change of $CONFIG by: systemctl restart rvmcv-worker"
    exit 3
  }
}

# On one line: bash reads a script as it runs it, and --uninstall may remove this one.
[ "${BASH_SOURCE[0]}" != "$0" ] || { main "$@"; exit; }
