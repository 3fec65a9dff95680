# shellcheck shell=bash
# Taking the worker off the machine again.

remove_worker() {
  [ "$MODE" != purge ] || agree_to_purge
  local unit
  if [ -e "$UNITS/$UNIT" ]; then
    say "stopping the worker: running jobs are handed back to RVM-Server"
    for unit in $(our_units); do
      systemctl disable --now --quiet "$unit" 2>/dev/null || true
    done
  fi
  ! systemctl is-active --quiet "$UNIT" ||
    refuse "$UNIT does not stop: see systemctl status rvmcv-worker, then run this again"
  for unit in $(our_units); do
    remove "$UNITS/$unit"
  done
  systemctl daemon-reload
  systemctl reset-failed 'rvmcv-worker*' 2>/dev/null || true
  if [ -e "$APPARMOR" ]; then
    apparmor_parser --remove -- "$APPARMOR" || true
    remove "$APPARMOR"
  fi
  ! command_is_ours || remove "$COMMAND"
  remove "$SYSUSERS" "$TMPFILES" "$OPT" "$RUN" "$WALL"
  [ "$MODE" != purge ] || purge
  if [ "$CHANGES" -eq 0 ]; then
    say "rvmcv-worker is not installed here: nothing had to be changed"
  elif [ "$MODE" = purge ]; then
    say "rvmcv-worker is gone, with settings, token and state"
  else
    say "rvmcv-worker is uninstalled. Kept: $ETC (settings, token), $STATE (ledger, reports not yet delivered," \
      "models) and the user $SERVICE_USER; install.sh --purge removes them too"
  fi
}

agree_to_purge() {
  local state_dir
  state_dir=$(sed -nE 's/^state_dir = "([^"]*)".*/\1/p' "$CONFIG" 2>/dev/null || true)
  [ -z "$state_dir" ] || [ "$ROOT$state_dir" = "$STATE" ] ||
    note "[worker] state_dir was $state_dir, which is left alone: remove it by hand"
  [ -z "$YES" ] || return 0
  [ -e "$ETC" ] || [ -e "$STATE" ] || return 0
  { : </dev/tty; } 2>/dev/null || refuse "--purge removes $ETC and $STATE for good: say --yes, or run this at a terminal"
  local answer
  read -rp "Remove $ETC (settings, token) and $STATE (ledger, reports not yet delivered, models) for good? Type yes: " \
    answer </dev/tty
  [ "$answer" = yes ] || refuse "nothing was removed: the answer was not yes"
}

purge() {
  remove "$ETC" "$STATE"
  if [ -n "$(home_of_user)" ] && user_is_ours; then
    userdel "$SERVICE_USER" || note "the user $SERVICE_USER is still there (see above): userdel $SERVICE_USER"
    changed "removed: the user $SERVICE_USER"
  fi
}
