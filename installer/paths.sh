# shellcheck shell=bash disable=SC2034
# Where everything is. RVMCV_ROOT puts a directory before each, for tests of single steps.

ROOT=${RVMCV_ROOT:-}
PYTHON=/usr/bin/python3 # the system's: one of a person's own would not be there for the service's user
SERVICE_USER=rvmcv-worker
UNIT=rvmcv-worker.service
# What the machine's admin trusts, a company's own certificates included.
SYSTEM_CERTIFICATES=/etc/ssl/certs/ca-certificates.crt

OPT=$ROOT/opt/rvmcv-worker
RELEASES=$OPT/releases
CURRENT=$OPT/current
TOOLS=$OPT/tools
CACHE=$OPT/cache
UPGRADE_NOTE=$OPT/upgrade-in-progress
COMMAND=$ROOT/usr/local/bin/rvmcv-worker
UNITS=$ROOT/usr/local/lib/systemd/system
SYSUSERS=$ROOT/usr/local/lib/sysusers.d/rvmcv-worker.conf
TMPFILES=$ROOT/usr/local/lib/tmpfiles.d/rvmcv-worker.conf
APPARMOR=$ROOT/etc/apparmor.d/rvmcv-worker-bwrap
ETC=$ROOT/etc/rvmcv-worker
CONFIG=$ETC/config.toml
CREDENTIALS=$ETC/credentials
STATE=$ROOT/var/lib/rvmcv-worker
RUN=$ROOT/run/rvmcv-worker
WALL=$ROOT/run/rvmcv-worker-wall # for units that lay something over /proc: see the tmpfiles rule
LOCK=$ROOT/run/rvmcv-worker-install.lock

# Copies a file where it is not there yet or differs; says so.
put_file() { # FROM TO MODE
  if [ -f "$2" ] && [ ! -L "$2" ] && cmp -s -- "$1" "$2"; then
    return
  fi
  mkdir -p -- "$(dirname -- "$2")"
  install -m "$3" -- "$1" "$2.part"
  mv -fT -- "$2.part" "$2"
  changed "written: $2"
}

# Points a link elsewhere in one step: at no moment is there none.
put_link() { # TARGET LINK
  [ "$(readlink -- "$2" || true)" != "$1" ] || return 0
  mkdir -p -- "$(dirname -- "$2")"
  ln -sfnT -- "$1" "$2.part"
  mv -fT -- "$2.part" "$2"
  changed "linked: $2 -> $1"
}

# Removes a directory or file that lies beneath one of ours, and nothing else whatever a variable holds.
remove() {
  local path
  for path in "$@"; do
    case $path in
      '' | *//* | */../* | */.. | */./* | */.) refuse "not removed, an odd path: $path" ;;
      "$OPT" | "$OPT"/?* | "$ETC" | "$STATE" | "$RUN" | "$WALL" | "$COMMAND" | "$SYSUSERS" | "$TMPFILES" | "$APPARMOR") ;;
      "$UNITS"/rvmcv-worker*) ;;
      *) refuse "not removed, none of the worker's paths: $path" ;;
    esac
    [ -e "$path" ] || [ -L "$path" ] || continue
    if rm -rf --one-file-system -- "$path"; then
      changed "removed: $path"
    else
      note "$path is not wholly removed (see above): a disk that is mounted there stays mounted"
    fi
  done
}
