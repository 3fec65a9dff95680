# shellcheck shell=bash
# From one release to another, and back when the new one does not get ready.
#
# A note on the disk says what an upgrade is in the middle of, so that one that was killed can be taken back.

# How long the new release may take to be ready.
READY_S=120
# In so many looks one after the other, a second apart, so that one that soon dies is not taken for ready.
STEADY_LOOKS=5
BEFORE=$OPT/status-before.json

upgrade() { # FROM
  UPGRADE_FROM=$1
  say "upgrading from $UPGRADE_FROM to $RELEASE"
  look_before_upgrade
  check_config
  if [ -n "$KEEP_DISABLED" ] && ! systemctl is-active --quiet "$UNIT"; then
    upgrade_out_of_the_way
    return
  fi
  check_server
  write_upgrade_note
  trap 'go_back "it was broken off"; exit 1' EXIT INT TERM HUP
  UPGRADE_STOPPED=''
  drain_worker
  UPGRADE_STOPPED=yes
  systemctl stop "$UNIT" || true
  ! systemctl is-active --quiet "$UNIT" || { go_back "$UNIT did not stop"; exit 1; }
  back_up_ledger || { go_back "the ledger could not be backed up"; exit 1; }
  restore_wish
  put_service_files "$RELEASE"
  switch_to "$RELEASE"
  start_anew
  wait_ready || { go_back "$WHY_NOT_READY"; exit 1; }
  printf '%s\n' "$UPGRADE_FROM" >"$OPT/previous"
  end_upgrade_note
  enable_units
  # Only now: a token that is wrong is not the new release's fault, and going back would not mend it.
  put_secrets
  hand_over_secrets
  offer_new_config "$UPGRADE_FROM"
  say "upgraded from $UPGRADE_FROM to $RELEASE"
}

# The release before, its state and its operator's wish: what the new one is held against.
look_before_upgrade() {
  UPGRADE_WISH=run
  "$CURRENT/bin/rvmcv-worker" status --json >"$BEFORE.part" 2>/dev/null || echo '{}' >"$BEFORE.part"
  mv -fT -- "$BEFORE.part" "$BEFORE"
  UPGRADE_STATE_DIR=$(configured_state_dir)
  case $(operator_wish) in
    pause) UPGRADE_WISH=pause ;;
    drain) UPGRADE_WISH=drain ;;
  esac
  systemctl is-enabled --quiet "$UNIT" || KEEP_DISABLED=yes
}

operator_wish() {
  as_worker timeout 5 head -c 16 -- "$UPGRADE_STATE_DIR/operator-wish" 2>/dev/null || true
}

# Before a job is handed back for it: going back would not help either, since both read the same file.
check_config() {
  local said
  said=$("$RELEASES/$RELEASE/bin/rvmcv-worker" config show 2>&1 >/dev/null) ||
    refuse "$RELEASE cannot use $CONFIG: $said. $UPGRADE_FROM was left as it is; correct that, then run this again"
}

check_server() {
  local said
  systemctl is-active --quiet "$UNIT" || return 0
  said=$(run_doctor 2>/dev/null | sed -nE 's/^FAILED +server +//p') || true
  [ -z "$said" ] ||
    refuse "RVM-Server does not answer: $said. Jobs could not be handed back, nor would $RELEASE get ready." \
      "Wait until it answers, or take the worker out of the way first: systemctl disable --now rvmcv-worker"
}

# A worker that is disabled and stopped stays so.
upgrade_out_of_the_way() {
  back_up_ledger || refuse "the ledger could not be backed up: $UPGRADE_FROM was left as it is"
  put_service_files "$RELEASE"
  put_secrets
  printf '%s\n' "$UPGRADE_FROM" >"$OPT/previous"
  switch_to "$RELEASE"
  enable_units
  offer_new_config "$UPGRADE_FROM"
  rm -f -- "$BEFORE"
  remove_old_releases
  say "upgraded from $UPGRADE_FROM to $RELEASE. The worker is disabled and stopped, as it was; to have it back:" \
    "systemctl enable --now rvmcv-worker"
  exit 0
}

configured_state_dir() {
  "$CURRENT/bin/rvmcv-worker" config show 2>/dev/null | sed -nE 's/^state_dir = "(.*)"$/\1/p' | grep . || echo "$STATE"
}

write_upgrade_note() {
  printf 'from=%s\nwish=%s\nstate_dir=%s\n' "$UPGRADE_FROM" "$UPGRADE_WISH" "$UPGRADE_STATE_DIR" >"$UPGRADE_NOTE.part"
  sync -- "$UPGRADE_NOTE.part"
  mv -fT -- "$UPGRADE_NOTE.part" "$UPGRADE_NOTE"
}

end_upgrade_note() {
  trap - EXIT INT TERM HUP
  rm -f -- "$UPGRADE_NOTE" "$BEFORE"
}

