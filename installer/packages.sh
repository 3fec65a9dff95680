# shellcheck shell=bash
# What the distribution has to give: Python with venv, bubblewrap, and small tools.

LEAST_PYTHON=3.10

missing_packages() {
  "$PYTHON" -I -c 'import ensurepip, venv, sqlite3' 2>/dev/null || echo python3-venv
  command -v bwrap >/dev/null || echo bubblewrap
  { command -v setpriv && command -v prlimit && command -v choom; } >/dev/null || echo util-linux
  [ -e "$SYSTEM_CERTIFICATES" ] || echo ca-certificates
}

install_packages() {
  local missing
  mapfile -t missing < <(missing_packages)
  if [ ${#missing[@]} -gt 0 ]; then
    [ -z "$WHEELHOUSE" ] ||
      refuse "missing: ${missing[*]}. --wheelhouse uses no network, so install them first: apt install ${missing[*]}"
    command -v apt-get >/dev/null ||
      refuse "missing: ${missing[*]} (Debian's names), and there is no apt-get: install them, then run this again"
    say "apt-get installs: ${missing[*]}"
    # `update` may fail for a source that has nothing to do with these packages; `install` decides.
    apt-get update --quiet=2 9>&- || true
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet=2 --no-install-recommends "${missing[@]}" 9>&- ||
      refuse "apt-get could not install ${missing[*]} (see above): install them, then run this again"
    changed "installed: ${missing[*]}"
  fi
  "$PYTHON" -c "import sys; sys.exit(sys.version_info < (${LEAST_PYTHON/./, }))" ||
    refuse "$PYTHON is $("$PYTHON" --version 2>&1), and the worker needs $LEAST_PYTHON: use Ubuntu 22.04, Debian 12 or newer"
}

# A wheelhouse holds compiled packages of one Python and one kind of machine.
check_wheelhouse() {
  [ -n "$WHEELHOUSE" ] || return 0
  local here there
  here=$("$PYTHON" -I -c 'import platform, sys; print("Python %d.%d on" % sys.version_info[:2], platform.machine())')
  there=$(cat -- "$WHEELHOUSE/made-for" 2>/dev/null) ||
    refuse "$WHEELHOUSE/made-for is missing: this is no directory that \`make wheelhouse\` has finished"
  [ "$here" = "$there" ] ||
    refuse "$WHEELHOUSE is for $there, and this machine has $here: make one with that Python, on such a machine"
}
