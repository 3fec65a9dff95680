# shellcheck shell=bash
# config.toml: written once, then it is the operator's.

put_config() {
  local template=$RELEASES/$RELEASE/share/rvmcv-worker/config.toml
  if [ -e "$CONFIG" ]; then
    [ -z "$SERVER_URL" ] || grep -qF "\"${SERVER_URL%/}\"" "$CONFIG" ||
      note "--server is for a fresh configuration; $CONFIG is there and was left alone: change [server] url in it"
    return
  fi
  install -d -m 0755 "$ETC"
  fresh_config "$template" >"$CONFIG.part"
  chmod 0644 "$CONFIG.part"
  mv -fT -- "$CONFIG.part" "$CONFIG"
  changed "written: $CONFIG"
}

# Writes the template with what the options say.
fresh_config() { # TEMPLATE
  local edits=()
  [ -z "$SERVER_URL" ] || edits+=(-e "s|^url = \"[^\"]*\"|url = \"${SERVER_URL%/}\"|")
  [ -z "$CPU" ] || edits+=(-e 's|^gpu = "auto"|gpu = "none"|')
  # Without torch it must not claim what it cannot run.
  [ -n "$COMPUTE" ] || edits+=(-e 's|^job_types = \[[^]]*\]|job_types = ["stub"]|')
  sed "${edits[@]}" -e '' "$1"
}

# After an upgrade: the new template beside a configuration, where it is another than before.
offer_new_config() { # RELEASE BEFORE
  local old=$RELEASES/$1/share/rvmcv-worker/config.toml new=$RELEASES/$RELEASE/share/rvmcv-worker/config.toml
  if [ ! -e "$old" ] || ! cmp -s -- "$old" "$new"; then
    put_file "$new" "$CONFIG.new" 0644
    say "config.toml has new keys or other defaults; $CONFIG was left alone, compare: diff $CONFIG $CONFIG.new"
  fi
}