# Takes back what a killed installer was in the middle of.
mend_broken_off_upgrade() {
  [ -e "$UPGRADE_NOTE" ] || return 0
  UPGRADE_FROM=$(sed -n 's/^from=//p' "$UPGRADE_NOTE")
  UPGRADE_WISH=$(sed -n 's/^wish=//p' "$UPGRADE_NOTE")
  UPGRADE_STATE_DIR=$(sed -n 's/^state_dir=//p' "$UPGRADE_NOTE")
  release_is_whole "$UPGRADE_FROM" ||
    refuse "$UPGRADE_NOTE names the release $UPGRADE_FROM, which is not in $RELEASES: remove that file, then run this again"
  say "an upgrade was broken off here; first it is taken back"
  go_back "it was broken off"
}

drain_worker() {
  systemctl is-active --quiet "$UNIT" || return 0
  say "draining: running jobs are handed back to RVM-Server (at most $DRAIN_TIMEOUT_S s)"
  "$CURRENT/bin/rvmcv-worker" drain --wait --timeout "$DRAIN_TIMEOUT_S" ||
    note "not drained (see above): stopping all the same, which hands back what still runs"
}

# Takes the upgrade's own drain back: the operator's wish of before holds again. The worker is stopped.
restore_wish() {
  [ "$UPGRADE_WISH" != drain ] && [ "$(operator_wish)" = drain ] || return 0
  if [ "$UPGRADE_WISH" = run ]; then
    as_worker rm -f -- "$UPGRADE_STATE_DIR/operator-wish"
  else
    as_worker tee "$UPGRADE_STATE_DIR/operator-wish" <<<"$UPGRADE_WISH" >/dev/null
  fi || note "the drain of this upgrade could not be taken back; once it runs: rvmcv-worker ${UPGRADE_WISH/run/resume}"
}

# Runs what touches the worker's own files as its user: root would follow a link that a stranger put there.
as_worker() {
  setpriv --reuid="$SERVICE_USER" --regid="$SERVICE_USER" --init-groups --no-new-privs -- "$@"
}

back_up_ledger() {
  local script=$RELEASES/$RELEASE/share/rvmcv-worker/installer/ledger_backup.py
  as_worker "$PYTHON" -I "$script" "$UPGRADE_STATE_DIR" "$UPGRADE_FROM"
}

start_anew() {
  STARTED_AT=$(date +%s.%6N)
  systemctl reset-failed "$UNIT" 2>/dev/null || true
  # Its own limit is the unit's; whether it got ready is looked at in any case.
  systemctl start --no-block "$UNIT" || true
}

# Waits until the worker is as well as it was before; sets WHY_NOT_READY where it does not get so.
wait_ready() {
  local deadline=$((SECONDS + READY_S)) version looks=0
  version=$("$CURRENT/bin/rvmcv-worker" version) || version='none: the program does not start'
  WHY_NOT_READY="it did not start"
  say "waiting until it is ready (at most $READY_S s)"
  while [ "$SECONDS" -lt "$deadline" ]; do
    case $(systemctl show --property ActiveState --value "$UNIT") in
      failed)
        WHY_NOT_READY="it failed: $(systemctl show --property Result --value "$UNIT"), exit status"
        WHY_NOT_READY+=" $(systemctl show --property ExecMainStatus --value "$UNIT")"
        return 1
        ;;
      active)
        if WHY_NOT_READY=$("$CURRENT/bin/rvmcv-worker" status --json 2>&1 |
          "$PYTHON" -I "$RELEASES/$RELEASE/share/rvmcv-worker/installer/readiness.py" "$BEFORE" "$version"); then
          looks=$((looks + 1))
          [ "$looks" -lt $STEADY_LOOKS ] || return 0
        else
          looks=0
        fi
        ;;
      *)
        WHY_NOT_READY="it starts, or ended and is started again"
        looks=0
        ;;
    esac
    sleep 1
  done
  return 1
}

go_back() { # WHY
  trap '' INT TERM HUP
  trap - EXIT
  set +e
  printf 'install.sh: the upgrade is taken back: %s\n' "$1" >&2
  if [ -n "${STARTED_AT:-}" ] && [ "$STARTED_AT" != now ]; then
    printf 'The last words of the new release:\n' >&2
    last_words "$STARTED_AT"
  fi
  if [ -n "${UPGRADE_STOPPED-yes}" ]; then
    systemctl stop "$UNIT"
    restore_wish
    # In a process of its own: what it cannot do must not keep the old release from its start.
    (put_service_files "$UPGRADE_FROM")
    switch_to "$UPGRADE_FROM"
    systemctl reset-failed "$UNIT" 2>/dev/null
    systemctl start "$UNIT"
  elif [ "$UPGRADE_WISH" != drain ]; then
    "$CURRENT/bin/rvmcv-worker" "${UPGRADE_WISH/run/resume}" # only drained so far
  fi
  enable_units
  if systemctl is-active --quiet "$UNIT"; then
    say "$UPGRADE_FROM runs again; the ledger was left as it is, since an older release reads a newer one's"
  else
    printf 'install.sh: %s does not run either: see journalctl -u rvmcv-worker\n' "$UPGRADE_FROM" >&2
  fi
  end_upgrade_note
  set -e
  trap - INT TERM HUP
}
