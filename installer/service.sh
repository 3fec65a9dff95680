# shellcheck shell=bash
# The service: user, directories, units; started, looked at.

# When this run last started the service, for its journal.
STARTED_AT=now
UNITS_CHANGED='' SECRETS_CHANGED=''

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
  for unit in "$UNITS"/rvmcv-worker*; do
    [ ! -e "$unit" ] || [ -e "$from/$(basename -- "$unit")" ] || {
      systemctl disable --now --quiet "$(basename -- "$unit")" 2>/dev/null || true
      remove "$unit"
    }
  done
  [ "$CHANGES" -eq "$before" ] || UNITS_CHANGED=yes
  systemctl daemon-reload
}

units_to_enable() {
  grep -lx '\[Install\]' "$UNITS"/rvmcv-worker* | xargs -n 1 basename
}

enable_units() {
  local unit
  for unit in $(units_to_enable); do
    systemctl is-enabled --quiet "$unit" || {
      systemctl enable --quiet "$unit"
      changed "enabled: $unit"
    }
    [[ $unit != *.timer ]] || systemctl is-active --quiet "$unit" || systemctl start "$unit"
  done
}

start_service() {
  enable_units
  if systemctl is-active --quiet "$UNIT"; then
    if [ -n "$UNITS_CHANGED" ]; then
      STARTED_AT=$(date +%s.%6N)
      systemctl restart "$UNIT" || true
      changed "restarted: $UNIT"
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

hand_over_secrets() {
  [ -z "$SECRETS_CHANGED" ] || systemctl reload "$UNIT" ||
    note "the worker has not taken the new token: systemctl reload rvmcv-worker"
}

last_words() { # SINCE
  journalctl --unit "$UNIT" --since "@$1" --lines 20 --no-pager --output cat 2>/dev/null | sed 's/^/    /' >&2
}

# Runs `doctor` as the service runs: its user, its credentials, and not its directories.
run_doctor() {
  local name load=()
  for name in token s3-access-key s3-secret-key; do
    [ ! -s "$CREDENTIALS/$name" ] || load+=(-p "LoadCredential=$name:$CREDENTIALS/$name")
  done
  systemd-run --quiet --wait --pipe --collect --service-type=exec -p "User=$SERVICE_USER" -p "Group=$SERVICE_USER" \
    "${load[@]}" "$CURRENT/bin/rvmcv-worker" doctor </dev/null
}
