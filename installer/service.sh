# shellcheck shell=bash
# The service: user, directories, units; started, looked at.

# When this run last started the service, for its journal.
STARTED_AT=now
UNITS_CHANGED='' SECRETS_CHANGED='' KEYS_CHANGED=''
# The operator's own wish, which an upgrade leaves as it is.
KEEP_DISABLED=''

# The units of all releases that are here and of this source: an admin's own may be called alike.
our_units() {
  local file
  for file in "$RELEASES"/*/share/rvmcv-worker/systemd/*.{service,timer} "$SOURCE"/systemd/*.{service,timer}; do
    [ ! -e "$file" ] || basename -- "$file"
  done | sort -u
}

put_service_files() { # RELEASE
  local from=$RELEASES/$1/share/rvmcv-worker/systemd unit before=$CHANGES
  put_file "$from/rvmcv-worker.sysusers" "$SYSUSERS" 0644
  put_file "$from/rvmcv-worker.tmpfiles" "$TMPFILES" 0644
  systemd-sysusers "$SYSUSERS" || refuse "systemd-sysusers could not make the user by $SYSUSERS (see above)"
  systemd-tmpfiles --create "$TMPFILES" || refuse "systemd-tmpfiles could not make the directories by $TMPFILES (see above)"
  before=$CHANGES
  for unit in "$from"/*.service "$from"/*.timer; do
    [ -e "$unit" ] && put_file "$unit" "$UNITS/$(basename -- "$unit")" 0644
  done
  # A unit that this release does not have any more.
  for unit in $(our_units); do
    [ ! -e "$UNITS/$unit" ] || [ -e "$from/$unit" ] || {
      systemctl disable --now --quiet "$unit" 2>/dev/null || true
      remove "$UNITS/$unit"
    }
  done
  [ "$CHANGES" -eq "$before" ] || UNITS_CHANGED=yes
  systemctl daemon-reload
}

units_to_enable() {
  local unit
  for unit in $(our_units); do
    ! grep -qsx '\[Install\]' "$UNITS/$unit" || echo "$unit"
  done
}

enable_units() {
  local unit
  for unit in $(units_to_enable); do
    [ "$unit" != "$UNIT" ] || [ -z "$KEEP_DISABLED" ] || continue
    if ! systemctl is-enabled --quiet "$unit"; then
      if systemctl enable --quiet "$unit"; then
        changed "enabled: $unit"
      else
        note "$unit is not enabled (see above): it does not start with the machine"
      fi
    fi
    [[ $unit != *.timer ]] || systemctl is-active --quiet "$unit" || systemctl start "$unit" ||
      note "$unit does not run (see above)"
  done
}

start_service() {
  enable_units
  if systemctl is-active --quiet "$UNIT"; then
    if [ -n "$UNITS_CHANGED" ]; then
      restart_worker
    else
      hand_over_secrets
    fi
    return
  fi
  STARTED_AT=$(date +%s.%6N)
  systemctl reset-failed "$UNIT" 2>/dev/null || true
  if systemctl start "$UNIT"; then
    changed "started: $UNIT"
  fi
}

restart_worker() {
  STARTED_AT=$(date +%s.%6N)
  # It counts starts by hand too, and this is none that came to nothing.
  systemctl reset-failed "$UNIT" 2>/dev/null || true
  systemctl restart "$UNIT" || true
  changed "restarted: $UNIT"
}

hand_over_secrets() {
  if [ -n "$KEYS_CHANGED" ]; then
    restart_worker # MinIO's keys are read at a start alone
    return
  fi
  [ -z "$SECRETS_CHANGED" ] || systemctl reload "$UNIT" ||
    note "the worker has not taken the new token: systemctl reload rvmcv-worker"
}

last_words() { # SINCE
  journalctl --unit "$UNIT" --since "@$1" --lines 20 --no-pager --output cat 2>/dev/null |
    tr -d '\000-\010\013-\037\177' | sed 's/^/    /' >&2 || true
}

# Asked by root it looks as the service does: by its user, with its credentials.
run_doctor() {
  "$CURRENT/bin/rvmcv-worker" doctor </dev/null
}
